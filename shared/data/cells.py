"""What a cell of a record may hold, by its role; a fault is said in words that show nothing of the cell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import islice


def surrogate(text: str) -> bool:
    """Return whether `text` holds half of a surrogate pair, which is no character and cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def text_fault(value: object) -> str | None:
    """Return what keeps `value` from being the text of a record, in words; None if it is text."""
    if not isinstance(value, str):
        return f"{kind_of(value)} where text is expected"
    return _string_fault(value)


def value_fault(role: str, value: object) -> str | None:
    """Return what keeps `value` from being a record's cell in this role, in words; None if it may.

    Text is text, nothing that could be turned into it. A label may also be a whole number, as Parquet and JSONL have
    it. Words and tags are lists of text, or text. A score is a number, or text (CSV has nothing else). Other roles hold
    what JSON holds.
    """
    if role in ("text", "pair", "prompt", "response"):
        nul = isinstance(value, str) and "\0" in value
        return "a NUL character" if nul else text_fault(value)
    if role == "label":
        if isinstance(value, int) and not isinstance(value, bool):
            return None
        fault = text_fault(value)
        return fault and fault.replace("text is expected", "text or a whole number is expected")
    if role in ("tokens", "tags"):
        if isinstance(value, list):
            return next((f"a list with {fault}" for word in value if (fault := text_fault(word))), None)
        fault = text_fault(value)
        return fault and fault.replace("text is expected", "text or a list of text is expected")
    if role == "score":
        numeric = isinstance(value, str) or (not isinstance(value, bool) and hasattr(value, "__float__"))
        return None if numeric else f"{kind_of(value)} where a number is expected"
    return _any_fault(value)


def _any_fault(value: object) -> str | None:
    if isinstance(value, str):
        return _string_fault(value)
    if isinstance(value, bytes):
        return "bytes, which no task can read"
    if isinstance(value, Mapping):
        value = [item for pair in value.items() for item in pair]
    if isinstance(value, list | tuple):
        return next((fault for item in value if (fault := _any_fault(item))), None)
    return None


def _string_fault(value: str) -> str | None:
    if not value.isascii() and surrogate(value):
        return "half of a surrogate pair, which is no character"
    return None


def kind_of(value: object) -> str:
    """Return what kind of value this is, in words."""
    names = {
        bool: "a truth value",
        int: "a number",
        float: "a number",
        dict: "an object",
        list: "a list",
        bytes: "bytes",
    }
    return "nothing" if value is None else names.get(type(value), f"a {type(value).__name__}")


def is_blank(value: object) -> bool:
    """Return whether a cell is empty: None, white space, NaN or an empty list."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, list) and not value)


def shorten(names: Sequence[str], most: int, total: int | None = None) -> str:
    """Return the first `most` names, and how many more of `total` (by default of all names) there are."""
    rest = (len(names) if total is None else total) - most
    return ", ".join(islice(names, most)) + (f" and {rest:,} more" if rest > 0 else "")
