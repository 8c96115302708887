"""`silotune deidentify`: every format, other columns untouched, the input never written, and a report without any text."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import Outcome

Command = Callable[..., Outcome]
NOTE, CLEAN = "Mr Fezziwig, born 5 May 1950, tel 020 7946 0958", "nothing of note"
MASKED = "Mr [NAME], born [DATE], tel [PHONE]"
RULES = ("--engine", "rules")


def test_csv(silotune: Command, tmp_path: Path) -> None:
    source, out, report = tmp_path / "a.csv", tmp_path / "b.csv", tmp_path / "report.json"
    content = f'id,note,"who, else"\r\n007,"{NOTE}","Mr Fezziwig, ""x"""\r\n\r\n008,{CLEAN},\r\n'
    source.write_text(content, newline="")
    before = source.read_bytes()
    outcome = silotune("deidentify", source, "--out", out, "--column", "note", "--report", report, *RULES)
    assert outcome.status == 0, outcome.err
    assert source.read_bytes() == before
    with out.open(newline="") as lines:
        rows = list(csv.reader(lines))
    assert rows == [["id", "note", "who, else"], ["007", MASKED, 'Mr Fezziwig, "x"'], ["008", CLEAN, ""]]
    assert out.read_bytes().count(b"\r\n") == 3
    said = json.loads(report.read_text())
    assert (said["engine"], said["records"], said["records_touched"]) == ("rules", 2, 1)
    assert {kind: row["places"] for kind, row in said["kinds"].items() if row["places"]} == {
        "name": 1,
        "date": 1,
        "phone": 1,
    }
    assert "[NAME]" in outcome.out
    for secret in ("Fezziwig", "1950", "7946", "note", str(source)):
        assert secret not in report.read_text()
    for secret in ("Fezziwig", "1950", "7946"):
        assert secret not in outcome.out + outcome.err


def test_tsv_and_gzip_and_encoding(silotune: Command, tmp_path: Path) -> None:
    source, out = tmp_path / "a.tsv.gz", tmp_path / "b.tsv.gz"
    source.write_bytes(gzip.compress(f"a\tnote\né\t{NOTE}\n".encode("latin-1")))
    outcome = silotune("deidentify", source, "--out", out, "--column", "note", "--encoding", "latin-1", *RULES)
    assert outcome.status == 0, outcome.err
    assert gzip.decompress(out.read_bytes()).decode("latin-1") == f"a\tnote\né\t{MASKED}\n"
    again = tmp_path / "c.tsv.gz"
    silotune("deidentify", source, "--out", again, "--column", "note", "--encoding", "latin-1", *RULES)
    assert again.read_bytes() == out.read_bytes()


def test_jsonl_keeps_every_other_byte(silotune: Command, tmp_path: Path) -> None:
    source, out = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    lines = [
        f'{{"n": 1.50e+2 ,  "note": "{NOTE}", "x": {{"note": "Mr Fezziwig"}}, "u": "\\u00e9"}}',
        "",
        '{"words":["Mr","Fezziwig","!"],"note":"fine","big":123456789012345678901234567890}',
        '{"note": null}',
    ]
    source.write_text("\n".join(lines) + "\n")
    outcome = silotune("deidentify", source, "--out", out, "--column", "note", "--column", "words", "--json", *RULES)
    assert outcome.status == 0, outcome.err
    assert out.read_text().splitlines() == [
        lines[0].replace(NOTE, MASKED),
        "",
        '{"words":["Mr", "[NAME]", "!"],"note":"fine","big":123456789012345678901234567890}',
        lines[3],
    ]
    assert json.loads(outcome.out)["records_touched"] == 2


def test_parquet_keeps_schema_and_other_columns(silotune: Command, tmp_path: Path) -> None:
    source, out = tmp_path / "a.parquet", tmp_path / "b.parquet"
    schema = pa.schema(
        [
            ("id", pa.int16()),
            ("note", pa.large_string()),
            ("words", pa.list_(pa.string())),
            ("when", pa.timestamp("us")),
        ],
        metadata={"made": "here"},
    )
    rows = [
        {"id": 1, "note": NOTE, "words": ["Mr", "Fezziwig"], "when": 5},
        {"id": 2, "note": None, "words": None, "when": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), source, compression="zstd")
    outcome = silotune("deidentify", source, "--out", out, "--column", "note", "--column", "words", *RULES)
    assert outcome.status == 0, outcome.err
    table = pq.read_table(out)
    assert table.schema.equals(pq.read_table(source).schema, check_metadata=True)
    assert table.column("note").to_pylist() == [MASKED, None]
    assert table.column("words").to_pylist() == [["Mr", "[NAME]"], None]
    assert table.drop_columns(["note", "words"]).equals(pq.read_table(source).drop_columns(["note", "words"]))
    assert pq.ParquetFile(out).metadata.row_group(0).column(0).compression == "ZSTD"


def test_plain_text_is_one_record(silotune: Command, tmp_path: Path) -> None:
    source, out = tmp_path / "a.txt", tmp_path / "b.txt"
    source.write_text("Please call.\n\nKind regards,\nEbenezer Fezziwig\n\nPS: Fezziwig is late\n")
    assert silotune("deidentify", source, "--out", out, "--json", *RULES).status == 0
    assert out.read_text() == "Please call.\n\nKind regards,\n[NAME]\n\nPS: [NAME] is late\n"


def test_kinds(silotune: Command, tmp_path: Path) -> None:
    source, out = tmp_path / "a.txt", tmp_path / "b.txt"
    source.write_text(NOTE)
    assert silotune("deidentify", source, "--out", out, "--kind", "date", "--kind", "phone").status == 0
    assert out.read_text() == "Mr Fezziwig, born [DATE], tel [PHONE]"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("a.csv", "--out", "a.csv", "--column", "note"), "never overwritten"),
        (("a.csv", "--out", "link.csv", "--column", "note"), "never overwritten"),
        (("a.csv", "--out", "b.csv", "--column", "note", "--report", "a.csv"), "never overwritten"),
        (("a.csv", "--out", "b.csv", "--column", "note", "--report", "b.csv"), "are both"),
        (("a.csv", "--out", "b.jsonl", "--column", "note"), "another format"),
        (("a.csv", "--out", "b.csv"), "--column NAME"),
        (("a.csv", "--out", "b.csv", "--column", "notes"), "Did you mean 'note'"),
        (("a.csv", "--out", "b.csv", "--column", "note", "--kind", "nam"), "kinds"),
        (("a.csv", "--out", "b.csv", "--column", "note", "--model", "en"), "LANGUAGE=NAME"),
        (("a.csv", "--out", "b.csv", "--column", "note", "--model", "en=a", "--model", "en=b"), "names 'en' twice"),
        (("a.csv", "--out", "b.csv", "--column", " "), "expected text that is not blank"),
        (("a.csv", "--out", "b.csv", "--column", "note", "--encoding", "utf-99"), "unknown text encoding"),
        (("a.txt", "--out", "b.txt", "--column", "note"), "no columns"),
        (("n.jsonl", "--out", "b.jsonl", "--column", "note"), "line 2"),
        (("gone.csv", "--out", "b.csv", "--column", "note"), "does not exist"),
        (("a.doc", "--out", "b.doc", "--column", "note"), "unknown ending"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(
    silotune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text(f'note\n"{NOTE}"\n')
    Path("link.csv").hardlink_to("a.csv")
    Path("a.txt").write_text(NOTE)
    Path("a.doc").write_text(NOTE)
    Path("n.jsonl").write_text('{"note": "fine"}\n{"note": 5550132}\n')
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    outcome = silotune("deidentify", *arguments)
    assert outcome.status != 0
    assert said in outcome.err
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before
    assert "Fezziwig" not in outcome.err
    assert "5550132" not in outcome.err
