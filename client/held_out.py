"""Which records a site never trains on, so that metrics can be measured on them.

Guarantee (test: tests/client/test_site_metrics.py): the side of a record depends on itself (or on whose it is, where persons
are the unit of privacy) and the data set's name alone. So adding or removing a record, or a person, changes neither side's
other records; equal records are on one side, and so are all records of a person. Nothing is claimed to be secret about it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any


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
