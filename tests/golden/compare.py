"""Compares two records and says, file by file and key by key, what differs.

Guarantee: no difference in bytes, and no file that only one side has, goes unsaid.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_MOST_PER_FILE = 20
_WIDTH = 160
_MISSING = "(not there)"


def compare(before: Path, after: Path, *, ignored: Sequence[str] = ()) -> list[str]:
    """Return what differs between two records, as lines for a person; none if they are equal byte for byte.

    Args:
        ignored: patterns of files (`help/*`), for changes that are wanted; see `fnmatch`.
    """
    sides = [_files(before), _files(after)]
    told: list[str] = []
    for name in sorted({*sides[0], *sides[1]}):
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in ignored):
            continue
        if name not in sides[1]:
            told.append(f"{name}: only before")
        elif name not in sides[0]:
            told.append(f"{name}: only after")
        elif (one := sides[0][name].read_bytes()) != (other := sides[1][name].read_bytes()):
            found = list(_differences(name, one.decode("utf-8"), other.decode("utf-8")))
            told += [f"{name}: {len(found)} differences", *(f"  {line}" for line in found[:_MOST_PER_FILE])]
            if len(found) > _MOST_PER_FILE:
                told.append(f"  ... and {len(found) - _MOST_PER_FILE} more")
    return told


def _files(record: Path) -> dict[str, Path]:
    found = {str(path.relative_to(record)): path for path in record.rglob("*") if path.is_file()}
    if not found:
        raise FileNotFoundError(f"{record} is no record; make it with: python -m tests.golden record {record}")
    return found


def _differences(name: str, before: str, after: str) -> Iterator[str]:
    """Yield the differences between two texts: by key where both are JSON, else by line."""
    try:
        if name.endswith(".json"):
            one, other = (dict(_leaves(json.loads(text))) for text in (before, after))
        elif name.endswith(".jsonl"):
            one, other = (dict(_leaves(_lines(text))) for text in (before, after))
        else:
            raise ValueError("no JSON")
    except ValueError:
        yield from _line_differences(before, after)
        return
    same = True
    for key in dict.fromkeys([*one, *other]):
        if one.get(key, _MISSING) != other.get(key, _MISSING):
            same = False
            yield f"{key}: {_shown(one.get(key, _MISSING))} -> {_shown(other.get(key, _MISSING))}"
    if same:
        yield "the same content in other bytes: order of keys, spacing, or how a number is written"


def _lines(text: str) -> dict[str, Any]:
    return {f"line {number}": json.loads(line) for number, line in enumerate(text.splitlines(), start=1)}


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (key path, value) of everything in a JSON value that holds nothing itself."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value:
        for number, item in enumerate(value):
            yield from _leaves(item, f"{path}[{number}]")
    else:
        yield path, repr(value)


def _line_differences(before: str, after: str) -> Iterator[str]:
    lines = [text.splitlines() for text in (before, after)]
    for line in difflib.unified_diff(*lines, lineterm="", n=0):
        if not line.startswith(("---", "+++", "@@")):
            yield _shown(line)


def _shown(value: str) -> str:
    return value if len(value) <= _WIDTH else f"{value[:_WIDTH]}... ({len(value)} characters)"
