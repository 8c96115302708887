"""Each rule beside what a job asks: said to be kept exactly where the policy accepts it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from client.policy.policy import check_job
from client.policy.verdicts import beside_numbers, job_verdicts, numbers, verdicts
from shared.errors import PolicyError
from shared.job.job import Job
from shared.job.parsing import parse
from tests.client.policy.test_policy import BROKEN, COORDINATOR, NOW, SIGNER, STRANGER, a_job, a_policy, shares, signed

RULES = (
    "tasks",
    "backbones",
    "max_epsilon_per_job",
    "min_noise_multiplier",
    "max_steps",
    "max_sample_rate",
    "min_sites",
)


def test_a_job_within_the_policy_keeps_every_rule() -> None:
    found = verdicts(a_policy(), signed(a_job()), now=NOW, site="north")
    assert all(verdict.kept for verdict in found)
    assert [v.rule for v in found] == ["signers", "validity", *RULES, *(f"limits.max_{of}" for of in LIMITS)]
    assert found[0].asked == f"signed by hospital ({SIGNER.verify_key.text})"


def test_every_rule_is_judged_by_numbers_or_named_as_not() -> None:
    policy = a_policy(peers=NAMED, hours="20:00-06:00", metrics=("accuracy",), max_epsilon_alone=900.0)
    asked = shares(noise=0.5).job.model_dump(mode="json")
    metrics = {"names": ["accuracy"], "noise_multiplier": 9.0}
    asks = signed(parse(Job, asked | {"site_metrics": metrics}, source="test job"))
    judged = {verdict.rule for verdict in numbers(policy, asks.job, site="north")}
    every = {verdict.rule.partition(".")[0] for verdict in verdicts(policy, asks, now=NOW, site="north")}
    assert judged | set(beside_numbers(policy)) == every
    assert judged & set(beside_numbers(policy)) == set()


NAMED = {name: f"{number:064x}" for number, name in enumerate("abcd")}
LIMITS = ("labels", "rank", "length")


@pytest.mark.parametrize(("case", "rule"), list(zip(BROKEN, RULES, strict=True)), ids=RULES)
def test_each_rule_alone_is_said_to_be_broken(case: tuple[dict[str, Any], dict[str, Any], str], rule: str) -> None:
    limits, sections, _ = case
    found = verdicts(a_policy(**limits), signed(a_job(**sections)), now=NOW, site="north")
    assert [verdict.rule for verdict in found if not verdict.kept] == [rule]


@pytest.mark.parametrize(
    ("limits", "rule"),
    [
        ({}, None),
        ({"max_epsilon_per_job": 0.01, "max_epsilon_alone": 900.0}, "max_epsilon_per_job"),
        ({"max_epsilon_alone": 8.01}, "max_epsilon_alone"),
        ({"min_noise_multiplier": 5.0}, "min_noise_multiplier"),
        ({"min_colluding": 3}, "min_colluding"),
        ({"peers": NAMED}, None),
        ({"peers": {"north": "f" * 64} | dict(list(NAMED.items())[1:])}, "peers"),
    ],
)
def test_rules_on_sums_over_sites(limits: dict[str, Any], rule: str | None) -> None:
    policy, job = a_policy(**{"max_epsilon_alone": 900.0} | limits), shares(noise=0.5)
    broken = [verdict.rule for verdict in verdicts(policy, job, now=NOW, site="north") if not verdict.kept]
    assert broken == ([] if rule is None else [rule])
    if rule is None:
        check_job(policy, job, now=NOW, site="north")
    else:
        with pytest.raises(PolicyError):
            check_job(policy, job, now=NOW, site="north")


def test_strangers_and_jobs_of_another_time_are_said_to_be() -> None:
    (stranger, *others) = verdicts(a_policy(), signed(a_job(), key=STRANGER), now=NOW, site="north")
    assert (stranger.kept, all(verdict.kept for verdict in others)) == (False, True)
    assert "somebody unknown here" in stranger.asked
    late = verdicts(a_policy(), signed(a_job()), now=NOW + timedelta(days=2), site="north")
    assert [verdict.rule for verdict in late if not verdict.kept] == ["validity"]


def test_metrics_that_the_policy_does_not_let_out_are_said_to_be_broken() -> None:
    raw = a_job().model_dump(mode="json", exclude={"site_metrics"}) | {
        "site_metrics": {"names": ["accuracy"], "noise_multiplier": 2.0}
    }
    job = parse(Job, raw, source="test job")
    found = {v.rule: v.kept for v in verdicts(a_policy(), signed(job), now=NOW, site="north")}
    assert found["metrics"] is False
    found = {v.rule: v.kept for v in verdicts(a_policy(metrics=["accuracy"]), signed(job), now=NOW, site="north")}
    assert found["metrics"] is True


def test_noise_that_there_is_none_of_is_left_to_site_toml() -> None:
    found = verdicts(a_policy(), signed(a_job(privacy={"mechanism": "none"})), now=NOW, site="north")
    assert [verdict.allowed for verdict in found if "epsilon" in verdict.rule] == ["left to site.toml"]
    assert COORDINATOR.verify_key.text  # what the job names; it is no rule


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        (
            {"peers": {"a": "a" * 64, "b": "b" * 64}},
            "the job needs 5 sites that are known here, [peers] names 3 with this one",
        ),
        ({"max_epsilon_alone": 8.01}, " at delta 1e-05, this site accepts at most 8.01"),
        (
            {"max_epsilon_alone": None, "max_epsilon_per_job": 6.0},
            ", this site accepts at most 6 (max_epsilon_per_job, because max_epsilon_alone is not set)",
        ),
        ({"max_steps": 4}, "max_steps asks 40, accepted is at most 4"),
    ],
)
def test_a_broken_rule_is_a_sentence(limits: dict[str, Any], sentence: str) -> None:
    limits = {key: value for key, value in ({"max_epsilon_alone": 900.0} | limits).items() if value is not None}
    found = [
        verdict for verdict in job_verdicts(a_policy(**limits), shares(noise=0.5).job, site="north") if not verdict.kept
    ]
    assert len(found) == 1
    assert sentence in found[0].sentence
    assert found[0].sentence.startswith("the job's masked inputs alone cost epsilon ") == ("accepts" in sentence)


def test_peers_bind_sums_alone() -> None:
    assert "peers" not in {one.rule for one in job_verdicts(a_policy(peers=NAMED), a_job(), site="north")}
    check_job(a_policy(peers={"a": "a" * 64}), signed(a_job(federation={"min_sites": 9})), now=NOW, site="north")
