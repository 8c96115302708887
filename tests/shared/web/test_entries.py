"""Reading the audit log from its end: the same entries as reading all of it, and few bytes, over many files."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from shared.trust.audit_chain import file_numbers, log_file
from shared.trust.audit_log import AuditLog, Event, read
from shared.web import entries
from shared.web.entries import backwards, every

NUM = 600


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long") / "audit"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        made = AuditLog(folder, max_bytes=40_000, clock=lambda: datetime(2026, 1, 1, tzinfo=UTC))
        for number in range(1, NUM + 1):
            event = Event.NODE_STARTED if number % 100 == 7 else Event.REPLY_SENT
            made.append(event, name=f"Müller {number}" if number % 50 == 0 else f"job {number}", filled="x" * 100)
    assert len(file_numbers(folder)) > 3
    return folder


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "_BLOCK", 1000)


@pytest.fixture
def num_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many bytes were read of the log's files."""
    found, real = [0], Path.open

    class Counted:
        def __init__(self, file: Any) -> None:
            self._file = file

        def __enter__(self) -> Counted:
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

        def __getattr__(self, name: str) -> Any:
            def call(*args: Any) -> Any:
                got = getattr(self._file, name)(*args)
                found[0] += len(got) if isinstance(got, bytes) else 0
                return got

            return call

    monkeypatch.setattr(Path, "open", lambda path, *args, **more: Counted(real(path, *args, **more)))
    return found


def numbers(found: Any) -> list[int]:
    return [line.sequence for line in found]


def test_it_reads_the_same_as_reading_all(log: Path) -> None:
    told = list(read(log))
    assert numbers(every(log)) == [entry.sequence for entry in reversed(told)]
    assert [line.details for line in every(log)] == [entry.details for entry in reversed(told)]
    for before in (1, 2, 3, 57, 200, 333, NUM, NUM + 1, 10**9):
        assert numbers(backwards(log, before=before, most=7)) == list(range(min(before, NUM + 1) - 1, 0, -1))[:7]
    assert numbers(every(log, event="node")) == [507, 407, 307, 207, 107, 7]
    assert numbers(every(log, event="node.started", search="JOB 10")) == [107]
    assert numbers(every(log, search="müller")) == list(range(NUM, 0, -50))
    assert numbers(every(log, search="no such text")) == numbers(every(log, event="nod")) == []


def test_a_page_reads_little(log: Path, num_read: list[int]) -> None:
    whole = sum(log_file(log, number).stat().st_size for number in file_numbers(log))
    for before in (None, NUM, 300, 20):
        num_read[0] = 0
        assert len(backwards(log, before=before, most=10)) == 10
        assert num_read[0] < whole / 8, before


def test_lines_that_are_none_are_left_out(log: Path, tmp_path: Path) -> None:
    folder = tmp_path / "audit"
    folder.mkdir()
    for path in log.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    damaged = log_file(folder, 2)
    content = damaged.read_bytes()
    middle = len(content) // 2
    damaged.write_bytes(content[:middle] + b"\x00" * 5000 + content[middle + 5000 :])
    log_file(folder, 3).unlink()
    found = numbers(every(folder))
    assert 200 < len(found) < NUM
    assert found == sorted(found, reverse=True)
    for before in (NUM, 300, 100):
        assert (
            backwards(folder, before=before, most=3) == [line for line in every(folder) if line.sequence < before][:3]
        )
