"""Odd files that users report: every command reads them alike or refuses them by row; no traceback, no silent loss."""

from __future__ import annotations

import gzip
import io
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from client.check import _data
from client.site.home import SiteHome
from shared.data.datasets import DataSource, read_records
from shared.errors import DataError
from simulations.scenario import load_scenario

Silotune = Callable[..., Any]
HEAD = "review,verdict\n"
GOOD = [(f"a quiet joy {i}", ("bad", "good")[i % 2]) for i in range(60)]
LINES = [f"{text},{label}" for text, label in GOOD]
SECRET = "PRIVATEWORD"  # noqa: S105 (a mark that must not be shown)


@dataclass(frozen=True, kw_only=True)
class Odd:
    """A file and what is right.

    Attributes:
        strict: rows that training reads, or what its refusal says.
        read, left_out: rows that `monitor` labels and counts as left out; `read` 0 is a refusal.
        options: of the data source; also options of the commands.
    """

    name: str
    content: bytes
    strict: int | str
    read: int
    left_out: int = 0
    options: dict[str, str] = field(default_factory=dict)


def csv(*lines: str, end: str = "\n", head: str = HEAD) -> bytes:
    return (head + "\n".join(lines) + "\n").replace("\n", end).encode()


def jsonl(*rows: object) -> bytes:
    good = [{"review": text, "verdict": label} for text, label in GOOD]
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in [*good, *rows]).encode()


def parquet(**columns: Any) -> bytes:
    table = {"review": [text for text, _ in GOOD], "verdict": [label for _, label in GOOD], **columns}
    made = io.BytesIO()
    pq.write_table(pa.table(table), made)
    return made.getvalue()


def swallowed(first: int, last: int) -> bytes:
    lines = list(LINES)
    lines[first] = '"' + lines[first]
    text, label = lines[last].split(",")
    lines[last] = f'{text}",{label}'
    return csv(*lines)


ODD = [
    Odd(name="lone-cr.csv", content=csv(*LINES, end="\r"), strict=60, read=60),
    Odd(name="mixed-ends.csv", content=csv(*LINES[:20]) + csv(*LINES[20:40], end="\r\n", head="")
        + csv(*LINES[40:], end="\r", head=""), strict=60, read=60),
    Odd(name="bom.csv", content=b"\xef\xbb\xbf" + csv(*LINES), strict=60, read=60),
    Odd(name="utf16.csv", content=csv(*LINES).decode().encode("utf-16"), strict=60, read=60),
    Odd(name="utf16-no-mark.csv", content=csv(*LINES).decode().encode("utf-16-le"), strict="NUL", read=0),
    Odd(name="utf16-told.csv", content=csv(*LINES).decode().encode("utf-16-le"), strict=60, read=60,
        options={"encoding": "utf-16-le"}),
    Odd(name="packed.csv.gz", content=gzip.compress(csv(*LINES)), strict=60, read=60),
    Odd(name="cut.csv.gz", content=gzip.compress(csv(*LINES))[:-9], strict="gzip", read=60, left_out=1),
    Odd(name="excel.csv", content=b"PK\x03\x04" + bytes(200), strict="zip archive", read=0),
    Odd(name="latin.csv", content=csv(*LINES, f"{SECRET} caf\u00e9,bad").decode().encode("latin-1"),
        strict="row 61 (line 62): it is not utf-8 at byte", read=60, left_out=1),
    Odd(name="nul.csv", content=csv(*LINES, f"{SECRET}\0,bad"), strict="row 61 (line 62)", read=60, left_out=1),
    Odd(name="ragged.csv", content=csv(*LINES, f"{SECRET},bad,more", SECRET), strict="row 61 (line 62): 3 cells",
        read=60, left_out=2),
    Odd(name="trailing-blanks.csv", content=csv(*LINES) + b"\n\n   \n\r\n", strict=60, read=60),
    Odd(name="empty-cells.csv", content=csv(*LINES, ",", ",bad"), strict="is blank at row 61 (line 62), row 62",
        read=60, left_out=2),
    Odd(name="empty.csv", content=b"", strict="is empty", read=0),
    Odd(name="header-only.csv", content=HEAD.encode(), strict="holds no rows", read=0),
    Odd(name="no-header.csv", content=csv(*[f"{SECRET} {line}" for line in LINES], head=""),
        strict="no column 'review', 'verdict'", read=0),
    Odd(name="twice.csv", content=csv(*[f"{line},x" for line in LINES], head="review,verdict,review\n"),
        strict="2 columns 'review'", read=0),
    Odd(name="excel-hint.csv", content=b"sep=;\r\n" + csv(*LINES).replace(b",", b";"), strict="sep=;, which is no header",
        read=0),
    Odd(name="excel-hint-told.csv", content=b"sep=;\n" + csv(*LINES).replace(b",", b";"), strict="Remove that line", read=0,
        options={"delimiter": ";"}),
    Odd(name="joined.csv", content=csv(*LINES[:30]) + csv(*LINES[30:]), strict="row 31 (line 32): the header again",
        read=60, left_out=1),
    Odd(name="joined-bom.csv", content=b"\xef\xbb\xbf" + csv(*LINES[:30]) + b"\xef\xbb\xbf" + csv(*LINES[30:]),
        strict="row 31 (line 32): the header again", read=60, left_out=1),
    Odd(name="semicolons.csv", content=csv(*LINES).replace(b",", b";"), strict="set delimiter", read=0),
    Odd(name="stray-quote.csv", content=swallowed(5, 50), strict="row 6 (line 7): a quoted cell spans 46 lines",
        read=59, left_out=1),
    Odd(name="stray-pair.csv", content=swallowed(30, 31), strict="row 31 (line 32): a quoted cell spans 2 lines",
        read=59, left_out=1),
    Odd(name="open-quote.csv", content=csv(*LINES[:30], '"' + LINES[30], *LINES[31:]), strict="never closed",
        read=59, left_out=1),
    Odd(name="quotes.tsv", content=csv(*LINES, '"so" quiet,bad').replace(b",", b"\t"), strict="quoting = \"none\"",
        read=60, left_out=1),
    Odd(name="quotes-none.tsv", content=csv(*LINES, '"so" quiet,bad').replace(b",", b"\t"), strict=61, read=61,
        options={"quoting": "none"}),
    Odd(name="long-notes.csv", content=csv(*LINES, '"quiet, and\nso on, well\n\nthe end",bad'), strict=61, read=61),
    Odd(name="surrogate.jsonl", content=jsonl('{"review": "PRIVATEWORD \\ud800", "verdict": "bad"}'),
        strict="half of a surrogate pair, which is no character at row 61 (line 61)", read=60, left_out=1),
    Odd(name="escaped-nul.jsonl", content=jsonl({"review": f"{SECRET}\0", "verdict": "bad"}), strict="a NUL character",
        read=60, left_out=1),
    Odd(name="objects.jsonl", content=jsonl({"review": {"a": SECRET}, "verdict": "bad"}, {"review": 5, "verdict": "bad"}),
        strict="an object where text is expected at row 61", read=60, left_out=2),
    Odd(name="truth.jsonl", content=jsonl({"review": "fine", "verdict": True}), strict="a truth value where", read=61),
    Odd(name="key-twice.jsonl", content=jsonl(f'{{"review": "a", "review": "{SECRET}", "verdict": "bad"}}'),
        strict="row 61 (line 61): one key stands twice", read=60, left_out=1),
    Odd(name="array.jsonl", content=json.dumps([{"review": SECRET}]).encode(), strict="a JSON array", read=0),
    Odd(name="deep.jsonl", content=jsonl("[" * 100_000), strict="malformed JSON", read=60, left_out=1),
    Odd(name="endless-number.jsonl", content=jsonl('{"review": "a", "verdict": ' + "9" * 5000 + "}"),
        strict="malformed JSON", read=60, left_out=1),
    Odd(name="good.parquet", content=parquet(), strict=60, read=60),
    Odd(name="bytes.parquet", content=parquet(review=[SECRET.encode()] * 60), strict="bytes where text is expected", read=0),
    Odd(name="nulls.parquet", content=parquet(review=[None, *["quiet"] * 59]), strict="is blank at row 1", read=59, left_out=1),
    Odd(name="floats.parquet", content=parquet(verdict=[1.0] * 60), strict="text or a whole number is expected", read=60),
    Odd(name="cut.parquet", content=parquet()[:-20], strict="cannot be read as Parquet", read=0),
    Odd(name="huge-cell.csv", content=csv(*LINES, "quiet joy " * 200_000 + ",bad"), strict=61, read=61),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _ends_soon() -> Any:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < 30, "ten seconds on a machine with nothing else to do"


@pytest.fixture
def odd_file(tmp_path: Path) -> Callable[[Odd], Path]:
    def write(odd: Odd) -> Path:
        path = tmp_path / odd.name
        path.write_bytes(odd.content)
        return path

    return write


def check_said(outcome: Any) -> None:
    assert "Traceback" not in outcome.out + outcome.err
    assert SECRET not in outcome.out + outcome.err


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd.name)
def test_simulate_and_site_read_the_same_or_refuse_by_row(
    odd: Odd, odd_file: Callable[[Odd], Path], silotune: Silotune, scenario_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = odd_file(odd)
    source = {"path": path.name, "columns": {"text": "review", "label": "verdict"}, **odd.options}
    scenario = scenario_file(data={"train": source, "num_test": 10})
    (tmp_path / "site.toml").write_text(
        f"name = 'north'\ndataset = 'd'\n[budget]\nepsilon = 8.0\ndelta = 1e-5\n[data]\npath = '{path.name}'\n"
        + "".join(f"{key} = '{value}'\n" for key, value in odd.options.items())
        + "columns = { text = 'review', label = 'verdict' }\n"
    )
    if isinstance(odd.strict, int):
        train, test = load_scenario(scenario).load_data()
        assert len(train) + len(test) == odd.strict
        assert f"{odd.strict} records" in _data(SiteHome(tmp_path))[1]
        return
    outcome = silotune("simulate", scenario, "--out", tmp_path / "run")
    assert outcome.status == 1
    assert odd.strict in outcome.err
    assert odd.name in outcome.err
    check_said(outcome)
    with pytest.raises(DataError) as caught:
        _data(SiteHome(tmp_path))
    assert odd.strict in str(caught.value)


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd.name)
def test_monitor_labels_every_row_that_can_be_read_and_counts_the_others(
    odd: Odd, odd_file: Callable[[Odd], Path], silotune: Silotune, finished_run: Path
) -> None:
    options = [part for key, value in odd.options.items() for part in (f"--{key}", value)]
    outcome = silotune("monitor", finished_run, odd_file(odd), "--text", "review", "--window", 20, "--json", *options)
    check_said(outcome)
    if odd.read == 0:
        assert outcome.status == 1
        assert outcome.err.startswith("error: ")
        return
    assert outcome.status == 0, outcome.err
    summary = json.loads(outcome.out.splitlines()[-1])
    assert (summary["texts"], sum(summary["skipped"].values())) == (odd.read, odd.left_out)
    assert sum(map(len, summary["skipped_places"].values())) == odd.left_out


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd.name)
def test_deidentify_masks_all_or_writes_nothing(
    odd: Odd, odd_file: Callable[[Odd], Path], silotune: Silotune, tmp_path: Path
) -> None:
    path, out = odd_file(odd), tmp_path / f"masked-{odd.name}"
    options = [part for key, value in odd.options.items() for part in (f"--{key}", value)]
    arguments = ["--column", "review", "--engine", "rules", "--json", *options]
    outcome = silotune("deidentify", path, "--out", out, *arguments)
    check_said(outcome)
    if outcome.status == 0:
        # Only the masked column matters here, and a blank one has nothing to mask.
        assert json.loads(outcome.out)["records"] in (odd.read, odd.read + odd.left_out)
    else:
        assert odd.read == 0 or odd.left_out
        assert not out.exists()


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd.name)
def test_predict_gives_each_line_its_number_or_says_which_it_leaves_out(
    odd: Odd, silotune: Silotune, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(odd.content[:100_000])))
    outcome = silotune("predict", finished_run, "--json")
    assert "Traceback" not in outcome.out + outcome.err
    if outcome.status == 0:
        rows = [json.loads(line)["row"] for line in outcome.out.splitlines()]
        assert rows == sorted({*rows})
    else:
        assert outcome.err.startswith("error: ")


@pytest.mark.parametrize("name", ["pipe.csv", "device.csv"])
@pytest.mark.parametrize("command", ["simulate", "new", "deidentify", "site"])
def test_what_may_have_no_end_is_refused(
    command: str, name: str, silotune: Silotune, scenario_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / name
    if name == "pipe.csv":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    columns = {"text": "review", "label": "verdict"}
    if command == "site":
        with pytest.raises(DataError, match="a pipe or a device"):
            read_records(DataSource(path=str(path), columns=columns))
        return
    arguments: list[object] = {
        "simulate": [scenario_file(data={"train": {"path": name, "columns": columns}}), "--out", tmp_path / "run"],
        "new": [path, "--text", "review", "--label", "verdict", "--out", tmp_path / "new.toml"],
        "deidentify": [path, "--out", tmp_path / "out.csv", "--column", "review", "--engine", "rules"],
    }[command]
    outcome = silotune(command, *arguments)
    assert outcome.status == 1
    assert "a pipe or a device" in outcome.err


def test_monitor_refuses_a_device(silotune: Silotune, finished_run: Path) -> None:
    outcome = silotune("monitor", finished_run, "/dev/zero", "--format", "text")
    assert outcome.status == 1
    assert "is a device, which may have no end" in outcome.err


@pytest.mark.parametrize("name", ["loop.csv", "n" * 300 + ".csv"])
@pytest.mark.parametrize("command", ["simulate", "scenario", "monitor", "new", "deidentify"])
def test_a_path_that_the_system_refuses_ends_with_a_message(
    command: str,
    name: str,
    silotune: Silotune,
    finished_run: Path,
    scenario_file: Callable[..., Path],
    tmp_path: Path,
) -> None:
    path = tmp_path / name
    if name == "loop.csv":
        path.symlink_to(name)
    columns = {"text": "review", "label": "verdict"}
    arguments: list[object] = {
        "simulate": [scenario_file(data={"train": {"path": name, "columns": columns}}), "--out", tmp_path / "run"],
        "scenario": [path, "--out", tmp_path / "run"],
        "monitor": [finished_run, path, "--text", "review"],
        "new": [path, "--text", "review", "--label", "verdict", "--out", tmp_path / "new.toml"],
        "deidentify": [path, "--out", tmp_path / "out.csv", "--column", "review", "--engine", "rules"],
    }[command]
    outcome = silotune("simulate" if command == "scenario" else command, *arguments)
    assert outcome.status in (1, 2)
    assert outcome.err.startswith("error: ")
    assert name[-12:] in outcome.err


def test_settings_with_a_mark_before_utf8_or_nested_without_end(
    silotune: Silotune, scenario_file: Callable[..., Path]
) -> None:
    path = scenario_file()
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_scenario(path).name == "small"
    path.write_text(f"[{'.'.join('a' * 20_000)}]\n")
    outcome = silotune("simulate", path)
    assert outcome.status == 2
    assert "nested too deep" in outcome.err


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("monitor", ["--horizon"]),
        ("monitor", ["--window"]),
        ("audit", ["--tier", 2, "--num-canaries"]),
        ("audit", ["--tier", 2, "--trainings"]),
        ("audit", ["--tier", 3, "--shadows"]),
    ],
)
def test_numbers_of_hundreds_of_digits_are_refused(
    command: str, options: list[object], silotune: Silotune, finished_run: Path
) -> None:
    outcome = silotune(command, finished_run, *options, 10**400)
    assert outcome.status == 2
    assert "(401 characters)" in outcome.err
