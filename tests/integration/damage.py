"""Wrong values at any place of a JSON or TOML file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

GONE = object()
"""In the place of a value: the place is not there."""


def places_of(value: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value; of a list, only of its first."""
    if prefix:
        yield prefix
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places_of(inner, (*prefix, key))
    elif isinstance(value, list) and value:
        yield from places_of(value[0], (*prefix, 0))


def changed(raw: Any, place: tuple[Any, ...], value: Any) -> Any:
    """Return a copy of `raw` with another value at one place, or without it."""
    copy = json.loads(json.dumps(raw))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    if value is GONE:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return copy
