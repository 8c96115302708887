"""A whole file, masked into another: CSV, TSV, JSONL, Parquet, each as `shared.data.datasets` reads it, or plain text.

Guarantees (tests: tests/shared/data/deidentify/test_files.py)
    * The input is never written. The output is there in full or not at all.
    * Other columns keep their values, in their order: cells of CSV, bytes of JSONL, columns and types of Parquet.
    * A text file is one record.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from shared.data.cells import text_fault
from shared.data.datasets import DataSource, format_of, require_columns, require_file, row_format, rows_of
from shared.data.deidentify.engine import Deidentifier
from shared.data.deidentify.report import MaskTally
from shared.data.parquet import open_parquet
from shared.data.rows import Quoting, parse_object, suffix_of
from shared.data.text_lines import Line, read_lines
from shared.errors import ConfigError, DataError
from shared.files import atomic
from shared.job.parsing import parse

_TEXT_ENDINGS = (".txt", ".text")
_SPACE = re.compile(r"[ \t\r\n]*")


def deidentify_file(
    path: Path,
    out: Path,
    columns: Sequence[str],
    deidentifier: Deidentifier,
    *,
    delimiter: str | None = None,
    encoding: str = "utf-8",
    quoting: Quoting = "checked",
    told: Callable[[int], object] = lambda records: None,
) -> MaskTally:
    """Write `path` to `out` with the named columns masked, and return the counts.

    Args:
        columns: that are masked; none for a text file.
        delimiter, encoding, quoting: of the file, as in `DataSource`.
        told: is called with the number of records after each one.

    Raises:
        ConfigError: if `out` is the input, or names another format.
        DataError: if the file cannot be read, a column is missing, or holds something other than text.
        RunError: if the disk does not take the file; nothing is there then.
    """
    require_file(path)
    require_another(path, out)
    tally = MaskTally(told=told)
    asked: dict[str, Any] = {"path": str(path), "columns": {name: name for name in columns} or {"-": "-"}}
    asked |= {"delimiter": delimiter, "encoding": encoding, "quoting": quoting}
    source = parse(DataSource, asked, source="what was asked for")
    kind = _kind_of(path, source)
    if kind != _kind_of(out, source):
        raise ConfigError(f"{path} is {kind}, but {out} ends like another format; give it the same ending.")
    if kind == "text" and columns:
        raise ConfigError(f"{path} is plain text and has no columns; leave --column out.")
    if kind != "text" and not columns:
        raise ConfigError(f"{path} has columns; name those that hold text: --column NAME.")
    data = _MASKED[kind](path, source, deidentifier, tally)
    if out.name.lower().endswith(".gz"):
        data = gzip.compress(data, mtime=0)
    tally.describe(deidentifier)
    atomic.write_bytes(out, data)
    return tally


def require_another(path: Path, out: Path) -> None:
    """Raise `ConfigError` if `out` is the file `path`, under whatever name."""
    if out.resolve() == path.resolve() or (out.exists() and path.exists() and out.samefile(path)):
        raise ConfigError(f"{out} is the input itself, which is never overwritten; name another file.")


# --- one function per format: the whole masked file, and its records counted -----------------------------


def _masked_csv(path: Path, source: DataSource, deidentifier: Deidentifier, tally: MaskTally) -> bytes:
    how = row_format(path, source)
    text = io.StringIO(newline="")
    first = next(read_lines(path, source.encoding), None)
    end = first.end if first is not None and first.end else "\n"
    quoting: Literal[0, 3] = csv.QUOTE_NONE if how.quoting == "none" else csv.QUOTE_MINIMAL
    quote = None if how.quoting == "none" else '"'
    writer = csv.writer(text, delimiter=how.delimiter, lineterminator=end, quoting=quoting, quotechar=quote)
    header: list[str] = []
    for row in rows_of(path, source, header=header):
        if row.number == 1:
            writer.writerow(header)
        places = [header.index(column) for column in source.columns]
        record = {header[place]: row.values[place] for place in places}
        changed = _mask(record, deidentifier, tally, f"{path}, {row.place}")
        writer.writerow([changed.get(header[i], cell) if i in places else cell for i, cell in enumerate(row.values)])
    if not tally.records:
        raise DataError(f"{path} holds no rows. Expected at least one record; check the export.")
    return _encoded(text.getvalue(), source, path)


def _masked_jsonl(path: Path, source: DataSource, deidentifier: Deidentifier, tally: MaskTally) -> bytes:
    lines: list[str] = []
    seen: dict[str, None] = {}
    for line in _sound(path, source):
        whole = line.text + line.end
        if not line.text.strip():
            lines.append(whole)
            continue
        record = parse_object(line.text)
        if isinstance(record, str):
            raise DataError(f"{path}, row {tally.records + 1} (line {line.number}): {record}")
        seen.update(dict.fromkeys(record))
        own = {column: record[column] for column in source.columns if column in record}
        changed = _mask(own, deidentifier, tally, f"{path}, row {tally.records + 1} (line {line.number})")
        lines.append(_spliced(whole, {column: value for column, value in changed.items() if value != own[column]}))
    if not seen:
        raise DataError(f"{path} holds no rows. Expected at least one record; check the export.")
    require_columns(path, source, list(seen))
    return _encoded("".join(lines), source, path)


def _sound(path: Path, source: DataSource) -> Iterator[Line]:
    """Yield lines; DataError at the first that cannot be read."""
    for line in read_lines(path, source.encoding):
        if line.fault is not None:
            raise DataError(f"{path}, line {line.number}: {line.fault.detail}")
        yield line


def _masked_parquet(path: Path, source: DataSource, deidentifier: Deidentifier, tally: MaskTally) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_parquet(path) as file:
        require_columns(path, source, file.schema_arrow.names)
        table = file.read()
        groups = file.metadata.row_group(0) if file.metadata.num_row_groups else None
        compression = groups.column(0).compression.lower() if groups is not None else "snappy"
    rows = table.select(list(source.columns)).to_pylist()
    changed = [
        row | _mask(row, deidentifier, tally, f"{path}, row {number}") for number, row in enumerate(rows, start=1)
    ]
    for column in source.columns:
        place = table.schema.get_field_index(column)
        field = table.schema.field(place)
        try:
            values = pa.array([row[column] for row in changed], type=field.type)
        except pa.ArrowException:
            raise DataError(
                f"{path}: column {column!r} has type {field.type}; expected text or lists of text."
            ) from None
        table = table.set_column(place, field, values)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression=compression if compression != "uncompressed" else "none")
    return buffer.getvalue()


def _masked_text(path: Path, source: DataSource, deidentifier: Deidentifier, tally: MaskTally) -> bytes:
    text = "".join(line.text + line.end for line in _sound(path, source))
    changed = _mask({"text": text}, deidentifier, tally, str(path))
    return _encoded(changed["text"], source, path)


_MASKED = {"csv": _masked_csv, "jsonl": _masked_jsonl, "parquet": _masked_parquet, "text": _masked_text}


def _kind_of(path: Path, source: DataSource) -> str:
    return "text" if suffix_of(path) in _TEXT_ENDINGS else format_of(path, source)


def _mask(record: dict[str, Any], deidentifier: Deidentifier, tally: MaskTally, place: str) -> dict[str, Any]:
    for column, value in record.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and (fault := text_fault(text)):
                raise DataError(f"{place}: {column!r} holds {fault}; mend the row.")
    masked = deidentifier.mask_record(record, list(record), place=place)
    tally.add(masked.counts)
    return masked.record


def _encoded(text: str, source: DataSource, path: Path) -> bytes:
    try:
        return text.encode(source.encoding)
    except UnicodeError:
        raise DataError(f"{path} cannot be written in {source.encoding} again; save it as UTF-8 first.") from None


def _spliced(line: str, values: dict[str, Any]) -> str:
    """Return a line of JSON with the values of some keys replaced; every other byte stays."""
    if not values:
        return line
    parts, last = [], 0
    for key, start, end in _members(line):
        if key in values:
            parts += [line[last:start], json.dumps(values[key], ensure_ascii=False)]
            last = end
    return "".join([*parts, line[last:]])


def _members(line: str) -> Iterator[tuple[str, int, int]]:
    """Yield (key, start, end) of every value of the object on a line that was parsed before."""
    decoder = json.JSONDecoder()
    place = _skip(line, _skip(line, 0) + 1)
    while line[place] == '"':
        key, place = decoder.raw_decode(line, place)
        start = _skip(line, _skip(line, place) + 1)
        _, end = decoder.raw_decode(line, start)
        yield key, start, end
        place = _skip(line, end)
        if line[place] == ",":
            place = _skip(line, place + 1)


def _skip(line: str, place: int) -> int:
    match = _SPACE.match(line, place)
    return match.end() if match else place
