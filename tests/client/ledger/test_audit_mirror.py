"""The ledger in the audit log: every entry of one is in the other, after crashes too, and an old copy shows."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.ledger.account import Account
from client.ledger.audit_mirror import AuditMirror, Witness, recount
from client.ledger.ledger import Budget, Charge, Ledger
from shared.errors import LedgerError, TrustError
from shared.privacy.accounting import GaussianSteps
from shared.privacy.filter import Composition, SpendingRule
from shared.trust import audit_log
from shared.trust.audit_log import AuditLog, Event
from shared.trust.keystore import Seal
from shared.trust.signing import SigningKey

ROOT = Path(__file__).resolve().parents[3]
DELTA = 1e-5
RELEASE = "b" * 64
KEY = SigningKey.from_bytes(bytes(range(32)))
SEAL = Seal(bytes(range(32)))


def charge(steps: int = 5, *, job_id: str = "job", sigma: float = 1.0) -> Charge:
    mechanism = GaussianSteps(noise_multiplier=sigma, sample_rate=0.05, steps=steps)
    return Charge(job_id=job_id, round=0, request_sha256="a" * 64, mechanism=mechanism)


class Home:
    """A site's ledger and log in one folder."""

    def __init__(self, folder: Path) -> None:
        self.path, self.log_folder = folder / "ledger.db", folder / "audit"

    def log(self) -> AuditLog:
        return AuditLog(self.log_folder, seal_head=KEY, max_bytes=4000)

    @contextmanager
    def opened(
        self,
        *,
        mirrored: bool = True,
        dataset: str = "notes",
        epsilon: float = 1000.0,
        composition: Composition = "fixed",
    ) -> Iterator[Ledger]:
        mirror = AuditMirror(self.log()) if mirrored else None
        budget = Budget(epsilon=epsilon, delta=DELTA, composition=composition)
        options: dict[str, Any] = {"unit": "record", "budget": budget, "cipher": SEAL, "mirror": mirror}
        with closing(Ledger(self.path, dataset=dataset, **options)) as ledger:
            yield ledger

    def events(self, event: str = Event.LEDGER_ENTRY) -> list[dict[str, Any]]:
        return [entry.details for entry in audit_log.read(self.log_folder) if entry.event == event]

    def check(self) -> None:
        """Check that the log is unbroken and holds exactly the entries of the ledger."""
        audit_log.verify(self.log_folder, verify_head=KEY.verify_key)
        with self.opened(mirrored=False) as ledger:
            entries = ledger.entries()
        assert self.events() == [
            {"sequence": e.sequence, "kind": e.kind, "payload": e.payload, "entry_sha256": e.entry_sha256}
            for e in entries
        ]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


@pytest.fixture
def free_accounting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the accountant where only the files are under test."""
    monkeypatch.setattr(SpendingRule, "epsilon", lambda self, events: 0.0)


def work(ledger: Ledger, num: int = 3) -> None:
    for _ in range(num):
        ledger.commit(ledger.reserve(charge()), executed_steps=4, release_sha256=RELEASE)


@pytest.mark.usefixtures("free_accounting")
def test_every_ledger_entry_is_in_the_log(home: Home) -> None:
    with home.opened() as ledger:
        assert [details["kind"] for details in home.events()] == ["open", "budget"]
        reservation = ledger.reserve(charge())
        (*_, last) = home.events()
        assert (last["sequence"], last["kind"]) == (3, "reserve") == (reservation, "reserve")
        assert last["payload"]["mechanism"] == {"noise_multiplier": 1.0, "sample_rate": 0.05, "steps": 5}
        ledger.commit(reservation, executed_steps=4, release_sha256=RELEASE)
        assert home.events()[-1]["payload"]["executed_steps"] == 4
    with home.opened(epsilon=3.0) as ledger, home.opened(dataset="letters") as other:
        work(ledger)
        work(other)
        work(ledger)
    with home.opened():
        pass
    home.check()
    assert len(home.events()) == 4 + 1 + 2 + 6 * 3 + 1
    assert home.events(Event.LOG_RECOVERED) == []


@pytest.mark.usefixtures("free_accounting")
def test_entries_lost_in_a_crash_are_added_in_order(home: Home) -> None:
    with home.opened() as ledger:
        work(ledger)
    with home.opened(mirrored=False) as ledger:  # as if the process died between the ledger and the log, twice
        work(ledger, 1)
    with home.opened() as ledger:
        work(ledger)
    home.check()
    (healed,) = home.events(Event.LOG_RECOVERED)
    assert (healed["first_sequence"], healed["last_sequence"]) == (9, 10)


@pytest.mark.usefixtures("free_accounting")
def test_a_ledger_that_is_older_than_its_log_is_taken_in(home: Home) -> None:
    with home.opened(mirrored=False) as ledger:
        work(ledger)
    with home.opened() as ledger:
        work(ledger)
    home.check()


@pytest.mark.usefixtures("free_accounting")
def test_a_failed_append_is_made_up_for_by_the_next(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with home.opened() as ledger:
        with monkeypatch.context() as patch:
            patch.setattr(audit_log, "write_head", fail)
            with pytest.raises(TrustError, match="No space left"):
                ledger.reserve(charge())
        assert len(ledger.events()) == 1
        work(ledger)
    home.check()


@pytest.mark.usefixtures("free_accounting")
def test_an_older_copy_of_the_ledger_is_refused(home: Home, tmp_path: Path) -> None:
    with home.opened() as ledger:
        work(ledger, 2)
    shutil.copy(home.path, tmp_path / "copy")
    with home.opened() as ledger:
        work(ledger, 1)
    newest = home.path.read_bytes()
    shutil.copy(tmp_path / "copy", home.path)
    logged = home.events()
    for epsilon in (1000.0, 1.0):  # a new cap would be written to the old copy
        with (
            pytest.raises(
                LedgerError, match=r"older copy.* ledger entry 7 of 8 .* does not hold it.*Restore the newest"
            ),
            home.opened(epsilon=epsilon),
        ):
            pass
        assert home.path.read_bytes() == (tmp_path / "copy").read_bytes()
    # Charged elsewhere up to the same length: another history.
    with home.opened(mirrored=False) as ledger:
        work(ledger, 1)
    with pytest.raises(LedgerError, match=r"ledger entry 7 of 8 .* has another in its place"), home.opened():
        pass
    assert home.events() == logged
    home.path.write_bytes(newest)
    with home.opened() as ledger:
        work(ledger, 1)
    home.check()


@pytest.mark.usefixtures("free_accounting")
def test_a_deleted_ledger_is_refused(home: Home) -> None:
    with home.opened() as ledger:
        work(ledger, 1)
    home.path.unlink()
    for _ in range(2):
        with pytest.raises(LedgerError, match=r"ledger entry 1 of 4 .* does not hold it"), home.opened():
            pass


@pytest.mark.usefixtures("free_accounting")
def test_a_long_log_is_read_before_others_are_kept_waiting(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    with home.opened() as ledger:
        work(ledger, 2)
    mirror, read, locked = AuditMirror(home.log()), list[int](), AuditLog.locked

    def lock(log: AuditLog, **options: Any) -> AbstractContextManager[None]:
        read.append(len(mirror._mirrored))
        return locked(log, **options)

    with home.opened(mirrored=False) as ledger:
        monkeypatch.setattr(AuditLog, "locked", lock)
        mirror(ledger)
    assert read == [6]


@pytest.mark.usefixtures("free_accounting")
def test_a_witness_finds_what_opening_refuses(home: Home, tmp_path: Path) -> None:
    witness = Witness(home.log_folder)
    witness.check(home.path)  # neither is there yet
    with home.opened() as ledger:
        work(ledger, 2)
        witness.check(home.path)
        shutil.copy(home.path, tmp_path / "copy")
        work(ledger, 10)  # over several files of the log
    assert len(list(home.log_folder.glob("*.jsonl"))) > 1
    witness.check(home.path)
    newest = home.path.read_bytes()
    home.path.write_bytes((tmp_path / "copy").read_bytes())
    for one in (witness, Witness(home.log_folder)):
        with pytest.raises(LedgerError, match=r"older copy.* ledger entry 26 of 26 .* does not hold it"):
            one.check(home.path)
    with home.opened(mirrored=False) as ledger:  # charged elsewhere up to the same length: another history
        work(ledger, 10)
    with pytest.raises(LedgerError, match="has another in its place"):
        witness.check(home.path)
    home.path.write_bytes(newest)
    witness.check(home.path)
    home.path.unlink()
    with pytest.raises(LedgerError, match="does not hold it"):
        witness.check(home.path)


@pytest.mark.usefixtures("free_accounting")
def test_a_copy_from_before_an_import_is_refused(home: Home, tmp_path: Path) -> None:
    elsewhere = Home(tmp_path / "elsewhere")
    elsewhere.path.parent.mkdir()
    with elsewhere.opened() as ledger:
        work(ledger, 2)
        export = ledger.export(site="north", declared_records=1024)
    with home.opened():
        shutil.copy(home.path, tmp_path / "copy")
    with home.opened() as ledger:
        ledger.import_account(export)
    home.check()
    assert [details["kind"] for details in home.events()] == [
        "open",
        "budget",
        "import",
        "imported",
        "imported",
        "budget",
    ]
    shutil.copy(tmp_path / "copy", home.path)
    with pytest.raises(LedgerError, match=r"ledger entry 3 of 6 .* does not hold it"), home.opened():
        pass
    assert home.path.read_bytes() == (tmp_path / "copy").read_bytes()


@pytest.mark.usefixtures("free_accounting")
def test_an_older_version_is_mirrored_and_guarded(home: Home, tmp_path: Path) -> None:
    old = Path(__file__).parent / "ledger_v1" / "sealed.db"
    shutil.copy(old, home.path)
    home.path.chmod(0o600)
    with home.opened() as ledger:
        assert [event.steps for event in ledger.events()] == [20, 19, 30]
        work(ledger, 1)
    home.check()
    assert [details["kind"] for details in home.events()][10:] == ["migrate", "budget", "reserve", "commit"]
    shutil.copy(old, home.path)  # the backup from before the migration
    with pytest.raises(LedgerError, match=r"ledger entry 11 of 14 .* does not hold it"), home.opened():
        pass
    assert home.path.read_bytes() == old.read_bytes(), "the old copy was migrated before the mirror was asked"


def test_recount_follows_the_recorded_composition(home: Home) -> None:
    account = {"delta": DELTA, "dataset": "notes", "unit": "record"}
    with home.opened(epsilon=8.0, composition="adaptive") as ledger:
        work(ledger, 2)
        adaptive = ledger.spent_epsilon()
        assert recount(home.log_folder, **account) == adaptive
    with home.opened(epsilon=8.0, composition="fixed") as ledger:
        assert recount(home.log_folder, **account) == ledger.spent_epsilon() < adaptive
        with pytest.raises(LedgerError, match="unknown kind 'gift'"):
            Account.read(
                [*ledger.entries(), replace(ledger.entries()[-1], kind="gift")], dataset="notes", unit="record"
            )


@pytest.mark.usefixtures("free_accounting")
def test_an_older_copy_of_the_log_shows_in_it(home: Home, tmp_path: Path) -> None:
    with home.opened() as ledger:
        work(ledger, 1)
        shutil.copytree(home.log_folder, tmp_path / "copy")
        work(ledger, 4)
    shutil.rmtree(home.log_folder)
    shutil.copytree(tmp_path / "copy", home.log_folder)
    with home.opened():
        pass
    home.check()
    (filled,) = home.events(Event.LOG_RECOVERED)
    assert (filled["first_sequence"], filled["last_sequence"]) == (5, 12)


@pytest.mark.usefixtures("free_accounting")
def test_an_older_ledger_is_refused_while_running_too(home: Home, tmp_path: Path) -> None:
    with home.opened() as ledger:
        work(ledger, 1)
        shutil.copy(home.path, tmp_path / "copy")
        work(ledger, 1)
    with home.opened() as ledger:
        with closing(sqlite3.connect(home.path)) as connection:
            connection.execute("DROP TRIGGER no_delete")
            connection.execute("DELETE FROM entries WHERE sequence > 4")
            digest = connection.execute("SELECT entry_sha256 FROM entries WHERE sequence = 4").fetchone()[0]
            connection.execute("UPDATE head SET num_entries = 4, sha256 = ?", (digest,))
            connection.commit()
        with pytest.raises(LedgerError, match="ledger entry 5 of 6"):
            ledger.reserve(charge())


@pytest.mark.usefixtures("free_accounting")
def test_the_log_is_read_once(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    with home.opened() as ledger:
        work(ledger, 10)
    with home.opened() as ledger:
        parsed = 0
        real = audit_log.scan

        def counted(*args: Any) -> Any:
            nonlocal parsed
            for pair in real(*args):
                parsed += 1
                yield pair

        monkeypatch.setattr(audit_log, "scan", counted)
        work(ledger, 5)
        # each charge reads what the one before wrote
        assert parsed == 9


@pytest.mark.usefixtures("free_accounting")
def test_two_openings_mirror_each_entry_once(home: Home) -> None:
    def use(dataset: str) -> None:
        with home.opened(dataset=dataset) as ledger:
            work(ledger, 8)

    threads = [threading.Thread(target=use, args=(name,)) for name in ("notes", "letters", "films")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    home.check()
    assert len(home.events()) == 3 * (2 + 16)


def test_a_foreign_ledger_entry_in_the_log_is_refused(home: Home) -> None:
    with home.opened():
        pass
    home.log().append(Event.LEDGER_ENTRY, sequence=2, kind="budget", payload={}, entry_sha256="0" * 64)
    with pytest.raises(TrustError, match=r"entry 3 of the audit log .* ledger entry 3 must come next"), home.opened():
        pass
    with pytest.raises(TrustError, match="it is not a complete ledger entry"):
        recount(home.log_folder, delta=DELTA, dataset="notes", unit="record")


# --- recount ---

JOBS = ("one", "two")
# Each step: reserve (dataset, job, steps, sigma), then commit some share of it, or not.
ROUNDS = st.lists(
    st.tuples(
        st.sampled_from(("notes", "letters")),
        st.sampled_from(JOBS),
        st.integers(1, 9),
        st.sampled_from((1.0, 2.0)),
        st.none() | st.floats(0, 1),
    ),
    max_size=8,
)


@given(rounds=ROUNDS)
@settings(max_examples=25, deadline=None)
def test_recount_agrees_with_the_ledger(rounds: list[tuple[str, str, int, float, float | None]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        home = Home(Path(name))
        with home.opened() as notes, home.opened(dataset="letters") as letters:
            ledgers = {"notes": notes, "letters": letters}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(SpendingRule, "epsilon", lambda self, events: 0.0)
                for dataset, job, steps, sigma, share in rounds:
                    id_ = ledgers[dataset].reserve(charge(steps, job_id=job, sigma=sigma))
                    if share is not None:
                        ledgers[dataset].commit(id_, executed_steps=round(steps * share), release_sha256=RELEASE)
            for dataset, ledger in ledgers.items():
                for job_id in (None, *JOBS):
                    account = {"delta": DELTA, "dataset": dataset, "unit": "record", "job_id": job_id}
                    assert recount(home.log_folder, **account) == ledger.spent_epsilon(job_id)
            assert recount(home.log_folder, delta=DELTA, dataset="notes", unit="patient") == 0.0
            assert recount(home.log_folder, delta=DELTA, dataset="films", unit="record") == 0.0


def test_recount_of_a_broken_log_is_refused(home: Home) -> None:
    with home.opened() as ledger:
        ledger.reserve(charge())
    path = home.log_folder / "audit-00001.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"steps":5', b'"steps":1'))
    with pytest.raises(TrustError, match=r"audit-00001\.jsonl, line 3, \(entry 3\) was changed"):
        recount(home.log_folder, delta=DELTA, dataset="notes", unit="record")


# --- death ---

WORKER = """
import os, sys
from pathlib import Path
from client.ledger.audit_mirror import AuditMirror
from client.ledger.ledger import Budget, Charge, Ledger
from shared.trust.audit_log import AuditLog
from shared.trust.keystore import Seal
from shared.privacy.accounting import GaussianSteps
from shared.privacy.filter import SpendingRule
from shared.trust.signing import SigningKey

SpendingRule.epsilon = lambda self, events: 0.0
home = Path(sys.argv[1])

def work():
    log = AuditLog(home / "audit", seal_head=SigningKey.from_bytes(bytes(range(32))), max_bytes=4000)
    ledger = Ledger(
        home / "ledger.db", dataset="notes", unit="record", budget=Budget(epsilon=1000.0, delta=1e-5),
        cipher=Seal(bytes(range(32))), mirror=AuditMirror(log),
    )
    mechanism = GaussianSteps(noise_multiplier=1.0, sample_rate=0.05, steps=5)
    for round in range(100_000):
        id = ledger.reserve(Charge(job_id="job", round=round, request_sha256="a" * 64, mechanism=mechanism))
        ledger.commit(id, executed_steps=4, release_sha256="b" * 64)

for _ in sys.stdin:
    child = os.fork()
    if not child:
        work()
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.mark.usefixtures("free_accounting")
def test_kill_at_any_moment_leaves_a_log_that_heals(home: Home, tmp_path: Path) -> None:
    def wait_for_writes(file: Path, num: int) -> None:
        deadline, last = time.monotonic() + 60, file.stat().st_mtime_ns
        while num and time.monotonic() < deadline:
            if file.stat().st_mtime_ns != last:
                num, last = num - 1, file.stat().st_mtime_ns
            time.sleep(0.0002)

    seed = random.randrange(1 << 32)
    delays = random.Random(seed)
    with home.opened():
        pass
    nursery = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert nursery.stdin is not None
    assert nursery.stdout is not None
    gaps = 0
    try:
        for _ in range(25):
            nursery.stdin.write("start\n")
            nursery.stdin.flush()
            worker = int(nursery.stdout.readline())
            # However busy the machine is, the worker gets to charge something; then it dies at any moment.
            wait_for_writes(delays.choice([home.path, home.log_folder / "head.json"]), delays.randrange(6))
            time.sleep(delays.uniform(0.0, 0.003))
            os.kill(worker, signal.SIGKILL)
            assert nursery.stdout.readline().strip() == str(int(signal.SIGKILL)), f"it ended by itself, seed {seed}"
            before = len(home.events())
            with home.opened() as ledger:
                gaps += len(ledger.entries()) > before
            home.check()
    finally:
        nursery.kill()
        nursery.communicate()
    assert len(home.events()) > 20, "too little was charged: the test saw nothing"
    assert gaps, "no worker was killed between ledger and log: the test saw nothing"
