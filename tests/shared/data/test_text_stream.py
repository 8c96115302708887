"""Texts read piece by piece: the same whatever the pieces, once each, and never shown."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest

from shared.data import rows, text_lines
from shared.data.text_stream import Files, Item, Skipped, TextFormat, TextReader, parse_time, read_stream
from shared.errors import ConfigError, DataError

CSV = (
    '\ufeffid,text,when\r\n1,"a ""quiet"" joy,\r\nit says",2026-03-01\r\n2,5" pipe,2026-03-02\r\n\r\n3,last,2026-03-03'
)
CSV_ITEMS = [('a "quiet" joy,\r\nit says', "2026-03-01"), ('5" pipe', "2026-03-02"), ("last", "2026-03-03")]


def read(kind: str, raw: bytes, size: int, **how: Any) -> tuple[list[Item], Skipped]:
    skipped = Skipped()
    reader = TextReader("f", kind, TextFormat(**how), skipped)
    items = [item for at in range(0, len(raw), size) for item in reader.feed(raw[at : at + size])]
    return items + reader.finish(), skipped


def everything(files: Files) -> list[str]:
    return [item.text for items in files.read() for item in items]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_pieces_of_any_size_give_the_same_texts(size: int) -> None:
    items, skipped = read("csv", CSV.encode(), size, time="when")
    assert items == [Item(text, parse_time(time), row) for row, (text, time) in enumerate(CSV_ITEMS, start=1)]
    lines = "\ufeffschön \r\n\n  two\nno end".encode()
    assert [item.text for item in read("text", lines, size)[0]] == ["schön", "two", "no end"]
    rows = b'{"text": "a", "t": 5}\n\n{"t": 6.5, "text": "b\\n"}'
    assert read("jsonl", rows, size, time="t")[0] == [Item("a", 5.0, 1), Item("b\n", 6.5, 2)]
    assert skipped.counts == {}


def test_what_cannot_be_read_is_left_out_and_counted() -> None:
    rows = [
        b'{"text": "one"}',
        b'{"text": "PRIVATE"',
        b"[1]",
        b'{"text": "\xff"}',
        b'{"other": "PRIVATE"}',
        b'{"text": 7}',
        b'{"text": " "}',
        b'{"text": "two"}',
    ]
    items, skipped = read("jsonl", b"\n".join(rows), 5)
    assert [item.text for item in items] == ["one", "two"]
    assert skipped.places == {
        "malformed": ["f, row 2 (line 2)", "f, row 3 (line 3)"],
        "not in the encoding": ["f, row 4 (line 4)"],
        "without a text": ["f, row 5 (line 5)", "f, row 7 (line 7)"],
        "with a number where text is expected": ["f, row 6 (line 6)"],
    }
    assert skipped.total == sum(skipped.counts.values()) == 6
    assert [item.row for item in items] == [1, 8]
    items, skipped = read("csv", b'text,n\none,1\nPRIVATE\n"a"b,2\ntwo,2\n"never closed', 4)
    assert [item.text for item in items] == ["one", "two"]
    assert skipped.counts == {"malformed": 3}
    items, skipped = read("csv", b"text,t\none,2026-01-01\ntwo,soon\n", 9, time="t")
    assert ([item.text for item in items], skipped.counts) == (["one"], {"without a readable time": 1})


@pytest.mark.parametrize("kind", ["text", "csv"])
def test_a_row_without_end_is_not_held(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (text_lines, rows):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 10_000)
    skipped = Skipped()
    reader = TextReader("f", kind, TextFormat(), skipped)
    reader.feed(b"text\n" + b'"' * (kind == "csv"))
    for _ in range(30):
        reader.feed(b"x" * 999 + (b"\n" if kind == "csv" else b"x"))
        lines = reader._rows._lines
        assert sum(map(len, lines._parts)) + sum(len(line.text) for line in reader._rows._open) <= 12_000
    after = reader.feed(b"\nfine\n") + reader.finish()
    assert after[-1].text == "fine"
    assert skipped.counts["too long"] >= 1


@pytest.mark.parametrize(
    ("raw", "how"),
    [
        (b"review,n\nx,1\n", {}),
        (b"text,text\nx,1\n", {}),
        (b"text;when\nx;1\n", {}),
        (b"text,n\nx,1\n", {"time": "when"}),
        (b"a private sentence,1\n", {}),
    ],
)
def test_a_header_that_lacks_a_column_is_named_but_not_shown(raw: bytes, how: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"--text|--time") as error:
        read("csv", raw, 100, **how)
    assert "private" not in str(error.value)
    assert "review" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("2026-03-01", datetime(2026, 3, 1, tzinfo=UTC)),
        ("20260301", datetime(2026, 3, 1, tzinfo=UTC)),
        (" 2026-03-01T12:00:00Z ", datetime(2026, 3, 1, 12, tzinfo=UTC)),
        ("2026-03-01 12:00:00+02:00", datetime(2026, 3, 1, 10, tzinfo=UTC)),
        (1772366400, datetime(2026, 3, 1, 12, tzinfo=UTC)),
        ("1772366400", datetime(2026, 3, 1, 12, tzinfo=UTC)),
        (1772366400000, datetime(2026, 3, 1, 12, tzinfo=UTC)),
        ("1772366400.0", datetime(2026, 3, 1, 12, tzinfo=UTC)),
        (datetime(2026, 3, 1, 12), datetime(2026, 3, 1, 12, tzinfo=UTC)),
        ("1000-01-01", datetime(1000, 1, 1, tzinfo=UTC)),
        ("8999-12-31T23:59:59Z", datetime(8999, 12, 31, 23, 59, 59, tzinfo=UTC)),
    ],
)
def test_times(value: object, expected: datetime) -> None:
    assert parse_time(value) == expected.timestamp()


NO_TIMES = [None, True, "", "soon", "nan", "inf", "2026-13-01", 1e300, [], {}, "1_772_366_400"]
TOO_FAR = ["9999-12-31T23:59:59Z", "0001-01-01", "0001-01-01T00:00:00+14:00", "9000-01-01", "0999-12-31", datetime.max]


@pytest.mark.parametrize("value", [*NO_TIMES, *TOO_FAR, date.min, -4e10, 9e14])
def test_what_is_no_time(value: object) -> None:
    assert parse_time(value) is None


def test_a_row_from_beyond_the_calendar_is_left_out_and_counted() -> None:
    raw = b"text,when\nx,9999-12-31T23:59:59Z\ny,2026-03-01\nz,0001-01-01\n"
    items, skipped = read("csv", raw, 100, time="when")
    assert [item.text for item in items] == ["y"]
    assert skipped.counts == {"without a readable time": 2}


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"delimiter": ";;"}, "--delimiter"),
        ({"encoding": "utf-99"}, "unknown"),
        ({"format": "text", "time": "t"}, "plain text has none"),
    ],
)
def test_bad_formats_are_refused(wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        TextFormat(**wrong)


class TestFiles:
    def test_new_files_and_appended_lines_come_once(self, tmp_path: Path) -> None:
        files = Files([tmp_path], TextFormat(), Skipped())
        assert everything(files) == []
        (tmp_path / "b.txt").write_text("b1\nb2")
        (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a1"}) + "\n")
        (tmp_path / "c.pdf").write_text("x\n")
        (tmp_path / ".d.txt").write_text("x\n")
        (tmp_path / "folder").mkdir()
        assert everything(files) == ["a1", "b1"], "b2 may go on"
        assert files.ignored == 1
        assert everything(files) == []
        with (tmp_path / "b.txt").open("a") as file:
            file.write(" and more\nb3\n")
        assert everything(files) == ["b2 and more", "b3"]
        with (tmp_path / "b.txt").open("a") as file:
            file.write("b4")
        assert everything(files) == []
        assert [item.text for items in files.finish() for item in items] == ["b4"]

    def test_a_renamed_file_is_not_read_again_and_a_new_one_is(self, tmp_path: Path) -> None:
        path = tmp_path / "mail.log"
        path.write_text("one\n")
        files = Files([tmp_path], TextFormat(), Skipped())
        assert everything(files) == ["one"]
        with path.open("a") as file:
            file.write("two\n")
        path.rename(tmp_path / "mail.log.1")
        path.write_text("three\n")
        assert everything(files) == ["three", "two"]

    def test_a_file_that_is_cut_or_replaced_is_read_from_its_start(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_text("one\ntwo\n")
        files = Files([path], TextFormat(), Skipped())
        assert everything(files) == ["one", "two"]
        path.write_text("new\n")
        assert everything(files) == ["new"]
        path.write_text("other and longer\n")  # the same inode, not shorter
        assert everything(files) == ["other and longer"]

    def test_a_file_that_goes_ends_its_last_line(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_text("one\ntwo")
        files = Files([tmp_path], TextFormat(), Skipped())
        assert everything(files) == ["one"]
        path.unlink()
        assert everything(files) == ["two"]
        assert files._places == {}

    def test_a_bad_file_does_not_end_a_long_watch(self, tmp_path: Path) -> None:
        skipped = Skipped()
        files = Files([tmp_path], TextFormat(), skipped)
        (tmp_path / "a.csv").write_text("review\nPRIVATE\n")
        with pytest.raises(DataError, match="no column 'text'"):
            everything(files)
        (tmp_path / "a.csv").write_text("text\nfine\n")
        assert everything(files) == ["fine"]
        (tmp_path / "b.csv").write_text("review\nPRIVATE\n")
        (tmp_path / "c.csv").write_text("text\nfine too\n")
        assert everything(files) == ["fine too"]
        with (tmp_path / "b.csv").open("a") as file:
            file.write("PRIVATE\n")
        assert everything(files) == []
        assert skipped.places == {"of a file that is no table with the columns": ["b.csv"]}
        (tmp_path / "d.csv").write_text("review")
        assert everything(files) == []
        assert [item for items in files.finish() for item in items] == []
        assert skipped.counts == {"of a file that is no table with the columns": 2}

    def test_plain_text_beside_files_with_times_is_passed_over(self, tmp_path: Path) -> None:
        files = Files([tmp_path], TextFormat(time="t"), Skipped())
        (tmp_path / "a.jsonl").write_text('{"text": "fine", "t": 5}\n')
        (tmp_path / "b.txt").write_text("no time\n")
        assert everything(files) == ["fine"]
        assert files.ignored == 1
        with pytest.raises(DataError, match="has no column 't' of times"):
            everything(Files([tmp_path / "b.txt"], TextFormat(time="t"), Skipped()))

    def test_a_large_file_is_read_in_pieces(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_text("".join(f"line {i}\n" for i in range(30_000)))
        pieces = list(Files([path], TextFormat(), Skipped()).read())
        assert len(pieces) > 3
        assert [item.text for items in pieces for item in items] == [f"line {i}" for i in range(30_000)]

    def test_what_is_not_there_or_unknown_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="does not exist"):
            Files([tmp_path / "none.csv"], TextFormat(), Skipped())
        (tmp_path / "a.doc").write_text("x\n")
        with pytest.raises(DataError, match="unknown ending"):
            Files([tmp_path / "a.doc"], TextFormat(), Skipped())
        assert everything(Files([tmp_path / "a.doc"], TextFormat(format="text"), Skipped())) == ["x"]


def test_a_stream_is_read_as_it_comes() -> None:
    pieces = iter([b"one\ntw", b"o\n", b"three", b""])
    found = list(read_stream(lambda size: next(pieces), TextFormat(), Skipped()))
    assert [[item.text for item in items] for items in found] == [["one"], ["two"], [], ["three"]]
