"""Tables as files: CSV that no spreadsheet takes for formulas, and JSON.

Guarantee (tests: tests/client/console/test_exports.py): a cell that a spreadsheet would compute begins with an apostrophe, also
one that it gets by splitting at semicolons, tabs or lines, so a name that a stranger chose does nothing on the machine that opens
the file; JSON has every value as it stands in the log.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fastapi.responses import Response, StreamingResponse

_FORMULA = re.compile(r'\A(?=[\t\r\n])|(?:\A|(?<=[;\t\r\n]))(?=[ "]*[=+\-@|%])')
"""Where a formula could begin: in many countries spreadsheets split at ";", and then a comma's quotes no longer hold."""


def as_csv(name: str, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> Response:
    """Return rows as CSV (UTF-8, RFC 4180) to be kept as a file."""
    lines = _lines(columns, rows)
    return StreamingResponse(lines, media_type="text/csv; charset=utf-8", headers=_kept(f"{name}.csv"))


def as_json_lines(name: str, rows: Iterable[Mapping[str, Any]]) -> Response:
    """Return rows as one JSON object a line, to be kept as a file."""
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n" for row in rows)
    return StreamingResponse(lines, media_type="application/jsonl", headers=_kept(f"{name}.jsonl"))


def _kept(name: str) -> dict[str, str]:
    return {"content-disposition": f'attachment; filename="{name}"'}


def _lines(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> Iterator[bytes]:
    yield _line(columns)
    for row in rows:
        yield _line([_cell(row[column]) for column in columns])


def _line(cells: Sequence[str]) -> bytes:
    line = io.StringIO()
    csv.writer(line, quoting=csv.QUOTE_ALL).writerow(cells)
    return line.getvalue().encode(errors="replace")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, int | float):
        return json.dumps(value)
    return _FORMULA.sub("'", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
