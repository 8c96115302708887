"""Tables as files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.trust.audit_log import Event, read
from shared.web.exports import _lines
from tests.client.console.conftest import Serving
from tests.client.console.homes import charge, make_home

FORMULA = "=HYPERLINK(\"https://evil.example\";'x')"


@pytest.fixture
def officer(serve: Callable[..., Serving], tmp_path: Path) -> Callable[[str], str]:
    home = make_home(tmp_path)
    charge(home, jobs=[FORMULA, "@SUM(A1)", "+1", "-1", 'a, "b"\nc'], rounds=2)
    browser = serve(home).signed_in("officer")

    def get(path: str) -> str:
        answer = browser.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-disposition"].startswith('attachment; filename="north-')
        return answer.text

    get.home = home  # type: ignore[attr-defined]
    return get


def test_no_spreadsheet_computes_a_name(officer: Callable[[str], str]) -> None:
    rows = list(csv.DictReader(io.StringIO(officer("/releases/export.csv"), newline="")))
    assert {row["name"] for row in rows} == {f"'{FORMULA}", "'@SUM(A1)", "'+1", "'-1", 'a, "b"\nc'}
    assert len(rows) == 9
    assert float(rows[0]["epsilon"]) > 0
    log = list(csv.DictReader(io.StringIO(officer("/releases/log/export.csv?event=request"), newline="")))
    assert all(not cell.startswith(("=", "+", "-", "@")) for row in log for cell in row.values())
    assert {row["event"] for row in log} == {"request.received", "request.refused"}


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize(
    "name", ["a;=1+1", "a\t=1+1", "a\n=1+1", 'a;"=1+1', "a; =1+1", "\r+1", "-1;@a", '";=1+1;"', "|a;%b"]
)
def test_no_other_separator_makes_a_formula(name: str, separator: str) -> None:
    (answer,) = [b"".join(_lines(["name", "more"], [{"name": name, "more": {"why": name}}]))]
    rows = csv.reader(io.StringIO(answer.decode(), newline=""), delimiter=separator)
    cells = [cell.lstrip(' "') for row in rows for cell in row]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "|", "%", "\t", "\r"))]


def test_json_has_everything_as_it_stands(officer: Callable[[str], str]) -> None:
    releases = [json.loads(line) for line in officer("/releases/export.jsonl?q=hyperlink").splitlines()]
    assert [one["name"] for one in releases] == [FORMULA] * 2
    before = [entry.sha256 for entry in read(officer.home.audit)]  # type: ignore[attr-defined]
    entries = [json.loads(line) for line in officer("/releases/log/export.jsonl").splitlines()]
    assert [entry["sha256"] for entry in entries][::-1][: len(before)] == before
    assert entries[0]["event"] == Event.CONSOLE_ACTION, "that it was exported stands there as well"
