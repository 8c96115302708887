"""What JSON of a model may hold, and how it is told that it holds more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.errors import ModelError, excerpt

MOST_ENTRIES = 10_000
"""Of any list or object but a vocabulary; the longest are labels and tokens that were added."""


def check_entries(path: Path, content: Any) -> None:
    """Raise `ModelError` if a list or object is longer than any that a model needs."""
    for one in nested(content):
        if len(one) > MOST_ENTRIES:
            raise beyond(path, f"has {len(one):,} entries in one place", f"{MOST_ENTRIES:,}")


def objects(content: Any) -> Iterator[dict[str, Any]]:
    """Yield every object in some JSON, the outermost first."""
    return (one for one in nested(content) if isinstance(one, dict))


def nested(content: Any) -> Iterator[list[Any] | dict[str, Any]]:
    """Yield every list and object in some JSON, the outermost first."""
    waiting = [content]
    while waiting:
        one = waiting.pop()
        if isinstance(one, list | dict):
            yield one
            waiting += one.values() if isinstance(one, dict) else one


def beyond(path: Path, found: str, allowed: str) -> ModelError:
    """Return the error that says what was found at a place, and what is allowed."""
    return ModelError(
        f"{excerpt(str(path), 200)} {found}; at most {allowed} may be. Use the model as it was published."
    )
