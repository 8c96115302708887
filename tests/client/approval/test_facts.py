"""What people are shown before they decide: true numbers, every rule, every change, and nothing that steers a terminal."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from client.approval.facts import Facts, Here, as_json, changes, facts_of
from client.approval.request import Approval, Request
from client.approval.words import told
from client.ledger.account import Budget
from client.policy.policy import Policy
from shared.epsilons import rounded_up
from shared.privacy.accounting import GaussianSteps
from shared.privacy.ledger_export import ChargedSteps, LedgerExport
from shared.privacy.plan import PrivacyPlan
from shared.trust.signed_job import SignedJob
from tests.client.approval.budget_oracle import lines_by
from tests.client.policy.test_policy import NOW, SIGNER, STRANGER, a_job, a_policy, shares, signed

JOB = a_job()
BUDGET = Budget(epsilon=8.0, delta=1e-5, composition="adaptive")
LINES = lines_by(None, BUDGET)


def charged(job: str, steps: int, *, committed: bool = True) -> ChargedSteps:
    return ChargedSteps(
        job_id=job,
        round=1,
        noise_multiplier=1.0,
        sample_rate=0.05,
        steps=steps,
        committed=committed,
        time="2026-01-01T00:00:00+00:00",
    )


def account(*charges: ChargedSteps, composition: Any = "adaptive") -> LedgerExport:
    return LedgerExport(
        site="north",
        dataset="notes",
        unit="record",
        declared_records=64,
        epsilon=8.0,
        delta=1e-5,
        composition=composition,
        charges=charges,
        num_entries=len(charges),
        head_sha256="0" * 64,
        exported_at="2026-01-01T00:00:00+00:00",
    )


def here(**changed: Any) -> Here:
    whole = Here(
        site="north",
        dataset="notes",
        unit="record",
        columns={"text": "note", "label": "triage"},
        settings="",
    )
    return replace(whole, **changed)


def facts(job: SignedJob, *, policy: Policy | None = None, last: SignedJob | None = None, **changed: Any) -> Facts:
    policy = policy or a_policy(approval="required")
    before = None if last is None else Request.of(last, now=NOW)
    lines = lines_by(changed.pop("account", None), changed.pop("budget", BUDGET))
    return facts_of(Request.of(job, now=NOW), policy=policy, here=here(**changed), lines=lines, last=before, now=NOW)


def text(found: Facts) -> str:
    return "\n".join(told(found))


# --- numbers ---


def test_what_is_promised_is_what_the_plan_says() -> None:
    found, plan = facts(signed(JOB)), PrivacyPlan.from_job(JOB)
    assert found.promised is not None
    assert (found.promised.epsilon, found.promised.alone) == (plan.epsilon(), None)
    assert (found.promised.delta, found.promised.noise_multiplier) == (1e-5, 1.0)
    assert f"epsilon {rounded_up(plan.epsilon(), 4)} at delta 1e-05, with noise multiplier 1" in text(found)
    assert (found.rounds, found.local_steps, found.steps) == (10, 4, 40)
    assert "10 rounds of 4 steps; each record enters a step with probability 0.05" in text(found)


def test_both_promises_of_a_sum_over_sites_are_told() -> None:
    job = shares(noise=0.6)
    plan = PrivacyPlan.from_job(job.job)
    found = facts(job, policy=a_policy(max_epsilon_alone=900.0))
    assert found.promised is not None
    assert found.promised.epsilon == plan.of_sum.epsilon()
    assert found.promised.alone == plan.epsilon()
    assert (found.promised.honest, found.promised.colluding) == (4, 1)
    lines = text(found)
    assert (
        f"epsilon {rounded_up(plan.of_sum.epsilon(), 4)} at delta 1e-05 against the coordinator and up to 1 sites"
        in lines
    )
    assert f"epsilon {rounded_up(plan.epsilon(), 4)} at delta 1e-05 for what this site sends by itself" in lines
    assert [line.promise for line in found.budget] == ["together", "alone"]
    assert found.budget[0].after < found.budget[1].after
    assert "with each masked input by itself" in lines


def test_what_is_left_is_what_the_account_says_once_the_job_was_charged() -> None:
    before = account(charged("a" * 64, 10))
    (line, alone) = facts(signed(JOB), account=before).budget
    step = GaussianSteps(noise_multiplier=1.0, sample_rate=0.05, steps=1)
    whole = [replace(step, steps=10), replace(step, steps=40)]
    assert line.spent == before.rule.epsilon(whole[:1])
    assert line.after == before.rule.epsilon(whole) == alone.after
    assert (line.cap, line.left) == (8.0, 8.0 - line.after)
    # What the job itself was charged already is a part of its plan.
    running = account(charged("a" * 64, 10), charged(JOB.sha256, 12))
    assert facts(signed(JOB), account=running).budget[0].after == pytest.approx(line.after)
    # And what it was charged beyond it is not forgotten.
    beyond = account(charged(JOB.sha256, 80))
    found = facts(signed(JOB), account=beyond).budget[0]
    assert found.after == found.spent


def test_a_site_that_spent_nothing_has_all_of_its_budget() -> None:
    (line, _) = facts(signed(JOB)).budget
    assert (line.spent, line.after) == (0.0, account().rule.epsilon([PrivacyPlan.from_job(JOB).mechanism(40)]))


def test_a_job_that_does_not_fit_is_said_not_to() -> None:
    found = facts(signed(JOB), budget=Budget(epsilon=1.0, delta=1e-5))
    assert not found.budget[0].fits
    assert found.budget[0].left == 0
    assert "it does NOT fit" in text(found)


@pytest.mark.parametrize("mechanism", ["none", "central"])
def test_what_is_not_charged_here_is_said_to_be(mechanism: str) -> None:
    sections: dict[str, Any] = {"privacy": {"mechanism": mechanism, "noise_multiplier": None}}
    if mechanism == "central":
        sections["privacy"] |= {"unit": "site", "central": {"num_sites": 200}, "epsilon": 2.0}
        sections |= {"federation": {"min_sites": 100}}
    found = facts(signed(a_job(**sections)))
    assert found.budget == ()
    lines = text(found)
    assert "this site's budget is not charged for it" in lines
    if mechanism == "none":
        assert "NOTHING: no noise is added" in lines
    else:
        assert "sees this site's update unprotected" in lines


def test_a_plan_of_billions_of_steps_is_not_accounted_for() -> None:
    found = facts(signed(a_job(training={"rounds": 10_000, "local_steps": 1000})))
    assert (found.promised, found.budget) == (None, ())
    assert "BROKEN max_steps: 10,000,000; accepted: at most 40" in text(found)


# --- rules, signer, settings ---


def test_every_rule_is_told_with_its_verdict() -> None:
    found = facts(signed(JOB), policy=a_policy(approval="required", max_epsilon_per_job=0.5))
    lines = text(found)
    kept = sum(verdict.kept for verdict in found.rules)
    assert f"rules of policy.toml: {kept} of {len(found.rules)} kept" in lines
    assert "  BROKEN max_epsilon_per_job: epsilon 2." in lines
    assert "  kept   min_sites: 2; accepted: at least 2" in lines
    assert "BROKEN site.toml: it wants what is not there" in text(
        facts(signed(JOB), settings="it wants what is not there")
    )


def test_who_signed_is_told_by_the_name_that_the_policy_gives() -> None:
    assert f"signed by hospital ({SIGNER.verify_key.text})" in text(facts(signed(JOB)))
    assert "signed by somebody who may sign nothing here now" in text(facts(signed(JOB, key=STRANGER)))


def test_what_was_said_is_told() -> None:
    request = Request.of(signed(JOB), now=NOW)
    ada = Approval(by="ada", at=NOW, reason="as agreed")
    found = facts_of(
        request.model_copy(update={"approvals": (ada,)}),
        policy=a_policy(approval="required", approvals_needed=2),
        here=here(),
        lines=LINES,
        last=None,
        now=NOW,
    )
    assert (found.state, found.needed) == ("waiting", 2)
    assert "approved by ada on 2026-03-01 12:00 UTC: as agreed" in text(found)
    assert "needs the approval of 2 different accounts until 2026-03-02 12:00 UTC" in text(found)  # of the signed job


# --- changes ---


def test_every_setting_that_changed_is_told() -> None:
    before = signed(JOB)
    after = signed(
        a_job(training={"rounds": 12}, privacy={"noise_multiplier": None, "epsilon": 3.0}, model={"backbone": "other"})
    )
    found = {change.setting: (change.before, change.after) for change in changes(before, after)}
    assert found == {
        "training.rounds": ("10", "12"),
        "privacy.noise_multiplier": ("1.0", "null"),
        "privacy.epsilon": ("8.0", "3.0"),
        "model.backbone": ('"embedded:all-minilm-l6-v2"', '"other"'),
    }
    lines = text(facts(after, last=before))
    assert f"changes since triage ({JOB.sha256[:12]}), the last job of this signer that was approved: 4" in lines
    assert "  training.rounds: 10 -> 12" in lines


def test_without_an_earlier_job_nothing_is_compared() -> None:
    assert "nothing of this signer was approved before" in text(facts(signed(JOB)))
    assert list(changes(signed(JOB), signed(JOB))) == []


def test_settings_that_one_of_the_jobs_does_not_have_are_told() -> None:
    found = {change.setting: (change.before, change.after) for change in changes(signed(JOB), shares(noise=1.0))}
    assert found["privacy.max_colluding"] == ("", "1")
    assert "  privacy.max_colluding: not set -> 1" in text(facts(shares(noise=1.0), last=signed(JOB)))


def test_long_values_that_differ_at_their_end_do_not_look_the_same() -> None:
    many = [f"label-{number}" for number in range(200)]
    (change,) = changes(signed(a_job(task={"labels": [*many, "x"]})), signed(a_job(task={"labels": [*many, "y"]})))
    assert change.before != change.after
    assert len(change.before) < 200


# --- form ---


def test_what_a_signer_wrote_steers_no_terminal() -> None:
    labels = ["good\x1b[2J\nkept   signers", "bad\u202e"]
    hostile = a_job(task={"labels": labels}, model={"backbone": "a\x1b]0;x\x07\nrules of policy.toml: 99 of 99 kept"})
    lines = told(facts(signed(hostile), last=signed(JOB)))
    assert all(line.isprintable() for line in lines)
    assert sum(line.startswith("rules of policy.toml") for line in lines) == 1


def test_a_program_gets_the_same_as_numbers() -> None:
    found = facts(signed(JOB), last=signed(a_job(training={"rounds": 9})))
    shown = as_json(found)
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown
    assert found.promised is not None
    assert shown["promised"]["epsilon"] == found.promised.epsilon
    assert shown["budget"][0]["left"] == found.budget[0].left
    assert shown["changes"] == [{"setting": "training.rounds", "before": "9", "after": "10"}]
    assert "account" not in shown["here"]
    assert {rule["rule"] for rule in shown["rules"]} >= {"signers", "max_epsilon_per_job"}
    endless = replace(found, budget=(replace(found.budget[0], after=math.inf),))
    assert as_json(endless)["budget"][0]["after"] is None
    assert "unbounded" in text(endless)


def test_times_are_those_of_the_request() -> None:
    request = Request.of(signed(JOB, days=30), now=NOW)
    later = NOW + timedelta(days=8)
    found = facts_of(request, policy=a_policy(approval="required"), here=here(), lines=LINES, last=None, now=later)
    assert (found.state, found.ends) == ("expired", NOW + timedelta(days=7))
    assert "not decided or not begun in time" in text(found)
