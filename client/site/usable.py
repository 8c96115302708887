"""Which of a site's records a job can use. The others are left out, and only the site learns of it.

A refusal because of a record would tell the coordinator, for nothing, that such a record is there: whoever may choose a job's
labels could ask for one label after the other. So a record that a job cannot use counts as if the site did not have it, and
the site's own log says which ones these are and why (docs/decisions/0014).

Guarantees (tests: tests/client/site/test_usable.py, tests/client/site/test_oracles.py)
    * Whether a record can be used depends on the record and the job alone, so data sets that differ in one record (or one
      person with all records) still do once the others are left out.
    * What is left out is told by row and reason, never by content, and to the site alone.
    * An error that concerns the job and no record (of its backbone, its settings) is raised, whatever the records are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shared.errors import AdapterError, BudgetExceeded, ConfigError, DataError, ModelError, PolicyError, RosterError
from shared.models.batches import Example
from shared.privacy.persons import Persons
from shared.runtime.runtime import Runtime

PUBLIC_ERRORS = (PolicyError, BudgetExceeded, AdapterError, RosterError)
"""Texts of these errors speak of the request or of public quantities only; all others stay at the site, name and text."""

_MOST_ROWS_NAMED = 5
_MOST_REASONS_NAMED = 5
_PLACE = re.compile(r"^(record \d+|row \d+ of the file) ")


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """What a site's engineer should know of the records that a job cannot use; never leaves the site.

    Attributes:
        rows: numbers of the records left out, in the order of the file, by reason.
        num_records: how many records there were.
        doubt: why the job would make little of the records that are left, or None.
        num_full: usable texts that fill the job's `model.max_length`, beyond which they are cut off.
    """

    rows: dict[str, list[int]]
    num_records: int
    doubt: str | None = None
    num_full: int = 0

    @property
    def count(self) -> int:
        """Number of records left out."""
        return sum(map(len, self.rows.values()))

    def __bool__(self) -> bool:
        return bool(self.rows) or self.doubt is not None

    def __str__(self) -> str:
        parts = []
        if self.rows:
            parts.append(f"{self.count:,} of {self.num_records:,} records cannot be used and are left out")
            parts += [_told(reason, rows) for reason, rows in list(self.rows.items())[:_MOST_REASONS_NAMED]]
            if more := len(self.rows) - _MOST_REASONS_NAMED:
                parts += [f"and {more:,} further reasons"] if more > 0 else []
        return "; ".join([*parts, *([self.doubt] if self.doubt else [])])


@dataclass(frozen=True, kw_only=True)
class UsableRecords:
    """What a job gets to see of a site's records.

    Attributes:
        examples: the usable records, encoded, in order.
        persons: whose each of them is; None unless persons are the unit of privacy.
        left_out: for the site alone.
        views: further views of the examples, equally many of each, those of the first first (`training.augmentation`).
    """

    examples: list[Example]
    persons: Persons | None
    left_out: LeftOut
    views: list[Example] = field(default_factory=list)


@contextmanager
def on_records() -> Iterator[None]:
    """Let no error that may be told leave what reads records: all that fails here is withheld, whatever its kind."""
    try:
        yield
    except PUBLIC_ERRORS as error:
        raise DataError(f"while records were read: {type(error).__name__}: {error}") from error


def usable_records(
    runtime: Runtime, records: Sequence[Any], *, rows: Sequence[int], persons: Persons | None, summed: bool = False
) -> UsableRecords:
    """Return the records that the job of `runtime` can use, encoded.

    Args:
        records: of the site, as they were read.
        rows: the number of each record in its file, for the site's own log.
        persons: whose record each one is, or None.
        summed: whether gradients of all sites are summed before anybody takes a step: then it does no harm that all of a site's
            records have one label (docs/decisions/0027).

    Raises:
        ModelError, ConfigError: the job itself cannot be encoded, whatever the records are.
    """
    runtime.encode([])
    unusable = dict(_unusable(runtime.encode, records))
    kept = [place for place in range(len(records)) if place not in unusable]
    examples = runtime.encode([records[place] for place in kept])
    by_reason: dict[str, list[int]] = {}
    for place, reason in unusable.items():
        by_reason.setdefault(reason, []).append(rows[place])
    doubt = None
    if not (summed and examples):
        try:
            runtime.task.check_site(examples)
        except DataError as error:
            doubt = str(error).rstrip(".")
    return UsableRecords(
        examples=examples,
        persons=None if persons is None else Persons(_renumbered(persons, kept)),
        left_out=LeftOut(rows=by_reason, num_records=len(records), doubt=doubt, num_full=_num_full(runtime, examples)),
    )


def _unusable(
    encode: Callable[[Sequence[Any]], list[Example]], records: Sequence[Any], first: int = 0
) -> Iterator[tuple[int, str]]:
    """Yield (place, reason) of every record that `encode` refuses, found by halving what it refuses."""
    try:
        encode(records)
        return
    except (ModelError, ConfigError, MemoryError):
        raise
    except Exception as error:  # a record may hold anything
        if len(records) == 1:
            yield first, _reason(error)
            return
    middle = len(records) // 2
    yield from _unusable(encode, records[:middle], first)
    yield from _unusable(encode, records[middle:], first + middle)


def _num_full(runtime: Runtime, examples: Sequence[Example]) -> int:
    if runtime.tokenizer is None:  # images have one size
        return 0
    return sum(example.length >= runtime.max_length for example in examples)


def _reason(error: Exception) -> str:
    """Return why one record cannot be used; of an error that is not ours only the kind, for its text may quote the record."""
    if not isinstance(error, DataError):
        return f"has a value of a kind that the task cannot read ({type(error).__name__})"
    return _PLACE.sub("", str(error)).rstrip(".")


def _told(reason: str, rows: Sequence[int]) -> str:
    named = ", ".join(f"{row:,}" for row in rows[:_MOST_ROWS_NAMED])
    more = f" and {len(rows) - _MOST_ROWS_NAMED:,} more" if len(rows) > _MOST_ROWS_NAMED else ""
    return f"record {named}{more}: {reason}"


def _renumbered(persons: Persons, kept: Sequence[int]) -> Any:
    """Return the owners of the records that are kept, numbered anew: a person without a usable record is not there."""
    owners = persons.owners[np.asarray(kept, dtype=np.intp)]
    return np.unique(owners, return_inverse=True)[1].astype(np.intp)
