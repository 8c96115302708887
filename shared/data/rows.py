"""Rows of CSV, TSV, JSONL, Parquet and plain text: the one reader behind every command, for whole files and for files that grow.

Guarantees (tests: tests/shared/data/test_rows.py)
    * Equal bytes give equal rows under equal numbers, however they are cut into pieces and whichever command reads them. Rows are
      numbered from 1 without the header and without blank lines; those that cannot be read have a number as well.
    * A row that cannot be read is a `Fault`; none is passed over in silence. No message holds text of a row.
    * A quoted CSV cell may go on over lines. Where these look like rows of the same file, a quote was not meant as one: under
      `quoting` "checked" that row is a fault, and the lines after its first are rows again.
"""

from __future__ import annotations

import csv
import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from shared.data.cells import surrogate
from shared.data.quotes import SeenRows, quote_is_open
from shared.data.text_lines import MAX_ROW_BYTES, TOO_LONG, TOO_LONG_ADVICE, Line, LineReader, read_pieces
from shared.errors import DataError
from shared.files.json_files import DuplicateKey, finite_number, refuse_constant, unique_keys

Quoting = Literal["checked", "trusted", "none"]
Kind = Literal["csv", "jsonl", "text"]
CheckHeader = Callable[[list[str]], object]

FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".tab": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}
TEXT_ENDINGS = (".txt", ".text", ".log")

MALFORMED = "malformed"
SWALLOWED = "with a quote that swallows rows"
NO_TEXT = "without a text"


class Row(NamedTuple):
    """A row that can be read.

    Attributes:
        number: from 1, among the rows of the file.
        line: on which it begins, from 1; None where the format has no lines.
        cells: by column.
        lines: how many lines it takes.
        values: the cells of CSV in their order.
    """

    number: int
    line: int | None
    cells: Mapping[str, Any]
    lines: int = 1
    values: Sequence[str] = ()

    @property
    def place(self) -> str:
        """Where it stands, in words."""
        return f"row {self.number}" if self.line is None else f"row {self.number} (line {self.line})"


class Fault(NamedTuple):
    """A row that cannot be read.

    Attributes:
        number, line: as of `Row`.
        reason: in a few words, for counting.
        detail: what is wrong and what to do; it holds no text of the row.
    """

    number: int
    line: int | None
    reason: str
    detail: str

    @property
    def place(self) -> str:
        """Where it stands, in words."""
        return f"row {self.number}" if self.line is None else f"row {self.number} (line {self.line})"


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """How rows stand in a file that has lines.

    Attributes:
        text: what the one column of plain text is called.
    """

    kind: Kind
    delimiter: str = ","
    quoting: Quoting = "checked"
    encoding: str = "utf-8"
    text: str = "text"


def suffix_of(path: Path) -> str:
    """Return the ending of a file's name in small letters, without .gz."""
    name = Path(path.name.lower())
    return Path(name.stem).suffix if name.suffix == ".gz" else name.suffix


def default_delimiter(path: Path) -> str:
    """Return what stands between cells if nothing else is said: a tab in .tsv and .tab, otherwise a comma."""
    return "\t" if suffix_of(path) in (".tsv", ".tab") else ","


def check_delimiter(value: str | None) -> str | None:
    """Return `value`; ValueError unless it is None or one character that can stand between cells."""
    if value is not None and (len(value) != 1 or value in '"\r\n\0' or surrogate(value)):
        raise ValueError('expected one character other than a quote or line end, such as ";"')
    return value


class RowReader:
    """Turns the bytes of one file, in whatever pieces they come, into rows and faults.

    Attributes:
        header: the column names of CSV, as soon as they are known.
    """

    def __init__(self, name: str, how: RowFormat, check_header: CheckHeader | None = None) -> None:
        """Start a file.

        Args:
            name: of the file, for messages.
            check_header: raises if the column names of CSV are not the right ones; it comes before any row.
        """
        self._name, self._how, self._check_header = name, how, check_header
        self._lines = LineReader(name, how.encoding)
        self.header: list[str] | None = None
        self._number = 0
        self._open: list[Line] = []  # lines of a CSV row whose quote is not closed
        self._open_size = 0
        self._seen = SeenRows()

    def feed(self, piece: bytes) -> list[Row | Fault]:
        """Return the rows that `piece` completes.

        Raises:
            DataError: if the header of CSV cannot be read, or the file holds no lines.
        """
        return self._rows(self._lines.feed(piece))

    def finish(self) -> list[Row | Fault]:
        """Return the rows that are left when the file ends; raises as `feed`."""
        found = self._rows(self._lines.finish())
        while self._open:
            lines, self._open = self._open, []
            again = self._unfinished(lines, _UNCLOSED, found)
            found += self._rows(again)
        return found

    def _rows(self, lines: Sequence[Line]) -> list[Row | Fault]:
        found: list[Row | Fault] = []
        if self._how.kind != "csv":
            read = _read_json if self._how.kind == "jsonl" else self._read_text
            for line in lines:
                if line.fault is not None:
                    found.append(self._fault(line, *line.fault))
                elif line.text.strip():
                    self._number += 1
                    found.append(read(self._number, line))
            return found
        queue = deque(lines)
        while queue:
            queue.extendleft(reversed(self._take(queue.popleft(), found)))
        return found

    def _read_text(self, number: int, line: Line) -> Row:
        return Row(number, line.number, {self._how.text: line.text.strip()})

    # --- CSV ---

    def _take(self, line: Line, found: list[Row | Fault]) -> list[Line]:
        """Go on with one line; return those that must be read again."""
        quoted = self._how.quoting != "none"
        self._open.append(line)
        self._open_size += len(line.text)
        inside = len(self._open) > 1
        if quoted and quote_is_open(line.text, self._how.delimiter, inside) and not _too_long(line):
            if self._open_size <= MAX_ROW_BYTES:
                return []
            lines, self._open, self._open_size = self._open, [], 0
            return self._unfinished(lines, TOO_LONG_ADVICE, found)
        lines, self._open, self._open_size = self._open, [], 0
        if not inside and line.fault is None and not line.text.strip() and self._how.delimiter not in line.text:
            return []
        return self._complete(lines, found)

    def _unfinished(self, lines: list[Line], why: str, found: list[Row | Fault]) -> list[Line]:
        """Count a row whose quote is never closed; return the lines after its first if they look like rows."""
        self._open_size = 0
        swallowed = self._how.quoting == "checked" and self._seen.swallowed(lines, self._how.delimiter)
        reason = SWALLOWED if swallowed else MALFORMED if why is _UNCLOSED else TOO_LONG
        found.append(self._fault(lines[0], reason, f"{why} It goes on over {len(lines):,} lines."))
        return lines[1:] if swallowed else []

    def _complete(self, lines: list[Line], found: list[Row | Fault]) -> list[Line]:
        first, size = lines[0], len(lines)
        delimiter = self._how.delimiter
        checked = self._how.quoting == "checked" and size > 1 and self.header is not None
        if checked and self._seen.swallowed(lines, delimiter):
            advice = _SWALLOWED_ADVICE.format(lines=size, last=lines[-1].number)
            found.append(self._fault(first, SWALLOWED, advice))
            return lines[1:]
        bad = next((line.fault for line in lines if line.fault is not None), None)
        if bad is not None:
            found.append(self._fault(first, *bad))
            return []
        cells = _cells(lines, self._how)
        if cells is None:
            found.append(self._fault(first, MALFORMED, _MALFORMED_ADVICE + _over(size)))
        elif self.header is None:
            if len(lines) == 1 and _SEPARATOR_HINT.fullmatch(first.text.strip()):
                raise DataError(_HINT_ADVICE.format(name=self._name, separator=first.text.strip()[-1:]))
            if self._check_header is not None:
                self._check_header(cells)
            self.header = cells
            self._seen.begin(cells)
        elif len(cells) != len(self.header):
            found.append(
                self._fault(
                    first,
                    MALFORMED,
                    f"{len(cells)} cells where the header has {len(self.header)}. Quote cells that contain {delimiter!r}, "
                    f"or set the right delimiter{_over(size)}.",
                )
            )
        elif len(cells) > 1 and [cells[0].lstrip("\ufeff"), *cells[1:]] == self.header:
            found.append(self._fault(first, MALFORMED, _HEADER_AGAIN))
        else:
            self._number += 1
            self._seen.add(cells, size)
            found.append(Row(self._number, first.number, dict(zip(self.header, cells, strict=True)), size, cells))
        return []

    def _fault(self, line: Line, reason: str, detail: str) -> Fault:
        if self._how.kind == "csv" and self.header is None:
            raise DataError(f"{self._name}, line {line.number}, the header: {detail}")
        self._number += 1
        return Fault(self._number, line.number, reason, detail)


_ADVICE = 'Write a quote inside a cell as "", or set quoting = "none" (--quoting none) where quotes mean nothing'
_UNCLOSED = f"malformed CSV, a quote that is never closed. {_ADVICE}."
_MALFORMED_ADVICE = f"malformed CSV, such as text after a closing quote. {_ADVICE}, or save the file as JSONL."
_SWALLOWED_ADVICE = (
    "a quoted cell spans {lines:,} lines (to line {last:,}) that look like rows of their own, so a quote was not meant as one. "
    f'{_ADVICE}; if the cell is right, set quoting = "trusted".'
)


_SEPARATOR_HINT = re.compile("(?i)sep=.?")
_HINT_ADVICE = (
    "{name} begins with a line for Excel, sep={separator}, which is no header. Remove that line, and set delimiter to what "
    "stands between the cells."
)
_HEADER_AGAIN = "the header again, as where files were joined. Remove the row."


def _over(lines: int) -> str:
    return f" (it spans {lines:,} lines)" if lines > 1 else ""


def _too_long(line: Line) -> bool:
    return line.fault is not None and line.fault.reason == TOO_LONG


def _cells(lines: Sequence[Line], how: RowFormat) -> list[str] | None:
    """Return the cells of one row; None if its quotes are wrong."""
    if how.quoting == "none":
        return lines[0].text.split(how.delimiter)
    if len(lines) == 1 and '"' not in lines[0].text:
        return lines[0].text.split(how.delimiter)
    csv.field_size_limit(max(csv.field_size_limit(), 2 * MAX_ROW_BYTES))
    whole = [line.text + line.end for line in lines[:-1]] + [lines[-1].text]
    try:
        rows = list(csv.reader(whole, delimiter=how.delimiter, strict=True))
    except csv.Error:
        return None
    return rows[0] if len(rows) == 1 else None


# --- JSONL ---


def _read_json(number: int, line: Line) -> Row | Fault:
    cells = parse_object(line.text)
    if isinstance(cells, str):
        return Fault(number, line.number, MALFORMED, cells)
    return Row(number, line.number, cells)


def parse_object(text: str) -> dict[str, Any] | str:
    """Return the object on a line of JSONL, or what is wrong with it."""
    try:
        value = _JSON.decode(text)
    except DuplicateKey:
        return "one key stands twice in the object. Remove one of the two."
    except (ValueError, RecursionError):  # the error object holds the line, so it must not be chained
        return (
            "malformed JSON. Expected one object per line; a file that is one large array must be split into lines, and NaN "
            "has no place in JSON."
        )
    if not isinstance(value, dict):
        return f"a JSON {_json_kind(value)}. Expected one object per line."
    return value


_JSON = json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=refuse_constant, parse_float=finite_number)


def _json_kind(value: object) -> str:
    return {list: "array", str: "string", bool: "boolean", type(None): "null"}.get(type(value), "number")


# --- whole files ---


def read_rows(path: Path, how: RowFormat, check_header: CheckHeader | None = None) -> Iterator[Row | Fault]:
    """Yield the rows of a whole file that has lines.

    Raises:
        DataError: if it cannot be read, it holds no lines, or its header cannot be read.
    """
    reader = RowReader(str(path), how, check_header)
    for piece in read_pieces(path):
        yield from reader.feed(piece)
    yield from reader.finish()
