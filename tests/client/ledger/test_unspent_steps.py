"""What an early-stopped run leaves unspent: given to later jobs where the account is valid under that, else held back.

Promised is the epsilon of the whole plan, charged are the executed steps, and the cap of an account whose composition is "fixed"
has to hold the whole plan, for when the run stopped depends on what it released.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client.ledger.account import Charge
from client.ledger.audit_mirror import AuditMirror, recount
from client.ledger.ledger import Budget, Ledger
from client.site.site import Site
from shared.errors import BudgetExceeded, LedgerError
from shared.job.job import Job
from shared.privacy.accounting import GaussianSteps, compose_epsilon
from shared.privacy.ledger_export import load_export, save_export
from shared.trust.audit_log import AuditLog
from shared.wire.messages import Refusal, TrainReply, TrainRequest

TWO_STEPS = GaussianSteps(noise_multiplier=1.0, sample_rate=0.25, steps=2)


def epsilon_of(steps: int) -> float:
    return compose_epsilon([replace(TWO_STEPS, steps=steps)], 1e-5)


def charge(job: str, number: int, planned: int | None = None) -> Charge:
    return Charge(job_id=job, round=number, request_sha256=f"{number:064x}", mechanism=TWO_STEPS, planned_steps=planned)


@pytest.fixture
def ledger(tmp_path: Path) -> Callable[..., Ledger]:
    def open_it(*, steps: float, composition: Any = "fixed") -> Ledger:
        budget = Budget(epsilon=epsilon_of(int(steps)) + 1e-6, delta=1e-5, composition=composition)
        return Ledger(
            tmp_path / "ledger.db",
            dataset="notes",
            unit="record",
            budget=budget,
            mirror=AuditMirror(AuditLog(tmp_path / "audit")),
        )

    return open_it


def run(opened: Ledger, job: str, rounds: int, planned: int | None) -> None:
    for number in range(1, rounds + 1):
        reservation = opened.reserve(charge(job, number, planned))
        opened.commit(reservation, executed_steps=2, release_sha256="0" * 64)


def test_under_fixed_the_whole_plan_counts_from_the_first_round_on(
    ledger: Callable[..., Ledger], tmp_path: Path
) -> None:
    opened = ledger(steps=10)
    run(opened, "may-stop", 1, planned=8)
    # One round of four was executed; eight steps count, so two more fit and not four.
    assert opened.spent_epsilon() == pytest.approx(epsilon_of(8))
    assert opened.spent_epsilon("may-stop") == pytest.approx(epsilon_of(2)), "charged is what was executed"
    assert opened.affordable_steps(noise_multiplier=1.0, sample_rate=0.25) == 2
    run(opened, "other", 1, planned=None)
    with pytest.raises(BudgetExceeded):
        opened.reserve(charge("other", 2))
    # The job's own rounds are paid for already; a fifth one is not.
    for number in (2, 3, 4):
        opened.reserve(charge("may-stop", number, 8))
        assert opened.spent_epsilon() == pytest.approx(epsilon_of(10))
    with pytest.raises(BudgetExceeded):
        opened.reserve(charge("may-stop", 5, 8))
    opened.close()
    again = ledger(steps=10)
    assert again.spent_epsilon() == pytest.approx(epsilon_of(10))
    assert recount(tmp_path / "audit", delta=1e-5, dataset="notes", unit="record") == again.spent_epsilon()


def test_a_round_that_is_charged_twice_takes_nothing_from_what_is_held_back(ledger: Callable[..., Ledger]) -> None:
    """Else a run of four rounds would end at ten steps, and one that stopped after three had left eight: the cap would tell."""
    opened = ledger(steps=20)
    run(opened, "may-stop", 1, planned=8)
    run(opened, "may-stop", 1, planned=8)
    assert opened.spent_epsilon() == pytest.approx(epsilon_of(2 + 8))
    for number in (2, 3, 4):
        opened.reserve(charge("may-stop", number, 8))
        assert opened.spent_epsilon() == pytest.approx(epsilon_of(2 + 8))


def test_what_is_held_back_is_the_plan_less_what_its_rounds_executed(ledger: Callable[..., Ledger]) -> None:
    opened = ledger(steps=20)

    def held() -> list[tuple[str, int]]:
        found = opened.export(site="north", declared_records=32).held_back
        return [(steps.job_id, steps.steps) for steps in found]

    reservation = opened.reserve(charge("may-stop", 1, planned=6))
    opened.commit(reservation, executed_steps=0, release_sha256="0" * 64)
    assert held() == [("may-stop", 6)]
    assert opened.spent_epsilon() == pytest.approx(epsilon_of(6))
    run(opened, "may-stop", 2, planned=6)
    assert held() == [("may-stop", 2)]
    opened.reserve(charge("may-stop", 3, planned=6))
    assert held() == []


def test_a_plan_that_does_not_fit_as_a_whole_does_not_begin(ledger: Callable[..., Ledger]) -> None:
    opened = ledger(steps=6)
    with pytest.raises(BudgetExceeded, match="Nothing was charged"):
        opened.reserve(charge("may-stop", 1, 8))
    assert opened.events() == []
    run(opened, "runs-to-its-end", 3, planned=None)


def test_under_adaptive_what_was_left_is_given_on(ledger: Callable[..., Ledger]) -> None:
    opened = ledger(steps=40, composition="adaptive")
    run(opened, "may-stop", 1, planned=30)
    plain = [TWO_STEPS]
    assert opened.spent_epsilon() == pytest.approx(opened.rule.epsilon(plain))
    assert opened.affordable_steps(noise_multiplier=1.0, sample_rate=0.25) > 0


def test_an_export_and_an_import_take_along_what_is_held_back(ledger: Callable[..., Ledger], tmp_path: Path) -> None:
    opened = ledger(steps=10)
    run(opened, "may-stop", 2, planned=8)
    export = opened.export(site="north", declared_records=32)
    assert export.rule.epsilon(export.mechanisms) == pytest.approx(opened.spent_epsilon())
    (held,) = export.held_back
    assert (held.job_id, held.round, held.steps, held.committed) == ("may-stop", 0, 4, False)
    assert (held.noise_multiplier, held.sample_rate) == (1.0, 0.25)
    assert held.time <= export.exported_at
    assert sum(charged.steps for charged in export.charges) == 4, "a report compares these with what was executed"
    save_export(tmp_path / "export.json", export)
    assert load_export(tmp_path / "export.json") == export
    # Exports of an earlier version did not tell the plan with each charge; what is held back is told apart there as well.
    plain = tuple(charged.model_copy(update={"planned_steps": None}) for charged in export.charges)
    for name, taken in (("moved", export), ("older", export.model_copy(update={"charges": plain}))):
        moved = Ledger(tmp_path / f"{name}.db", dataset="notes", unit="record", budget=opened.budget)
        moved.import_account(taken)
        assert moved.spent_epsilon() == pytest.approx(epsilon_of(8))


@pytest.mark.parametrize("composition", ["adaptive", "fixed"])
def test_an_imported_plan_counts_by_the_composition_here_and_its_rounds_once(
    ledger: Callable[..., Ledger], tmp_path: Path, composition: str
) -> None:
    """From an adaptive account the rest of the plan was lost, and from a fixed one every further round of it counted twice."""
    opened = ledger(steps=40, composition=composition)
    run(opened, "may-stop", 1, planned=8)
    save_export(tmp_path / "export.json", opened.export(site="north", declared_records=32))
    here = Ledger(
        tmp_path / "here.db",
        dataset="notes",
        unit="record",
        budget=Budget(epsilon=epsilon_of(40), delta=1e-5, composition="fixed"),
    )
    here.import_account(load_export(tmp_path / "export.json"))
    assert here.spent_epsilon() == pytest.approx(epsilon_of(8))
    for number in (2, 3, 4):
        here.reserve(charge("may-stop", number, 8))
        assert here.spent_epsilon() == pytest.approx(epsilon_of(8))


def test_a_plan_without_steps_is_no_plan() -> None:
    with pytest.raises(LedgerError, match="plans 0 steps"):
        charge("x", 1, 0)


def test_a_site_tells_its_ledger_which_jobs_may_stop(
    site_home: Callable[..., Path], private_job: Callable[..., Job], request_for: Callable[..., TrainRequest]
) -> None:
    budget = {"epsilon": epsilon_of(8) + 1e-6, "delta": 1e-5, "composition": "fixed"}
    stopping = private_job(training={"rounds": 4, "early_stopping": {"patience": 1}})
    site = Site(site_home(budget=budget))
    assert isinstance(site.answer(request_for(stopping)), TrainReply)
    assert site.ledger().spent_epsilon() == pytest.approx(epsilon_of(8))
    refused = site.answer(request_for(private_job(name="other", training={"rounds": 1})))
    assert isinstance(refused, Refusal)
    assert refused.code == "BudgetExceeded"
    for number in (2, 3, 4):
        assert isinstance(site.answer(request_for(stopping, number)), TrainReply)
    plain = Site(site_home("plain", budget=budget))
    assert isinstance(plain.answer(request_for(private_job(training={"rounds": 4}))), TrainReply)
    assert plain.ledger().spent_epsilon() == pytest.approx(epsilon_of(2))
