"""What a backup takes of a ledger: its bytes between two transactions, and the hashes of its entries."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from client.ledger.account import Budget, Charge
from client.ledger.file import copy_of, entry_hashes
from client.ledger.ledger import Ledger
from shared.errors import LedgerError
from shared.privacy.accounting import GaussianSteps
from shared.privacy.filter import SpendingRule

CHARGE = Charge(
    job_id="job",
    round=1,
    request_sha256="a" * 64,
    mechanism=GaussianSteps(noise_multiplier=1.0, sample_rate=0.05, steps=3),
)


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A closed ledger of some entries, and an empty working folder."""
    monkeypatch.setattr(SpendingRule, "epsilon", lambda self, events: 0.0)
    folder, path = tmp_path / "empty", tmp_path / "a ledger?mode=memory.db"
    folder.mkdir()
    monkeypatch.chdir(folder)
    budget = Budget(epsilon=8.0, delta=1e-5, composition="fixed")
    with closing(Ledger(path, dataset="notes", unit="record", budget=budget)) as opened:
        opened.commit(opened.reserve(CHARGE), executed_steps=3, release_sha256="b" * 64)
    return path


def rows_of(path: Path) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path)) as file:
        return file.execute("SELECT * FROM entries ORDER BY sequence").fetchall()


def test_a_copy_is_the_ledger_and_says_how_many_entries_it_has(ledger: Path, tmp_path: Path) -> None:
    content, num_entries = copy_of(ledger)
    copy = tmp_path / "copy.db"
    copy.write_bytes(content)
    assert rows_of(copy) == rows_of(ledger)
    assert num_entries == len(rows_of(ledger)) >= 3
    assert copy_of(copy) == (content, num_entries)
    assert list(Path.cwd().iterdir()) == []


def test_the_hashes_of_a_ledger_are_those_of_its_entries_in_order(ledger: Path) -> None:
    assert entry_hashes(ledger) == [row[5] for row in rows_of(ledger)]
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("read", [copy_of, entry_hashes])
def test_nothing_is_taken_of_what_is_no_ledger_or_cannot_be_trusted(
    ledger: Path, read: Callable[[Path], object]
) -> None:
    with pytest.raises(LedgerError, match=r"cannot be used .*cannot be opened; mend the path"):
        read(ledger.with_name("none.db"))
    assert not ledger.with_name("none.db").exists()
    with closing(sqlite3.connect(ledger)) as file, file:
        file.execute("UPDATE head SET num_entries = 2")
    with pytest.raises(LedgerError, match=r"cannot be trusted: entry \d is missing, added or replaced"):
        read(ledger)
