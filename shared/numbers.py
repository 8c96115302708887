"""Numbers as files and people write them: a text is one only if it reads as one, never by what Python makes of it.

`float` and `int` take 1_3 for 13, and `float` knows nan and infinity.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

_NUMBER = re.compile(r"\s*[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?\s*")
_DECIMAL_COMMA = re.compile(r"\s*[+-]?\d*,\d+\s*")
_WHOLE = re.compile(r"\s*[+-]?\d+\s*")


def read_number(value: object) -> float:
    """Return the finite number that `value` is, or that it is the text of.

    Raises:
        ValueError: it is none; a truth value is none, nor are bytes. The error holds nothing of it.
    """
    if not isinstance(value, str):
        numeric = hasattr(value, "__float__") and not isinstance(value, bool)
    else:
        numeric = _NUMBER.fullmatch(value) is not None
    try:
        number = float(value) if numeric else math.nan  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError("no number")
    return number


def comma_hint(values: Iterable[object]) -> str:
    """Return what an error about values that are no numbers adds if one is written as 3,5; it holds nothing of the value."""
    found = any(isinstance(value, str) and _DECIMAL_COMMA.fullmatch(value) for value in values)
    return " (a decimal comma? write a point)" if found else ""


def read_whole(text: str) -> int:
    """Return the whole number that `text` is; ValueError if it is none, or has thousands of digits."""
    if _WHOLE.fullmatch(text) is None:
        raise ValueError("no whole number")
    return int(text)
