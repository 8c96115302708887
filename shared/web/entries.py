"""Reading an audit log for pages: from its end backwards, or on from where somebody read before.

The chain is not checked here, which would take too long for a page: `shared.trust.audit_log.verify` does, and the page has
what it said. Every line that is not an entry is left out, and `verify` names it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.trust.audit_chain import HEAD_FILE, Position, log_file, read_head


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


def end_of(folder: Path) -> Position:
    """Return the end of a log as its head names it; the beginning if there is no log yet.

    Raises:
        TrustError: the head cannot be read.
    """
    if not (folder / HEAD_FILE).exists():
        return Position()
    return read_head(folder, None, signed_is_fine=True)


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


def onwards(folder: Path, start: tuple[int, int], end: Position) -> Iterator[bytes]:
    """Yield the lines from a place (file, byte) on up to an end."""
    number, offset = start
    while number <= end.number and end.sequence:
        try:
            with log_file(folder, number).open("rb") as file:
                file.seek(offset)
                content = file.read((end.size - offset) if number == end.number else -1)
        except OSError:
            return  # `verify` tells
        yield from content.splitlines()
        number, offset = number + 1, 0


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
    end, wanted = end_of(folder), _as_in_the_file(search).casefold()
    for number in range(end.number, 0, -1):
        lines = list(onwards(folder, (number, 0), end if number == end.number else _whole(number)))
        for line in reversed(lines):
            text = line.decode(errors="replace")
            if (wanted and wanted not in text.casefold()) or (event and f'"event":"{event}' not in text):
                continue
            found = parsed(text)
            if found is None or (before is not None and found.sequence >= before):
                continue
            if event and found.event != event and not found.event.startswith(f"{event}."):
                continue
            yield found


def _whole(number: int) -> Position:
    return Position(sequence=1, number=number, size=1 << 40)


def _as_in_the_file(text: str) -> str:
    """Return how a text stands in a line of JSON."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
