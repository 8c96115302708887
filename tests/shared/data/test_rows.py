"""The one row reader: equal bytes, equal rows; odd files are read or refused by number, never by text."""

from __future__ import annotations

import csv
import gzip
import io
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shared.data import rows, text_lines
from shared.data.cells import value_fault
from shared.data.datasets import DataSource, FileFacts, read_records
from shared.data.rows import SWALLOWED, Fault, Quoting, Row, RowFormat, RowReader
from shared.data.text_stream import Files, Skipped, TextFormat
from shared.errors import DataError

NAMED = "Mrs Smith of Elm Road has gout"
CELLS = st.text(alphabet=st.sampled_from('ab",;\n\r \té北'), max_size=6)


def read(raw: bytes, *, size: int = 10**9, **how: Any) -> list[Row | Fault]:
    reader = RowReader("f", RowFormat(**{"kind": "csv", **how}))
    found = [row for at in range(0, len(raw), size) for row in reader.feed(raw[at : at + size])]
    return [*found, *reader.finish()]


def values(found: Sequence[Row | Fault]) -> list[list[str]]:
    assert all(isinstance(row, Row) for row in found), found
    return [list(row.values) for row in found if isinstance(row, Row)]


# --- the same rows as the csv module, in any pieces ---


@settings(deadline=None, max_examples=300)
@given(
    table=st.lists(st.lists(CELLS, min_size=2, max_size=2), max_size=6),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    size=st.integers(1, 9),
    delimiter=st.sampled_from([",", ";", "\t"]),
)
@example(table=[["a", '"'], ['"', "b"]], end="\r", size=1, delimiter=",")
def test_what_the_csv_module_writes_is_read_back(table: list[list[str]], end: str, size: int, delimiter: str) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([["one", "two"], *table])
    found = read(text.getvalue().encode(), size=size, delimiter=delimiter, quoting="trusted")
    assert values(found) == table
    assert [row.number for row in found] == list(range(1, len(table) + 1))


@settings(deadline=None, max_examples=300)
@given(raw=st.text(alphabet=st.sampled_from('ab",\n\r \0é'), max_size=60), size=st.integers(1, 7))
def test_pieces_do_not_matter_and_every_line_is_in_a_row_or_a_fault(raw: str, size: int) -> None:
    content = b"one,two\n" + raw.encode()
    whole = read(content)
    assert read(content, size=size) == whole
    assert read(gzip.compress(content), size=size) == whole
    assert read(b"\xef\xbb\xbf" + content, size=size) == whole
    assert [row.number for row in whole] == list(range(1, len(whole) + 1))


@settings(deadline=None, max_examples=100)
@given(raw=st.binary(max_size=80), size=st.integers(1, 9), kind=st.sampled_from(["csv", "jsonl", "text"]))
def test_no_bytes_at_all_end_in_anything_but_rows_faults_or_a_data_error(raw: bytes, size: int, kind: str) -> None:
    try:
        found = read(raw, size=size, kind=kind)
    except DataError:
        return
    assert all(isinstance(row, Row | Fault) for row in found)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp037", "gb18030", "shift_jis"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(encoding: str, end: str) -> None:
    letters = "é" if encoding == "cp037" else "北京"
    raw = end.join(["a,b", f"{letters},1", '"x', 'y",2']).encode(encoding)
    for size in (1, 3, 100):
        found = read(raw, size=size, encoding=encoding)
        assert values(found) == [[letters, "1"], [f"x{end}y", "2"]]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_decides(encoding: str) -> None:
    for declared in ("utf-8", "latin-1", "utf-16-le"):
        assert values(read("a,b\n北,1\n".encode(encoding), encoding=declared)) == [["北", "1"]]


# --- quotes that swallow rows, and cells that really go on over lines ---

LABELS = ("routine", "urgent")


def notes(number: int, seed: int = 0) -> list[list[str]]:
    draw = random.Random(seed)
    return [[f"note {i} is {draw.choice(['well', 'bad'])}", draw.choice(LABELS)] for i in range(number)]


def swallowing(first: int, last: int, total: int = 400, *, end: str = "\n", columns: int = 2) -> bytes:
    """A file in which a stray quote opens in row `first` and one closes in row `last`."""
    table = [[*row, *["x"] * (columns - 2)] for row in notes(total)]
    table[first - 1][0] = '"' + table[first - 1][0]
    table[last - 1][0] += '"'
    header = ["note", "triage", *[f"c{i}" for i in range(columns - 2)]]
    return end.join(",".join(row) for row in [header, *table]).encode()


@pytest.mark.parametrize(("first", "last"), [(10, 300), (1, 300), (1, 4), (30, 31), (30, 32), (200, 203), (399, 400)])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("columns", [2, 4])
def test_a_stray_quote_swallows_nothing(first: int, last: int, end: str, columns: int) -> None:
    found = read(swallowing(first, last, end=end, columns=columns))
    faults = [row for row in found if isinstance(row, Fault)]
    assert len(found) == 400
    assert [fault.number for fault in faults] == [first]
    assert faults[0].reason == SWALLOWED
    assert f"spans {last - first + 1} lines (to line {last + 1})" in faults[0].detail


def test_a_stray_quote_that_is_never_closed_swallows_nothing() -> None:
    raw = swallowing(10, 300).replace(b'"\n', b"\n").replace(b'",', b",")
    found = read(raw)
    assert [row.number for row in found if isinstance(row, Fault)] == [10]
    assert len(found) == 400


def test_one_column_has_no_separators_so_lines_are_counted() -> None:
    lines = [f"note {i}, fine" for i in range(400)]
    lines = [line.replace(",", "") for line in lines]
    lines[99], lines[199] = '"' + lines[99], lines[199] + '"'
    found = read("\n".join(["note", *lines]).encode())
    assert [row.number for row in found if isinstance(row, Fault)] == [100]
    assert len(found) == 400


NOTES = [
    "Pt seen, no pain.\nBP 120/80, HR 72, afebrile.\nPlan: review in two weeks, bloods, scan.\nSigned, Dr X",
    "Labs:\nNa,140\nK,4.2\nCl,101\nall fine",
    "One line, then\nanother, and\n\na third, with\n1,200 cells",
    "a,b\nc,d",
    'He said "no, thanks"\nand left, well',
    "Medication\n" + "\n".join(f"- drug {i}, {i} mg, daily" for i in range(60)),
]


@pytest.mark.parametrize("note", NOTES)
@pytest.mark.parametrize("header", [["note", "triage"], ["id", "note", "triage"]])
@pytest.mark.parametrize("before", [20, 60])
def test_a_real_note_of_many_lines_is_read(note: str, header: list[str], before: int) -> None:
    table = [[str(i), *row] for i, row in enumerate(notes(before))] + [["7", note, "urgent"]]
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *[row[-len(header) :] for row in table]])
    found = read(text.getvalue().encode())
    assert values(found)[-1][-2] == note
    assert found[-1].lines == 1 + note.count("\n")  # type: ignore[union-attr]


def test_trusted_and_none_are_what_they_say() -> None:
    raw = swallowing(10, 300)
    trusted = read(raw, quoting="trusted")
    assert len(trusted) == 110
    assert [row.lines for row in trusted if isinstance(row, Row)][9] == 291
    plain = read(raw, quoting="none")
    assert values(plain)[9][0].startswith('"note 9')
    assert len(plain) == 400
    tsv = b'note\ttriage\n"Pt denies" pain\troutine\n5" wound\turgent\n'
    assert [type(row) for row in read(tsv, delimiter="\t")] == [Fault, Row]
    assert values(read(tsv, delimiter="\t", quoting="none")) == [
        ['"Pt denies" pain', "routine"],
        ['5" wound', "urgent"],
    ]


# --- faults ---


@pytest.mark.parametrize(
    ("raw", "numbers", "said"),
    [
        (b"a,b\n1,2\n1,2,3\n1\n", [2, 3], "cells where the header has 2"),
        (b'a,b\n"x"y,2\n1,2\n', [1], "malformed CSV"),
        (b"a,b\n1,2\n\xff\xfe,2\n1,\xe9\n", [2, 3], "not utf-8 at byte"),
        (b"a,b\n1,2\n1\0,2\n", [2], "NUL"),
        (b'a,b\n"x\n\xffy",2\n1,2\n', [1], "not utf-8"),
    ],
)
def test_faulty_rows_have_numbers_and_the_others_stay(raw: bytes, numbers: list[int], said: str) -> None:
    found = read(raw)
    faults = [row for row in found if isinstance(row, Fault)]
    assert [fault.number for fault in faults] == numbers
    assert said in faults[0].detail
    assert [row.number for row in found] == list(range(1, len(found) + 1))


def test_a_byte_offset_is_that_of_the_file() -> None:
    raw = b"\xef\xbb\xbfa,b\r\n1,2\r\nxx\xff,2\r\n"
    (fault,) = [row for row in read(raw, size=2) if isinstance(row, Fault)]
    assert f"at byte {raw.index(0xFF)}." in fault.detail


@pytest.mark.parametrize("start", [b"PK\x03\x04abc", b"%PDF-1.7", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", b"BZh91AY"])
def test_a_file_without_lines_is_called_by_its_kind(start: bytes) -> None:
    with pytest.raises(DataError, match="not text"):
        read(start + bytes(50))


def test_gzip_of_many_members_padding_and_a_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = gzip.compress(b"a,b\n1,2\n"), gzip.compress(b"3,4\n")
    assert values(read(one + two + bytes(100), size=5)) == [["1", "2"], ["3", "4"]]
    assert [type(row) for row in read(one + two[:-5], size=5)] == [Row, Row, Fault]
    # A small file that unpacks to much is unpacked in small parts.
    most = 0
    made = text_lines.LineReader._plain

    def watch(self: text_lines.LineReader, piece: bytes) -> list[text_lines.Line]:
        nonlocal most
        most = max(most, len(piece))
        return made(self, piece)

    monkeypatch.setattr(text_lines.LineReader, "_plain", watch)
    read(gzip.compress(b"a,b\n" + b"1,2\n" * 500_000))
    assert most <= text_lines.PIECE


def test_rows_that_are_too_long_are_faults_and_the_next_ones_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (rows, text_lines):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 1000)
    raw = b"a,b\n" + b"x" * 5000 + b",1\nfine,2\n"
    for size in (7, 1001, 10**6):
        found = read(raw, size=size)
        assert [type(row) for row in found] == [Fault, Row]
        assert "longer than" in found[0].detail  # type: ignore[union-attr]


# --- values ---


@pytest.mark.parametrize(
    ("role", "value", "said"),
    [
        ("text", 5, "a number where text is expected"),
        ("text", 5.5, "a number"),
        ("text", True, "a truth value"),
        ("text", {"a": NAMED}, "an object"),
        ("text", [NAMED], "a list"),
        ("text", NAMED.encode(), "bytes"),
        ("text", "\ud800", "surrogate"),
        ("text", "a\0b", "NUL"),
        ("pair", 5, "a number"),
        ("prompt", {}, "an object"),
        ("response", b"x", "bytes"),
        ("label", True, "a truth value where text or a whole number"),
        ("label", 1.0, "a number"),
        ("label", "\udfff", "surrogate"),
        ("tokens", [NAMED, 5], "a list with a number"),
        ("tokens", ["\ud800"], "surrogate"),
        ("tags", {"a": 1}, "an object"),
        ("score", True, "a truth value"),
        ("score", [1], "a list"),
        ("site", b"x", "bytes"),
        ("site", {"a": ["\ud800"]}, "surrogate"),
        ("person", "\ud800", "surrogate"),
    ],
)
def test_values_are_never_turned_into_text(role: str, value: object, said: str) -> None:
    fault = value_fault(role, value)
    assert fault is not None
    assert said in fault
    assert NAMED not in fault


@pytest.mark.parametrize(
    ("role", "value"),
    [
        ("text", "fine 北京 😀"),
        ("label", 3),
        ("label", "3"),
        ("tokens", ["a", "b"]),
        ("tokens", "a b"),
        ("score", 5),
        ("score", "4.5"),
        ("pixels", [[0, 255], [1, 2]]),
        ("site", 7),
    ],
)
def test_what_a_role_may_hold(role: str, value: object) -> None:
    assert value_fault(role, value) is None


def test_a_key_twice_in_an_object_is_refused() -> None:
    (fault,) = read(f'{{"a": 1, "a": "{NAMED}"}}'.encode(), kind="jsonl")
    assert isinstance(fault, Fault)
    assert "stands twice" in fault.detail


# --- one reader for all ---

FILES: dict[str, bytes] = {
    "lf.csv": b"note,triage\na,x\nb,y\n",
    "crlf.csv": b"note,triage\r\na,x\r\nb,y\r\n",
    "cr.csv": b"note,triage\ra,x\rb,y\r",
    "bom.csv": b"\xef\xbb\xbfnote,triage\na,x\nb,y\n",
    "utf16.csv": "note,triage\na,x\nb,y\n".encode("utf-16"),
    "packed.csv.gz": gzip.compress(b"note,triage\na,x\nb,y\n"),
    "blank.csv": b"\n\nnote,triage\n\na,x\n\n\nb,y\n\n   \n",
    "tabs.tsv": b"note\ttriage\na\tx\nb\ty",
    "cr.jsonl": b'{"note": "a", "triage": "x"}\r{"note": "b", "triage": "y"}\r',
    "packed.jsonl.gz": gzip.compress(b'{"note": "a", "triage": "x"}\n{"note": "b", "triage": "y"}'),
}


@pytest.mark.parametrize("name", FILES)
def test_every_command_reads_the_same_rows(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(FILES[name])
    records = read_records(DataSource(path=str(path), columns={"text": "note", "label": "triage"}))
    assert [record["text"] for record in records] == ["a", "b"]
    skipped = Skipped()
    files = Files([path], TextFormat(text="note"), skipped)
    items = [item for part in (files.read(), files.finish()) for found in part for item in found]
    assert [(item.text, item.row) for item in items] == [("a", 1), ("b", 2)]
    assert not skipped.total


def test_facts_are_sizes_and_places(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f'note,triage\n{NAMED},x\n"a\nb\nc",y\n')
    facts = FileFacts()
    read_records(DataSource(path=str(path), columns={"text": "note", "label": "triage"}), facts=facts)
    assert facts.line() == (
        f", longest text {len(NAMED)} characters (row 1 (line 2)), most lines in one row 3 (row 2 (line 3))"
    )


@pytest.mark.parametrize("quoting", ["checked", "trusted", "none"])
def test_twenty_megabytes_in_one_record(tmp_path: Path, quoting: Quoting) -> None:
    path = tmp_path / "a.csv"
    long = "pain and fever " * (20 * 2**20 // 15)
    path.write_text(f"note,triage\n{long},x\nshort,y\n")
    records = read_records(DataSource(path=str(path), columns={"text": "note", "label": "triage"}, quoting=quoting))
    assert [len(record["text"]) for record in records] == [len(long), 5]
