"""Which records a site never trains on, so that metrics can be measured on them.

Guarantee (test: tests/client/test_site_metrics.py): the side of a record depends on itself and the data set's name alone, so
adding or removing one changes neither side's other records; equal records are on one side. Nothing is claimed to be secret
about it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any


def split_held_out(
    records: Sequence[dict[str, Any]], share: float, *, dataset: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return (records to train on, records held out), each in the given order.

    Args:
        share: of the records that are held out, on average, in [0, 1).
        dataset: the data set's name in the ledger.
    """
    if not share:
        return list(records), []
    out = [_point(record, dataset) < share for record in records]
    return (
        [record for record, is_out in zip(records, out, strict=True) if not is_out],
        [record for record, is_out in zip(records, out, strict=True) if is_out],
    )


def _point(record: dict[str, Any], dataset: str) -> float:
    """Return a number in [0, 1), as if drawn uniformly for each different record."""
    text = json.dumps([dataset, record], sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2.0**64
