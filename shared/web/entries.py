"""Reading an audit log for pages: from its end backwards, or on from where somebody read before.

A page reads what it shows and little more, however long the log is (tests: tests/shared/web/test_entries.py). The chain is
not checked here, which would take too long for a page: `shared.trust.audit_log.verify` does, and the page has what it said.
Every line that is not an entry is left out, and `verify` names it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from os import SEEK_END
from pathlib import Path
from typing import Any, BinaryIO

from shared.trust.audit_chain import end_of, log_file

_BLOCK = 256 << 10  # bytes; no line is longer


@dataclass(frozen=True, kw_only=True)
class Line:
    """An entry as it stands in the log.

    Attributes:
        sequence, time, event, details, sha256: as in `shared.trust.audit_chain.Entry`.
        text: the whole line.
    """

    sequence: int
    time: str
    event: str
    details: dict[str, Any]
    sha256: str
    text: str


def backwards(
    folder: Path, *, search: str = "", event: str = "", before: int | None = None, most: int = 50
) -> list[Line]:
    """Return the latest entries, the newest first.

    Args:
        search: a text that the line holds, in any case.
        event: its event, or the first part of it up to a dot.
        before: only entries of smaller numbers.
        most: how many.
    """
    return [line for _, line in zip(range(most), _backwards(folder, search, event, before), strict=False)]


def every(folder: Path, *, search: str = "", event: str = "") -> Iterator[Line]:
    """Yield all entries that fit, the newest first; a file at a time is in memory."""
    yield from _backwards(folder, search, event, None)


def parsed(line: bytes | str) -> Line | None:
    """Return the entry of a line; None if it is none."""
    try:
        fields = json.loads(line)
        return Line(
            sequence=int(fields["sequence"]),
            time=str(fields["time"]),
            event=str(fields["event"]),
            details=dict(fields["details"]),
            sha256=str(fields["sha256"]),
            text=line if isinstance(line, str) else line.decode(),
        )
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _backwards(folder: Path, search: str, event: str, before: int | None) -> Iterator[Line]:
    end, wanted = end_of(folder), _as_in_the_file(search).casefold().encode()
    mark = f'"event":"{event}'.encode()
    for number in range(end.number, 0, -1):
        for block in _blocks(log_file(folder, number), end.size if number == end.number else None, before):
            if not _may_hold(block, wanted, mark if event else b""):
                continue
            for line in reversed(block.splitlines()):
                if not _may_hold(line, wanted, mark if event else b"") or (found := parsed(line)) is None:
                    continue
                if before is not None and found.sequence >= before:
                    continue
                if event and found.event != event and not found.event.startswith(f"{event}."):
                    continue
                yield found


def _blocks(path: Path, size: int | None, before: int | None) -> Iterator[bytes]:
    """Yield the lines of a file, some at a time, from its end on, or from a little behind the entry `before` on."""
    try:
        with path.open("rb") as file:
            place = file.seek(0, SEEK_END) if size is None else size
            if before is not None:
                place = _behind(file, place, before)
            rest = b""  # the end of a line that begins further ahead
            while place:
                start = max(0, place - _BLOCK)
                file.seek(start)
                block = file.read(place - start) + rest
                cut = block.find(b"\n") + 1 if start else 0
                rest, place = block[:cut], start
                yield block[cut:]
    except OSError:
        return  # `verify` tells


def _behind(file: BinaryIO, size: int, before: int) -> int:
    """Return a place from which on every entry has the number `before` or a larger one; not far behind the first of them."""
    low, high = 0, size
    file.seek(0)
    if (first := parsed(file.readline())) is not None and first.sequence >= before:
        return 0
    while high - low > _BLOCK:
        file.seek((low + high) // 2)
        file.readline()
        place = file.tell()
        found = parsed(file.readline()) if place < high else None
        if found is None:
            break  # more is read than has to be
        if found.sequence < before:
            low = place
        else:
            high = place
    return high


def _may_hold(lines: bytes, wanted: bytes, mark: bytes) -> bool:
    """Return whether a text in small letters, and a mark as it is, may stand in lines."""
    if mark and mark not in lines:
        return False
    if not wanted:
        return True
    return wanted in (lines.lower() if wanted.isascii() else lines.decode(errors="replace").casefold().encode())


def _as_in_the_file(text: str) -> str:
    """Return how a text stands in a line of JSON."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
