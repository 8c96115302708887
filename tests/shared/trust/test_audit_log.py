"""The audit log: what it records, and that no edit, crash, race or full disk goes unseen."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shared.errors import TrustError
from shared.files import atomic
from shared.trust import audit_chain, audit_log
from shared.trust.audit_log import AuditLog, Event, read, verify
from shared.trust.signing import SigningKey

ROOT = Path(__file__).resolve().parents[3]
KEY = SigningKey.from_bytes(bytes(range(32)))
NOON = datetime(2031, 5, 4, 12, tzinfo=UTC)
ROTATE = 900  # bytes: three or four entries of these tests to a file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "log"


def opened(folder: Path, **changes: Any) -> AuditLog:
    return AuditLog(folder, **{"seal_head": KEY, "max_bytes": ROTATE, "clock": lambda: NOON} | changes)


def fill(log: AuditLog, num: int = 10) -> None:
    for number in range(num):
        log.append(Event.REQUEST_RECEIVED, round=number, sender="coordinator")


def check(folder: Path) -> audit_log.Verified:
    return verify(folder, verify_head=KEY.verify_key)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def sequences(folder: Path) -> list[int]:
    return [entry.sequence for entry in read(folder)]


def numbers(folder: Path, event: str = Event.REQUEST_RECEIVED) -> list[int]:
    """Return what `fill` and the workers count, in the order of the log."""
    return [entry.details["round"] for entry in read(folder) if entry.event == event]


# --- what is written ---


def test_entries_come_back_as_they_were_given(folder: Path) -> None:
    log = opened(folder)
    details = {"text": "Grüße\n\x1b[31m\u2028", "nested": {"b": [1, 2.5, None, True], "a": {}}, "tuple": (1, 2)}
    first = log.append(Event.NODE_STARTED, **details)
    second = log.append("node.stopped")
    assert [first, second] == list(read(folder))
    assert (first.sequence, second.sequence) == (1, 2)
    assert first.details == details | {"tuple": [1, 2]}
    assert (first.time, first.event) == ("2031-05-04T12:00:00.000+00:00", "node.started")
    assert (first.previous, second.previous) == ("0" * 64, first.sha256)
    assert (folder / "audit-00001.jsonl").read_text() == f"{first.line()}\n{second.line()}\n"


def test_a_line_is_canonical_json_and_its_hash_can_be_checked_by_hand(folder: Path) -> None:
    import hashlib

    opened(folder).append(Event.NODE_STARTED, b=1, a="x")
    line = (folder / "audit-00001.jsonl").read_bytes()
    fields = json.loads(line)
    assert set(fields) == {"sequence", "time", "event", "details", "previous", "sha256"}
    sha256 = fields.pop("sha256")
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == sha256


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1: 2}, b"bytes", object(), [{"x": float("-inf")}]])
def test_what_is_not_json_is_refused_and_nothing_is_written(folder: Path, value: object) -> None:
    log = opened(folder)
    before = files(folder)
    with pytest.raises(ValueError, match="expected JSON values"):
        log.append(Event.NODE_STARTED, value=value)
    assert files(folder) == before


def test_an_unknown_event_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"node\.exploded"):
        opened(folder).append("node.exploded")


def test_nobody_can_flood_the_log(folder: Path) -> None:
    log = opened(folder, max_bytes=1 << 20)
    long = log.append(Event.REQUEST_REFUSED, reason="x" * 1_000_000, inner=[{"y" * 5000: "\x00" * 3000}])
    assert long.details["reason"] == "x" * 2000 + "... (1000000 characters)"
    assert len(long.line()) < 20_000
    many = log.append(Event.REQUEST_REFUSED, reasons=["x" * 2000] * 1000)
    assert many.details.keys() == {"left_out", "details_sha256"}
    assert "2003013 bytes" in many.details["left_out"]
    half = log.append(Event.REQUEST_REFUSED, reason="half \ud800 a character")
    assert half.details["reason"] == "half \\ud800 a character"
    assert list(read(folder)) == [long, many, half]
    assert check(folder).entries == 3


def test_the_largest_entry_fits_and_the_next_larger_does_not(folder: Path) -> None:
    log = opened(folder, max_bytes=1)
    kept = set()
    for last in range(1850, 2000):
        entry = log.append(Event.NODE_STARTED, texts=["x" * 2000] * 31 + ["x" * 1200, "x" * last])
        assert len(entry.line()) + 1 <= audit_chain.MAX_LINE
        kept.add("texts" in entry.details)
    assert kept == {True, False}
    assert check(folder).entries == 150


def test_files_are_private_to_their_owner(folder: Path) -> None:
    previous = os.umask(0)
    try:
        fill(opened(folder))
    finally:
        os.umask(previous)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_the_chain_goes_on_in_the_next_file(folder: Path) -> None:
    log = opened(folder)
    fill(log, 10)
    fill(opened(folder), 10)
    logs = sorted(path.name for path in folder.glob("audit-*.jsonl"))
    assert logs == [f"audit-{number:05d}.jsonl" for number in range(1, len(logs) + 1)]
    assert len(logs) > 4
    assert all(path.stat().st_size <= ROTATE for path in folder.glob("audit-*.jsonl"))
    assert sequences(folder) == list(range(1, 21))
    found = check(folder)
    assert (found.entries, found.signature_checked, found.notes) == (20, True, ())
    assert found.sha256 == list(read(folder))[-1].sha256
    head = json.loads((folder / "head.json").read_text())
    assert (head["sequence"], head["sha256"], head["file"]) == (20, found.sha256, logs[-1])


def test_an_empty_log_is_unbroken(folder: Path) -> None:
    opened(folder)
    found = check(folder)
    assert (found.entries, found.first_time, found.last_time, found.sha256) == (0, None, None, "0" * 64)
    assert list(read(folder)) == []


def test_an_entry_is_on_the_disk_before_append_returns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = opened(folder, max_bytes=1)
    calls: list[str] = []
    for name in ("write", "fsync", "replace"):
        real = getattr(os, name)

        def record(*args: Any, real: Callable[..., Any] = real, name: str = name) -> Any:
            calls.append(name)
            return real(*args)

        monkeypatch.setattr(os, name, record)
    log.append(Event.NODE_STARTED)
    # the line, the new file's name, the new head, its name
    assert calls == ["write", "fsync", "fsync", "fsync", "replace", "fsync"]


def test_append_does_not_read_the_log_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = opened(folder)
    fill(log)
    for module in (audit_log, audit_chain):
        monkeypatch.setattr(module, "scan", None)
    fill(log)
    fill(opened(folder))


def test_memory_does_not_grow_with_the_log(tmp_path: Path) -> None:
    peaks = []
    for num in (100, 3000):
        folder = tmp_path / str(num)
        write_quickly(folder, num)
        tracemalloc.start()
        assert verify(folder).entries == num
        assert sum(1 for _ in read(folder)) == num
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 50_000
    AuditLog(tmp_path / "3000").append(Event.NODE_STARTED)
    assert verify(tmp_path / "3000").entries == 3001


def write_quickly(folder: Path, num: int) -> None:
    """Write an unsigned log without waiting for the disk."""
    folder.mkdir()
    head = audit_chain.BEGINNING
    with (folder / "audit-00001.jsonl").open("wb") as file:
        for number in range(num):
            entry = audit_chain.new_entry(head, "2031-05-04T12:00:00.000+00:00", "node.started", {"round": number})
            line = f"{entry.line()}\n".encode()
            file.write(line)
            head = head.after(entry, line, number=1)
    audit_chain.write_head(folder, head, None)


# --- the key ---


def test_a_forged_head_needs_the_key(folder: Path) -> None:
    fill(opened(folder, max_bytes=1 << 20), 5)
    path = folder / "audit-00001.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]))
    entry = list(map(json.loads, lines))[2]
    cut = audit_chain.Position(sequence=3, sha256=entry["sha256"], number=1, line=3, size=path.stat().st_size)
    for signer in (None, SigningKey.generate()):
        audit_chain.write_head(folder, cut, signer)
        assert verify(folder).entries == 3, "without the key nobody can see it"
        with pytest.raises(TrustError, match=r"head\.json .*sign"):
            check(folder)
        with pytest.raises(TrustError, match=r"head\.json .*sign"):
            opened(folder)


def test_a_running_log_does_not_go_on_from_a_forged_head(folder: Path) -> None:
    log = opened(folder)
    fill(log, 5)
    copy = files(folder)
    fill(log, 5)
    restore(folder, copy)
    with pytest.raises(TrustError, match="replaced by another copy while in use"):
        log.append(Event.NODE_STOPPED)


def test_a_signed_log_is_not_continued_without_its_key(folder: Path) -> None:
    fill(opened(folder))
    before = files(folder)
    with pytest.raises(TrustError, match="open the log with the key of its owner"):
        opened(folder, seal_head=None)
    with pytest.raises(TrustError, match="was not signed with this key"):
        opened(folder, seal_head=SigningKey.generate())
    assert files(folder) == before


def test_an_unsigned_log_says_so(folder: Path) -> None:
    fill(opened(folder, seal_head=None))
    found = verify(folder)
    assert not found.signature_checked
    assert any("no key was given" in note for note in found.notes)
    with pytest.raises(TrustError, match="is not signed, but the log has a key"):
        check(folder)
    with pytest.raises(TrustError, match="is not signed, but the log has a key"):
        opened(folder)


# --- tampering ---


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A signed log of 12 entries in 4 files."""
    folder = tmp_path_factory.mktemp("good") / "log"
    log = opened(folder)
    fill(log, 11)
    log.append(Event.UPDATE_REFUSED, reason="Größe stimmt nicht", value=0.1)
    content = files(folder)
    assert sum(name.startswith("audit-0") for name in content) >= 3
    return content


@pytest.fixture(scope="module")
def good_unsigned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("good") / "log"
    fill(opened(folder, seal_head=None), 11)
    return files(folder)


def restore(folder: Path, content: dict[str, bytes]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in content.items():
        (folder / name).write_bytes(data)


@contextmanager
def copy_of(content: dict[str, bytes]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        restore(Path(name) / "log", content)
        yield Path(name) / "log"


def log_names(content: dict[str, bytes]) -> list[str]:
    return [name for name in content if name.endswith(".jsonl")]


def join(content: dict[str, bytes], lines: list[list[bytes]]) -> dict[str, bytes]:
    return content | {name: b"".join(part) for name, part in zip(log_names(content), lines, strict=True)}


def split(content: dict[str, bytes]) -> list[list[bytes]]:
    return [content[name].splitlines(keepends=True) for name in log_names(content)]


@given(data=st.data(), signed=st.booleans())
@settings(max_examples=400, deadline=None)
def test_any_changed_byte_is_detected(
    good: dict[str, bytes], good_unsigned: dict[str, bytes], data: st.DataObject, signed: bool
) -> None:
    content = good if signed else good_unsigned
    name = data.draw(st.sampled_from([*log_names(content), "head.json"]))
    index = data.draw(st.integers(0, len(content[name]) - 1))
    byte = data.draw(st.integers(0, 255))
    assume(content[name][index] != byte)
    changed = bytearray(content[name])
    changed[index] = byte
    with copy_of(content | {name: bytes(changed)}) as folder:
        # A head without a signature may name another file; then that file is told, for it is not there.
        with pytest.raises(TrustError, match=r"(audit-\d{5}\.jsonl(, line \d| is missing)|head\.json)"):
            verify(folder, verify_head=KEY.verify_key if signed else None)
        if name != "head.json":
            line = content[name][:index].count(b"\n") + 1
            with pytest.raises(TrustError, match=rf"{name}, line {line},"):
                list(read(folder))


def test_a_head_that_names_the_next_file_is_detected(good: dict[str, bytes], good_unsigned: dict[str, bytes]) -> None:
    for content, key, text in (
        (good_unsigned, None, r"audit-00005\.jsonl is missing"),
        (good, KEY.verify_key, "head.json"),
    ):
        changed = content["head.json"].replace(b"audit-00004", b"audit-00005")
        assert changed != content["head.json"]
        with copy_of(content | {"head.json": changed}) as folder, pytest.raises(TrustError, match=text):
            verify(folder, verify_head=key)


@given(data=st.data())
@settings(max_examples=400, deadline=None)
def test_any_change_of_the_lines_is_detected(good: dict[str, bytes], data: st.DataObject) -> None:
    lines = split(good)
    places = [(part, row) for part in range(len(lines)) for row in range(len(lines[part]))]
    part, row = data.draw(st.sampled_from(places))
    other, other_row = data.draw(st.sampled_from(places))
    change = data.draw(st.sampled_from(["remove", "duplicate", "insert", "swap", "move", "merge"]))
    line = lines[part][row]
    if change == "remove":
        del lines[part][row]
    elif change == "duplicate":
        lines[other].insert(other_row, line)
    elif change == "insert":
        lines[part].insert(row, data.draw(st.binary(max_size=40)) + b"\n")
    elif change == "swap":
        assume((part, row) != (other, other_row))
        lines[part][row], lines[other][other_row] = lines[other][other_row], line
    elif change == "move":
        assume(abs(places.index((part, row)) - places.index((other, other_row))) > 1)
        lines[part][row] = b""
        lines[other].insert(other_row, line)
    else:
        lines[part][row] = line[:-1]
    with copy_of(join(good, lines)) as folder, pytest.raises(TrustError, match=r"audit-\d{5}\.jsonl|head\.json"):
        check(folder)


def test_an_edited_entry_with_a_hash_of_its_own_is_detected(good: dict[str, bytes]) -> None:
    lines = split(good)
    for part, row in ((0, 0), (1, 1), (len(lines) - 1, len(lines[-1]) - 1)):
        fields = json.loads(lines[part][row])
        before = audit_chain.Position(sequence=fields["sequence"] - 1, sha256=fields["previous"])
        forged = audit_chain.new_entry(before, fields["time"], fields["event"], {"round": 99})
        edited = [list(rows) for rows in lines]
        edited[part][row] = f"{forged.line()}\n".encode()
        # `previous` of the next entry shows it; behind the last one, the head does.
        with copy_of(join(good, edited)) as folder, pytest.raises(TrustError, match=r"does not (follow|fit the log)"):
            check(folder)


def test_another_writing_of_the_same_values_is_detected(good: dict[str, bytes]) -> None:
    name = log_names(good)[1]
    line = good[name].splitlines(keepends=True)[1]
    others = [
        line.replace(b":", b": ", 1),
        json.dumps(json.loads(line)).encode() + b"\n",
        line.replace(b'"round":', b'"round":77,"round":'),
        line.replace(b"coordinator", b"coordin\\u0061tor"),
        line.replace(b"\n", b"\r\n"),
    ]
    for other in others:
        assert other != line
        changed = good | {name: good[name].replace(line, other)}
        with copy_of(changed) as folder, pytest.raises(TrustError, match=rf"{name}, line 2,"):
            check(folder)
    head = json.loads(good["head.json"])
    for signature in (head["signature"].upper(), f" {head['signature']}", head["signature"] + "00"):
        content = f"{json.dumps(head | {'signature': signature}, sort_keys=True, separators=(',', ':'))}\n".encode()
        with copy_of(good | {"head.json": content}) as folder, pytest.raises(TrustError, match=r"head\.json"):
            check(folder)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_tail_that_was_cut_off_is_detected(good: dict[str, bytes], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(log_names(good)))
    length = data.draw(st.integers(0, len(good[name]) - 1))
    later = {n: d for n, d in good.items() if not (n.endswith(".jsonl") and n > name)}
    with copy_of(later | {name: good[name][:length]}) as folder:
        with pytest.raises(TrustError, match=r"is missing|is empty|has no end|cut off"):
            check(folder)
        with pytest.raises(TrustError, match=r"is missing|cut off"):
            opened(folder)


def test_every_missing_file_is_named(good: dict[str, bytes]) -> None:
    for name in log_names(good):
        with copy_of({n: d for n, d in good.items() if n != name}) as folder:
            with pytest.raises(TrustError, match=rf"{name} is missing"):
                check(folder)
            with pytest.raises(TrustError, match=rf"{name} is missing"):
                list(read(folder))


def test_files_in_another_order_are_detected(good: dict[str, bytes]) -> None:
    first, second, *_ = log_names(good)
    swapped = good | {first: good[second], second: good[first]}
    with copy_of(swapped) as folder, pytest.raises(TrustError, match=rf"{first}, line 1,.* must stand here"):
        check(folder)


def test_a_missing_head_is_detected(good: dict[str, bytes]) -> None:
    with copy_of({n: d for n, d in good.items() if n != "head.json"}) as folder:
        for attempt in (check, opened, lambda folder: list(read(folder))):
            with pytest.raises(TrustError, match=r"head\.json is missing, but the log's files are there"):
                attempt(folder)


def test_a_foreign_file_of_the_log_is_detected(good: dict[str, bytes]) -> None:
    last = log_names(good)[-1]
    for number in (0, 42):
        name = f"audit-{number:05d}.jsonl"
        with (
            copy_of(good | {name: good[last]}) as folder,
            pytest.raises(TrustError, match=rf"{name} does not belong to the log"),
        ):
            check(folder)
    following = f"audit-{int(last[6:11]) + 1:05d}.jsonl"
    for content in (good[last], good[last].splitlines(keepends=True)[0]):
        with copy_of(good | {following: content}) as folder, pytest.raises(TrustError, match=following):
            check(folder)


def test_an_older_head_beside_a_longer_log_is_detected(folder: Path) -> None:
    log = opened(folder, max_bytes=1 << 20)
    heads = []
    for _ in range(4):
        fill(log, 1)
        heads.append((folder / "head.json").read_bytes())
    (folder / "head.json").write_bytes(heads[1])
    for attempt in (check, opened):
        with pytest.raises(TrustError, match=r"audit-00001\.jsonl, line 4, stands after the end"):
            attempt(folder)


def test_a_broken_tail_is_seen_by_the_next_append(folder: Path) -> None:
    log = opened(folder, max_bytes=1 << 20)
    fill(log, 3)
    path = folder / "audit-00001.jsonl"
    good_bytes = path.read_bytes()
    path.write_bytes(good_bytes.replace(b'"round":2', b'"round":7'))
    with pytest.raises(TrustError, match=r"line 3, \(entry 3\) was changed"):
        fill(log, 1)
    path.write_bytes(b"")
    with pytest.raises(TrustError, match="line 3, is missing or cut off"):
        fill(log, 1)
    path.write_bytes(good_bytes)
    fill(log, 1)
    assert check(folder).entries == 4


def test_strange_heads_are_explained(good: dict[str, bytes]) -> None:
    fields = json.loads(good["head.json"])
    for change in (
        {"sequence": True},
        {"file": "audit-1.jsonl"},
        {"file": 3},
        {"bytes": -1},
        {"more": 1},
        {"line": "1"},
    ):
        content = f"{json.dumps(fields | change, sort_keys=True, separators=(',', ':'))}\n".encode()
        with copy_of(good | {"head.json": content}) as folder, pytest.raises(TrustError, match=r"head\.json"):
            verify(folder)
    for content in (b"", b"[]\n", b"null\n", b"[" * 60_000, b'{"sequence":1e999}\n', b"\xff\xfe"):
        with (
            copy_of(good | {"head.json": content}) as folder,
            pytest.raises(TrustError, match=r"head\.json is not a head"),
        ):
            check(folder)
    huge = {"sequence": 1, "sha256": "0" * 64, "file": "audit-00001.jsonl", "line": 1, "bytes": 1 << 70}
    content = f"{json.dumps(huge, sort_keys=True, separators=(',', ':'))}\n".encode()
    with copy_of(good | {"head.json": content}) as folder, pytest.raises(TrustError, match="no log can have"):
        verify(folder)


def test_deeply_nested_garbage_is_an_error_for_people(good: dict[str, bytes]) -> None:
    name = log_names(good)[1]
    for garbage, problem in ((b"[" * 60_000 + b"\n", "is not JSON"), (b"x" * 10_000_000, "has no end")):
        with (
            copy_of(good | {name: garbage + good[name]}) as folder,
            pytest.raises(TrustError, match=f"{name}, line 1, {problem}"),
        ):
            check(folder)


def test_a_folder_without_a_log_is_explained(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "missing"):
        with pytest.raises(TrustError, match="holds no audit log"):
            check(place)
    (tmp_path / "file").write_text("x")
    with pytest.raises(TrustError, match="cannot be written"):
        AuditLog(tmp_path / "file")


def test_a_log_that_vanished_while_open_is_not_begun_anew(folder: Path) -> None:
    log = opened(folder)
    fill(log)
    for path in folder.glob("*.json*"):
        path.unlink()
    with pytest.raises(TrustError, match="holds no audit log"):
        fill(log)
    assert not list(folder.glob("*.json*"))


def test_verify_leaves_no_trace_and_needs_no_lock_file(good: dict[str, bytes]) -> None:
    content = {name: data for name, data in good.items() if name != "audit.lock"}
    with copy_of(content) as folder:
        folder.chmod(0o500)
        assert check(folder).entries == 12
        assert files(folder) == content
        folder.chmod(0o700)


# --- crashes ---


class Died(BaseException):
    """Stands for the end of the process: nothing catches it."""


def assert_healed(folder: Path, acknowledged: list[int], attempted: int) -> None:
    """Check that the log opens, holds what was acknowledged and at most `attempted` more, and goes on."""
    before = check(folder)
    log = opened(folder)
    found = numbers(folder)
    assert found in (acknowledged, [*acknowledged, attempted])
    repairs = [entry.details for entry in read(folder) if entry.event == Event.LOG_RECOVERED]
    assert len(repairs) <= 1
    if len(found) > len(acknowledged) and before.entries == len(acknowledged):
        assert repairs[0]["adopted_sequence"] == len(found)
        assert any("was written while the process died" in note for note in before.notes)
    log.append(Event.REQUEST_RECEIVED, round=attempted + 1)
    opened(folder).append(Event.REQUEST_RECEIVED, round=attempted + 2)
    assert numbers(folder) == [*found, attempted + 1, attempted + 2]
    assert check(folder).entries == len(found) + 2 + len(repairs)
    assert not list(folder.glob(".head*")), "what a dead process left lies around"


@pytest.mark.parametrize("rotates", [False, True])
def test_every_partial_state_is_repaired(folder: Path, rotates: bool) -> None:
    log = opened(folder, max_bytes=1 if rotates else 1 << 20)
    fill(log, 3)
    before = files(folder)
    log.append(Event.REQUEST_RECEIVED, round=3)
    after = files(folder)
    name = "audit-00004.jsonl" if rotates else "audit-00001.jsonl"
    start = 0 if rotates else len(before[name])
    full = len(after[name])
    for length in {*range(start, full, 5), start + 1, full - 2, full - 1, full}:
        restore(folder, before | {name: after[name][:length]})
        notes = check(folder).notes
        assert len(notes) == (length > start)
        assert_healed(folder, [0, 1, 2], 3)
    restore(folder, before | {name: after[name]})
    opened(folder)
    assert numbers(folder) == [0, 1, 2, 3], "the complete line was not adopted"
    for zeros in (after[name][:-20] + b"\0" * 20, after[name][: start + 50] + b"\0" * 30 + b"\n"):  # a power cut
        restore(folder, before | {name: zeros})
        assert "unfinished entry" in check(folder).notes[0]
        assert_healed(folder, [0, 1, 2], 3)
    restore(folder, after)
    assert_healed(folder, [0, 1, 2, 3], 4)


def test_the_very_first_entry_can_be_torn_too(folder: Path) -> None:
    log = opened(folder)
    before = files(folder)
    fill(log, 1)
    line = (folder / "audit-00001.jsonl").read_bytes()
    for length in (0, 1, len(line) - 1, len(line)):
        restore(folder, before | {"audit-00001.jsonl": line[:length]})
        assert_healed(folder, [], 0)


def dies_at(fatal: int, half: bool, action: Callable[[], object]) -> bool:
    """Run `action` and end it at system call number `fatal`, after it or (not `half`) before; say whether it ended."""
    names = ("open", "write", "fsync", "replace", "unlink", "close")
    calls = 0
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            real = getattr(os, name)

            def counted(*args: Any, name: str = name, real: Callable[..., Any] = real, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls - 1 != fatal:
                    return real(*args, **kwargs)
                if half and name == "write":
                    real(args[0], bytes(args[1])[: len(args[1]) // 2])
                elif half or name == "close":  # the system closes what a dead process held, and frees its lock
                    real(*args, **kwargs)
                raise Died

            patch.setattr(os, name, counted)
        try:
            action()
        except Died:
            return True
    return False


@pytest.mark.parametrize("max_bytes", [1, 1 << 20])
def test_death_at_every_system_call(folder: Path, max_bytes: int) -> None:
    log = opened(folder, max_bytes=max_bytes)
    fill(log, 3)
    before = files(folder)
    for fatal in range(100):
        for half in (False, True):
            restore(folder, before)
            log = opened(folder, max_bytes=max_bytes)
            died = dies_at(fatal, half, lambda log=log: log.append(Event.REQUEST_RECEIVED, round=3))
            assert_healed(folder, [0, 1, 2] if died else [0, 1, 2, 3], 3 if died else 4)
        if not died:
            break
    assert fatal > 8, "the test did not reach the calls"


@pytest.mark.parametrize("is_torn", [False, True])
@pytest.mark.parametrize("max_bytes", [1, 1 << 20])
def test_death_at_every_system_call_of_a_repair(folder: Path, max_bytes: int, is_torn: bool) -> None:
    log = opened(folder, max_bytes=max_bytes)
    fill(log, 3)
    head = (folder / "head.json").read_bytes()
    fill(log, 1)
    (folder / "head.json").write_bytes(head)
    if is_torn:
        last = max(folder.glob("audit-*.jsonl"))
        last.write_bytes(last.read_bytes()[:-9])
    before = files(folder)
    for fatal in range(100):
        for half in (False, True):
            restore(folder, before)
            died = dies_at(fatal, half, lambda: opened(folder, max_bytes=max_bytes))
            opened(folder)
            assert numbers(folder) == [0, 1, 2] + [0] * (not is_torn)
            assert check(folder).entries <= 6
        if not died:
            break
    assert fatal > 8, "the test did not reach the calls"


def test_a_lone_line_after_the_head_must_follow_from_it(folder: Path) -> None:
    log = opened(folder, max_bytes=1 << 20)
    fill(log, 2)
    path = folder / "audit-00001.jsonl"
    good_bytes = path.read_bytes()
    for line in (good_bytes.splitlines(keepends=True)[0], b"{}\n", b"17\n"):
        path.write_bytes(good_bytes + line)
        for attempt in (check, opened):
            with pytest.raises(TrustError, match=r"audit-00001\.jsonl, line 3,"):
                attempt(folder)


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_a_full_disk_is_explained_and_the_log_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    log = opened(folder)
    fill(log, 3)
    real = os.write

    def fail(*args: Any) -> int:
        if where == "write":
            real(args[0], bytes(args[1])[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for mode in ("apart", "under one lock"):
        with log.locked() if mode == "under one lock" else log._threads:
            with monkeypatch.context() as patch:
                patch.setattr(os, where, fail)
                with pytest.raises(TrustError, match=r"cannot be written: No space left on device\. Free space"):
                    log.append(Event.REQUEST_RECEIVED, round=3)
            log.append(Event.REQUEST_RECEIVED, round=4)
        check(folder)
    assert set(numbers(folder)) >= {0, 1, 2, 4}
    assert sum(entry.event == Event.LOG_RECOVERED for entry in read(folder)) == 2


def test_an_error_of_the_caller_under_the_lock_is_not_the_log_s(folder: Path) -> None:
    log = opened(folder)
    with pytest.raises(OSError, match="mine"), log.locked():
        raise OSError("mine")
    fill(log)


# --- several writers ---

APPENDER = """
import sys
from pathlib import Path
from shared.trust.audit_log import AuditLog
from shared.trust.signing import SigningKey
log = AuditLog(Path(sys.argv[1]), seal_head=SigningKey.from_bytes(bytes(range(32))), max_bytes=900)
print("ready", flush=True)
sys.stdin.readline()
for number in range(40):
    log.append("request.received", round=number, sender=sys.argv[2])
"""

WORKER = """
import os, sys
from pathlib import Path
from shared.trust.audit_log import AuditLog
from shared.trust.signing import SigningKey

def work(start):
    log = AuditLog(Path(sys.argv[1]), seal_head=SigningKey.from_bytes(bytes(range(32))), max_bytes=900)
    acknowledged = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in range(start, start + 1_000_000):
        log.append("request.received", round=number)
        os.write(acknowledged, f"{number}\\n".encode())

for number, _ in enumerate(sys.stdin):
    child = os.fork()
    if not child:
        work(number * 1_000_000)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def python(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def say(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_four_processes_append_at_once_while_one_verifies(folder: Path) -> None:
    appenders = [python(APPENDER, str(folder), str(number)) for number in range(4)]
    try:
        assert [hear(appender) for appender in appenders] == ["ready"] * 4
        for appender in appenders:
            say(appender, "go")
        counts = []
        while any(appender.poll() is None for appender in appenders):
            counts.append(check(folder).entries)
        assert [appender.wait() for appender in appenders] == [0] * 4
    finally:
        for appender in appenders:
            appender.kill()
            appender.communicate()
    assert counts == sorted(counts)
    assert check(folder).entries == 160
    assert check(folder).notes == ()
    for number in range(4):
        mine = [entry.details["round"] for entry in read(folder) if entry.details["sender"] == str(number)]
        assert mine == list(range(40))


def test_threads_may_share_a_log(folder: Path) -> None:
    log = opened(folder)
    threads = [threading.Thread(target=fill, args=(log, 15)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sequences(folder) == list(range(1, 61))
    assert sorted(numbers(folder)) == sorted([*range(15)] * 4)


def head_sequence(folder: Path) -> int:
    try:
        return int(json.loads((folder / "head.json").read_text())["sequence"])
    except FileNotFoundError:
        return 0


def test_kill_at_any_moment_loses_no_acknowledged_entry(folder: Path, tmp_path: Path) -> None:
    acknowledgements = tmp_path / "acknowledged"
    acknowledgements.touch()
    seed = random.randrange(1 << 32)
    delays = random.Random(seed)
    opened(folder)
    nursery = python(WORKER, str(folder), str(acknowledgements))  # forks one worker for each line, the imports done
    try:
        for attempt in range(40):
            # However busy the machine is, the worker gets to write some entries; then it dies at any moment.
            goal = head_sequence(folder) + delays.randrange(6)
            say(nursery, "start")
            worker = int(hear(nursery))
            deadline = time.monotonic() + 60
            while head_sequence(folder) < goal and time.monotonic() < deadline:
                time.sleep(0.0005)
            time.sleep(delays.uniform(0.0, 0.004))
            os.kill(worker, signal.SIGKILL)
            assert hear(nursery) == str(int(signal.SIGKILL)), "the worker ended by itself"
            check(folder)
            acknowledged = [int(line) for line in acknowledgements.read_text().splitlines()]
            opened(folder)  # repairs
            assert not any("while" in note for note in check(folder).notes), f"seed {seed}"
            found = numbers(folder)
            assert set(acknowledged) <= set(found), f"seed {seed}"
            assert len(set(found)) == len(found) <= len(acknowledged) + attempt + 1, f"seed {seed}"
    finally:
        nursery.kill()
        nursery.communicate()
    assert len(acknowledged) > 20, "too little was written: the test saw nothing"


def test_positions_let_a_reader_go_on(folder: Path) -> None:
    log = opened(folder)
    position = audit_chain.BEGINNING
    seen = []
    for num in (0, 5, 1, 0, 9):
        fill(log, num)
        for entry, after in log.read_on(position):
            seen.append(entry)
            position = after
    assert seen == list(read(folder))


def test_the_old_name_of_a_temporary_head_is_the_one_that_is_removed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clean-up relies on how `shared.files.atomic` names its temporary files."""
    log = opened(folder)

    def die(*_: Any) -> None:
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(Died):
            atomic.write_bytes(folder / "head.json", b"x")
    assert len(list(folder.glob(".head.json.*"))) == 1
    del log
    opened(folder)
    assert not list(folder.glob(".*"))
