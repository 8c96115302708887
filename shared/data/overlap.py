"""Whether two data sets hold the same records, by the text that makes up most of each; labels and row order do not matter.

Two records count as the same if their longest cells are equal, but for case, spaces and the Unicode form of letters. So it
finds a copy with other labels or columns; it does not find a text that was changed, cut or masked, and it takes different people
with the same short text for the same. Good for a warning, no proof either way.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from shared.data.datasets import PERSON_ROLE


def content_key(record: Mapping[str, Any]) -> str:
    """Return the longest cell of a record as text, evened out; the id of its person does not count."""
    cells = (_text_of(value) for role, value in record.items() if role != PERSON_ROLE)
    return max(cells, key=lambda text: (len(text), text), default="")


def num_shared(records: Iterable[Mapping[str, Any]], others: Iterable[Mapping[str, Any]]) -> int:
    """Return how many of `records` also stand among `others`."""
    known = {content_key(other) for other in others}
    return sum(content_key(record) in known for record in records)


def _text_of(value: object) -> str:
    if not isinstance(value, str):
        value = json.dumps(value, sort_keys=True, default=str)
    return " ".join(unicodedata.normalize("NFC", value).casefold().split())
