"""Texts from files, from folders that grow and from standard input: read piece by piece, never held as a whole.

Guarantees (tests: tests/shared/data/test_text_stream.py)
    * A row counts once, whatever the pieces in which it arrives. One that lacks its line end waits for it, or for the end.
    * What is held is a piece of one file, one unfinished row at most, and for each file how far it was read.
    * A row that cannot be read is left out and counted by reason; no message holds a text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

from shared.data.cells import is_blank, shorten, value_fault
from shared.data.parquet import parquet_columns, read_parquet
from shared.data.rows import (
    FORMATS,
    NO_TEXT,
    TEXT_ENDINGS,
    Fault,
    Kind,
    Quoting,
    Row,
    RowFormat,
    RowReader,
    check_delimiter,
    default_delimiter,
    suffix_of,
)
from shared.data.text_lines import PIECE, Line, LineReader, check_encoding
from shared.errors import ConfigError, DataError
from shared.numbers import read_number

_START_BYTES = 64
_MOST_PLACES = 20
_PARQUET_ROWS = 256
# Years 1000 to 9000: around a time within them a calendar of the years 1 to 9999 has room for a window and a figure's margin.
EARLIEST, LATEST = (datetime(year, 1, 1, tzinfo=UTC).timestamp() for year in (1000, 9000))
ENDINGS = {**dict.fromkeys(TEXT_ENDINGS, "text"), **FORMATS}


class Item(NamedTuple):
    """One text.

    Attributes:
        time: seconds since 1970 in UTC; None if no column of times was named.
        row: its number in the file, see `shared.data.rows`.
    """

    text: str
    time: float | None
    row: int = 0


@dataclass(frozen=True, kw_only=True)
class TextFormat:
    """How texts stand in what is read.

    Attributes:
        format: "text" is one text a line; "auto" goes by the name's ending, and is "text" for standard input.
        text, time: columns of CSV and Parquet, keys of JSONL.
        delimiter, encoding, quoting: as in `shared.data.datasets.DataSource`.
    """

    format: Literal["auto", "text", "csv", "jsonl", "parquet"] = "auto"
    text: str = "text"
    time: str | None = None
    delimiter: str | None = None
    encoding: str = "utf-8"
    quoting: Quoting = "checked"

    def __post_init__(self) -> None:
        try:
            check_delimiter(self.delimiter)
        except ValueError as error:
            raise ConfigError(f"--delimiter is {self.delimiter!r}; {error}.") from None
        if self.time is not None and self.format == "text":
            raise ConfigError("--time names a column, but plain text has none; give CSV or JSONL, or leave it out.")
        try:
            check_encoding(self.encoding)
        except ValueError as error:
            raise ConfigError(f"--encoding: {error}.") from None

    def of(self, path: Path) -> str | None:
        """Return "text", "csv", "jsonl" or "parquet"; None if the ending is unknown."""
        return ENDINGS.get(suffix_of(path)) if self.format == "auto" else self.format

    def rows(self, kind: str, path: Path | None) -> RowFormat:
        """Return how the rows of a file stand; `path` is None for standard input."""
        delimiter = self.delimiter or ("," if path is None else default_delimiter(path))
        return RowFormat(
            kind=cast("Kind", kind),
            delimiter=delimiter,
            quoting=self.quoting,
            encoding=self.encoding,
            text=self.text,
        )


@dataclass
class Skipped:
    """Rows that were left out.

    Attributes:
        counts: by reason.
        places: where they stood, such as "mail.csv, row 6 (line 7)", by reason; the first 20.
    """

    counts: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, place: str) -> None:
        """Count one row."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        places = self.places.setdefault(reason, [])
        if len(places) < _MOST_PLACES:
            places.append(place)

    @property
    def total(self) -> int:
        """How many rows were left out."""
        return sum(self.counts.values())


class TextReader:
    """Turns the bytes of one file, in whatever pieces they come, into texts; what cannot be read is counted."""

    def __init__(self, name: str, kind: str, how: TextFormat, skipped: Skipped, *, path: Path | None = None) -> None:
        """Start a file.

        Raises:
            DataError: if times are asked for and it is plain text.
        """
        if kind == "text" and how.time is not None:
            raise DataError(f"{name} is plain text and has no column {how.time!r} of times; give CSV or JSONL.")
        self.name, self._how, self._skipped = name, how, skipped
        self._rows = RowReader(name, how.rows(kind, path), self.check_header)

    def feed(self, piece: bytes) -> list[Item]:
        """Return the texts that `piece` completes.

        Raises:
            DataError: if a CSV header lacks a column or cannot be read, or the file holds no lines.
        """
        return self.items(self._rows.feed(piece))

    def finish(self) -> list[Item]:
        """Return the texts that are left when the file ends; raises as `feed`."""
        return self.items(self._rows.finish())

    def items(self, rows: Sequence[Row | Fault]) -> list[Item]:
        """Return the texts of these rows."""
        return [item for row in rows if (item := self._item(row)) is not None]

    def check_header(self, cells: list[str]) -> None:
        """Raise `DataError` unless the columns are there, once each."""
        for column, option in ((self._how.text, "--text"), (self._how.time, "--time")):
            if column is not None and cells.count(column) != 1:
                # The first line may be a record where the header is missing, so it is not shown.
                raise DataError(
                    f"{self.name} has {cells.count(column) or 'no'} column{'s' * (cells.count(column) > 1)} {column!r} among "
                    f"the {len(cells)} of its first line; name it by {option}, or set --delimiter."
                )

    def _item(self, row: Row | Fault) -> Item | None:
        place = f"{self.name}, {row.place}"
        if isinstance(row, Fault):
            self._skipped.add(row.reason, place)
            return None
        text = row.cells.get(self._how.text)
        if is_blank(text):
            self._skipped.add(NO_TEXT, place)
            return None
        if (fault := value_fault("text", text)) is not None:
            self._skipped.add(f"with {fault}", place)
            return None
        time = None
        if self._how.time is not None and (time := parse_time(row.cells.get(self._how.time))) is None:
            self._skipped.add("without a readable time", place)
            return None
        return Item(str(text), time, row.number)


def parse_time(value: Any) -> float | None:
    """Return seconds since 1970 of an ISO 8601 time (UTC if it names no zone) or of a number of seconds or milliseconds.

    None if it is neither, or not between the years 1000 and 9000.
    """
    if isinstance(value, date):  # also with a time of day, as Parquet has them
        value = value.isoformat()
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    text = str(value).strip()
    try:
        if re.fullmatch(r"\d{8}", text):
            raise ValueError  # the digits of a date
        seconds = read_number(text)
        seconds = seconds / 1000 if abs(seconds) >= 1e11 else seconds
    except ValueError:
        try:
            found = datetime.fromisoformat(text)
        except ValueError:
            return None
        seconds = (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
    return seconds if EARLIEST <= seconds < LATEST else None


def read_stream(read: Callable[[int], bytes], how: TextFormat, skipped: Skipped) -> Iterator[list[Item]]:
    """Yield the texts of a stream as they come; `read` returns what is there, up to so many bytes, and b"" at the end."""
    kind = "text" if how.format == "auto" else how.format
    if kind == "parquet":
        raise ConfigError("Parquet cannot be read from standard input; give the file.")
    reader = TextReader("standard input", kind, how, skipped)
    while piece := read(PIECE):
        yield reader.feed(piece)
    yield reader.finish()


class GivenTexts(NamedTuple):
    """Texts that were given to a command.

    Attributes:
        rows: number of each text among what was given, from 1.
        left_out: why rows were left out, and which; numbers only.
    """

    texts: list[str]
    rows: list[int]
    left_out: Skipped


def given_texts(arguments: Sequence[str] | None, read: Callable[[int], bytes]) -> GivenTexts:
    """Return the texts of a command's arguments, or else of the lines that `read` gives.

    A blank line is left out and counted like one that cannot be read: whoever counts lines must be able to go on counting.

    Raises:
        DataError: if an argument is no text or blank, or nothing is left.
    """
    skipped = Skipped()
    texts: dict[int, str] = {}
    if arguments:
        for number, text in enumerate(arguments, start=1):
            if (fault := value_fault("text", text)) is not None:
                raise DataError(f"text {number} holds {fault}; give it in UTF-8.")
            if not text.strip():
                raise DataError(f"text {number} is blank; give what is to be read.")
            texts[number] = text
    else:
        lines = LineReader("standard input", "utf-8")
        found: list[Line] = []
        while piece := read(PIECE):
            found += lines.feed(piece)
        for line in (*found, *lines.finish()):
            if line.fault is not None:
                skipped.add(line.fault.reason, f"line {line.number}")
            elif not line.text.strip():
                skipped.add("left blank", f"line {line.number}")
            else:
                texts[line.number] = line.text.strip()
    if not texts:
        told = f" ({skipped.total:,} lines were left out)" if skipped.total else ""
        raise DataError(f"there is no text{told}; give texts as arguments, or one a line on standard input.")
    return GivenTexts(list(texts.values()), list(texts), skipped)


def file_texts(path: Path, how: TextFormat) -> GivenTexts:
    """Return the texts of a file, each with the number of its row.

    Raises:
        DataError: if it is no file, lacks the column, or nothing is left.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder; give one file, so that rows have one number each.")
    skipped = Skipped()
    files = Files([path], how, skipped)
    items = [item for part in chain(files.read(), files.finish()) for item in part]
    if not items:
        told = "".join(f"; {line}" for line in left_out(skipped))
        raise DataError(
            f"{path} holds no text that can be read{told}. Mend the file, or name another column by --text."
        )
    return GivenTexts([item.text for item in items], [item.row for item in items], skipped)


def left_out(skipped: Skipped, most: int = 5) -> list[str]:
    """Return for each reason how many rows were left out, and where they stood; numbers only."""
    return [
        f"left out: {count:,} {'row' if count == 1 else 'rows'} {reason}: "
        + shorten(skipped.places[reason], most, count)
        for reason, count in skipped.counts.items()
    ]


@dataclass
class _Place:
    """How far one file was read."""

    reader: TextReader
    start: bytes = b""
    offset: int = 0
    modified: int = 0
    rows: int = 0
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
            if path.is_char_device() or path.is_block_device():
                raise DataError(
                    f"{path} is a device, which may have no end; give a file, a folder or - for standard input."
                )
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
                    self._skipped.add("of a file that cannot be opened", path.name)
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
            reader = TextReader(path.name, kind or "text", self._how, self._skipped, path=path)
            place = self._places[key] = _Place(reader)
        place.modified = found.st_mtime_ns
        if kind == "parquet":
            place.offset = found.st_size
            yield from self._read_parquet(path, place)
            return
        file.seek(place.offset)
        while piece := file.read(PIECE):
            if len(place.start) < _START_BYTES and place.offset == len(place.start):
                place.start += piece[: _START_BYTES - len(place.start)]
            place.offset += len(piece)
            yield self._guarded(place, partial(place.reader.feed, piece))

    def _read_parquet(self, path: Path, place: _Place) -> Iterator[list[Item]]:
        """Yield the texts that came since the last time; such a file is whole, or cannot be read yet."""
        rows = islice(self._parquet_rows(path, place), place.rows, None)
        place.refused, more = False, True

        def next_items() -> list[Item]:
            nonlocal more
            batch = list(islice(rows, _PARQUET_ROWS))
            place.rows, more = place.rows + len(batch), bool(batch)
            return place.reader.items(batch)

        while more and not place.refused:
            yield self._guarded(place, next_items)

    def _parquet_rows(self, path: Path, place: _Place) -> Iterator[Row]:
        place.reader.check_header(parquet_columns(path))
        yield from read_parquet(path, [self._how.text, *([] if self._how.time is None else [self._how.time])])

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
            self._skipped.add("of a file that is no table with the columns", place.reader.name)
            return []
        self._worked = self._worked or bool(items)
        return items
