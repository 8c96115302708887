"""Counts of what was masked, by kind; never what was masked, nor around what it stood.

The counts are exact, so the report stays where the data is; like every exact number about records it is no release.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shared.data.deidentify.spans import KINDS, Kind, placeholder

if TYPE_CHECKING:
    from shared.data.deidentify.engine import Deidentifier

FORMAT = "silotune-deidentification/1"
CAVEAT = (
    "Rules and recognisers miss some identifiers. The masked text is not anonymous, and masking does not "
    "replace differential privacy."
)


@dataclass
class MaskTally:
    """What was masked in many records.

    Attributes:
        records: that were looked at.
        touched: records in which something was masked.
        places: masked, by kind.
        records_by_kind: records with at least one place of the kind.
        engine: `rules`, or `presidio` for both.
        presidio: version and models, if it was used.
        without_presidio: why `auto` did not use it.
        kinds: that were looked for.
        told: is called with the number of records after each one.
    """

    records: int = 0
    touched: int = 0
    places: Counter[Kind] = field(default_factory=Counter)
    records_by_kind: Counter[Kind] = field(default_factory=Counter)
    engine: str = "rules"
    presidio: dict[str, Any] | None = None
    without_presidio: str | None = None
    kinds: tuple[Kind, ...] = ()
    told: Callable[[int], object] = field(default=lambda records: None, repr=False, compare=False)

    def add(self, counts: Counter[Kind]) -> None:
        """Count one more record."""
        self.records += 1
        self.touched += bool(counts)
        self.places += counts
        self.records_by_kind.update(counts.keys())
        self.told(self.records)

    def describe(self, deidentifier: Deidentifier) -> None:
        """Note what masked the records."""
        self.engine = deidentifier.engine
        self.kinds = tuple(kind for kind in KINDS if kind in deidentifier.kinds)
        self.without_presidio = deidentifier.without_presidio
        if deidentifier.presidio is not None:
            self.presidio = {"version": deidentifier.presidio.version, "models": deidentifier.presidio.models}

    def document(self) -> dict[str, Any]:
        """Return the report as JSON holds it: kinds, counts and what made them."""
        return {
            "format": FORMAT,
            "engine": self.engine,
            "presidio": self.presidio,
            "without_presidio": self.without_presidio,
            "records": self.records,
            "records_touched": self.touched,
            "kinds": {
                kind: {
                    "placeholder": placeholder(kind),
                    "places": self.places[kind],
                    "records": self.records_by_kind[kind],
                }
                for kind in self.kinds
            },
            "caveat": CAVEAT,
        }

    def line(self) -> str:
        """Return the counts in one line for people."""
        found = ", ".join(f"{self.places[kind]:,} {kind}" for kind in self.kinds if self.places[kind])
        return f"by {self.by()}: {found or 'nothing'} masked, in {self.touched:,} of {self.records:,} records"

    def by(self) -> str:
        """Return which engine, for people."""
        if self.presidio is None:
            return "rules"
        return f"rules and Presidio {self.presidio['version']} ({', '.join(self.presidio['models'].values())})"
