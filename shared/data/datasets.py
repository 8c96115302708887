"""Records from files: only the declared columns, renamed to the role that a task asks for.

Guarantee: no message of this module shows the content of a cell. A fault is named by file, column, row and
line, so a message may enter a log that is read where the data must not be.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from shared.data.cells import is_blank, shorten, value_fault
from shared.data.deidentify.config import DeidentifyConfig, parse_short
from shared.data.parquet import parquet_columns, read_parquet
from shared.data.records import FileRecord
from shared.data.rows import (
    FORMATS,
    Fault,
    Quoting,
    Row,
    RowFormat,
    check_delimiter,
    default_delimiter,
    read_rows,
    suffix_of,
)
from shared.data.text_lines import check_encoding
from shared.errors import DataError
from shared.files import atomic
from shared.job.parsing import Section

if TYPE_CHECKING:
    from shared.data.deidentify.report import MaskTally

Record = Mapping[str, Any]
"""One example: role -> value."""

PERSON_ROLE = "person"
"""Role of the id column: whose record it is. No task reads it; see `shared.privacy.persons`."""

TEXT_ROLES = frozenset({"text", "pair", "prompt", "response", "tokens"})
"""Roles that hold what a person wrote; `deidentify` masks these and no other."""

_MOST_NAMES_SHOWN = 20
_MOST_PLACES_SHOWN = 5

NonBlank = Annotated[str, Field(min_length=1, pattern=r"\S")]


class DataSource(Section):
    """A file and the columns that a task may see of it; every other column is dropped at once."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    path: NonBlank
    """CSV, TSV, JSONL (each also gzipped) or Parquet; relative to the file that declares it."""
    format: Literal["auto", "csv", "jsonl", "parquet"] = "auto"
    """`auto` goes by the name's ending: .csv .tsv .tab .jsonl .ndjson (and .gz after these) .parquet .pq."""
    columns: dict[NonBlank, NonBlank] = Field(min_length=1)
    """Role -> column name in the file, such as `{"text": "review", "label": "stars"}`. All are required. The role `person`
    names the id column that tells whose record it is, for the units `patient` and `customer`."""
    delimiter: str | None = None
    """One character between CSV cells; None means a tab for .tsv and .tab, otherwise a comma."""
    encoding: str = "utf-8"
    """Of CSV and JSONL; a byte order mark (UTF-8, UTF-16, UTF-32) decides, whatever stands here."""
    # Not written out where it is not set: what was written by older versions stays the same.
    quoting: Quoting = Field(default="checked", exclude_if=lambda value: value == "checked")
    """Of CSV: `checked`, a quote at the start of a cell opens one that may go on over lines, and is refused if these look like
    rows of the file; `trusted`, the same without that check; `none`, a quote is a character like any other, as in many TSV."""
    # Not written out where it is not set: what was written by older versions stays the same.
    deidentify: DeidentifyConfig | None = Field(default=None, exclude_if=lambda value: value is None)
    """Mask names, dates and numbers in the text of every record as it is read; the file stays as it is. `true`, a list of
    kinds, or a section. See docs/de-identification.md: it complements differential privacy and does not replace it."""

    @field_validator("deidentify", mode="before")
    @classmethod
    def _parse_deidentify(cls, value: object) -> object:
        return parse_short(value)

    @model_validator(mode="after")
    def _check_there_is_text_to_mask(self) -> Self:
        if self.deidentify is not None and not self.columns.keys() & TEXT_ROLES:
            raise ValueError(
                f"deidentify masks the roles {', '.join(sorted(TEXT_ROLES))}, but columns names none of them; remove it, "
                "or give the text one of these roles"
            )
        return self

    @field_validator("delimiter")
    @classmethod
    def _check_delimiter(cls, value: str | None) -> str | None:
        return check_delimiter(value)

    @field_validator("encoding")
    @classmethod
    def _check_encoding(cls, value: str) -> str:
        return check_encoding(value)

    @model_validator(mode="after")
    def _check_it_is_csv(self) -> Self:
        for name, given in (("delimiter", self.delimiter is not None), ("quoting", self.quoting != "checked")):
            if given and self.format in ("jsonl", "parquet"):
                raise ValueError(f"{name} is for CSV, but format is {self.format}; remove one of the two")
        return self


class FileFacts:
    """What a person should know of a file that was read; sizes only, no text.

    Attributes:
        longest_text: characters of the longest text.
        longest_row: where it stands.
        most_lines: of one row.
        most_lines_row: where it stands.
    """

    def __init__(self) -> None:
        self.longest_text = 0
        self.longest_row = ""
        self.most_lines = 1
        self.most_lines_row = ""

    def add(self, row: Row, record: Record) -> None:
        """Take note of one row."""
        size = max((_text_size(record[role]) for role in record.keys() & TEXT_ROLES), default=0)
        if size > self.longest_text:
            self.longest_text, self.longest_row = size, row.place
        if row.lines > self.most_lines:
            self.most_lines, self.most_lines_row = row.lines, row.place

    def line(self) -> str:
        """Return this in words, beginning with a comma; nothing where there is no text."""
        said = f", longest text {self.longest_text:,} characters ({self.longest_row})" if self.longest_text else ""
        if self.most_lines > 1:
            said += f", most lines in one row {self.most_lines:,} ({self.most_lines_row})"
        return said


def _text_size(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    return sum(map(_text_size, value)) if isinstance(value, list) else 0


def read_records(
    source: DataSource, *, base: Path | None = None, tally: MaskTally | None = None, facts: FileFacts | None = None
) -> list[dict[str, Any]]:
    """Read every row's declared columns, renamed to their role, in the order of the file.

    Each is a `FileRecord`, which knows its row. CSV cells come as text; JSONL and Parquet keep their types, of which each role
    takes only its own (see `shared.data.cells.value_fault`). Blank lines of CSV and JSONL are skipped.

    Args:
        source: the file and its columns.
        base: folder that a relative path starts from; None is the working directory.
        tally: takes the counts of what `source.deidentify` masked.
        facts: takes the sizes of what was read.

    Raises:
        ConfigError: if `source.deidentify` asks for Presidio and it cannot be used here.
        DataError: if the file is missing, empty, malformed, wrongly encoded or lacks a declared column; or if
            a declared cell is missing or blank (None, white space, NaN or an empty list), or is not what its role takes.
    """
    path = (base or Path()) / source.path
    require_file(path)
    records: list[dict[str, Any]] = []
    gaps: dict[str, list[str]] = {}
    for row in rows_of(path, source):
        record = FileRecord({role: row.cells.get(column) for role, column in source.columns.items()}, row=row.number)
        for role, value in record.items():
            fault = "is blank" if is_blank(value) else value_fault(role, value)
            if fault is not None:
                what = fault if fault == "is blank" else f"holds {fault}"
                gaps.setdefault(f"column {source.columns[role]!r} {what}", []).append(row.place)
        if facts is not None:
            facts.add(row, record)
        records.append(record)
    _require_no_gaps(path, gaps)
    if not records:
        raise DataError(f"{path} holds no rows. Expected at least one record; check the export.")
    if source.deidentify is not None:
        _mask(records, source, path, tally)
    return records


def rows_of(path: Path, source: DataSource, *, header: list[str] | None = None) -> Iterator[Row]:
    """Yield the rows of a file that has the declared columns.

    Args:
        path: the file, whatever `source.path` says.
        source: how it is read.
        header: takes the column names of CSV.

    Raises:
        DataError: see `read_records`; naming the first row that cannot be read.
    """
    kind = format_of(path, source)
    if kind == "parquet":
        require_columns(path, source, parquet_columns(path))
        yield from read_parquet(path, list(source.columns.values()))
        return
    columns: dict[str, None] = {}

    found_header = False

    def check(found: list[str]) -> None:
        nonlocal found_header
        found_header = True
        require_columns(path, source, found, shown=_looks_like_header(found))
        if header is not None:
            header[:] = found

    for row in read_rows(path, row_format(path, source), check):
        if isinstance(row, Fault):
            raise DataError(f"{path}, {row.place}: {row.detail}")
        if kind == "jsonl":
            columns.update(dict.fromkeys(row.cells))
        yield row
    if columns:
        require_columns(path, source, list(columns))
    if kind == "csv" and not found_header:
        raise DataError(f"{path} is empty. Expected a header line, then one row per record.")


def row_format(path: Path, source: DataSource) -> RowFormat:
    """Return how rows stand in a file of CSV or JSONL."""
    return RowFormat(
        kind="csv" if format_of(path, source) == "csv" else "jsonl",
        delimiter=source.delimiter or default_delimiter(path),
        quoting=source.quoting,
        encoding=source.encoding,
    )


def _mask(records: list[dict[str, Any]], source: DataSource, path: Path, tally: MaskTally | None) -> None:
    from shared.data.deidentify.engine import open_deidentifier  # only who asks for it waits for Presidio

    assert source.deidentify is not None  # noqa: S101 (the caller's condition)
    deidentifier = open_deidentifier(source.deidentify)
    roles = sorted(source.columns.keys() & TEXT_ROLES)
    for number, record in enumerate(records, start=1):
        masked = deidentifier.mask_record(record, roles, place=f"{path}, row {number}")
        record.update(masked.record)
        if tally is not None:
            tally.add(masked.counts)
    if tally is not None:
        tally.describe(deidentifier)


def dataset_fingerprint(records: Iterable[Record]) -> str:
    """SHA-256 (hexadecimal) of the content of a data set, whatever the order of its rows and columns.

    Shuffling a file, or saving the same table as CSV, JSONL or Parquet, keeps the fingerprint: numbers are
    hashed as the text that Python writes for them. Any change of a cell or a role changes it, and so does any
    change of how often a row occurs.

    Formal guarantees:
        - Equal multisets of records have equal fingerprints (`test_fingerprint_ignores_order`).
        - Unequal ones have unequal fingerprints, up to SHA-256 collisions (`test_fingerprint_sees_changes`).

    It identifies content, not people: a file with one more row is another data set to it.
    """
    digests = sorted(_digest(record) for record in records)
    return hashlib.sha256(b"silotune-dataset-1:" + b"".join(digests)).hexdigest()


def write_jsonl(path: Path, records: Iterable[Record]) -> None:
    """Replace `path` by one JSON object per line (UTF-8), atomically.

    Raises:
        DataError: if a record holds a value that JSON cannot hold, such as NaN or bytes; `path` is untouched.
        RunError: if the disk does not take the file; `path` is untouched.
    """
    lines: list[str] = []
    for number, record in enumerate(records, start=1):
        try:
            line = json.dumps(dict(record), ensure_ascii=False, allow_nan=False)
            line.encode()
        except (TypeError, ValueError):
            raise DataError(
                f"{path} was not written: record {number} has a value that JSON cannot hold. Expected "
                "text, finite numbers, booleans, lists and objects; convert the others first."
            ) from None
        lines.append(line + "\n")
    atomic.write_text(path, "".join(lines))


# --- checks --------------------------------------------------------------------------------------------


def require_file(path: Path) -> None:
    """Raise `DataError` unless there is a file that can be opened."""
    if path.is_dir():
        raise DataError(f"{path} is a folder. Expected a CSV, JSONL or Parquet file; name one in it.")
    if not path.exists():
        raise DataError(f"{path} does not exist. Check the name, and the folder that a relative path starts from.")
    if not path.is_file():
        raise DataError(
            f"{path} is a pipe or a device, which may have no end and cannot be read twice. Write its content to a file."
        )
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise DataError(
            f"{path} cannot be opened: {error.strerror or error}. Give this account the right to read it."
        ) from error


def format_of(path: Path, source: DataSource) -> str:
    """Return csv, jsonl or parquet, as declared or by the name's ending; `DataError` if neither tells."""
    if source.format != "auto":
        return source.format
    suffix = suffix_of(path)
    if suffix not in FORMATS:
        raise DataError(
            f"{path} has the unknown ending {suffix or '(none)'}. Expected one of {' '.join(FORMATS)}, "
            "CSV and JSONL also with .gz; rename the file or set format to csv, jsonl or parquet."
        )
    for name, given in (("delimiter", source.delimiter is not None), ("quoting", source.quoting != "checked")):
        if FORMATS[suffix] == "parquet" and given:
            raise DataError(f"{path} is Parquet, but {name} is set, which is for CSV. Remove it.")
    return FORMATS[suffix]


def require_columns(path: Path, source: DataSource, present: Sequence[str], *, shown: bool = True) -> None:
    """Each declared column must occur once in `present`, whose names a message may quote if `shown`."""
    counts = Counter(present)
    for column in source.columns.values():
        if counts[column] > 1:
            raise DataError(f"{path} has {counts[column]} columns {column!r}. Rename all but one of them.")
    missing = {column: None for column in source.columns.values() if not counts[column]}
    if not missing:
        return
    if shown or len(missing) < len(set(source.columns.values())):
        found = f"It has {shorten([repr(name) for name in present], _MOST_NAMES_SHOWN)}."
        advice = _nearest(missing, present)
    else:
        found = f"Its first line, of {len(present)} cells, is not shown because it may be a record."
        advice = "Add a header line with column names."
    if len(present) == 1 and (marks := [mark for mark in ";\t|," if mark in present[0]]):
        advice = (
            f"Its cells seem to be separated by {marks[0]!r}: set delimiter to that (on the command line: --delimiter)."
        )
    raise DataError(f"{path} has no column {', '.join(map(repr, missing))}. {found} {advice}")


def _looks_like_header(cells: Sequence[str]) -> bool:
    """Distinct short names that start with a letter, of three words at most; sentences and numbers do not."""
    return len(set(cells)) == len(cells) and all(
        len(cell) <= 40 and cell[:1].isalpha() and len(cell.split()) <= 3 for cell in cells
    )


def _nearest(missing: Iterable[str], present: Sequence[str]) -> str:
    folded = {name.casefold(): name for name in reversed(present)}
    for column in missing:
        if near := difflib.get_close_matches(column.casefold(), folded, n=1):
            return f"Did you mean {folded[near[0]]!r} for {column!r}? Change the columns to match."
    return "Change the columns to match."


def _require_no_gaps(path: Path, gaps: Mapping[str, Sequence[str]]) -> None:
    if not gaps:
        return
    found = "; ".join(f"{what} at {shorten(places, _MOST_PLACES_SHOWN)}" for what, places in gaps.items())
    advice = (
        "fill or remove these rows" if all(what.endswith("blank") for what in gaps) else "mend or remove these rows"
    )
    raise DataError(f"{path}: {found}. Expected a value of its kind in every declared column; {advice}.")


# --- canonical form ------------------------------------------------------------------------------------


def _digest(record: Record) -> bytes:
    text = json.dumps(_canonical(record), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).digest()


def _canonical(value: object) -> object:
    """Text, lists and objects as they are, None as null, every other scalar as its text."""
    if isinstance(value, Mapping):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    return value if value is None or isinstance(value, str) else str(value)
