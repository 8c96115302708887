"""The ledger as the console reads it: the same numbers, nothing written, damage told."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from client.budget.accounts import AccountBudget, Budgets, Plan, _spread, _told
from client.ledger.account import PROMISES, Account, Charge, Charged
from client.site.home import SiteHome, open_site
from shared.errors import LedgerError
from shared.job.parsing import load_toml
from shared.privacy.accounting import GaussianSteps
from shared.trust.keystore import Seal, load_secret
from simulations.federation.processes import change_toml
from tests.client.console.conftest import files_of
from tests.client.console.homes import ask, charge, make_home, want_people
from tests.conftest import Outcome


def budgets(home: SiteHome) -> Budgets:
    return Budgets(home, Seal(load_secret(home.storage_key, passphrase=None)))


@pytest.fixture
def home(tmp_path: Path) -> SiteHome:
    return make_home(tmp_path)


@pytest.mark.parametrize("composition", ["adaptive", "fixed"])
def test_the_spend_is_the_ledgers(home: SiteHome, composition: str) -> None:
    change_toml(home.config, budget={**load_toml(home.config)["budget"], "composition": composition})
    charge(home, jobs=["one", "two"], rounds=3, secure=True)
    change_toml(home.config, budget={**load_toml(home.config)["budget"], "epsilon_alone": 30.0})
    ledger = open_site(home, passphrase=None).ledger()
    (found,) = budgets(home).all()
    assert found.tells_both
    assert found.spent == {p: ledger.spent_epsilon(promise=p) for p in ("together", "alone")}  # type: ignore[arg-type]
    assert found.caps == {"together": 8.0, "alone": 30.0}
    assert found.spent["together"] < found.spent["alone"]
    assert [point.spent for point in found.line("alone")][-1] == pytest.approx(found.spent["alone"], abs=1e-12)
    for job in found.jobs:
        assert (job.epsilon, job.epsilon_alone) == (
            ledger.spent_epsilon(job.job),
            ledger.spent_epsilon(job.job, promise="alone"),
        )
    assert (found.num_open, found.steps) == (1, sum(event.steps for event in ledger.events()))


def test_reading_changes_nothing(home: SiteHome) -> None:
    found = budgets(home)
    assert not found.is_begun
    assert found.all() == []
    assert not (home.path / "ledger.db").exists()
    charge(home, jobs=["one"], rounds=2)
    before = files_of(home.path)
    assert len(found.all()) == 1
    assert files_of(home.path) == before


def test_it_is_read_anew_when_it_changed_and_only_then(home: SiteHome, monkeypatch: pytest.MonkeyPatch) -> None:
    charge(home, jobs=["one"], rounds=2)
    found, reads = budgets(home), []
    real: Callable[..., list[AccountBudget]] = found._accounts
    monkeypatch.setattr(found, "_accounts", lambda reading: (reads.append(reading.number), real(reading))[1])
    first = found.all()[0].spent["together"]
    found.all()
    charge(home, jobs=["two"], rounds=2, begin=datetime(2026, 11, 1, tzinfo=UTC))
    assert found.all()[0].spent["together"] > first
    change_toml(home.config, budget={**load_toml(home.config)["budget"], "epsilon": 9.0})
    assert found.all()[0].caps["together"] == 9.0
    assert len(reads) == 3


@pytest.mark.parametrize("composition", ["adaptive", "fixed"])
def test_what_would_be_spent_is_the_ledgers(home: SiteHome, composition: str) -> None:
    """One job that was begun, with most of its plan to come, and one that was not: run both, and compare."""
    change_toml(home.config, budget={**load_toml(home.config)["budget"], "composition": composition})
    charge(home, jobs=["one"], rounds=2)
    step = GaussianSteps(noise_multiplier=3.0, sample_rate=0.1, steps=5)
    together = replace(step, noise_multiplier=5.0)
    ledger = open_site(home, passphrase=None).ledger()
    plans: dict[str, Plan] = {
        job: {"together": [replace(together, steps=20)], "alone": [replace(step, steps=20)]} for job in "ab"
    }

    def reserve(job: str, rounds: range) -> None:
        for number in rounds:
            ledger.reserve(
                Charge(
                    job_id=job,
                    round=number,
                    request_sha256="ab" * 32,
                    mechanism=step,
                    together=together,
                    planned_steps=20,
                )
            )

    reserve("a", range(1))
    (found,) = budgets(home).all()
    told, alone = found.after(plans), found.after({"a": plans["a"]})
    assert found.after({}) == found.spent
    assert told["together"] > alone["together"] >= found.spent["together"]
    reserve("a", range(1, 4))
    assert alone == {p: ledger.spent_epsilon(promise=p) for p in PROMISES}
    reserve("b", range(4))
    assert told == pytest.approx({p: ledger.spent_epsilon(promise=p) for p in PROMISES}, abs=1e-12)
    ledger.close()


def test_an_account_of_another_data_set_is_shown_with_its_last_caps(home: SiteHome) -> None:
    charge(home, jobs=["one"], rounds=2)
    change_toml(home.config, dataset="other", budget={**load_toml(home.config)["budget"], "epsilon": 5.0})
    charge(home, jobs=["two"], rounds=2)
    current, former = budgets(home).all()
    assert (current.account.dataset, current.is_current, current.caps["together"]) == ("other", True, 5.0)
    assert (former.account.dataset, former.is_current, former.caps["together"]) == ("north-records", False, 8.0)
    assert current.id != former.id
    assert budgets(home).find(former.id) is not None


def test_a_changed_ledger_is_told(home: SiteHome) -> None:
    charge(home, jobs=["one"], rounds=2)
    with sqlite3.connect(home.path / "ledger.db") as connection:
        connection.execute("DROP TRIGGER no_delete")
        connection.execute("DELETE FROM entries WHERE sequence = 3")
    with pytest.raises(LedgerError, match="entry 3 is missing"):
        budgets(home).all()


def test_fault_an_older_ledger_is_not_shown(home: SiteHome, silotune: Callable[..., Outcome]) -> None:
    """What people decide by is not what was left before the last charges: the node would not open such a ledger either."""
    want_people(home)
    request = ask(home)
    charge(home, jobs=["one"], rounds=2)
    older = (home.path / "ledger.db").read_bytes()
    found = budgets(home)
    found.check()
    charge(home, jobs=["two"], rounds=2, begin=datetime(2026, 11, 1, tzinfo=UTC))
    (newer,) = found.all()
    newest = (home.path / "ledger.db").read_bytes()
    for content, told in ((older, "does not hold it"), (None, "does not hold it"), (forged(home), "has another")):
        if content is None:
            (home.path / "ledger.db").unlink()
        else:
            (home.path / "ledger.db").write_bytes(content)
        for one in (found, budgets(home)):
            for ask_of in (one.all, one.check, one.current):
                with pytest.raises(LedgerError, match=told):
                    ask_of()
        for command in ("request", "approve"):
            done = silotune(
                "site", command, home.path, request.name, *(["--by", "Olga"] if command == "approve" else [])
            )
            assert done.status
            assert told in done.err
    (home.path / "ledger.db").write_bytes(newest)
    assert found.all()[0].spent == newer.spent


def forged(home: SiteHome) -> bytes:
    """Return a ledger of as many entries as the site's, with another past."""
    other = make_home(home.path.parent / "other")
    charge(other, jobs=["three", "four"], rounds=2)
    return (other.path / "ledger.db").read_bytes()


def test_a_charge_that_the_log_does_not_repeat_yet_is_shown(home: SiteHome) -> None:
    """Ledger first, then log: between the two a page is as right as after them."""
    charge(home, jobs=["one"], rounds=2)
    log = {path: path.read_bytes() for path in home.audit.iterdir()}
    charge(home, jobs=["two"], rounds=2, begin=datetime(2026, 11, 1, tzinfo=UTC))
    for path in home.audit.iterdir():
        path.unlink()
    for path, content in log.items():
        path.write_bytes(content)
    found = budgets(home)
    found.check()
    assert len(found.all()[0].account.charges) == 4


def test_what_was_read_before_is_checked_when_that_is_asked_for(home: SiteHome) -> None:
    charge(home, jobs=["one"], rounds=2)
    found = budgets(home)
    found.check()
    before = found.all()
    with sqlite3.connect(home.path / "ledger.db") as connection:
        connection.execute("DROP TRIGGER no_update")
        connection.execute("UPDATE entries SET time = '2026-01-01' WHERE sequence = 3")
    assert found.all() == before, "its head is the same"
    with pytest.raises(LedgerError, match="entry 3 was changed"):
        found.check()


def test_a_line_of_many_charges_is_thinned_out() -> None:
    begin, step = datetime(2026, 1, 1, tzinfo=UTC), GaussianSteps(noise_multiplier=3.0, sample_rate=0.01, steps=1)
    account = Account(dataset="d", unit="record", caps=[{"epsilon": 8.0, "delta": 1e-5, "orders": [6, 9]}])
    for number in range(3000):
        time = (begin + timedelta(hours=number)).isoformat()
        account.charges[number] = Charged(
            job_id="j", round=number, mechanism=step, committed=True, time=time, imported=False
        )
    found = AccountBudget(account, {"together": 8.0, "alone": 8.0}, 1e-5, "adaptive", True)
    line = found.line("together")
    assert 150 <= len(line) <= 300, "one job, whose end is the last charge"
    assert line[0].time == begin.timestamp()
    assert line[-1].spent == pytest.approx(found.spent["together"], abs=1e-12)
    assert [point.spent for point in line] == sorted(point.spent for point in line)
    assert _spread(3, 10) == {0, 1, 2}
    assert _spread(0, 10) == set()
    for count in (1, 2, 299, 300, 301, 598, 599, 600, 3000, 99_999):
        told = _spread(count, 300)
        assert {0, count - 1} <= told
        assert len(told) <= 300
        assert len(_spread(count + 1, 300) - told) <= 2 or len(_spread(count + 1, 300)) < len(told)


def test_the_ends_of_jobs_are_in_the_line() -> None:
    step = GaussianSteps(noise_multiplier=3.0, sample_rate=0.01, steps=1)
    one = Charged(job_id="", round=0, mechanism=step, committed=True, time="", imported=False)
    charges = [replace(one, job_id=f"{number // 1000}") for number in range(50_000)]
    told = _told(charges, 300)
    assert {0, *range(999, 50_000, 1000)} <= told
    assert len(told) <= 600
    many = [replace(one, job_id=f"{number}") for number in range(3000)]
    assert len(_told(many, 300)) <= 300
