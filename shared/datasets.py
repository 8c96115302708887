"""Records from files: only the declared columns, renamed to the role that a task asks for.

Guarantee: no message of this module shows the content of a cell. A fault is named by file, column, row and
line, so a message may enter a log that is read where the data must not be.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import gzip
import hashlib
import io
import json
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, NoReturn, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from shared import atomic
from shared.deidentify.config import DeidentifyConfig, parse_short
from shared.errors import DataError

if TYPE_CHECKING:
    from shared.deidentify.report import MaskTally

Record = Mapping[str, Any]
"""One example: role -> value."""

PERSON_ROLE = "person"
"""Role of the id column: whose record it is. No task reads it; see `shared.privacy.persons`."""

TEXT_ROLES = frozenset({"text", "pair", "prompt", "response", "tokens"})
"""Roles that hold what a person wrote; `deidentify` masks these and no other."""

MAX_CELL_CHARACTERS = 16 * 2**20
"""A longer CSV cell is taken for a missing closing quote; the csv module's own limit is 128 KiB."""

_FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".tab": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_GZIP_MAGIC = b"\x1f\x8b"
_MOST_NAMES_SHOWN = 20
_MOST_PLACES_SHOWN = 5

NonBlank = Annotated[str, Field(min_length=1, pattern=r"\S")]


class DataSource(BaseModel):
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
    """Of CSV and JSONL; a byte order mark of UTF-8 is accepted."""
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
                f"deidentify masks the roles {', '.join(sorted(TEXT_ROLES))}, but columns names none of them; remove "
                f"it, or give the "
                "text one of these roles"
            )
        return self

    @field_validator("delimiter")
    @classmethod
    def _check_delimiter(cls, value: str | None) -> str | None:
        if value is not None and (len(value) != 1 or value in '"\r\n'):
            raise ValueError('expected one character other than a quote or line end, such as ";"')
        return value

    @field_validator("encoding")
    @classmethod
    def _check_encoding(cls, value: str) -> str:
        try:
            "".encode(value)
        except LookupError:
            raise ValueError(f"unknown text encoding {value!r}; try utf-8, latin-1 or cp1252") from None
        return value

    @model_validator(mode="after")
    def _check_delimiter_is_for_csv(self) -> Self:
        if self.delimiter is not None and self.format in ("jsonl", "parquet"):
            raise ValueError(f"delimiter is for CSV, but format is {self.format}; remove one of the two")
        return self


def read_records(
    source: DataSource, *, base: Path | None = None, tally: MaskTally | None = None
) -> list[dict[str, Any]]:
    """Read every row's declared columns, renamed to their role, in the order of the file.

    CSV cells come as text; JSONL and Parquet keep their types. Blank lines of CSV and JSONL are skipped.

    Args:
        source: the file and its columns.
        base: folder that a relative path starts from; None is the working directory.
        tally: takes the counts of what `source.deidentify` masked.

    Raises:
        ConfigError: if `source.deidentify` asks for Presidio and it cannot be used here.
        DataError: if the file is missing, empty, malformed, wrongly encoded or lacks a declared column; or if
            a declared cell is missing or blank (None, white space, NaN or an empty list).
    """
    path = (base or Path()) / source.path
    require_file(path)
    read = _READERS[format_of(path, source)]
    records: list[dict[str, Any]] = []
    gaps: dict[str, list[str]] = {}
    for number, row in enumerate(read(path, source), start=1):
        record = {role: row.cells.get(column) for role, column in source.columns.items()}
        for role in (role for role, value in record.items() if _is_blank(value)):
            place = f"row {number}" if row.line is None else f"row {number} (line {row.line})"
            gaps.setdefault(source.columns[role], []).append(place)
        records.append(record)
    _require_no_gaps(path, gaps)
    if not records:
        raise DataError(f"{path} holds no rows. Expected at least one record; check the export.")
    if source.deidentify is not None:
        _mask(records, source, path, tally)
    return records


def _mask(records: list[dict[str, Any]], source: DataSource, path: Path, tally: MaskTally | None) -> None:
    from shared.deidentify.engine import open_deidentifier  # only who asks for it waits for Presidio

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


# --- readers: one per format, each yields rows as they stand in the file -------------------------------


class _Row(NamedTuple):
    line: int | None
    """1-based line of the file on which the row ends; None where the format has no lines."""
    cells: Record


def _read_csv(path: Path, source: DataSource) -> Iterator[_Row]:
    rows = csv_rows(path, source)
    _, header = next(rows)
    for line, cells in rows:
        yield _Row(line, dict(zip(header, cells, strict=True)))


def csv_rows(path: Path, source: DataSource) -> Iterator[tuple[int, list[str]]]:
    """Yield (line on which it ends, cells) of the header, which has the declared columns, and of every row, as long as it.

    Raises:
        DataError: see `read_records`.
    """
    csv.field_size_limit(max(csv.field_size_limit(), MAX_CELL_CHARACTERS))
    delimiter = delimiter_of(path, source)
    reader = csv.reader(text_lines(path, source), delimiter=delimiter, strict=True)
    try:
        header = next((cells for cells in reader if cells), None)
        if header is None:
            raise DataError(f"{path} is empty. Expected a header line, then one row per record.")
        require_columns(path, source, header, shown=_looks_like_header(header))
        yield reader.line_num, header
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells where the header has {len(header)}. "
                    f"Quote cells that contain {delimiter!r}, or set the right delimiter."
                )
            yield reader.line_num, cells
    except csv.Error:
        raise DataError(
            f"{path}, line {reader.line_num}: malformed CSV, such as a quote that is never closed or "
            'text after a closing quote. Write a quote inside a cell as "", or save the file as JSONL.'
        ) from None


def _read_jsonl(path: Path, source: DataSource) -> Iterator[_Row]:
    seen: dict[str, None] = {}
    for number, line in enumerate(text_lines(path, source), start=1):
        if not line.strip():
            continue
        cells = parse_object(path, number, line)
        seen.update(dict.fromkeys(cells))
        yield _Row(number, cells)
    if seen:
        require_columns(path, source, list(seen))


def delimiter_of(path: Path, source: DataSource) -> str:
    """Return the character between cells of a CSV file."""
    return source.delimiter or ("\t" if suffix_of(path) in (".tsv", ".tab") else ",")


def parse_object(path: Path, number: int, line: str) -> dict[str, Any]:
    """Return the object on a line of JSONL.

    Raises:
        DataError: if there is none; the message names the line only.
    """
    try:
        value = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):  # the error object holds the line, so it must not be chained
        raise DataError(
            f"{path}, line {number}: malformed JSON. Expected one object per line; a file that is one large "
            "array must be split into lines, and NaN has no place in JSON."
        ) from None
    if not isinstance(value, dict):
        raise DataError(f"{path}, line {number}: a JSON {_json_kind(value)}. Expected one object per line.")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _json_kind(value: object) -> str:
    return {list: "array", str: "string", bool: "boolean", type(None): "null"}.get(type(value), "number")


def _read_parquet(path: Path, source: DataSource) -> Iterator[_Row]:
    import pyarrow as pa  # slow to load, and only Parquet needs it
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            require_columns(path, source, file.schema_arrow.names)
            for batch in file.iter_batches(columns=list(dict.fromkeys(source.columns.values()))):
                for cells in batch.to_pylist():
                    yield _Row(None, cells)
    except (pa.ArrowException, OSError, UnicodeError):
        raise DataError(
            f"{path} cannot be read as Parquet: it is cut short, damaged or another format. Copy it again "
            "and compare checksums with its source, or set the right format."
        ) from None


_READERS = {"csv": _read_csv, "jsonl": _read_jsonl, "parquet": _read_parquet}


def text_lines(path: Path, source: DataSource) -> Iterator[str]:
    """Lines with their ends, decompressed if the content is gzip, whatever the name says."""
    encoding = codecs.lookup(source.encoding).name
    number = 0
    try:
        with path.open("rb") as raw:
            packed = raw.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
            raw.seek(0)
            stream: Any = gzip.GzipFile(fileobj=raw) if packed else raw
            text = io.TextIOWrapper(stream, "utf-8-sig" if encoding == "utf-8" else encoding, newline="")
            for line in text:
                number += 1
                yield line
    except UnicodeError:  # the error object holds bytes of the file, so it must not be chained
        raise DataError(
            f"{path} is not {source.encoding}: something after line {number} cannot be decoded. Set the "
            "encoding that the file was saved in, such as latin-1, cp1252 or utf-16, or save it as UTF-8."
        ) from None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise DataError(f"{path} is damaged or cut short gzip data. Copy it again from its source.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Mend that, then try again.") from error


# --- checks --------------------------------------------------------------------------------------------


def require_file(path: Path) -> None:
    """Raise `DataError` unless there is a file that can be opened."""
    if path.is_dir():
        raise DataError(f"{path} is a folder. Expected a CSV, JSONL or Parquet file; name one in it.")
    if not path.exists():
        raise DataError(f"{path} does not exist. Check the name, and the folder that a relative path starts from.")
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
    if suffix not in _FORMATS:
        raise DataError(
            f"{path} has the unknown ending {suffix or '(none)'}. Expected one of {' '.join(_FORMATS)}, "
            "CSV and JSONL also with .gz; rename the file or set format to csv, jsonl or parquet."
        )
    if _FORMATS[suffix] == "parquet" and source.delimiter is not None:
        raise DataError(f"{path} is Parquet, but a delimiter is set, which is for CSV. Remove the delimiter.")
    return _FORMATS[suffix]


def suffix_of(path: Path) -> str:
    """Return the ending of a file's name in small letters, without .gz."""
    name = Path(path.name.lower())
    return Path(name.stem).suffix if name.suffix == ".gz" else name.suffix


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
        found = f"It has {_shorten([repr(name) for name in present], _MOST_NAMES_SHOWN)}."
        advice = _nearest(missing, present)
    else:
        found = f"Its first line, of {len(present)} cells, is not shown because it may be a record."
        advice = "Add a header line with column names."
    if len(present) == 1 and (marks := [mark for mark in ";\t|," if mark in present[0]]):
        advice = f"Its cells seem to be separated by {marks[0]!r}: set delimiter to that."
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
    found = "; ".join(
        f"column {name!r} is blank at {_shorten(places, _MOST_PLACES_SHOWN)}" for name, places in gaps.items()
    )
    raise DataError(f"{path}: {found}. Expected a value in every declared column; fill or remove these rows.")


def _is_blank(value: object) -> bool:
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, list) and not value)


def _shorten(names: Sequence[str], most: int) -> str:
    rest = len(names) - most
    return ", ".join(islice(names, most)) + (f" and {rest} more" if rest > 0 else "")


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
