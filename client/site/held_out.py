"""Which records a site never trains on, so that metrics can be measured on them.

Guarantee (test: tests/client/site/test_site_metrics.py): the side of a record depends on itself (or on whose it is, where persons
are the unit of privacy) and the data set's name alone. So adding or removing a record, or a person, changes neither side's
other records; equal records are on one side, and so are all records of a person. Nothing is claimed to be secret about it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from client.site.config import SiteConfig
from client.site.usable import UsableRecords, usable_records
from shared.data.datasets import PERSON_ROLE
from shared.job.values import PERSON_UNITS
from shared.privacy.persons import Persons
from shared.runtime.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some of a site's records.

    Attributes:
        records: these.
        rows: their numbers in the file, for the site's own log.
        persons: whose each of them is; None unless persons are the unit of the site's budget.
    """

    records: list[dict[str, Any]]
    rows: list[int]
    persons: Persons | None

    @property
    def num_units(self) -> int:
        """How many records there are, or persons."""
        return len(self.records) if self.persons is None else self.persons.count

    def usable(self, runtime: Runtime, *, summed: bool = False) -> UsableRecords:
        """Return those that the job of `runtime` can use; see `usable_records`."""
        return usable_records(runtime, self.records, rows=self.rows, persons=self.persons, summed=summed)


def split(records: list[dict[str, Any]], config: SiteConfig) -> tuple[Part, Part]:
    """Return the records to train on and those held out; takes ids of persons out of `records`."""
    ids = [record.pop(PERSON_ROLE, None) for record in records]
    by_person = config.budget.unit in PERSON_UNITS
    persons = Persons.keys(ids) if by_person else None
    out = held_out(records, config.evaluation_share, dataset=config.dataset, persons=persons)

    def part(side: bool) -> Part:
        places = [place for place, is_out in enumerate(out) if is_out == side]
        return Part(
            records=[records[place] for place in places],
            rows=[place + 1 for place in places],
            persons=Persons.from_ids([ids[place] for place in places]) if by_person else None,
        )

    return part(False), part(True)


def held_out(
    records: Sequence[dict[str, Any]], share: float, *, dataset: str, persons: Sequence[str] | None = None
) -> list[bool]:
    """Return for each record whether it is held out.

    Args:
        share: of the records, or persons, that are held out, on average, in [0, 1).
        dataset: the data set's name in the ledger.
        persons: whose each record is, one text for one person; None if records are the unit of privacy.
    """
    keys: Sequence[object] = records if persons is None else persons
    return [_point(key, dataset) < share for key in keys]


def _point(key: object, dataset: str) -> float:
    """Return a number in [0, 1), as if drawn uniformly for each different key."""
    text = json.dumps([dataset, key], sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2.0**64
