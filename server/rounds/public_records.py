"""The coordinator's public records in two parts: those that decide, and those that a run is judged by.

Whatever is chosen by records looks better on them than on new ones. So a fifth of the public evaluation records decides, when to
stop, which round's adapter is kept, how confident probabilities are (`shared.runtime.calibration`), and the others, which
decide nothing, give the figures.

Guarantee (tests/server/rounds/test_public_records.py): equal texts (or images) are in one part; which one follows from their
content alone, so neither order nor seed moves a record.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shared.files.json_files import canonical_json
from shared.tasks import Record

ONE_IN = 5
"""One in so many records decides."""
FEWEST = 200
"""With fewer public records none is held back: a part would be too small to decide by, and the rest to judge by."""


@dataclass(frozen=True, kw_only=True)
class PublicRecords:
    """Public evaluation records, each in one part.

    Attributes:
        reported: every figure of a run is of these.
        deciding: what is chosen is chosen by these; empty if nothing was held back.
    """

    reported: Sequence[Record]
    deciding: Sequence[Record]

    @property
    def counts(self) -> dict[str, int]:
        """How many records are in each part, for `run.json`."""
        return {"reported": len(self.reported), "deciding": len(self.deciding)}


def hold_back(records: Sequence[Record], role: str) -> PublicRecords:
    """Return `records` in two parts; equal values of `role`, the first column of the task, stay together."""
    nothing = PublicRecords(reported=records, deciding=())
    if len(records) < FEWEST:
        return nothing
    reported: list[Record] = []
    deciding: list[Record] = []
    for record in records:
        (deciding if _decides(record[role]) else reported).append(record)
    # A few texts, many times each, may all be in one part.
    return PublicRecords(reported=reported, deciding=deciding) if reported and deciding else nothing


def _decides(value: Any) -> bool:
    digest = hashlib.sha256(canonical_json(value).encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") % ONE_IN == 0
