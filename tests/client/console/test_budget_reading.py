"""The ledger as the console keeps it between two pages: only what is new is read; what is unexpected has all of it read anew.

These sites have no log: what an older ledger beside a newer log is, tests/client/console/test_budget.py says.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pytest

from client.budget.accounts import Budgets
from client.budget.reading import Reading
from client.ledger.account import PROMISES, Account, counting
from client.ledger.file import LedgerFile
from client.site.home import SiteHome
from shared.errors import LedgerError
from shared.trust.keystore import Seal, load_secret
from tests.client.console.homes import charge, make_home


def seal(home: SiteHome) -> Seal:
    return Seal(load_secret(home.storage_key, passphrase=None))


def opened(home: SiteHome) -> LedgerFile:
    return LedgerFile(home.path / "ledger.db", cipher=seal(home), clock=lambda: datetime.now(UTC))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a site that was charged for two jobs, and its ledger as it was after the first."""
    home = make_home(tmp_path_factory.mktemp("site"))
    charge(home, jobs=["one"], rounds=4, secure=True)
    shutil.copy(home.path / "ledger.db", home.path / "earlier.db")
    charge(home, jobs=["two"], rounds=3, secure=True, begin=datetime(2026, 11, 1, tzinfo=UTC))
    return home.path


@pytest.fixture
def home(made: Path, tmp_path: Path) -> SiteHome:
    """That site, its ledger as it was after the first job."""
    shutil.copytree(made, tmp_path / "north")
    shutil.copy(made / "ledger.db", tmp_path / "later.db")
    shutil.copy(made / "earlier.db", tmp_path / "north" / "ledger.db")
    shutil.rmtree(tmp_path / "north" / "audit")
    return SiteHome(tmp_path / "north")


def grow(home: SiteHome) -> None:
    """Let the same file go on to what it is after the second job."""
    (home.path / "ledger.db").write_bytes((home.path.parent / "later.db").read_bytes())


@pytest.fixture
def opens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the entries that are unsealed."""
    found: list[int] = []
    real = LedgerFile._unpack

    def unpack(self: LedgerFile, sequence: int, kind: str, stored: str) -> object:
        found.append(sequence)
        return real(self, sequence, kind, stored)

    monkeypatch.setattr(LedgerFile, "_unpack", unpack)
    return found


def test_only_what_is_new_is_read(home: SiteHome, opens: list[int]) -> None:
    budgets = Budgets(home, seal(home))
    first = budgets.all()[0].spent["together"]
    known = len(opens)
    assert opens == list(range(1, known + 1))
    opens.clear()
    grow(home)
    assert budgets.all()[0].spent["together"] > first
    assert opens == list(range(known + 1, known + len(opens) + 1))
    assert len(opens) > 4
    opens.clear()
    budgets.all()
    budgets.check()
    assert opens == []


def test_reading_on_is_reading_all(home: SiteHome) -> None:
    budgets = Budgets(home, seal(home))
    budgets.all()
    grow(home)
    on, anew = budgets.all(), Budgets(home, seal(home)).all()
    assert on == anew
    file = opened(home)
    entries = file.read_chain()
    file.close()
    (found,) = on
    whole = Account.read(entries, dataset=found.account.dataset, unit=found.account.unit)
    assert [(one.job_id, one.mechanism, one.together, one.committed) for one in found.charges] == [
        (one.job_id, one.mechanism, one.together, one.committed)
        for one in sorted(whole.charges.values(), key=lambda one: one.time)
    ]
    assert found.counts == {p: Counter(counting(one, p) for one in whole.charges.values()) for p in PROMISES}


def test_a_page_at_hand_does_not_change(home: SiteHome) -> None:
    """What one page shows is of one moment, whatever another has read meanwhile."""
    budgets = Budgets(home, seal(home))
    (before,) = budgets.all()
    charges, spent = len(before.charges), dict(before.spent)
    grow(home)
    assert len(budgets.all()[0].charges) > charges
    assert (len(before.charges), before.spent) == (charges, spent)


def test_whatever_is_unexpected_has_all_of_it_read_anew(home: SiteHome, opens: list[int]) -> None:
    budgets = Budgets(home, seal(home))
    path, whole = home.path / "ledger.db", len(budgets.all()) and len(opens)
    # 1. Another file of the same content, which grew.
    os.replace(shutil.copy(home.path.parent / "later.db", home.path.parent / "copy.db"), path)
    opens.clear()
    budgets.all()
    longer = len(opens)
    assert (opens[0], longer > whole) == (1, True)
    # 2. Fewer entries: an older copy was put back.
    (home.path / "ledger.db").write_bytes((home.path / "earlier.db").read_bytes())
    opens.clear()
    budgets.all()
    assert opens == list(range(1, whole + 1))
    # 3. Another entry where the last one was: what follows is refused, and so is all of it.
    grow(home)
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TRIGGER no_update")
        connection.execute("UPDATE entries SET entry_sha256 = ? WHERE sequence = ?", ("cd" * 32, whole))
    for _ in range(2):
        with pytest.raises(LedgerError, match=f"entry {whole} was changed"):
            budgets.all()
    grow(home)
    assert len(budgets.all()[0].charges) > 0


def test_what_broke_off_is_not_gone_on_with(home: SiteHome, monkeypatch: pytest.MonkeyPatch) -> None:
    budgets = Budgets(home, seal(home))
    budgets.all()
    grow(home)
    with monkeypatch.context() as patch:
        patch.setattr(Reading, "take", lambda *_: (_ for _ in ()).throw(LedgerError("a damaged disk")))
        with pytest.raises(LedgerError, match="a damaged disk"):
            budgets.all()
    assert budgets.all() == Budgets(home, seal(home)).all()
