"""Ledger files of version 1, made by that version, open with every charge, also if the first opening is cut off.

`ledger_v1/plain.db` and `sealed.db` (key: bytes 0 to 31) hold the account `notes` (cap 8; charges of 20 steps, executed 20
and 19, and 30 reserved) and the account `letters` (cap 3; 7 reserved).
"""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from client.ledger.ledger import SCHEMA_VERSION, Budget, Entry, Ledger
from shared.errors import LedgerError
from shared.privacy.accounting import GaussianSteps, compose_epsilon
from shared.privacy.filter import Composition, filter_orders
from shared.trust.keystore import Seal

ROOT = Path(__file__).resolve().parents[3]
DELTA = 1e-5
SEAL = Seal(bytes(range(32)))
CHARGES = [
    GaussianSteps(noise_multiplier=sigma, sample_rate=0.05, steps=num)
    for sigma, num in ((1.0, 20), (1.0, 19), (2.0, 30))
]


@pytest.fixture(params=["plain", "sealed"])
def old(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Seal | None]:
    """A copy of a version-1 file, and its key."""
    path = tmp_path / "ledger.db"
    shutil.copy(Path(__file__).parent / "ledger_v1" / f"{request.param}.db", path)
    path.chmod(0o600)
    return path, SEAL if request.param == "sealed" else None


@contextmanager
def opened(
    old: tuple[Path, Seal | None], *, dataset: str = "notes", epsilon: float = 8.0, composition: Composition = "fixed"
) -> Iterator[Ledger]:
    path, cipher = old
    budget = Budget(epsilon=epsilon, delta=DELTA, composition=composition)
    with closing(Ledger(path, dataset=dataset, unit="record", budget=budget, cipher=cipher)) as ledger:
        yield ledger


def version(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])


def rows(path: Path) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT * FROM entries ORDER BY sequence").fetchall()


def kinds(entries: list[Entry]) -> list[str]:
    return [entry.kind for entry in entries]


def test_old_files_open_with_every_charge(old: tuple[Path, Seal | None]) -> None:
    path, _ = old
    before = rows(path)
    assert (version(path), len(before)) == (1, 10)
    with opened(old) as ledger:
        assert ledger.events() == CHARGES
        assert ledger.spent_epsilon() == compose_epsilon(CHARGES, DELTA)
        assert kinds(ledger.entries())[10:] == ["migrate", "budget"]
        assert ledger.entries()[10].payload | {"from": 1, "to": 2} == ledger.entries()[10].payload
        ledger.commit(9, executed_steps=12, release_sha256="b" * 64)
    assert version(path) == SCHEMA_VERSION == 2
    assert rows(path)[:10] == before, "an old entry was written anew"
    with opened(old, dataset="letters", epsilon=3.0) as other:
        assert [event.steps for event in other.events()] == [7]
        assert kinds(other.entries())[13:] == ["budget"], "the file is taken over once"
    with opened(old) as ledger:
        assert [event.steps for event in ledger.events()] == [20, 19, 12]


def test_an_old_account_gets_the_orders_of_its_first_cap(old: tuple[Path, Seal | None]) -> None:
    with opened(old, epsilon=3.0, composition="adaptive") as ledger:
        assert ledger.rule.orders == filter_orders(epsilon=8.0, delta=DELTA)
        assert ledger.entries()[-1].payload["orders"] == list(ledger.rule.orders)
        assert ledger.spent_epsilon() > compose_epsilon(CHARGES, DELTA)


def test_a_damaged_old_file_is_refused_untouched(old: tuple[Path, Seal | None]) -> None:
    path, _ = old
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TRIGGER no_update")
        connection.execute("UPDATE entries SET time = 'never' WHERE sequence = 5")
        connection.commit()
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="entry 5 was changed"), opened(old):
        pass
    assert path.read_bytes() == before


WORKER = """
import os, signal, sys
from pathlib import Path
import client.ledger.file
from client.ledger.ledger import Budget, Ledger
from shared.trust.keystore import Seal

real = client.ledger.file.sqlite3.connect

class Deadly:
    def __init__(self, connection):
        self._connection = connection

    def execute(self, *arguments):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return self._connection.execute(*arguments)

    def __getattr__(self, name):
        return getattr(self._connection, name)

def migrate(path, sealed, num):
    global left
    left = num
    client.ledger.file.sqlite3.connect = lambda *a, **k: Deadly(real(*a, **k))
    budget = Budget(epsilon=8.0, delta=1e-5)
    cipher = Seal(bytes(range(32))) if sealed else None
    Ledger(Path(path), dataset="notes", unit="record", budget=budget, cipher=cipher)

for line in sys.stdin:
    path, sealed, num = line.split()
    child = os.fork()
    if not child:
        migrate(path, sealed == "1", int(num))
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def test_kill_between_any_two_statements_of_a_migration(old: tuple[Path, Seal | None], tmp_path: Path) -> None:
    path, cipher = old
    original = path.read_bytes()
    nursery = subprocess.Popen(
        [sys.executable, "-c", WORKER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert nursery.stdin is not None
    assert nursery.stdout is not None
    found: set[int] = set()
    try:
        for num in range(100):
            path.write_bytes(original)
            path.with_name("ledger.db-journal").unlink(missing_ok=True)
            nursery.stdin.write(f"{path} {int(cipher is not None)} {num}\n")
            nursery.stdin.flush()
            outcome = int(nursery.stdout.readline())
            assert outcome in (0, int(signal.SIGKILL)), f"killed after {num} statements"
            found.add(version(path))
            assert (version(path) == SCHEMA_VERSION) == (len(rows(path)) == 12), "the file is half of each version"
            with opened(old) as ledger:
                assert ledger.events() == CHARGES
                assert kinds(ledger.entries())[10:] == ["migrate", "budget"]
            if outcome == 0:
                break
    finally:
        nursery.kill()
        nursery.communicate()
    assert outcome == 0, "the migration never came to its end"
    assert num > 15, "too few statements: the test saw nothing"
    assert found == {1, 2}
    assert os.listdir(tmp_path) == ["ledger.db"]
