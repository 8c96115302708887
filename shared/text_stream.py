"""Texts from files, from folders that grow and from standard input: read piece by piece, never held as a whole.

Guarantees (tests: tests/shared/test_text_stream.py)
    * A row counts once, whatever the pieces in which it arrives. One that lacks its line end waits for it, or for the end.
    * What is held is a piece of one file, one unfinished row at most, and for each file how far it was read.
    * A row that cannot be read is left out and counted by reason; no message holds a text.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from shared.errors import ConfigError, DataError

PIECE = 2**16
"""Bytes that are read at once."""
MAX_ROW_BYTES = 2**20
"""A longer row is left out: a quote that is never closed, or no text at all."""
_START_BYTES = 64
ENDINGS = {
    ".txt": "text",
    ".text": "text",
    ".log": "text",
    ".csv": "csv",
    ".tsv": "csv",
    ".tab": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}


class Item(NamedTuple):
    """One text.

    Attributes:
        time: seconds since 1970 in UTC; None if no column of times was named.
    """

    text: str
    time: float | None


@dataclass(frozen=True, kw_only=True)
class TextFormat:
    """How texts stand in what is read.

    Attributes:
        format: "text" is one text a line; "auto" goes by the name's ending, and is "text" for standard input.
        text, time: columns of CSV, keys of JSONL.
        delimiter: between CSV cells; None is a tab for .tsv and .tab, otherwise a comma.
        encoding: one in which a line ends with the byte 10.
    """

    format: Literal["auto", "text", "csv", "jsonl"] = "auto"
    text: str = "text"
    time: str | None = None
    delimiter: str | None = None
    encoding: str = "utf-8"

    def __post_init__(self) -> None:
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '"\r\n'):
            raise ConfigError(f"--delimiter is {self.delimiter!r}; expected one character other than a quote.")
        if self.time is not None and self.format == "text":
            raise ConfigError("--time names a column, but plain text has none; give CSV or JSONL, or leave it out.")
        try:
            fits = "\n".encode(self.encoding) == b"\n"
        except LookupError:
            raise ConfigError(f"--encoding is {self.encoding!r}, which is unknown; try utf-8 or cp1252.") from None
        if not fits:
            raise ConfigError(f"--encoding {self.encoding} has no lines that end with one byte; convert it to utf-8.")

    def of(self, path: Path) -> str | None:
        """Return "text", "csv" or "jsonl"; None if the ending is unknown."""
        return ENDINGS.get(path.suffix.lower()) if self.format == "auto" else self.format


@dataclass
class Skipped:
    """Rows that were left out.

    Attributes:
        counts: by reason.
        first: where the first of each reason stood, such as "mail.csv, line 7".
    """

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, name: str, line: int) -> None:
        """Count one row."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, f"{name}, line {line}")


class RowReader:
    """Turns the bytes of one file, in whatever pieces they come, into texts."""

    def __init__(self, name: str, kind: str, how: TextFormat, skipped: Skipped, *, tabs: bool = False) -> None:
        if kind == "text" and how.time is not None:
            raise DataError(f"{name} is plain text and has no column {how.time!r} of times; give CSV or JSONL.")
        self.name, self._kind, self._how, self._skipped = name, kind, how, skipped
        self._delimiter = how.delimiter or ("\t" if tabs else ",")
        self._rest = b""
        self._line = 0
        self._too_long = False
        self._header: list[str] | None = None
        self._row = ""  # lines of a CSV row that is not finished
        self._quoted = False

    def feed(self, piece: bytes) -> list[Item]:
        """Return the texts that `piece` completes.

        Raises:
            DataError: if a CSV header lacks a column.
        """
        *lines, self._rest = (self._rest + piece).split(b"\n")
        items = [item for line in lines if (item := self._read_line(line)) is not None]
        if len(self._rest) > MAX_ROW_BYTES:
            self._rest, self._too_long = b"", True
        return items

    def finish(self) -> list[Item]:
        """Return the text of a last line without an end."""
        rest, self._rest = self._rest, b""
        item = self._read_line(rest) if rest or self._too_long else None
        if self._quoted:
            self._drop("malformed")
        return [] if item is None else [item]

    def _read_line(self, raw: bytes) -> Item | None:
        self._line += 1
        if self._too_long:
            self._too_long = False
            self._drop("too long")
            return None
        if self._line == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        try:
            line = raw.decode(self._how.encoding).removesuffix("\r")
        except UnicodeError:
            self._drop("not in the encoding")
            return None
        if self._kind == "csv":
            return self._read_csv(line)
        if not line.strip():
            return None
        return Item(line.strip(), None) if self._kind == "text" else self._read_json(line)

    def _read_json(self, line: str) -> Item | None:
        try:
            cells = json.loads(line)
        except (ValueError, RecursionError):
            cells = None
        if not isinstance(cells, dict):
            self._drop("malformed")
            return None
        return self._item(cells.get(self._how.text), cells.get(self._how.time) if self._how.time else None)

    def _read_csv(self, line: str) -> Item | None:
        self._quoted = _quote_is_open(line, self._delimiter, self._quoted)
        if self._quoted:
            self._row += line + "\n"
            if len(self._row) > MAX_ROW_BYTES:
                self._drop("too long")
            return None
        row, self._row = self._row + line, ""
        if not row:
            return None
        try:
            cells = next(csv.reader([row], delimiter=self._delimiter, strict=True))
        except (csv.Error, StopIteration):
            self._drop("malformed")
            return None
        if self._header is None:
            self._header = self._checked_header(cells)
            return None
        if len(cells) != len(self._header):
            self._drop("malformed")
            return None
        named = dict(zip(self._header, cells, strict=True))
        return self._item(named[self._how.text], named[self._how.time] if self._how.time else None)

    def _checked_header(self, cells: list[str]) -> list[str]:
        for column, option in ((self._how.text, "--text"), (self._how.time, "--time")):
            if column is not None and cells.count(column) != 1:
                # The first line may be a record where the header is missing, so it is not shown.
                raise DataError(
                    f"{self.name} has {cells.count(column) or 'no'} column{'s' * (cells.count(column) > 1)} {column!r} among "
                    f"the {len(cells)} of its first line; name it by {option}, or set --delimiter."
                )
        return cells

    def _item(self, text: Any, when: Any) -> Item | None:
        if not isinstance(text, str) or not text.strip():
            self._drop("without a text")
            return None
        if self._how.time is None:
            return Item(text.strip(), None)
        time = parse_time(when)
        if time is None:
            self._drop("without a readable time")
            return None
        return Item(text.strip(), time)

    def _drop(self, reason: str) -> None:
        self._row, self._quoted = "", False
        self._skipped.add(reason, self.name, self._line)


def _quote_is_open(line: str, delimiter: str, inside: bool) -> bool:
    """Return whether a quoted cell goes on after this line of CSV; `inside` says that one was open before it."""
    place = 0
    while True:
        if inside:
            end = line.find('"', place)
            if end < 0:
                return True
            if line.startswith('"', end + 1):
                place = end + 2
            else:
                inside, place = False, end + 1
        elif line.startswith('"', place) and (place == 0 or line[place - 1] == delimiter):
            inside, place = True, place + 1
        else:
            place = line.find(delimiter, place) + 1
            if place == 0:
                return False


def parse_time(value: Any) -> float | None:
    """Return seconds since 1970 of an ISO 8601 time (UTC if it names no zone) or of a number of seconds or milliseconds."""
    if isinstance(value, bool) or value is None:
        return None
    text = str(value).strip()
    try:
        seconds = math.nan if re.fullmatch(r"\d{8}", text) else float(text)
    except ValueError:
        seconds = math.nan
    if math.isnan(seconds):  # not a number, or the eight digits of a date
        try:
            found = datetime.fromisoformat(text)
            return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError):
            return None
    seconds = seconds / 1000 if abs(seconds) >= 1e11 else seconds
    # Within the years that a date can have.
    return seconds if math.isfinite(seconds) and -6e10 < seconds < 2.5e11 else None


def read_stream(read: Callable[[int], bytes], how: TextFormat, skipped: Skipped) -> Iterator[list[Item]]:
    """Yield the texts of a stream as they come; `read` returns what is there, up to so many bytes, and b"" at the end."""
    kind = "text" if how.format == "auto" else how.format
    reader = RowReader("standard input", kind, how, skipped)
    while piece := read(PIECE):
        yield reader.feed(piece)
    yield reader.finish()


@dataclass
class _Place:
    """How far one file was read."""

    reader: RowReader
    start: bytes = b""
    offset: int = 0
    modified: int = 0
    refused: bool = False


class Files:
    """Files and folders, read from where the last call stopped.

    A file is known by its device and inode, so that one that is renamed is not read again; one that is cut short or replaced is
    read from its start. Folders are not entered further, and hidden files and unknown endings are passed over. Once a text was
    read, a further file without the columns, or one that cannot be opened, is left out and counted: it must not end a long watch.

    Attributes:
        ignored: files of the folders that were passed over at the last call.
    """

    def __init__(self, paths: Sequence[Path], how: TextFormat, skipped: Skipped) -> None:
        self._paths, self._how, self._skipped = paths, how, skipped
        self._places: dict[tuple[int, int], _Place] = {}
        self._unopened: set[Path] = set()
        self._worked = False
        self.ignored = 0
        for path in paths:
            if not path.exists():
                raise DataError(f"{path} does not exist; give a file, a folder or - for standard input.")
            if not path.is_dir() and how.of(path) is None:
                raise DataError(f"{path} has an unknown ending; expected one of {' '.join(ENDINGS)}, or give --format.")

    def read(self) -> Iterator[list[Item]]:
        """Yield what is new: of files in the order of their names, of each in the order of its rows."""
        present: set[tuple[int, int]] = set()
        self.ignored = 0
        for path in self._files():
            try:
                with path.open("rb") as file:
                    yield from self._read_file(path, file, present)
            except FileNotFoundError:
                continue  # gone since the folder was listed
            except OSError as error:
                if not self._worked:
                    raise DataError(f"{path} cannot be read: {error.strerror}; mend that, then start again.") from None
                if path not in self._unopened:
                    self._unopened.add(path)
                    self._skipped.add("of a file that cannot be opened", path.name, 0)
        for key in self._places.keys() - present:
            yield self._finish(self._places.pop(key))

    def finish(self) -> Iterator[list[Item]]:
        """Yield the texts of last lines without an end."""
        for place in self._places.values():
            yield self._finish(place)

    def _files(self) -> Iterator[Path]:
        for path in self._paths:
            if path.is_dir():
                yield from sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
            else:
                yield path

    def _read_file(self, path: Path, file: BinaryIO, present: set[tuple[int, int]]) -> Iterator[list[Item]]:
        found = os.fstat(file.fileno())
        key = (found.st_dev, found.st_ino)
        place = self._places.get(key)
        kind = self._how.of(path)
        if place is None and (kind is None or (kind == "text" and self._how.time is not None and self._worked)):
            self.ignored += 1
            return
        present.add(key)
        if place is not None and (found.st_size, found.st_mtime_ns) == (place.offset, place.modified):
            return
        if place is not None and (found.st_size < place.offset or file.read(len(place.start)) != place.start):
            yield self._finish(place)
            place = None
        if place is None:
            tabs = path.suffix.lower() in (".tsv", ".tab")
            place = self._places[key] = _Place(
                RowReader(path.name, kind or "text", self._how, self._skipped, tabs=tabs)
            )
        place.modified = found.st_mtime_ns
        file.seek(place.offset)
        while piece := file.read(PIECE):
            if len(place.start) < _START_BYTES and place.offset == len(place.start):
                place.start += piece[: _START_BYTES - len(place.start)]
            place.offset += len(piece)
            yield self._guarded(place, partial(place.reader.feed, piece))

    def _finish(self, place: _Place) -> list[Item]:
        return self._guarded(place, place.reader.finish)

    def _guarded(self, place: _Place, read: Callable[[], list[Item]]) -> list[Item]:
        """Return what `read` does; nothing, and the file is left out from now on, if it lacks the columns."""
        if place.refused:
            return []
        try:
            items = read()
        except DataError:
            if not self._worked:
                raise
            place.refused = True
            self._skipped.add("of a file without the columns", place.reader.name, 1)
            return []
        self._worked = self._worked or bool(items)
        return items
