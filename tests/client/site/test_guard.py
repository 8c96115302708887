"""A real site, guarded: what it is sent is trained only if it is signed, fresh and within the policy."""

from __future__ import annotations

import hashlib
import inspect
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from client import commands
from client.app import Signed, signed
from client.approval.policy_changes import FOLDER
from client.ledger.account import Budget, Charge
from client.site.guard import Guard, NoGuard
from client.site.home import SiteHome, open_site
from client.site.site import Site
from shared.data.datasets import write_jsonl
from shared.epsilons import as_set
from shared.errors import PolicyError, SilotuneError, TrustError
from shared.job.job import Job
from shared.models.backbones import backbone_sha256
from shared.privacy.plan import PrivacyPlan
from shared.trust import audit_log
from shared.trust.audit_log import Entry, Event
from shared.trust.keystore import new_key, save_secret
from shared.trust.signed_job import SignedJob, round_fields, sign_job
from shared.trust.signing import Purpose, SigningKey
from shared.wire.messages import (
    MetricsReply,
    Order,
    Refusal,
    SiteDescription,
    TrainReply,
    TrainRequest,
    pack_request,
    unpack_request,
)
from simulations.federation.processes import change_toml

NOON = datetime(2026, 6, 1, 12, 0, tzinfo=UTC)


@dataclass
class World:
    """A site, and everybody who sends it something; `now` is the clock of all of them."""

    home: SiteHome
    signer: SigningKey
    coordinator: SigningKey
    now: datetime = NOON
    opened: list[Site] = field(default_factory=list)

    @property
    def site(self) -> Site:
        if not self.opened:
            self.opened.append(open_site(self.home, passphrase=None, clock=lambda: self.now))
        return self.opened[-1]

    def signed(self, job: Job, *, signer: SigningKey | None = None, days: float = 1.0) -> SignedJob:
        return sign_job(
            job,
            signer=signer or self.signer,
            coordinator=self.coordinator.verify_key,
            issued=self.now,
            not_after=self.now + timedelta(days=days),
        )

    def order(
        self,
        request: TrainRequest,
        *,
        signer: SigningKey | None = None,
        key: SigningKey | None = None,
        sent_at: str | None = None,
    ) -> TrainRequest:
        """Return the request, ordered as a coordinator does it."""
        sent_at = sent_at or self.now.isoformat(timespec="milliseconds")
        fields = round_fields(
            job_sha256=request.job.sha256,
            round_number=request.round_number,
            adapter=request.adapter,
            sent_at=sent_at,
        )
        signature = (key or self.coordinator).sign(Purpose.ROUND, fields)
        signed = self.signed(request.job, signer=signer)
        return replace(request, order=Order(signed_job=signed, sent_at=sent_at, signature=signature))

    def entries(self, event: Event) -> list[Entry]:
        return [entry for entry in audit_log.read(self.home.audit) if entry.event == event]

    def refusal(self, request: TrainRequest) -> str:
        """Return the reason why the site refuses a request; checks that nothing was charged and that it was noted."""
        before = len(self.site.ledger().entries())
        answer = self.site.answer(request)
        assert isinstance(answer, Refusal), "it was not refused"
        assert answer.site == "north"
        assert len(self.site.ledger().entries()) == before
        noted = self.entries(Event.REQUEST_REFUSED)[-1].details
        assert (noted["code"], noted["reason"], noted["reason_sent"]) == (answer.code, answer.reason, True)
        return answer.reason


@pytest.fixture
def world(tmp_path: Path, tiny_bert: Path, records: list[dict[str, Any]]) -> World:
    signer = SigningKey.generate()
    write_jsonl(tmp_path / "notes.jsonl", records)
    home = SiteHome(tmp_path / "north")
    commands.init(
        home.path,
        name="north",
        coordinator="127.0.0.1:9",
        data=tmp_path / "notes.jsonl",
        columns=["text=text", "label=label"],
        epsilon=50.0,
        signer=[f"consortium={signer.verify_key.text}"],
    )
    change_toml(home.policy, backbones={str(tiny_bert): backbone_sha256(tiny_bert)})
    change_toml(home.config, compute={"device": "cpu", "precision": "float32"})
    return World(home, signer, SigningKey.generate())


@pytest.fixture
def job(private_job: Callable[..., Job]) -> Job:
    return private_job(federation={"min_sites": 2})


@pytest.fixture
def asked(job: Job, request_for: Callable[..., TrainRequest], world: World) -> TrainRequest:
    """A request that nothing is wrong with."""
    return world.order(request_for(job))


# --- what is accepted ---


def test_a_request_that_nothing_is_wrong_with_is_trained_and_noted(world: World, asked: TrainRequest) -> None:
    assert isinstance(world.site.accept(asked.order and asked.order.signed_job), SiteDescription)
    reply = world.site.answer(asked)
    assert isinstance(reply, TrainReply), reply
    assert reply.job_sha256 == asked.job.sha256
    received, stored = world.entries(Event.REQUEST_RECEIVED)[-1], world.entries(Event.RELEASE_STORED)[-1]
    assert received.details["signer"] == world.signer.verify_key.text
    assert asked.order
    assert (received.details["sent_at"], received.details["waited_seconds"]) == (asked.order.sent_at, 0.0)
    assert stored.details["epsilon_spent"] == pytest.approx(world.site.ledger().spent_epsilon())
    assert world.entries(Event.JOB_PREPARED)


def test_the_same_request_again_is_answered_from_the_store_and_charged_once(world: World, asked: TrainRequest) -> None:
    first, spent = world.site.answer(asked), world.site.ledger().spent_epsilon()
    assert isinstance(first, TrainReply)
    assert world.site.answer(asked) == first
    assert world.site.answer(world.order(replace(asked, order=None))) == first
    assert world.site.ledger().spent_epsilon() == spent
    # The log has it once more each time: a process may have died before it noted what it had stored.
    stored, repeated = world.entries(Event.RELEASE_STORED), world.entries(Event.RELEASE_REPEATED)
    assert (len(stored), len(repeated)) == (1, 2)
    assert {entry.details["sha256"] for entry in repeated} == {stored[0].details["sha256"]}


def test_without_a_job_a_site_tells_only_its_public_description(world: World) -> None:
    answer = world.site.accept(None)
    assert isinstance(answer, SiteDescription)
    assert (answer.site, answer.declared_records) == ("north", 32)


# --- signatures ---


def test_an_unsigned_request_is_refused(world: World, asked: TrainRequest) -> None:
    reason = world.refusal(replace(asked, order=None))
    assert reason == "site north accepts signed jobs only; submit the job through a coordinator."


def test_a_request_without_signatures_is_refused_as_it_comes_from_the_wire(world: World, asked: TrainRequest) -> None:
    request = unpack_request(pack_request(replace(asked, order=None)))
    assert "accepts signed jobs only" in world.refusal(request)


ALTERATIONS: dict[str, Callable[[TrainRequest, World, Job], TrainRequest]] = {
    "round number": lambda r, w, other: replace(r, round_number=2),
    "adapter": lambda r, w, other: replace(r, adapter=r.adapter[:-1] + bytes([r.adapter[-1] ^ 1])),
    "time": lambda r, w, other: with_order(
        r, sent_at=(w.now + timedelta(seconds=1)).isoformat(timespec="milliseconds")
    ),
    "time that is none": lambda r, w, other: with_order(r, sent_at="soon"),
    "signature": lambda r, w, other: with_order(r, signature=bytes(64)),
    "empty signature": lambda r, w, other: with_order(r, signature=b""),
    "job behind the signed one": lambda r, w, other: replace(w.order(replace(r, job=other)), order=r.order),
    "signed job": lambda r, w, other: with_order(r, signed_job=w.signed(other)),
    "signed job and job": lambda r, w, other: replace(with_order(r, signed_job=w.signed(other)), job=other),
    "signed by another coordinator": lambda r, w, other: w.order(r, key=SigningKey.generate()),
    "signed by the job's signer": lambda r, w, other: w.order(r, key=w.signer),
    "signed by the coordinator for another job": lambda r, w, other: with_order(
        w.order(replace(r, job=other)), signed_job=w.signed(r.job)
    ),
    "time without a zone": lambda r, w, other: w.order(r, sent_at="2026-06-01T12:00:00"),
}


def with_order(request: TrainRequest, **changes: Any) -> TrainRequest:
    assert request.order is not None
    return replace(request, order=replace(request.order, **changes))


@pytest.mark.parametrize("what", ALTERATIONS)
def test_a_request_that_was_altered_is_refused(
    what: str, world: World, asked: TrainRequest, private_job: Callable[..., Job]
) -> None:
    other = private_job(name="other", federation={"min_sites": 2})
    reason = world.refusal(ALTERATIONS[what](asked, world, other))
    assert "is not signed by the coordinator that the job names" in reason
    assert "was changed on the way, or somebody else sent it" in reason


def test_a_signed_job_that_was_altered_on_the_wire_cannot_even_be_read(world: World, asked: TrainRequest) -> None:
    content = pack_request(asked)
    header = content.config_records["silotune"]
    text = str(header["signed_job"])
    changed = text.replace(r"\"noise_multiplier\":1.0", r"\"noise_multiplier\":0.1")
    assert changed != text
    header["signed_job"] = changed
    with pytest.raises(SilotuneError, match="what was signed has changed") as unreadable:
        unpack_request(content)
    answer = world.site.refuse_unreadable(unreadable.value)
    assert answer.code == "TrustError"
    assert answer.reason.startswith("the job's signature does not hold: ")
    assert world.entries(Event.REQUEST_REFUSED)[-1].details["reason"] == str(unreadable.value)


def test_a_stranger_signs_nothing(world: World, asked: TrainRequest) -> None:
    stranger = SigningKey.generate()
    reason = world.refusal(world.order(asked, signer=stranger))
    assert f"it is signed by {stranger.verify_key.text}, which is not among this site's signers" in reason
    refused = world.site.accept(world.signed(asked.job, signer=stranger))
    assert isinstance(refused, Refusal)
    assert not world.entries(Event.JOB_PREPARED)


# --- time ---


@pytest.mark.parametrize(("later", "text"), [(301, "301 seconds behind"), (-301, "301 seconds ahead of")])
def test_a_round_of_another_time_is_refused(world: World, asked: TrainRequest, later: int, text: str) -> None:
    world.now += timedelta(seconds=later)
    if later < 0:  # the job itself was issued in time
        assert asked.order is not None
        signed = world.signed(asked.job)
        asked = replace(asked, order=replace(asked.order, signed_job=signed))
    assert f"the coordinator's message is dated {text} this site's clock; at most 300" in world.refusal(asked)


def test_a_round_that_was_recorded_is_worth_nothing_later(world: World, asked: TrainRequest) -> None:
    assert isinstance(world.site.answer(asked), TrainReply)
    world.now += timedelta(hours=2)
    assert "7,200 seconds behind this site's clock" in world.refusal(asked)


def test_a_job_that_expired_is_refused(world: World, asked: TrainRequest) -> None:
    assert asked.order is not None
    signed = asked.order.signed_job
    world.now += timedelta(days=2)
    fresh = world.order(replace(asked, order=None))
    assert fresh.order is not None
    reason = world.refusal(replace(fresh, order=replace(fresh.order, signed_job=signed)))
    assert "the signed job 'test' expired on 2026-06-02T12:00:00Z" in reason


def test_rounds_run_only_within_the_hours(world: World, asked: TrainRequest) -> None:
    local = world.now.astimezone()
    begin, end = local + timedelta(hours=1), local + timedelta(hours=2)
    change_toml(world.home.policy, hours=f"{begin:%H:%M}-{end:%H:%M}")
    reason = world.refusal(asked)
    assert f"this site runs rounds only between {begin:%H:%M} and {end:%H:%M} (site's local time)" in reason
    assert asked.order is not None
    assert isinstance(world.site.accept(asked.order.signed_job), SiteDescription)  # it may prepare before
    world.now += timedelta(minutes=90)
    assert isinstance(world.site.answer(world.order(asked)), TrainReply)


# --- the policy ---


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({"privacy": {"noise_multiplier": 0.4}}, ["its plan costs epsilon", "this site accepts at most 2 per job"]),
        ({"training": {"rounds": 300}}, ["it plans 600 steps (300 rounds of 2); this site accepts at most 200"]),
        ({"federation": {"min_sites": 1}}, ["its federation.min_sites is 1; this site takes part only from 2"]),
        (
            {"task": {"labels": [f"{n}" for n in range(1001)]}},
            ["task.labels asks for 1,001; this site accepts at most 1,000"],
        ),
    ],
    ids=["epsilon", "steps", "sites", "labels"],
)
def test_a_job_beyond_the_limits_is_refused_in_every_message(
    world: World,
    private_job: Callable[..., Job],
    request_for: Callable[..., TrainRequest],
    changes: dict[str, Any],
    rows: list[str],
) -> None:
    change_toml(world.home.policy, max_epsilon_per_job=2.0)
    greedy = private_job(**{"federation": {"min_sites": 2}} | changes)
    reason = world.refusal(world.order(request_for(greedy)))
    prepared = world.site.accept(world.signed(greedy))
    assert isinstance(prepared, Refusal)
    for row in rows:
        assert row in reason
        assert row in prepared.reason


def test_a_backbone_that_is_not_listed_is_refused(world: World, asked: TrainRequest, tiny_gpt2: Path) -> None:
    change_toml(world.home.policy, backbones={str(tiny_gpt2): "0" * 64})
    assert "is not among those that this site has listed by hash" in world.refusal(asked)


def test_a_backbone_whose_files_differ_is_refused(world: World, asked: TrainRequest, tiny_bert: Path) -> None:
    change_toml(world.home.policy, backbones={str(tiny_bert): "0" * 64})
    reason = world.refusal(asked)
    assert f"at this site have SHA-256 {backbone_sha256(tiny_bert)}, but its policy expects {'0' * 64}" in reason


def test_repeated_rounds_count_towards_the_limit_of_the_job(
    world: World, job: Job, request_for: Callable[..., TrainRequest]
) -> None:
    change_toml(world.home.policy, max_epsilon_per_job=6.0)
    answers = []
    for _ in range(12):  # charged, and not stored: as if the process had died in between
        answers.append(world.site.answer(world.order(request_for(job))))
        if isinstance(answers[-1], Refusal):
            break
        for stored in world.home.path.glob("rounds/*/*"):
            stored.unlink()
    assert isinstance(answers[0], TrainReply)
    assert isinstance(answers[-1], Refusal)
    assert answers[-1].reason.startswith(
        "with this round, repeated ones included, the job would exceed this site's limit"
    )
    assert world.site.ledger().spent_epsilon(job.sha256) <= 6.0


def test_a_round_has_one_adapter_and_rounds_go_forward_only(
    world: World, job: Job, request_for: Callable[..., TrainRequest]
) -> None:
    """Two adapters in one round, or a round that is over once more, are releases that the job does not plan."""
    first = world.site.answer(world.order(request_for(job, 1)))
    assert isinstance(first, TrainReply)
    reason = world.refusal(world.order(request_for(job, 1, shift=1e-6)))
    assert "this site has answered round 1 of the job from another adapter; rounds go forward only" in reason
    assert isinstance(world.site.answer(world.order(request_for(job, 3))), TrainReply), "it may have missed some"
    reason = world.refusal(world.order(request_for(job, 2)))
    assert "round 2 was asked for, but this site has answered round 3 of the job; rounds go forward only" in reason
    # What it has released it gives again, as it is.
    assert world.site.answer(world.order(request_for(job, 1))) == first
    # Another job has rounds of its own.
    assert isinstance(
        world.site.answer(world.order(request_for(job.model_copy(update={"name": "other"}), 1))), TrainReply
    )


def test_a_round_that_waited_here_is_as_old_as_when_it_came(world: World, asked: TrainRequest) -> None:
    """Behind another round, longer than the clocks may differ."""
    world.now += timedelta(seconds=900)
    assert "800 seconds behind this site's clock" in world.refusal(replace(asked, waited_seconds=100.0))
    assert isinstance(world.site.answer(replace(asked, waited_seconds=890.0)), TrainReply)


def test_a_signer_that_is_struck_out_signs_nothing_any_more(world: World, asked: TrainRequest) -> None:
    assert isinstance(world.site.answer(asked), TrainReply)
    change_toml(world.home.policy, signers={"another": SigningKey.generate().verify_key.text})
    assert "which is not among this site's signers" in world.refusal(asked)
    change_toml(world.home.policy, signers={"consortium": world.signer.verify_key.text})
    assert isinstance(world.site.answer(asked), TrainReply)


def test_a_policy_that_was_written_by_hand_is_kept_and_training_does_not_depend_on_it(
    world: World, asked: TrainRequest
) -> None:
    assert isinstance(world.site.answer(asked), TrainReply)
    change_toml(world.home.policy, max_steps=199)
    assert isinstance(world.site.answer(asked), TrainReply)
    (entry,) = world.entries(Event.POLICY_CHANGED)
    kept = world.home.path / FOLDER / f"{entry.details['sha256']}.toml"
    assert (kept.read_text(), entry.details["number"]) == (world.home.policy.read_text(), None)
    shutil.rmtree(kept.parent)
    kept.parent.write_text("no folder")
    change_toml(world.home.policy, max_steps=198)
    assert isinstance(world.site.answer(asked), TrainReply)
    assert len(world.entries(Event.POLICY_CHANGED)) == 1


def test_a_change_that_was_begun_is_finished_before_the_policy_is_read(world: World, asked: TrainRequest) -> None:
    guard = world.site.guard
    assert isinstance(guard, Guard)
    guard.keep_policy()
    before, changes = world.home.policy.read_text(), guard._changes
    change_toml(world.home.policy, max_steps=1)
    after = world.home.policy.read_text()
    world.home.policy.write_text(before)
    base = hashlib.sha256(before.encode()).hexdigest()
    proposal = changes.propose(after, base=base, by="eve")
    details = {"number": proposal.number, "sha256": proposal.sha256, "base": base, "by": "olga", "reason": ""}
    guard.log.append(Event.POLICY_ACCEPTED, **details)  # and there the console dies
    os.utime(world.home.policy, ns=(1, 1))
    assert "it plans" in world.refusal(asked), "by the new policy at once"
    assert world.home.policy.read_text() == after


@pytest.mark.parametrize("broken", ["tasks = [", "", None], ids=["syntax", "empty", "missing"])
def test_a_policy_that_cannot_be_read_accepts_nothing_and_only_the_site_learns_why(
    world: World, asked: TrainRequest, broken: str | None
) -> None:
    assert isinstance(world.site.guard, Guard)  # opened while the policy could still be read
    good = world.home.policy.read_text()
    if broken is None:
        world.home.policy.unlink()
    else:
        world.home.policy.write_text(broken)
    for _ in range(2):
        assert world.refusal(asked) == "site north accepts no job now: its policy cannot be read."
    assert str(world.home.policy) in world.entries(Event.POLICY_UNREADABLE)[-1].details["reason"]
    world.home.policy.write_text(good)
    assert isinstance(world.site.answer(asked), TrainReply)


# --- what stays ---


def test_what_a_site_keeps_cannot_be_read_with_another_key(world: World, asked: TrainRequest) -> None:
    reply = world.site.answer(asked)
    assert isinstance(reply, TrainReply)
    (stored,) = world.home.path.glob("rounds/*/round-*.safetensors")
    assert reply.update[:64] not in stored.read_bytes()
    assert asked.job.sha256.encode() not in (world.home.path / "ledger.db").read_bytes()
    save_secret(world.home.storage_key, new_key(), passphrase=None, replace=True)
    world.opened.clear()
    with pytest.raises(SilotuneError):
        world.site.ledger().entries()
    answer = world.site.answer(asked)
    assert isinstance(answer, Refusal)
    assert answer == Refusal.withheld("north")


def test_a_refusal_for_the_sites_own_reasons_tells_nothing(world: World, asked: TrainRequest) -> None:
    assert isinstance(world.site.answer(asked), TrainReply)
    (stored,) = world.home.path.glob("rounds/*/round-*.safetensors")
    stored.write_bytes(b"damaged")
    answer = world.site.answer(asked)
    assert answer == Refusal.withheld("north")
    noted = world.entries(Event.REQUEST_REFUSED)[-1].details
    assert (noted["code"], noted["reason_sent"]) == ("LedgerError", False)
    assert "holds a release that was already charged" in noted["reason"]


def test_a_key_that_cannot_be_read_costs_nothing_and_its_path_stays_here(world: World, asked: TrainRequest) -> None:
    world.site.ledger()
    good = world.home.key.read_bytes()
    world.home.key.write_bytes(b"damaged")
    os.utime(world.home.key, ns=(1, 1))
    before = len(world.site.ledger().entries())
    answer = signed(world.site, asked, world.site.answer)
    assert answer == Refusal.withheld("north")
    assert len(world.site.ledger().entries()) == before
    world.home.key.write_bytes(good)
    assert isinstance(signed(world.site, asked, world.site.answer), Signed)


def test_a_round_that_another_ledger_charged_is_over(
    world: World, job: Job, request_for: Callable[..., TrainRequest], tmp_path: Path
) -> None:
    """Nobody here knows from which adapter it was answered there."""
    assert isinstance(world.site.answer(world.order(request_for(job, 1))), TrainReply)
    export = world.site.ledger().export(site="north", declared_records=32)
    moved = SiteHome(tmp_path / "moved")
    shutil.copytree(
        world.home.path, moved.path, ignore=shutil.ignore_patterns("ledger.db*", "rounds", "audit", "*.sealed")
    )
    site = open_site(moved, passphrase=None, clock=lambda: world.now)
    site.ledger().import_account(export)
    for shift in (0.0, 1e-5):
        answer = site.answer(world.order(request_for(job, 1, shift=shift)))
        assert isinstance(answer, Refusal)
        assert "rounds go forward only" in answer.reason
    assert isinstance(site.answer(world.order(request_for(job, 2))), TrainReply)


# --- metrics ---


@pytest.fixture
def measured(world: World, private_job: Callable[..., Job], request_for: Callable[..., TrainRequest]) -> TrainRequest:
    """A request for the metrics of a job that nothing is wrong with; the site lets accuracy out."""
    change_toml(world.home.config, evaluation_share=0.5)
    change_toml(world.home.policy, metrics=["accuracy"])
    asked = private_job(federation={"min_sites": 2}, site_metrics={"names": ["accuracy"], "noise_multiplier": 4.0})
    return world.order(request_for(asked, 4))


def test_allowed_metrics_leave_sealed_logged_and_charged(world: World, measured: TrainRequest) -> None:
    reply = world.site.answer_metrics(measured)
    assert isinstance(reply, MetricsReply)
    noted = world.entries(Event.RELEASE_STORED)[-1].details
    release = reply.canonical()
    assert (noted["round"], noted["sha256"], noted["bytes"]) == (4, hashlib.sha256(release).hexdigest(), len(release))
    assert noted["epsilon_spent"] == world.site.ledger().spent_epsilon() > 0
    (stored,) = world.home.path.glob("rounds/*/metrics.json")
    assert b"accuracy" not in stored.read_bytes()
    assert world.site.answer_metrics(measured) == reply


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ({"metrics": []}, "does not release the metrics accuracy; its policy allows none"),
        ({"metrics": ["loss"]}, "does not release the metrics accuracy; its policy allows loss"),
        ({"min_noise_multiplier": 4.5}, "accepts no less than 4.5"),
        ({"max_epsilon_per_job": 0.5}, "this site accepts at most 0.5 per job"),
    ],
)
def test_metrics_that_the_policy_forbids_stay(
    world: World, measured: TrainRequest, policy: dict[str, Any], reason: str
) -> None:
    change_toml(world.home.policy, **policy)
    answer = world.site.answer_metrics(measured)
    assert isinstance(answer, Refusal)
    assert reason in answer.reason
    assert world.site.ledger().events() == []
    assert not list(world.home.path.glob("rounds/*/metrics.json"))


def test_metrics_need_an_order_of_their_own(world: World, measured: TrainRequest) -> None:
    for forged in (replace(measured, order=None), replace(measured, adapter=measured.adapter + b" ")):
        answer = world.site.answer_metrics(forged)
        assert isinstance(answer, Refusal)
        assert answer.code == "PolicyError"
    stranger = world.order(measured, key=SigningKey.generate())
    assert "is not signed by the coordinator" in str(world.site.answer_metrics(stranger))
    assert world.site.ledger().events() == []


def test_a_simulated_sites_guard_answers_to_the_calls_of_a_real_one() -> None:
    """So that a check that is added to the one cannot be forgotten in the other, nor be called with something else."""

    def calls(guard: type) -> dict[str, list[str]]:
        found = inspect.getmembers(guard, inspect.isfunction)
        return {name: list(inspect.signature(call).parameters) for name, call in found if not name.startswith("_")}

    assert calls(NoGuard) == calls(Guard)


def test_a_folder_with_keys_is_not_opened_without_a_guard(world: World) -> None:
    home = world.home.path
    for name in ("ledger.db", "policy.toml"):  # as of a site that has not begun, or was half restored
        (home / name).unlink(missing_ok=True)
    with pytest.raises(TrustError, match="is a real site's folder"):
        Site(home)


# --- sums over sites ---


@pytest.fixture
def shares(private_job: Callable[..., Job]) -> Job:
    """A job of three rounds and two spare attempts, whose sites add shares of the noise."""
    privacy = {"mechanism": "distributed", "max_colluding": 1, "noise_multiplier": 2.0, "spare_attempts": 2}
    return private_job(privacy=privacy, training={"rounds": 3, "local_steps": 1}, federation={"min_sites": 5})


def masked(job: Job, round_number: int, attempt: int, **changes: Any) -> Charge:
    plan = PrivacyPlan.from_job(job)
    given: dict[str, Any] = {
        "job_id": job.sha256,
        "round": round_number,
        "request_sha256": "a" * 64,
        "mechanism": plan.mechanism(1),
        "together": plan.of_sum.mechanism(1),
        "attempt": attempt,
    }
    return Charge(**given | changes)


def test_rounds_and_attempts_go_forward(world: World, shares: Job) -> None:
    guard, ledger = world.site.guard, world.site.ledger()
    for place in ((1, 0), (2, 0), (2, 3)):
        guard.admit_attempt(ledger, shares, *place)
        ledger.reserve(masked(shares, *place))
    for round_number, attempt, told in (
        (2, 3, "attempt 3 at round 2 was asked for, but this site has taken part in attempt 3"),
        (2, 1, "has taken part in attempt 3; each needs a number above all before it"),
        (1, 9, "but the job has 3 rounds, and this site has taken part in round 2; rounds go forward only"),
        (4, 0, "round 4 was asked for, but the job has 3 rounds"),
    ):
        with pytest.raises(PolicyError, match=told):
            guard.admit_attempt(ledger, shares, round_number, attempt)
    change_toml(world.home.policy, max_attempts_per_round=4)
    guard.admit_attempt(ledger, shares, 2, 4)
    guard.admit_attempt(ledger, shares, 3, 0)
    # A process that died after the charge has dropped out of that attempt; another job has rounds of its own.
    world.opened.clear()
    with pytest.raises(PolicyError, match="in attempt 3"):
        world.site.guard.admit_attempt(world.site.ledger(), shares, 2, 3)
    other = shares.model_copy(update={"name": "other"})
    world.site.guard.admit_attempt(world.site.ledger(), other, 1, 0)


def test_attempts_have_an_end(world: World, shares: Job) -> None:
    change_toml(world.home.policy, max_attempts_per_round=2)
    guard, ledger = world.site.guard, world.site.ledger()
    for place in ((1, 0), (1, 1)):
        guard.admit_attempt(ledger, shares, *place)
        ledger.reserve(masked(shares, *place))
    with pytest.raises(PolicyError, match="in 2 attempts at round 1; its policy allows 2 a round"):
        guard.admit_attempt(ledger, shares, 1, 2)
    for place in ((2, 0), (2, 1), (3, 0)):
        guard.admit_attempt(ledger, shares, *place)
        ledger.reserve(masked(shares, *place))
    told = (
        "in 5 attempts, and the job plans 3 rounds and 2 spare attempts. Submit a job with more privacy.spare_attempts"
    )
    with pytest.raises(PolicyError, match=re.escape(told)):
        guard.admit_attempt(ledger, shares, 3, 1)


def test_what_one_job_may_spend_is_judged_by_both_promises(world: World, shares: Job) -> None:
    plan = PrivacyPlan.from_job(shares)
    one = plan.mechanism(1), plan.of_sum.mechanism(1)
    summed, alone = plan.of_sum.epsilon(), plan.epsilon()
    change_toml(world.home.policy, max_epsilon_per_job=summed, max_epsilon_alone=alone)
    guard, ledger = world.site.guard, world.site.ledger()
    for attempt in range(5):
        guard.admit_spend(ledger, shares, *one)
        ledger.reserve(masked(shares, 1, attempt))
    with pytest.raises(PolicyError, match=f"exceed this site's limit of epsilon {as_set(summed)} per job"):
        guard.admit_spend(ledger, shares, *one)
    change_toml(world.home.policy, max_epsilon_per_job=2 * summed, max_epsilon_alone=alone)
    with pytest.raises(
        PolicyError, match=f"by themselves would exceed this site's limit of epsilon {as_set(alone)} per"
    ):
        guard.admit_spend(ledger, shares, *one)


def test_a_charge_by_the_site_holds_both(world: World, shares: Job) -> None:
    plan = PrivacyPlan.from_job(shares)
    share, summed = plan.mechanism(1), plan.of_sum.mechanism(1)
    caps = {"unit": "record", "epsilon": 20.0, "epsilon_alone": 90.0, "composition": "fixed"}
    change_toml(world.home.config, budget=caps)
    site = world.site
    charge = masked(shares, 1, 1, planned_steps=plan.planned_steps)
    site.check_charge(shares, charge)
    assert site.ledger().charges(shares.sha256) == []
    site.charge(shares, charge)
    (charged,) = site.ledger().charges(shares.sha256)
    assert (charged.mechanism, charged.together, charged.attempt) == (share, summed, 1)
    assert charged.planned_steps == 5
    assert site.ledger().budget == Budget(epsilon=20.0, delta=1e-5, composition="fixed", epsilon_alone=90.0)
    # The whole plan counts from its first round on.
    assert site.ledger().spent_epsilon() == plan.of_sum.epsilon()
    assert site.ledger().spent_epsilon(promise="alone") == plan.epsilon()
    before = site.ledger().entries()
    site.anticipate()
    assert site.ledger().entries() == before


def test_sums_with_strangers_are_refused_where_peers_are_named(world: World, shares: Job) -> None:
    names = ("north", "a", "b", "c", "d")
    world.site.guard.admit_peers(shares, names)
    change_toml(world.home.policy, peers={name: f"{number:064x}" for number, name in enumerate("abc")})
    with pytest.raises(PolicyError, match="of the 5 sites in this sum, site north knows 4"):
        world.site.guard.admit_peers(shares, names)
    change_toml(world.home.policy, peers={name: f"{number:064x}" for number, name in enumerate("abcd")})
    world.site.guard.admit_peers(shares, names)
