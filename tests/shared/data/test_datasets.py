"""Real files in every format, and every way in which they can be wrong."""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from shared.data.datasets import DataSource, dataset_fingerprint, read_records, write_jsonl
from shared.errors import DataError

COLUMNS = {"text": "review", "label": "stars"}
CELL = "Mrs Smith of Elm Road has gout"
ROWS = [
    {"id": "1", "review": 'Said "wow", twice\nand left – fine', "stars": "5"},
    {"id": "2", "review": "Eh.", "stars": "1"},
]
EXPECTED = [{"text": row["review"], "label": row["stars"]} for row in ROWS]


def write_csv(path: Path, *, delimiter: str = ",", encoding: str = "utf-8") -> None:
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, ["id", "review", "stars"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def write_json_lines(path: Path) -> None:
    path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n", encoding="utf-8")


def write_parquet(path: Path, rows: list[dict[str, Any]] | None = None) -> None:
    pq.write_table(pa.Table.from_pylist(rows or ROWS), path)


def pack(write: Callable[[Path], None], path: Path) -> None:
    plain = path.with_suffix("")
    write(plain)
    path.write_bytes(gzip.compress(plain.read_bytes()))


def read(path: Path, columns: dict[str, str] | None = None, **fields: Any) -> list[dict[str, Any]]:
    return read_records(DataSource(path=str(path), columns=columns or COLUMNS, **fields))


def refused(path: Path, content: bytes, columns: dict[str, str] | None = None, **fields: Any) -> str:
    """The message that refuses a file of this content; it must name the file and never quote a cell."""
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(path, columns, **fields)
    message = str(caught.value)
    assert str(path) in message
    assert CELL not in message
    assert caught.value.__cause__ is None  # a chained error may carry the cell
    return message


# --- formats -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.csv", write_csv),
        ("a.CSV", write_csv),
        ("a.tsv", lambda path: write_csv(path, delimiter="\t")),
        ("a.jsonl", write_json_lines),
        ("a.ndjson", write_json_lines),
        ("a.parquet", write_parquet),
    ],
)
def test_formats_agree(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    write(tmp_path / name)
    assert read(tmp_path / name) == EXPECTED


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.csv.gz", write_csv),
        ("a.tsv.gz", lambda path: write_csv(path, delimiter="\t")),
        ("a.jsonl.gz", write_json_lines),
    ],
)
def test_gzipped_formats_agree(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    pack(write, tmp_path / name)
    assert read(tmp_path / name) == EXPECTED


def test_gzip_is_told_by_content_not_by_name(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv.gz")
    assert read(tmp_path / "a.csv.gz") == EXPECTED


def test_delimiter_encoding_and_format_can_be_set(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.txt", delimiter=";", encoding="cp1252")
    assert read(tmp_path / "a.txt", format="csv", delimiter=";", encoding="cp1252") == EXPECTED


def test_byte_order_mark_is_not_part_of_the_first_column(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfreview,stars\nfine,5\n")
    assert read(tmp_path / "a.csv") == [{"text": "fine", "label": "5"}]


def test_relative_path_starts_from_base(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv")
    assert read_records(DataSource(path="a.csv", columns=COLUMNS), base=tmp_path) == EXPECTED


def test_json_and_parquet_keep_types(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"a.b": ["x", "y"], "n": 0}, {"a.b": ["z"], "n": 3}]
    columns = {"tokens": "a.b", "label": "n"}
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    write_parquet(tmp_path / "a.parquet", rows)
    expected = [{"tokens": row["a.b"], "label": row["n"]} for row in rows]
    assert read(tmp_path / "a.jsonl", columns) == read(tmp_path / "a.parquet", columns) == expected


def test_cell_beyond_the_csv_modules_own_limit(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"review,stars\n{'x' * 200_000},1\n", encoding="utf-8")
    assert len(read(tmp_path / "a.csv")[0]["text"]) == 200_000


def test_real_banking_data() -> None:
    path = Path(__file__).parents[3] / "../shared/data/banking77_test.csv.gz"
    if not path.exists():
        pytest.skip("the banking data set is not beside this checkout (../shared/data)")
    records = read(path, {"text": "text", "label": "category"})
    assert len(records) == 3080
    assert len({record["label"] for record in records}) == 77


# --- faults --------------------------------------------------------------------------------------------


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read(tmp_path / "a.csv")
    with pytest.raises(DataError, match="is a folder"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["a.xlsx", "a", "a.gz"])
def test_unknown_ending(tmp_path: Path, name: str) -> None:
    message = refused(tmp_path / name, b"review,stars\nfine,5\n")
    assert "unknown ending" in message
    assert ".parquet" in message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", f"id,Reveiw,stars\n1,{CELL},5\n"),
        ("a.jsonl", json.dumps({"id": 1, "Reveiw": CELL, "stars": 5})),
    ],
)
def test_missing_column_lists_columns_and_nearest_name(tmp_path: Path, name: str, content: str) -> None:
    message = refused(tmp_path / name, content.encode())
    assert "no column 'review'. It has 'id', 'Reveiw', 'stars'." in message
    assert "Did you mean 'Reveiw' for 'review'?" in message


def test_missing_column_in_parquet(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"id": 1, "stars": 5}])
    with pytest.raises(DataError, match=r"no column 'review'. It has 'id', 'stars'\."):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize("first", [f"{CELL},5", '"Gout.",5', "x" * 41 + ",y", "fine,fine"])
def test_first_record_of_a_headerless_file_is_not_shown(tmp_path: Path, first: str) -> None:
    message = refused(tmp_path / "a.csv", f"{first}\n{CELL},1\n".encode())
    assert "first line, of 2 cells, is not shown" in message
    assert first.split(",")[0].strip('"') not in message


def test_wrong_delimiter_is_suggested(tmp_path: Path) -> None:
    message = refused(tmp_path / "a.csv", f"id;review;stars\n1;{CELL};5\n".encode())
    assert "separated by ';'" in message


def test_column_that_occurs_twice(tmp_path: Path) -> None:
    assert "2 columns 'review'" in refused(tmp_path / "a.csv", b"review,review,stars\na,b,5\n")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", b""), ("a.csv", b"\n\n"), ("a.csv", b"review,stars\n"), ("a.jsonl", b"\n")],
)
def test_empty_file(tmp_path: Path, name: str, content: bytes) -> None:
    message = refused(tmp_path / name, content)
    assert "is empty" in message or "holds no rows" in message


def test_empty_parquet(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"review": pa.array([], pa.string()), "stars": pa.array([], pa.int64())}), tmp_path / "a.pq"
    )
    with pytest.raises(DataError, match="holds no rows"):
        read(tmp_path / "a.pq")


def test_blank_cells_are_named_by_row_and_line_only(tmp_path: Path) -> None:
    content = f'review,stars\n"{CELL}\nagain",5\n\n  ,4\n{CELL},\n'
    message = refused(tmp_path / "a.csv", content.encode())
    assert "column 'review' is blank at row 2 (line 5)" in message
    assert "column 'stars' is blank at row 3 (line 6)" in message


@pytest.mark.parametrize("cell", [None, "", " \t", [], "absent"])
def test_blank_json_values(tmp_path: Path, cell: object) -> None:
    row = {"review": CELL} if cell == "absent" else {"review": CELL, "stars": cell}
    lines = [json.dumps({"review": CELL, "stars": 0}), json.dumps(row)]
    assert "column 'stars' is blank at row 2 (line 2)" in refused(tmp_path / "a.jsonl", "\n".join(lines).encode())


def test_blank_parquet_cells(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"review": "a", "stars": 1.0}, {"review": None, "stars": float("nan")}]
    write_parquet(tmp_path / "a.parquet", rows)
    with pytest.raises(DataError, match=r"'review' is blank at row 2; column 'stars' is blank at row 2\."):
        read(tmp_path / "a.parquet")


def test_many_blank_cells_are_counted_not_listed(tmp_path: Path) -> None:
    message = refused(tmp_path / "a.csv", b"review,stars\n" + b"fine,\n" * 1000)
    assert "row 5 (line 6) and 995 more" in message
    assert len(message) < 500 + len(str(tmp_path))


@pytest.mark.parametrize(
    "line",
    [f'"{CELL}', f'"{CELL}" and,1', f"{CELL},1,2", CELL],
    ids=["open", "after", "long", "short"],
)
def test_malformed_csv_names_the_line(tmp_path: Path, line: str) -> None:
    assert ", row 2 (line 3): " in refused(tmp_path / "a.csv", f"review,stars\nfine,5\n{line}\n".encode())


@pytest.mark.parametrize(
    "line",
    [f'{{"review": "{CELL}"', f'"{CELL}"', f'["{CELL}"]', '{"stars": NaN}', "null", "[" * 100_000],
)
def test_malformed_json_names_the_line(tmp_path: Path, line: str) -> None:
    message = refused(tmp_path / "a.jsonl", f'{{"review": "a", "stars": 1}}\n\n{line}\n'.encode())
    assert ", row 2 (line 3): " in message
    assert "one object per line" in message


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_wrong_encoding(tmp_path: Path, name: str) -> None:
    content = b"review,stars\nfine,5\n" if name == "a.csv" else b'{"review": "fine", "stars": 5}\n'
    line = f"{CELL} café,5\n" if name == "a.csv" else f'{{"review": "{CELL} café", "stars": 5}}\n'
    message = refused(tmp_path / name, content + line.encode("latin-1"))
    place = len(content) + line.index("é")
    assert f"row 2 (line {3 if name == 'a.csv' else 2}): it is not utf-8 at byte {place:,}." in message
    assert "latin-1" in message


def test_damaged_parquet(tmp_path: Path) -> None:
    write_parquet(tmp_path / "good.parquet", [{"review": CELL, "stars": 5}])
    whole = (tmp_path / "good.parquet").read_bytes()
    for content in (whole[:-20], b"", b"review,stars\nfine,5\n", whole[:8] + bytes(40) + whole[48:]):
        assert "cannot be read as Parquet" in refused(tmp_path / "a.parquet", content)


def test_gzip_that_is_cut_short(tmp_path: Path) -> None:
    packed = gzip.compress(b"review,stars\n" + b"fine,5\n" * 1000)
    assert "gzip" in refused(tmp_path / "a.csv.gz", packed[: len(packed) // 2])


@pytest.mark.parametrize(
    "fields",
    [
        {"columns": {}},
        {"columns": {"text": " "}},
        {"path": ""},
        {"delimiter": ";;"},
        {"delimiter": '"'},
        {"delimiter": ";", "format": "jsonl"},
        {"encoding": "utf-7.5"},
        {"encoding": "base64"},
        {"sheet": "1"},
    ],
)
def test_source_refuses(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DataSource.model_validate({"path": "a.csv", "columns": COLUMNS} | fields)


# --- fingerprint and writing ---------------------------------------------------------------------------

VALUES = st.one_of(st.none(), st.text(), st.integers(), st.floats(allow_nan=False), st.lists(st.text(), max_size=3))
RECORDS = st.lists(st.dictionaries(st.text(min_size=1), VALUES, max_size=3), max_size=6)


@settings(deadline=None)
@given(records=RECORDS, seed=st.integers(0, 9))
def test_fingerprint_ignores_order(records: list[dict[str, Any]], seed: int) -> None:
    other = [dict(reversed(record.items())) for record in records]
    random.Random(seed).shuffle(other)
    assert dataset_fingerprint(other) == dataset_fingerprint(records)


@pytest.mark.parametrize(
    "changed",
    [
        [],
        [{"text": "a", "label": "1"}],
        [{"text": "a", "label": "1"}, {"text": "b", "label": "2"}, {"text": "b", "label": "2"}],
        [{"text": "a", "label": "2"}, {"text": "b", "label": "1"}],
        [{"text": "a", "label": "1"}, {"text": "b ", "label": "2"}],
        [{"text": "a", "label": "1"}, {"text": "b", "tag": "2"}],
        [{"text": "a", "label": "1"}, {"text": "b", "label": ["2"]}],
        [{"text": "a", "label": "1"}, {"text": "b", "label": None}],
    ],
)
def test_fingerprint_sees_changes(changed: list[dict[str, Any]]) -> None:
    records = [{"text": "a", "label": "1"}, {"text": "b", "label": "2"}]
    assert dataset_fingerprint(changed) != dataset_fingerprint(records)


def test_fingerprint_counts_repeats() -> None:
    assert dataset_fingerprint([{"text": "a"}] * 3) != dataset_fingerprint([{"text": "a"}])


def test_fingerprint_is_a_contract() -> None:
    """Ledgers keep it, so it may never change for the same data."""
    records = [{"text": "café", "label": 1}, {"text": "b", "label": 2}]
    assert dataset_fingerprint(records) == "f8439d0e4413a0b18543acff7fd3a2ee01d5bc2454cf26edda848e04d15e7ab2"


def test_fingerprint_is_the_same_from_csv_jsonl_and_parquet(tmp_path: Path) -> None:
    rows = [{"review": "a – b", "stars": 1}, {"review": "c", "stars": 2}]
    (tmp_path / "a.csv").write_text("stars,review\n2,c\n1,a – b\n", encoding="utf-8")
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_parquet(tmp_path / "a.parquet", rows)
    prints = {dataset_fingerprint(read(tmp_path / f"a.{end}")) for end in ("csv", "jsonl", "parquet")}
    assert len(prints) == 1


def test_write_jsonl_round_trips(tmp_path: Path) -> None:
    records = [{"text": "é\u2028\n", "label": 1}, {"text": "b", "label": 2}]
    write_jsonl(tmp_path / "new" / "a.jsonl", records)
    assert read(tmp_path / "new" / "a.jsonl", {"text": "text", "label": "label"}) == records


@pytest.mark.parametrize("value", [float("nan"), CELL.encode(), "\ud800"])
def test_write_jsonl_refuses_and_keeps_the_old_file(tmp_path: Path, value: object) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"text": "old"}])
    with pytest.raises(DataError, match="record 2") as caught:
        write_jsonl(path, [{"text": "new"}, {"text": value}])
    assert CELL not in str(caught.value)
    assert read(path, {"text": "text"}) == [{"text": "old"}]
