"""The ledger: what it charges, where it stops, and that no crash, race, full disk or edit loosens it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

import client.ledger.account as account_module
import client.ledger.file as file_module
from client.ledger.ledger import Budget, Charge, Ledger
from shared.epsilons import rounded_up
from shared.errors import BudgetExceeded, LedgerError, PrivacyError
from shared.privacy.accounting import GaussianSteps, compose_epsilon
from shared.privacy.filter import Composition, SpendingRule, filter_epsilon, filter_orders
from shared.trust.keystore import Seal

ROOT = Path(__file__).resolve().parents[3]
DELTA = 1e-5
REQUEST = "a" * 64
RELEASE = "b" * 64


def steps(num: int) -> GaussianSteps:
    return GaussianSteps(noise_multiplier=1.0, sample_rate=0.05, steps=num)


def charge(num: int, *, job_id: str = "job", round: int = 0) -> Charge:  # noqa: A002
    return Charge(job_id=job_id, round=round, request_sha256=REQUEST, mechanism=steps(num))


def epsilon_of(num: int) -> float:
    return compose_epsilon([steps(num)], DELTA)


@contextmanager
def opened(
    path: Path,
    *,
    epsilon: float = 8.0,
    composition: Composition = "fixed",
    dataset: str = "notes",
    unit: str = "record",
    **options: Any,
) -> Iterator[Ledger]:
    budget = Budget(epsilon=epsilon, delta=DELTA, composition=composition)
    with closing(Ledger(path, dataset=dataset, unit=unit, budget=budget, **options)) as ledger:
        yield ledger


@contextmanager
def free_accounting() -> Iterator[None]:
    """Leave out the accountant where only the file is under test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpendingRule, "epsilon", lambda self, events: 0.0)
        yield


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


# --- charging ---


def test_reserve_and_commit_charge_what_the_accountant_says(path: Path) -> None:
    with opened(path) as ledger:
        assert ledger.spent_epsilon() == 0.0
        first = ledger.reserve(charge(20, job_id="one"))
        ledger.reserve(charge(20, job_id="two"))
        assert ledger.events() == [steps(20), steps(20)]
        assert ledger.spent_epsilon() == epsilon_of(40)
        ledger.commit(first, executed_steps=10, release_sha256=RELEASE)
        assert ledger.events() == [steps(10), steps(20)]
        assert ledger.events("one") == [steps(10)]
        assert ledger.spent_epsilon() == epsilon_of(30)
        assert ledger.spent_epsilon("two") == epsilon_of(20)
        assert ledger.spent_epsilon("three") == 0.0


def test_uncommitted_reservation_counts_in_full(path: Path) -> None:
    with opened(path, epsilon=epsilon_of(20)) as ledger:
        ledger.reserve(charge(20))
    with opened(path, epsilon=epsilon_of(20)) as ledger:
        assert ledger.spent_epsilon() == epsilon_of(20)
        with pytest.raises(BudgetExceeded):
            ledger.reserve(charge(1))


def test_retried_round_is_charged_again(path: Path) -> None:
    with opened(path) as ledger:
        ids = {ledger.reserve(charge(10, round=3)), ledger.reserve(charge(10, round=3))}
        assert len(ids) == 2
        assert ledger.spent_epsilon() == epsilon_of(20)


def test_hard_stop_exactly_at_the_cap(path: Path) -> None:
    with opened(path, epsilon=epsilon_of(40)) as ledger:
        ledger.reserve(charge(33))
        before = ledger.entries()
        with pytest.raises(BudgetExceeded, match=r"asks for 8 steps.*Nothing was charged\. 7 such") as refused:
            ledger.reserve(charge(8))
        assert refused.value.steps_affordable == 7
        assert ledger.entries() == before
        assert ledger.affordable_steps(noise_multiplier=1.0, sample_rate=0.05) == 7
        ledger.reserve(charge(7))  # exactly the cap is allowed
        with pytest.raises(BudgetExceeded) as refused:
            ledger.reserve(charge(1))
        assert refused.value.steps_affordable == 0
        assert ledger.spent_epsilon() == epsilon_of(40)


@pytest.mark.parametrize("composition", ["fixed", "adaptive"])
def test_a_refusal_says_what_was_asked_what_it_would_cost_and_what_fits(path: Path, composition: Composition) -> None:
    with opened(path, epsilon=3.0, composition=composition) as ledger:
        ledger.reserve(charge(20))
        fits = ledger.affordable_steps(noise_multiplier=1.0, sample_rate=0.05)
        after = ledger.rule.epsilon([steps(20), steps(fits + 1)])
        with pytest.raises(BudgetExceeded) as refused:
            ledger.reserve(charge(fits + 1, job_id="late", round=2))
        assert str(refused.value) == (
            f"round 2 of job late asks for {fits + 1} steps at noise multiplier 1.0000 and sample rate 0.05. That would bring "
            f"data set 'notes' (unit: record) from epsilon {rounded_up(ledger.spent_epsilon(), 6)} to {rounded_up(after, 6)} "
            f"at delta 1e-05 ({composition} composition); the site's cap is 3. Nothing was charged. {fits} such steps still "
            "fit: ask for no more than that, for more noise or a smaller sample rate, or raise the site's cap in its settings."
        )
        assert refused.value.steps_affordable == fits


def test_hard_stop_of_the_filter(path: Path) -> None:
    orders = filter_orders(epsilon=8.0, delta=DELTA)
    with opened(path, composition="adaptive") as ledger:
        assert (ledger.rule.composition, ledger.rule.orders, ledger.spent_epsilon()) == ("adaptive", orders, 0.0)
        ledger.reserve(charge(100))
        assert ledger.spent_epsilon() == filter_epsilon([steps(100)], delta=DELTA, orders=orders) > epsilon_of(100)
        assert ledger.spent_epsilon("job") == epsilon_of(100), "a job is a plan that was fixed in advance"
        fits = ledger.affordable_steps(noise_multiplier=1.0, sample_rate=0.05)
        before = ledger.entries()
        with pytest.raises(
            BudgetExceeded, match=rf"\(adaptive composition\).*Nothing was charged\. {fits} such"
        ) as refused:
            ledger.reserve(charge(fits + 1))
        assert (refused.value.steps_affordable, ledger.entries()) == (fits, before)
        ledger.reserve(charge(fits))
        with pytest.raises(BudgetExceeded):
            ledger.reserve(charge(1))
        assert 7.9 < ledger.spent_epsilon() <= 8.0
    with opened(path, composition="fixed") as ledger:  # the owner's word that all plans had been fixed
        assert ledger.spent_epsilon() == epsilon_of(100 + fits) < 8.0
        ledger.reserve(charge(1))


def test_orders_stay_when_the_cap_changes_after_a_charge(path: Path) -> None:
    def recorded(epsilon: float, composition: Composition = "adaptive") -> list[Any]:
        with opened(path, epsilon=epsilon, composition=composition) as ledger:
            return [entry.payload["orders"] for entry in ledger.entries() if entry.kind == "budget"]

    three, eight = (list(filter_orders(epsilon=epsilon, delta=DELTA)) for epsilon in (3.0, 8.0))
    assert recorded(3.0) == [three]
    assert recorded(8.0) == [three, eight], "nothing was released yet"
    with opened(path, composition="adaptive") as ledger:
        ledger.reserve(charge(10))
    assert recorded(3.0) == [three, eight, eight]
    assert recorded(3.0, "fixed") == recorded(3.0, "fixed") == [three, eight, eight, eight]
    with opened(path, epsilon=3.0, composition="adaptive") as ledger:
        assert ledger.rule.orders == tuple(eight)
        with pytest.raises(BudgetExceeded):
            ledger.reserve(charge(1))


def test_the_slow_accounting_is_done_before_the_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then again under it, where the sum is in the accountant's cache unless another process charged in between."""
    asked: list[tuple[bool, list[GaussianSteps]]] = []

    with opened(path) as ledger:
        ledger.reserve(charge(3))

        def noted(rule: SpendingRule, events: list[GaussianSteps]) -> float:
            asked.append((ledger._file._connection.in_transaction, list(events)))
            return 0.0

        monkeypatch.setattr(SpendingRule, "epsilon", noted)
        before = ledger.entries()
        ledger.anticipate(steps(5))
        assert ledger.entries() == before
        ledger.reserve(charge(5))
        events = [steps(3), steps(5)]
        # Each once for either cap.
        assert asked == [(False, events)] * 4 + [(True, events)] * 2


def test_each_opening_goes_by_its_own_composition(path: Path) -> None:
    with opened(path, composition="adaptive") as one, opened(path, composition="fixed") as other:
        assert (one.rule.composition, other.rule.composition) == ("adaptive", "fixed")


def test_who_charges_is_the_only_writer(path: Path) -> None:
    with opened(path) as ledger, closing(sqlite3.connect(path, isolation_level=None, timeout=0)) as other:
        with ledger._file.transaction("DEFERRED"):
            other.execute("BEGIN IMMEDIATE")
            other.execute("ROLLBACK")
        with ledger._file.transaction("IMMEDIATE"), pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")


def test_what_is_missing_is_told_by_number(path: Path) -> None:
    with opened(path) as ledger:
        fill(ledger)
    good = path.read_bytes()
    for statement, told in (
        ("DELETE FROM entries WHERE sequence = 3", "entry 3 is missing; the next one found has number 4"),
        ("DELETE FROM entries WHERE sequence = 6", "entry 6 is missing, added or replaced; the last one recorded is 6"),
        ("DELETE FROM head", "entry 7 is missing, added or replaced; the last one recorded is none"),
    ):
        path.write_bytes(good)
        tamper(path, lambda connection, statement=statement: connection.execute(statement))
        with pytest.raises(LedgerError, match=rf"cannot be trusted: {told}\. Nothing more is charged"), opened(path):
            pass


def test_unaccountable_epsilon_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(path) as ledger:
        monkeypatch.setattr(SpendingRule, "epsilon", lambda self, events: float("nan"))
        monkeypatch.setattr(SpendingRule, "affordable_steps", lambda *_, **__: 0)
        with pytest.raises(BudgetExceeded):
            ledger.reserve(charge(1))
        assert ledger.events() == []


def test_reopening_keeps_every_charge(path: Path) -> None:
    with opened(path) as ledger:
        first = ledger.reserve(charge(20))
        ledger.commit(first, executed_steps=15, release_sha256=RELEASE)
        second = ledger.reserve(charge(5))
        before = ledger.entries()
    with opened(path) as ledger:
        assert ledger.entries() == before
        assert ledger.spent_epsilon() == epsilon_of(20)
        ledger.commit(second, executed_steps=5, release_sha256=RELEASE)
        with pytest.raises(LedgerError, match="committed already"):
            ledger.commit(first, executed_steps=15, release_sha256=RELEASE)


def test_charges_of_one_job_are_told_oldest_first(path: Path) -> None:
    """By these a site knows how far a job has come, so those of another job must not count."""
    with opened(path) as ledger:
        for number, job in ((1, "a"), (7, "b"), (2, "a")):
            ledger.reserve(charge(2, job_id=job, round=number))
        assert [(charged.job_id, charged.round) for charged in ledger.charges("a")] == [("a", 1), ("a", 2)]
        assert [charged.round for charged in ledger.charges("b")] == [7]
        assert ledger.charges("c") == []


def test_accounts_share_a_file_but_not_a_cap(path: Path) -> None:
    with (
        opened(path) as notes,
        opened(path, dataset="letters") as letters,
        opened(path, dataset="calls", unit="patient") as patients,
    ):
        reservation = notes.reserve(charge(20))
        assert letters.events() == patients.events() == []
        with pytest.raises(LedgerError, match="no reservation"):
            letters.commit(reservation, executed_steps=0, release_sha256=RELEASE)
        letters.reserve(charge(10))
        assert (notes.spent_epsilon(), letters.spent_epsilon()) == (epsilon_of(20), epsilon_of(10))
        kinds = [entry.kind for entry in notes.entries()]
        assert kinds == ["open", "budget"] * 3 + ["reserve"] * 2


@pytest.mark.parametrize(
    "other",
    [
        "Notes",
        "NOTES",
        " notes ",
        "notes\n",
        "\uff4eotes",
        "no\u0074es",
        "no\u200btes\ufeff",
        "no\u00adtes",
        "caf\u00e9",
        "cafe\u0301",
        "CAF\u00c9 ",
    ],
)
def test_another_spelling_of_a_data_set_is_no_new_budget(path: Path, other: str) -> None:
    first = "caf\u00e9" if "caf" in other.casefold() else "notes"
    with opened(path, epsilon=1.001 * epsilon_of(30), dataset=first) as ledger:
        ledger.reserve(charge(20))
    with opened(path, epsilon=1.001 * epsilon_of(30), dataset=other) as ledger:
        assert ledger.spent_epsilon() == epsilon_of(20)
        with pytest.raises(BudgetExceeded):
            ledger.reserve(charge(20))
        ledger.reserve(charge(10))
        assert ledger.spent_epsilon() == epsilon_of(30)
    with (
        pytest.raises(LedgerError, match="was charged by the unit 'record'"),
        opened(path, dataset=other, unit="patient"),
    ):
        pass


def test_what_an_older_version_kept_under_two_spellings_counts_together(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as older:
        older.setattr(account_module, "dataset_key", str)
        for name in ("notes", "Notes"):
            with opened(path, epsilon=1.001 * epsilon_of(20), dataset=name) as ledger:
                ledger.reserve(charge(20))
                assert ledger.spent_epsilon() == epsilon_of(20)
    for name in ("notes", "Notes"):
        with opened(path, epsilon=1.001 * epsilon_of(20), dataset=name) as ledger:
            assert ledger.spent_epsilon() == epsilon_of(40)
            with pytest.raises(BudgetExceeded):
                ledger.reserve(charge(1))


@pytest.mark.parametrize(("first", "second"), [("record", "patient"), ("patient", "record"), ("patient", "customer")])
def test_a_charged_data_set_keeps_its_unit(path: Path, first: str, second: str) -> None:
    """A release by the record has no bound by the patient, and one by the patient must not be missing by the record."""
    with opened(path, unit=first) as ledger, opened(path, unit=second) as other:
        before = other.entries()  # both may be opened before anything is charged
        ledger.reserve(charge(5))
        with pytest.raises(
            LedgerError, match=f"was charged by the unit '{first}', so it cannot be counted by '{second}'"
        ):
            other.reserve(charge(5))
        assert len(ledger.entries()) == len(before) + 1
        assert ledger.spent_epsilon() == epsilon_of(5)
    with pytest.raises(LedgerError, match=f'Set budget.unit = "{first}"'), opened(path, unit=second):
        pass
    with opened(path, unit=first) as ledger, opened(path, dataset="letters", unit=second) as letters:
        letters.reserve(charge(5))
        ledger.reserve(charge(5))


def test_each_change_of_the_cap_is_recorded(path: Path) -> None:
    for epsilon in (8.0, 8.0, 3.0, 8.0):
        with opened(path, epsilon=epsilon) as ledger:
            caps = [entry.payload["epsilon"] for entry in ledger.entries() if entry.kind == "budget"]
    assert caps == [8.0, 3.0, 8.0]


def test_lowered_cap_refuses_the_next_charge_but_not_the_commit(path: Path) -> None:
    with opened(path) as ledger:
        reservation = ledger.reserve(charge(20))
    with opened(path, epsilon=1.0) as ledger:
        with pytest.raises(BudgetExceeded):
            ledger.reserve(charge(1))
        ledger.commit(reservation, executed_steps=20, release_sha256=RELEASE)


def test_entries_carry_the_injected_time_in_utc(path: Path) -> None:
    noon = datetime(2031, 5, 4, 12, tzinfo=UTC)
    budget = Budget(epsilon=8, delta=DELTA)
    with closing(Ledger(path, dataset="notes", unit="record", budget=budget, clock=lambda: noon)) as ledger:
        assert {entry.time for entry in ledger.entries()} == {"2031-05-04T12:00:00.000+00:00"}


# --- bad arguments ---


@pytest.mark.parametrize("executed", [-1, 11])
def test_commit_of_steps_outside_the_reservation_is_refused(path: Path, executed: int) -> None:
    with opened(path) as ledger:
        reservation = ledger.reserve(charge(10))
        with pytest.raises(LedgerError, match="covers 10 steps"):
            ledger.commit(reservation, executed_steps=executed, release_sha256=RELEASE)
        assert ledger.events() == [steps(10)]


def test_commit_of_an_unknown_reservation_is_refused(path: Path) -> None:
    with opened(path) as ledger:
        ledger.reserve(charge(10))
        for unknown in (0, 1, 99):  # entry 1 exists, but is not a reservation
            with pytest.raises(LedgerError, match=f"no reservation {unknown}"):
                ledger.commit(unknown, executed_steps=1, release_sha256=RELEASE)


def test_bad_arguments_are_refused(path: Path) -> None:
    for epsilon in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(LedgerError, match="epsilon"):
            Budget(epsilon=epsilon, delta=DELTA)
    with pytest.raises(LedgerError, match="composition is 'none'; expected 'adaptive' or 'fixed'"):
        Budget(epsilon=1.0, delta=DELTA, composition="none")  # type: ignore[arg-type]
    with pytest.raises(PrivacyError, match="delta"):
        Budget(epsilon=1.0, delta=0.0)
    for changes in ({"job_id": " "}, {"round": -1}, {"request_sha256": "A" * 64}, {"mechanism": steps(0)}):
        arguments = {"job_id": "job", "round": 0, "request_sha256": REQUEST, "mechanism": steps(1)} | changes
        with pytest.raises(LedgerError):
            Charge(**arguments)
    for account in ({"dataset": ""}, {"unit": ""}, {"dataset": "x" * 501}):
        with pytest.raises(LedgerError, match=rf"^{next(iter(account))} (is empty|has 501)"), opened(path, **account):
            pass
    assert not path.exists()
    with opened(path) as ledger:
        reservation = ledger.reserve(charge(1))
        with pytest.raises(LedgerError, match=r"^release_sha256 is"):
            ledger.commit(reservation, executed_steps=1, release_sha256="b" * 63)


def test_arguments_at_their_limits_are_accepted(path: Path) -> None:
    with opened(path, dataset="x" * 500, epsilon=1e-9 + epsilon_of(30)) as ledger:
        assert Charge(job_id="x" * 500, round=0, request_sha256="0" * 64, mechanism=steps(1)).round == 0
        nothing, everything = (ledger.reserve(charge(10)) for _ in range(2))
        ledger.commit(nothing, executed_steps=0, release_sha256=RELEASE)
        ledger.commit(everything, executed_steps=10, release_sha256=RELEASE)
        assert ledger.events() == [steps(0), steps(10)]


# --- the file ---


def test_the_format_of_the_file_stands(path: Path) -> None:
    """Every later version has to read it, and the hashes are over these very texts."""
    with opened(path, clock=lambda: datetime(2031, 5, 4, 12, tzinfo=UTC)) as ledger:
        ledger.reserve(charge(7, round=3))
        ledger.commit(3, executed_steps=5, release_sha256=RELEASE)
        may_stop = {"records": "c" * 64, "planned_steps": 20}
        ledger.reserve(Charge(job_id="job", round=4, request_sha256=REQUEST, mechanism=steps(7), **may_stop))
    with closing(sqlite3.connect(path)) as file:
        rows = file.execute("SELECT * FROM entries ORDER BY sequence").fetchall()
        assert file.execute("PRAGMA application_id").fetchone() == (int.from_bytes(b"SILO"),)
        assert file.execute("PRAGMA user_version").fetchone() == (2,)
        assert file.execute("SELECT * FROM head").fetchall() == [(5, rows[-1][5])]
    kinds = ("open", "budget", "reserve", "commit", "reserve")
    assert [row[:3] for row in rows] == [
        (number, kind, "2031-05-04T12:00:00.000+00:00") for number, kind in enumerate(kinds, start=1)
    ]
    orders = list(filter_orders(epsilon=8.0, delta=DELTA))
    assert [row[3] for row in rows[:2]] == [
        '{"dataset":"notes","schema_version":2,"unit":"record"}',
        f'{{"composition":"fixed","dataset":"notes","delta":1e-05,"epsilon":8.0,"orders":{orders},"unit":"record"}}'.replace(
            ", ", ","
        ),
    ]
    assert rows[3][3] == (
        f'{{"dataset":"notes","executed_steps":5,"release_sha256":"{RELEASE}","reservation":3,"unit":"record"}}'
    )
    assert json.loads(rows[4][3]) == json.loads(rows[2][3]) | {"round": 4} | may_stop
    assert rows[2][3] == (
        '{"dataset":"notes","job_id":"job","mechanism":{"noise_multiplier":1.0,"sample_rate":0.05,"steps":7},'
        f'"request_sha256":"{REQUEST}","round":3,"unit":"record"}}'
    )
    previous = "0" * 64
    for sequence, kind, time_text, payload, link, digest in rows:
        assert link == previous
        text = json.dumps([previous, sequence, kind, time_text, payload])
        assert digest == hashlib.sha256(text.encode()).hexdigest()
        previous = digest


def test_new_file_is_private_and_stands_alone(path: Path) -> None:
    previous = os.umask(0)
    try:
        with opened(path) as ledger:
            ledger.reserve(charge(1))
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == [path.name]


def test_every_write_is_synchronised_with_the_disk(path: Path) -> None:
    with opened(path) as ledger:
        assert ledger._file._connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        assert ledger._file._connection.execute("PRAGMA synchronous").fetchone() == (3,)  # EXTRA


def test_a_new_file_has_its_place_on_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power cut after the first charge could leave a folder without the file."""
    synchronised: list[Path] = []
    monkeypatch.setattr(file_module, "sync_folder", synchronised.append)
    for _ in range(2):
        with opened(path):
            assert synchronised == [path.parent]


def test_unusable_files_are_explained(path: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(LedgerError, match="cannot create the ledger"),
        opened(tmp_path / "missing" / "ledger"),
    ):
        pass
    with pytest.raises(LedgerError, match="cannot be opened"), opened(tmp_path):
        pass
    path.write_bytes(b"these are not the bytes of a database " * 100)
    with pytest.raises(LedgerError, match="is no ledger"), opened(path):
        pass
    other = tmp_path / "other.sqlite"
    with closing(sqlite3.connect(other)) as connection:
        connection.execute("CREATE TABLE patients (name)")
    with pytest.raises(LedgerError, match="is a database, but no ledger"), opened(other):
        pass


def test_damaged_file_is_explained(path: Path) -> None:
    with free_accounting(), opened(path) as ledger:
        for _ in range(20):
            ledger.reserve(charge(1))
    data = bytearray(path.read_bytes())
    data[100:] = b"\xff" * (len(data) - 100)
    path.write_bytes(data)
    with pytest.raises(LedgerError, match="damaged"), opened(path):
        pass


def test_a_refused_opening_leaves_no_file_open(path: Path) -> None:
    """Neither one that the mirror refuses nor one that the file's own checks refuse, while the error is still held."""

    def refuse(ledger: Ledger) -> None:
        raise LedgerError("no mirror")

    def is_open() -> bool:
        return str(path) in [file.path for file in psutil.Process().open_files()]

    with pytest.raises(LedgerError, match="no mirror") as held, opened(path, mirror=refuse):
        pass
    assert held.tb is not None
    assert not is_open()
    with opened(path):
        assert is_open()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 3")
    with pytest.raises(LedgerError, match="schema version 3") as held, opened(path):
        pass
    assert held.tb is not None
    assert not is_open()


def test_newer_schema_is_refused_untouched(path: Path) -> None:
    with opened(path):
        pass
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 3")
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="schema version 3; this program knows versions up to 2"), opened(path):
        pass
    assert path.read_bytes() == before


def test_locked_file_is_explained(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_module, "LOCK_TIMEOUT", 0.1)
    with opened(path) as ledger, closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(LedgerError, match="another process kept it locked"):
            ledger.reserve(charge(1))
        other.execute("ROLLBACK")
        ledger.reserve(charge(1))


def test_full_disk_charges_nothing_and_recovers(path: Path) -> None:
    with free_accounting(), opened(path) as ledger:
        (pages,) = ledger._file._connection.execute("PRAGMA page_count").fetchone()
        ledger._file._connection.execute(f"PRAGMA max_page_count = {pages}")
        num_charged = 0
        with pytest.raises(LedgerError, match="disk is full and nothing was written"):  # noqa: PT012
            for _ in range(100):
                ledger.reserve(charge(1))
                num_charged += 1
        ledger.entries()
        assert len(ledger.events()) == num_charged
        ledger._file._connection.execute("PRAGMA max_page_count = 1000000")
        ledger.reserve(charge(1))
        assert len(ledger.events()) == num_charged + 1


def test_file_that_vanished_while_open_refuses_charges(path: Path) -> None:
    with opened(path) as ledger:
        path.unlink()
        with pytest.raises(LedgerError, match="moved while open"):
            ledger.reserve(charge(1))


def test_closed_ledger_and_foreign_thread_are_explained(path: Path) -> None:
    caught: list[LedgerError] = []

    def use() -> None:
        with pytest.raises(LedgerError, match="thread") as error:
            ledger.events()
        caught.append(error.value)

    with opened(path) as ledger:
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
    assert len(caught) == 1
    with pytest.raises(LedgerError, match="closed"):
        ledger.events()


# --- tampering ---


def edit_payload(connection: sqlite3.Connection) -> None:
    connection.execute(
        """UPDATE entries SET payload = replace(payload, '"steps":30', '"steps":3') WHERE sequence = 5"""
    )


def edit_time(connection: sqlite3.Connection) -> None:
    connection.execute("UPDATE entries SET time = '2001-01-01T00:00:00.000+00:00' WHERE sequence = 5")


def edit_kind(connection: sqlite3.Connection) -> None:
    connection.execute("UPDATE entries SET kind = 'note' WHERE sequence = 5")


def edit_type(connection: sqlite3.Connection) -> None:
    connection.execute("UPDATE entries SET payload = CAST(payload AS BLOB) WHERE sequence = 5")


def edit_undecodable(connection: sqlite3.Connection) -> None:
    connection.execute("UPDATE entries SET payload = CAST(x'ff00ff' AS TEXT) WHERE sequence = 5")


def edit_with_its_own_hash(connection: sqlite3.Connection) -> None:
    edit_payload(connection)
    (row,) = connection.execute("SELECT * FROM entries WHERE sequence = 5")
    digest = file_module._entry_sha256(row[4], *row[:4])
    connection.execute("UPDATE entries SET entry_sha256 = ? WHERE sequence = 5", (digest,))


def edit_last_with_its_own_hash(connection: sqlite3.Connection) -> None:
    connection.execute("""UPDATE entries SET payload = replace(payload, ':40', ':4') WHERE sequence = 6""")
    (row,) = connection.execute("SELECT * FROM entries WHERE sequence = 6")
    digest = file_module._entry_sha256(row[4], *row[:4])
    connection.execute("UPDATE entries SET entry_sha256 = ? WHERE sequence = 6", (digest,))


def delete_middle(connection: sqlite3.Connection) -> None:
    connection.execute("DELETE FROM entries WHERE sequence = 5")


def delete_middle_and_renumber(connection: sqlite3.Connection) -> None:
    connection.execute("DELETE FROM entries WHERE sequence = 5")
    connection.execute("UPDATE entries SET sequence = 5 WHERE sequence = 6")
    connection.execute("UPDATE head SET num_entries = 5")


def delete_tail(connection: sqlite3.Connection) -> None:
    connection.execute("DELETE FROM entries WHERE sequence >= 5")


def delete_tail_and_lower_the_count(connection: sqlite3.Connection) -> None:
    connection.execute("DELETE FROM entries WHERE sequence >= 6")
    connection.execute("UPDATE head SET num_entries = 5")


def delete_all(connection: sqlite3.Connection) -> None:
    connection.execute("DELETE FROM entries")


def delete_head(connection: sqlite3.Connection) -> None:
    connection.execute("DELETE FROM head")


def swap(connection: sqlite3.Connection) -> None:
    for old, new in ((5, 100), (4, 5), (100, 4)):
        connection.execute("UPDATE entries SET sequence = ? WHERE sequence = ?", (new, old))


def append_copy(connection: sqlite3.Connection) -> None:
    connection.execute(
        "INSERT INTO entries SELECT 7, kind, time, payload, previous_sha256, entry_sha256"
        " FROM entries WHERE sequence = 6"
    )


TAMPERINGS: list[tuple[Callable[[sqlite3.Connection], None], str]] = [
    (edit_payload, "entry 5 was changed"),
    (edit_time, "entry 5 was changed"),
    (edit_kind, "entry 5 was changed"),
    (edit_type, "entry 5 was changed"),
    (edit_undecodable, "Could not decode"),
    (edit_with_its_own_hash, "entry 6 does not follow"),
    (edit_last_with_its_own_hash, "entry 6 is missing, added or replaced"),
    (delete_middle, "entry 5 is missing"),
    (delete_middle_and_renumber, "entry 5 does not follow"),
    (delete_tail, "entry 5 is missing"),
    (delete_tail_and_lower_the_count, "entry 5 is missing, added or replaced"),
    (delete_all, "entry 1 is missing"),
    (delete_head, "entry 7 is missing, added or replaced"),
    (swap, "entry 4 does not follow"),
    (append_copy, "entry 7 does not follow"),
]


def fill(ledger: Ledger) -> None:
    """Entries: 1 open, 2 budget, 3 to 6 reservations of 10, 20, 30 and 40 steps."""
    with free_accounting():
        for num in (10, 20, 30, 40):
            ledger.reserve(charge(num))


def tamper(path: Path, how: Callable[[sqlite3.Connection], None]) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("DROP TRIGGER no_update")
        connection.execute("DROP TRIGGER no_delete")
        before = path.read_bytes()
        how(connection)
    assert path.read_bytes() != before, "the tampering changed nothing"


@pytest.mark.parametrize(("how", "diagnosis"), TAMPERINGS, ids=[how.__name__ for how, _ in TAMPERINGS])
def test_tampering_is_detected(path: Path, how: Callable[[sqlite3.Connection], None], diagnosis: str) -> None:
    with opened(path) as ledger:
        fill(ledger)
        tamper(path, how)
        with pytest.raises(LedgerError, match=diagnosis):
            ledger.entries()
    with pytest.raises(LedgerError, match=diagnosis), opened(path):
        pass


def test_tampering_behind_an_open_ledger_stops_the_next_charge(path: Path) -> None:
    with opened(path) as ledger:
        fill(ledger)
        tamper(path, edit_payload)
        with pytest.raises(LedgerError, match="entry 5 was changed"):
            ledger.reserve(charge(1))
        with pytest.raises(LedgerError, match="entry 5 was changed"):
            ledger.commit(3, executed_steps=1, release_sha256=RELEASE)


@pytest.mark.parametrize("statement", ["UPDATE entries SET kind = 'x'", "DELETE FROM entries WHERE sequence = 2"])
def test_accidental_edit_is_refused_by_the_file_itself(path: Path, statement: str) -> None:
    with opened(path):
        pass
    with (
        closing(sqlite3.connect(path)) as connection,
        pytest.raises(sqlite3.IntegrityError, match="append-only"),
    ):
        connection.execute(statement)


# --- sealed ---

SEAL = Seal(bytes(range(32)))
PLANTED = ("cardiology-letters", "patient", "job-of-the-northern-union", REQUEST, RELEASE, "0.0523", "1.7654321")


def fill_sealed(ledger: Ledger) -> int:
    """Entries: 1 open, 2 budget, 3 a reservation, 4 its commit, 5 a reservation."""
    mechanism = GaussianSteps(noise_multiplier=1.7654321, sample_rate=0.0523, steps=31)
    planted = Charge(job_id=PLANTED[2], round=7, request_sha256=REQUEST, mechanism=mechanism)
    with free_accounting():
        first = ledger.reserve(planted)
        ledger.commit(first, executed_steps=30, release_sha256=RELEASE)
        return ledger.reserve(planted)


def opened_sealed(path: Path, **options: Any) -> Any:
    return opened(path, **{"dataset": PLANTED[0], "unit": PLANTED[1], "cipher": SEAL} | options)


def test_sealed_ledger_charges_like_any_other(path: Path, tmp_path: Path) -> None:
    with opened_sealed(path) as sealed, opened_sealed(tmp_path / "plain.sqlite", cipher=None) as plain:
        assert fill_sealed(sealed) == fill_sealed(plain) == 5
        shown = [
            [(entry.sequence, entry.kind, entry.payload) for entry in ledger.entries()] for ledger in (sealed, plain)
        ]
        assert shown[0] == shown[1]
        assert sealed.spent_epsilon() == plain.spent_epsilon() > 0
    with opened_sealed(path) as sealed:
        assert [(entry.sequence, entry.kind, entry.payload) for entry in sealed.entries()] == shown[0]
        with pytest.raises(LedgerError, match="committed already"):
            sealed.commit(3, executed_steps=1, release_sha256=RELEASE)


def test_sealed_ledger_shows_nothing(path: Path, tmp_path: Path) -> None:
    def traces(file: Path, cipher: Seal | None) -> tuple[set[str], set[int]]:
        """Return which planted texts stand in the file or in its journal, and the lengths of the payloads."""
        with opened_sealed(file, cipher=cipher) as ledger:
            fill_sealed(ledger)
            with ledger._file.transaction("IMMEDIATE"):
                ledger._append(ledger._file.read_chain(), "commit", {"reservation": 5, "executed_steps": 1})
                journal = file.with_name(f"{file.name}-journal").read_bytes()
            payloads = [str(row[0]) for row in ledger._file._connection.execute("SELECT payload FROM entries")]
        assert len(journal) > 1000
        content = file.read_bytes() + journal
        if cipher is not None:
            content += b"".join(map(base64.b64decode, payloads))
        return {text for text in texts if text.encode() in content}, set(map(len, payloads))

    texts = {*PLANTED, '"steps"', "budget", "reserve", "epsilon"}
    found, lengths = traces(tmp_path / "plain.sqlite", None)
    assert found == texts, "the test would see nothing"
    assert len(lengths) > 3
    found, lengths = traces(path, SEAL)
    assert found == set()
    assert len(lengths) == 1, "the length tells the kind"


def test_wrong_key_no_key_and_needless_key_are_explained(path: Path, tmp_path: Path) -> None:
    with opened_sealed(path) as ledger:
        fill_sealed(ledger)
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=r"is sealed, and no key was given\. Open it with the key"), opened(path):
        pass
    other = Seal(bytes(32))
    with pytest.raises(LedgerError, match=r"entry 1 .* does not open with the key"), opened(path, cipher=other):
        pass
    assert path.read_bytes() == before
    plain = tmp_path / "plain.sqlite"
    with opened(plain) as ledger:
        fill(ledger)
    before = plain.read_bytes()
    with pytest.raises(LedgerError, match=r"is not sealed .* but a key was given"), opened(plain, cipher=SEAL):
        pass
    assert plain.read_bytes() == before


def forge(connection: sqlite3.Connection, sequence: int, kind: str, payload: str) -> None:
    """Replace an entry and compute every hash anew, as one can who has no key."""
    rows = [list(row) for row in connection.execute("SELECT * FROM entries ORDER BY sequence")]
    rows[sequence - 1][1], rows[sequence - 1][3] = kind, payload
    previous = "0" * 64
    for row in rows:
        row[4], row[5] = previous, file_module._entry_sha256(previous, *row[:4])
        previous = row[5]
        connection.execute(
            "UPDATE entries SET kind=?2, payload=?4, previous_sha256=?5, entry_sha256=?6 WHERE sequence=?1", row
        )
    connection.execute("UPDATE head SET sha256 = ?", (previous,))


def payload_of(connection: sqlite3.Connection, sequence: int) -> str:
    return str(connection.execute("SELECT payload FROM entries WHERE sequence = ?", (sequence,)).fetchone()[0])


def test_forged_entry_of_a_sealed_ledger_is_refused(path: Path) -> None:
    with opened_sealed(path) as ledger:
        fill_sealed(ledger)
    good = path.read_bytes()
    smaller = json.dumps({"kind": "commit", "payload": {"reservation": 5, "executed_steps": 0}})
    own = base64.b64encode(Seal(bytes(32)).seal(smaller.encode(), context="ledger/4")).decode()
    forgeries: list[tuple[Callable[[sqlite3.Connection], None], str]] = [
        (lambda c: forge(c, 4, "sealed", own), "entry 4 .* does not open"),
        (lambda c: forge(c, 5, "sealed", payload_of(c, 3)), "entry 5 .* does not open"),  # another entry's content
        (lambda c: forge(c, 4, "commit", smaller), r"is not sealed \(entry 4"),
        (lambda c: forge(c, 4, "sealed", "no base64!"), "entry 4 .* does not open"),
        (lambda c: forge(c, 4, "sealed", payload_of(c, 4) + "!"), "entry 4 .* does not open"),  # its own, but not quite
    ]
    for forgery, problem in forgeries:
        path.write_bytes(good)
        tamper(path, forgery)
        with pytest.raises(LedgerError, match=problem), opened_sealed(path):
            pass
    path.write_bytes(good)
    with opened_sealed(path) as ledger:
        ledger.entries()


# The others need the plain text: see test_forged_entry_of_a_sealed_ledger_is_refused.
NEEDING_TEXT = (edit_payload, edit_with_its_own_hash, edit_last_with_its_own_hash)
BLIND_TAMPERINGS = [pair for pair in TAMPERINGS if pair[0] not in NEEDING_TEXT]


@pytest.mark.parametrize(("how", "diagnosis"), BLIND_TAMPERINGS, ids=[how.__name__ for how, _ in BLIND_TAMPERINGS])
def test_tampering_with_a_sealed_ledger_is_detected(
    path: Path, how: Callable[[sqlite3.Connection], None], diagnosis: str
) -> None:
    with opened(path, cipher=SEAL) as ledger:
        fill(ledger)
    tamper(path, how)
    with pytest.raises(LedgerError, match=diagnosis), opened(path, cipher=SEAL):
        pass


# --- a mirror ---


def test_mirror_is_called_before_the_first_write_and_after_each(path: Path) -> None:
    seen: list[int] = []

    def mirror(ledger: Ledger) -> None:
        seen.append(len(ledger.entries()))

    with opened(path, mirror=mirror) as ledger:
        assert seen == [0, 2]
        reservation = ledger.reserve(charge(5))
        ledger.commit(reservation, executed_steps=5, release_sha256=RELEASE)
        assert seen == [0, 2, 3, 4]
        with pytest.raises(BudgetExceeded):
            ledger.reserve(charge(100_000))
        assert seen == [0, 2, 3, 4]


def test_what_the_mirror_raises_is_passed_on_and_the_charge_stands(path: Path) -> None:
    broken = False

    def mirror(ledger: Ledger) -> None:
        if broken:
            raise LedgerError("the mirror is broken")

    with opened(path, mirror=mirror) as ledger:
        broken = True
        with pytest.raises(LedgerError, match="the mirror is broken"):
            ledger.reserve(charge(10))
        broken = False
        assert ledger.events() == [steps(10)]
    broken = True
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="the mirror is broken"), opened(path, epsilon=1.0, mirror=mirror):
        pass
    assert path.read_bytes() == before, "the new cap was written before the mirror was asked"


# --- several processes, and death at any moment ---

RACER = """
import sys, time
from pathlib import Path
from client.ledger.ledger import Budget, Charge, Ledger
from shared.errors import BudgetExceeded, LedgerError
from shared.privacy.accounting import GaussianSteps
from shared.privacy.filter import SpendingRule

def slow_epsilon(self, events):
    epsilon = real_epsilon(self, events)
    time.sleep(0.05)  # widen the gap between check and charge
    return epsilon

real_epsilon, SpendingRule.epsilon = SpendingRule.epsilon, slow_epsilon
folder, cap, composition = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
mechanism = GaussianSteps(noise_multiplier=1.0, sample_rate=0.05, steps=int(sys.argv[4]))
charge = Charge(job_id="job", round=0, request_sha256="a" * 64, mechanism=mechanism)
print("ready", flush=True)
while line := sys.stdin.readline():
    budget = Budget(epsilon=cap, delta=1e-5, composition=composition)
    ledger = Ledger(folder / line.strip(), dataset="notes", unit="record", budget=budget)
    print("opened", flush=True)
    sys.stdin.readline()
    try:
        ledger.reserve(charge)
        print("won", flush=True)
    except BudgetExceeded:
        print("refused", flush=True)
    except LedgerError as error:
        print(error, flush=True)
"""

WORKER = """
import os, sys
from pathlib import Path
from client.ledger.ledger import Budget, Charge, Ledger
from shared.privacy.accounting import GaussianSteps
from shared.privacy.filter import SpendingRule

SpendingRule.epsilon = lambda self, events: 0.0  # spend the time where death could hurt

def work():
    budget = Budget(epsilon=8.0, delta=1e-5)
    ledger = Ledger(Path(sys.argv[1]), dataset="notes", unit="record", budget=budget)
    released = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for round in range(100_000):
        steps = 5 + round % 7
        mechanism = GaussianSteps(noise_multiplier=1.0, sample_rate=0.05, steps=steps)
        id = ledger.reserve(Charge(job_id="job", round=round, request_sha256="a" * 64, mechanism=mechanism))
        executed = steps - round % 2
        os.write(released, f"{executed}\\n".encode())
        os.fsync(released)
        ledger.commit(id, executed_steps=executed, release_sha256="b" * 64)

for _ in sys.stdin:
    child = os.fork()
    if not child:
        work()
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def python(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def say(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("composition", ["fixed", "adaptive"])
def test_two_processes_race_for_the_last_affordable_charge(tmp_path: Path, composition: Composition) -> None:
    if composition == "fixed":
        cap, num = epsilon_of(10), 10
    else:
        cap = 4.0
        rule = SpendingRule(composition="adaptive", delta=DELTA, orders=filter_orders(epsilon=cap, delta=DELTA))
        num = rule.affordable_steps([], noise_multiplier=1.0, sample_rate=0.05, cap=cap)
    racers = [python(RACER, str(tmp_path), repr(cap), composition, str(num)) for _ in range(2)]
    try:
        assert [hear(racer) for racer in racers] == ["ready", "ready"]
        for number in range(5):
            name = f"{number}.sqlite"
            for racer in racers:
                say(racer, name)
            assert [hear(racer) for racer in racers] == ["opened", "opened"]
            for racer in racers:
                say(racer, "go")
            assert sorted(hear(racer) for racer in racers) == ["refused", "won"]
            with opened(tmp_path / name, epsilon=cap, composition=composition) as ledger:
                assert ledger.events() == [steps(num)]
                assert ledger.spent_epsilon() <= cap
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()


def test_kill_at_any_moment_never_loses_a_charge(path: Path, tmp_path: Path) -> None:
    releases = tmp_path / "released"
    releases.touch()
    seed = random.randrange(1 << 32)
    delays = random.Random(seed)
    nursery = python(WORKER, str(path), str(releases))  # forks one worker for each line, the imports done
    try:
        for _ in range(25):
            say(nursery, "start")
            worker = int(hear(nursery))
            time.sleep(delays.uniform(0.0, 0.15))
            os.kill(worker, signal.SIGKILL)
            assert hear(nursery) == str(int(signal.SIGKILL)), "the worker ended by itself"
            released = [int(line) for line in releases.read_text().splitlines()]
            with opened(path) as ledger:  # verifies the chain
                reserved = ledger.events()
                committed = [entry for entry in ledger.entries() if entry.kind == "commit"]
            assert sum(event.steps for event in reserved) >= sum(released), f"seed {seed}"
            assert len(reserved) >= len(released) >= len(committed), f"seed {seed}"
    finally:
        nursery.kill()
        nursery.communicate()
    assert committed, "no round was finished: the test saw nothing"
    assert len(reserved) > len(committed), "no worker was killed within a round: the test saw nothing"
