"""A real site whose people approve jobs: what no rule refuses waits, whatever is asked for, until they said yes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from client.approval.request import Rules
from client.approval.requests import Approvals
from client.backup import back_up, put_back
from client.policy.policy import load_policy
from client.site import opened as opened_module
from client.site.guard import Guard
from client.site.home import SiteHome
from shared.errors import AwaitingApproval
from shared.job.job import Job
from shared.job.parsing import load_toml
from shared.trust.audit_log import Event
from shared.trust.signed_job import SignedJob, round_fields
from shared.trust.signing import Purpose, SigningKey
from shared.wire.messages import MetricsReply, Order, Refusal, SiteDescription, TrainReply, TrainRequest
from simulations.federation.processes import change_toml
from tests.client.site.secure.test_guarded import Sites, ordered
from tests.client.site.test_guard import World, world

__all__ = ["world"]

ROOT = Path(__file__).parents[3]
WAITS = Refusal(site="north", code="AwaitingApproval", reason="waiting for approval")


@pytest.fixture(autouse=True)
def _required(world: World) -> None:
    change_toml(world.home.policy, approval="required")


@pytest.fixture
def job(private_job: Callable[..., Job]) -> Job:
    return private_job(federation={"min_sites": 2})


@pytest.fixture
def asked(job: Job, request_for: Callable[..., TrainRequest], world: World) -> TrainRequest:
    return world.order(request_for(job))


def people(world: World) -> tuple[Approvals, Rules]:
    """Return what a person's own process opens."""
    guard = world.site.guard
    assert isinstance(guard, Guard)
    return (
        Approvals(world.home.approvals, site="north", seal=guard.seal, log=guard.log, clock=lambda: world.now),
        Rules.of(load_policy(world.home.policy)),
    )


def approve(world: World, named: str = "test", by: str = "ada") -> None:
    approvals, rules = people(world)
    approvals.approve(named, rules, by=by)


def refuse(world: World, named: str = "test", by: str = "ada") -> None:
    approvals, rules = people(world)
    approvals.refuse(named, rules, by=by, reason="marker-reason")


def signed_of(request: TrainRequest) -> SignedJob:
    assert request.order is not None
    return request.order.signed_job


def of_attempt(world: World, request: TrainRequest, kind: str) -> TrainRequest:
    """Return a request of one of the two exchanges of an attempt, ordered as a coordinator does it."""
    signed, sent_at = signed_of(request), world.now.isoformat(timespec="milliseconds")
    fields = round_fields(
        job_sha256=request.job.sha256, round_number=1, adapter=request.adapter, sent_at=sent_at, attempt=1, kind=kind
    )
    signature = world.coordinator.sign(Purpose.ROUND, fields)
    return replace(request, attempt=1, order=Order(signed_job=signed, sent_at=sent_at, signature=signature))


def next_round(world: World, request: TrainRequest, request_for: Callable[..., TrainRequest]) -> TrainRequest:
    return world.order(request_for(request.job, 2, shift=0.001))


def test_every_kind_of_question_waits_and_nothing_is_loaded_or_charged(world: World, asked: TrainRequest) -> None:
    site = world.site
    for answer in (
        site.accept(signed_of(asked)),
        site.answer(asked),
        site.answer_ready(of_attempt(world, asked, "ready")),
        site.answer_masked(of_attempt(world, asked, "masked")),
        site.answer_metrics(asked),
    ):
        assert answer == WAITS
    assert not world.entries(Event.JOB_PREPARED)
    assert not [entry for entry in site.ledger().entries() if entry.kind == "reserve"]
    (noted,) = world.entries(Event.APPROVAL_ASKED)
    assert noted.details["job"] == asked.job.sha256
    assert {entry.details["reason"] for entry in world.entries(Event.REQUEST_REFUSED)} == {"waiting for approval"}


def test_a_description_without_a_job_waits_for_nobody(world: World) -> None:
    assert isinstance(world.site.accept(None), SiteDescription)


def test_an_approved_job_runs_through_all_its_rounds(
    world: World, asked: TrainRequest, request_for: Callable[..., TrainRequest]
) -> None:
    assert world.site.accept(signed_of(asked)) == WAITS
    approve(world)
    assert isinstance(world.site.accept(signed_of(asked)), SiteDescription)
    assert not world.entries(Event.APPROVAL_BEGUN)  # it prepares; its first round has not begun
    assert isinstance(world.site.answer(asked), TrainReply)
    # Whatever the days of the policy: it has begun.
    change_toml(world.home.policy, approval_days=0.001)
    world.now += timedelta(hours=1)
    assert isinstance(world.site.answer(next_round(world, asked, request_for)), TrainReply)
    assert len(world.entries(Event.APPROVAL_BEGUN)) == 1


def test_after_a_restart_an_approval_is_what_it_was(world: World, asked: TrainRequest) -> None:
    assert world.site.answer(asked) == WAITS
    world.opened.clear()
    assert world.site.answer(asked) == WAITS
    assert len(world.entries(Event.APPROVAL_ASKED)) == 1
    approve(world)
    world.opened.clear()
    first = world.site.answer(asked)
    assert isinstance(first, TrainReply)
    world.opened.clear()
    assert world.site.answer(asked) == first


def test_a_withdrawn_job_stops_before_its_next_round(
    world: World, asked: TrainRequest, request_for: Callable[..., TrainRequest]
) -> None:
    assert world.site.answer(asked) == WAITS
    approve(world)
    assert isinstance(world.site.answer(asked), TrainReply)
    spent = world.site.ledger().spent_epsilon()
    refuse(world)
    told = Refusal(site="north", code="PolicyError", reason="site north refuses the job test: its people said no.")
    assert world.site.answer(next_round(world, asked, request_for)) == told
    assert world.site.answer(asked) == told  # nor does what was stored leave once more
    assert world.site.accept(signed_of(asked)) == told
    assert world.site.ledger().spent_epsilon() == spent
    assert [entry.details["reason"] for entry in world.entries(Event.APPROVAL_WITHDRAWN)] == ["marker-reason"]
    assert all("marker" not in entry.details["reason"] for entry in world.entries(Event.REQUEST_REFUSED))


def test_a_job_that_a_rule_refuses_is_refused_as_ever_and_makes_no_request(
    world: World, private_job: Callable[..., Job], request_for: Callable[..., TrainRequest]
) -> None:
    by_policy = private_job(training={"rounds": 300}, federation={"min_sites": 2})
    by_terms = private_job(federation={"min_sites": 2}, privacy={"delta": 1e-3})
    for job, text in ((by_policy, "it plans 600 steps"), (by_terms, "is weaker than this site's")):
        for answer in (world.site.accept(world.signed(job)), world.site.answer(world.order(request_for(job)))):
            assert isinstance(answer, Refusal)
            assert text in answer.reason
    stranger = world.site.accept(world.signed(private_job(federation={"min_sites": 2}), signer=SigningKey.generate()))
    assert isinstance(stranger, Refusal)
    assert "is not among this site's signers" in stranger.reason
    assert not world.home.approvals.exists()


def test_a_request_that_its_coordinator_did_not_sign_makes_no_request_for_people(
    world: World, asked: TrainRequest
) -> None:
    forged = world.order(replace(asked, order=None), key=SigningKey.generate())
    assert "is not signed by the coordinator" in world.refusal(forged)
    assert not world.home.approvals.exists()


def test_the_same_job_of_another_signer_or_coordinator_waits(world: World, asked: TrainRequest) -> None:
    other = SigningKey.generate()
    signers = {"consortium": world.signer.verify_key.text, "other": other.verify_key.text}
    change_toml(world.home.policy, signers=signers)
    assert world.site.answer(asked) == WAITS
    approve(world)
    assert world.site.answer(world.order(asked, signer=other)) == WAITS
    elsewhere = replace(world, coordinator=SigningKey.generate(), opened=[world.site])
    assert world.site.answer(elsewhere.order(asked)) == WAITS
    assert isinstance(world.site.answer(asked), TrainReply)
    assert len(people(world)[0].listed(people(world)[1])) == 3


def test_four_eyes(world: World, asked: TrainRequest) -> None:
    change_toml(world.home.policy, approvals_needed=2)
    assert world.site.answer(asked) == WAITS
    approve(world, by="ada")
    assert world.site.answer(asked) == WAITS
    approve(world, by="bob")
    assert isinstance(world.site.answer(asked), TrainReply)


def test_an_approval_that_expired_before_the_first_round_is_asked_for_anew(world: World, asked: TrainRequest) -> None:
    change_toml(world.home.policy, approval_days=0.5)
    assert world.site.accept(signed_of(asked)) == WAITS
    approve(world)
    assert isinstance(world.site.accept(signed_of(asked)), SiteDescription)
    world.now += timedelta(hours=13)
    assert world.site.answer(world.order(asked)) == WAITS
    assert len(world.entries(Event.APPROVAL_EXPIRED)) == 1
    approve(world)
    assert isinstance(world.site.answer(world.order(asked)), TrainReply)


def budget(world: World, epsilon: float) -> None:
    change_toml(world.home.config, budget=load_toml(world.home.config)["budget"] | {"epsilon": epsilon})
    world.opened.clear()


def test_a_round_that_is_refused_its_charge_keeps_no_approval(world: World, asked: TrainRequest) -> None:
    """Whoever asks while the budget is short could keep a yes for ever, at no cost."""
    change_toml(world.home.policy, approval="required", approval_days=0.5)
    whole = load_toml(world.home.config)["budget"]["epsilon"]
    budget(world, 0.001)
    assert world.site.answer(asked) == WAITS
    approve(world)
    answer = world.site.answer(world.order(asked))
    assert isinstance(answer, Refusal)
    assert answer.code == "BudgetExceeded"
    assert not world.entries(Event.APPROVAL_BEGUN)
    world.now += timedelta(days=300)
    budget(world, whole)
    assert world.site.answer(world.order(asked)) == WAITS


def test_a_file_that_was_edited_approves_nothing_and_nobody_is_told_why(world: World, asked: TrainRequest) -> None:
    assert world.site.answer(asked) == WAITS
    waiting = world.home.approvals.read_bytes()
    approve(world)
    for content in (waiting, b"{}"):
        world.home.approvals.write_bytes(content)
        assert world.site.answer(asked) == Refusal.withheld("north")
        assert "Nothing counts as approved" in world.entries(Event.REQUEST_REFUSED)[-1].details["reason"]


def test_a_site_that_was_put_back_from_a_backup_asks_anew(world: World, asked: TrainRequest, tmp_path: Path) -> None:
    assert world.site.answer(asked) == WAITS
    approve(world)
    released = world.site.answer(asked)
    assert isinstance(released, TrainReply)
    back_up(world.home, tmp_path / "backup.tar")
    restored = replace(world, home=SiteHome(tmp_path / "restored"), opened=[])
    put_back(tmp_path / "backup.tar", restored.home, passphrase=None, nothing_released=True)
    assert not restored.home.approvals.exists()
    assert restored.site.answer(asked) == WAITS
    approve(restored)
    assert restored.site.answer(asked) == released


def test_a_running_job_waits_once_approval_is_required(
    world: World, asked: TrainRequest, request_for: Callable[..., TrainRequest]
) -> None:
    change_toml(world.home.policy, approval="none")
    assert isinstance(world.site.answer(asked), TrainReply)
    assert not world.home.approvals.exists()
    change_toml(world.home.policy, approval="required")
    assert world.site.answer(next_round(world, asked, request_for)) == WAITS
    approve(world)
    assert isinstance(world.site.answer(next_round(world, asked, request_for)), TrainReply)


def test_a_no_holds_where_approval_is_not_required_any_more(world: World, asked: TrainRequest) -> None:
    assert world.site.answer(asked) == WAITS
    refuse(world)
    change_toml(world.home.policy, approval="none")
    assert "its people said no" in world.refusal(asked)
    approve(world)
    assert isinstance(world.site.answer(asked), TrainReply)


def test_a_policy_without_the_keys_asks_nobody_and_writes_nothing(world: World, asked: TrainRequest) -> None:
    lines = world.home.policy.read_text().splitlines()
    old = "\n".join(line for line in lines if not line.startswith(("approval", "# approval")))
    world.home.policy.write_text(old + "\n")
    assert isinstance(world.site.accept(signed_of(asked)), SiteDescription)
    assert isinstance(world.site.answer(asked), TrainReply)
    assert not world.home.approvals.exists()
    assert not [entry for event in Event if event.startswith("approval.") for entry in world.entries(event)]


def test_metrics_are_a_round_like_any_other(
    world: World, private_job: Callable[..., Job], request_for: Callable[..., TrainRequest]
) -> None:
    change_toml(world.home.config, evaluation_share=0.3)
    change_toml(world.home.policy, metrics=["accuracy"])
    job = private_job(
        federation={"min_sites": 2},
        training={"rounds": 1},
        site_metrics={"names": ["accuracy"], "noise_multiplier": 5.0},
    )
    measured = world.order(request_for(job, 2))
    assert world.site.answer_metrics(measured) == WAITS
    approve(world)
    assert isinstance(world.site.answer_metrics(measured), MetricsReply)
    refuse(world)
    answer = world.site.answer_metrics(measured)
    assert isinstance(answer, Refusal)
    assert "its people said no" in answer.reason


def test_both_exchanges_of_a_sum_over_sites_wait_and_stop(
    world: World, classification_job: Callable[..., Job], request_for: Callable[..., TrainRequest], tmp_path: Path
) -> None:
    job = classification_job(
        training={"rounds": 2, "local_steps": 1},
        privacy={"mechanism": "distributed", "max_colluding": 1, "noise_multiplier": 1.0, "sample_rate": 0.25},
        federation={"min_sites": 3},
    )
    request = replace(request_for(job), attempt=1)
    assert world.site.answer_ready(ordered(world, request)) == WAITS
    approve(world)
    sites = Sites(world, tmp_path / "ca", request)
    entries = sites.ready()
    assert not world.entries(Event.APPROVAL_BEGUN), "it costs nothing, and must not keep an approval for ever"
    refuse(world)
    answer = sites.masked(entries)
    assert isinstance(answer, Refusal)
    assert "its people said no" in answer.reason
    assert sites.charged() == 0
    approve(world)
    assert isinstance(sites.masked(entries), TrainReply)
    assert (len(world.entries(Event.APPROVAL_BEGUN)), sites.charged()) == (1, 1)


def test_what_is_told_while_it_waits_does_not_follow_from_a_record(
    world: World, asked: TrainRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any) -> Iterator[None]:
        pytest.fail("a record was read for a job that waits")

    monkeypatch.setattr(opened_module.OpenedFolder, "usable", read)
    assert world.site.accept(signed_of(asked)) == WAITS
    assert world.site.answer(asked) == WAITS


def test_a_withdrawal_between_admission_and_charge_is_heeded(
    world: World, asked: TrainRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert world.site.answer(asked) == WAITS
    approve(world)
    real = opened_module.OpenedFolder.usable

    def usable(self: Any, *arguments: Any) -> Any:
        refuse(world)
        return real(self, *arguments)

    monkeypatch.setattr(opened_module.OpenedFolder, "usable", usable)
    assert "its people said no" in world.refusal(asked)


def test_no_other_door_leads_to_the_records() -> None:
    """Every kind of request is admitted by `OpenedFolder.admit`, which asks people last."""
    pattern = re.compile(r"\.(admit_round|admit_job|admit_decided)\(")
    found = {
        path.relative_to(ROOT).as_posix(): len(pattern.findall(path.read_text(encoding="utf-8")))
        for path in (ROOT / "client").rglob("*.py")
        if pattern.search(path.read_text(encoding="utf-8"))
    }
    assert found == {"client/site/opened.py": 5, "client/site/site.py": 1, "client/site/guard.py": 1}


def test_the_text_is_the_only_one() -> None:
    assert str(AwaitingApproval()) == WAITS.reason
