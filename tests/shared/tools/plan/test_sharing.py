"""Plans whose sites share the noise: the price of each promise, and whether an account has room for both."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from cli.commands import app
from shared.epsilons import noise_rounded_down, rounded_up
from shared.errors import ConfigError
from shared.job.job import Job
from shared.job.parsing import parse
from shared.privacy.accounting import GaussianSteps, compose_epsilon, noise_of_sum
from shared.privacy.ledger_export import ChargedSteps, LedgerExport, save_export
from shared.privacy.plan import PrivacyPlan
from shared.tools.plan import sharing
from shared.tools.plan.affordability import can_afford, spent
from shared.tools.plan.planning import SIGMA_DECIMALS, Question
from shared.tools.plan.sharing import SharesPlan, Sharing, solve_shares
from shared.tools.plan.tables import Planned

RATE, STEPS, DELTA = 0.125, 16, 1e-5
QUESTION = Question(sample_rate=RATE, steps=STEPS, delta=DELTA, epsilon=1.0)
SHARING = Sharing(sites=8, colluding=2, epsilon_alone=8.0)


def epsilon(sigma: float, steps: int = STEPS, rate: float = RATE) -> float:
    return compose_epsilon([GaussianSteps(noise_multiplier=sigma, sample_rate=rate, steps=steps)], DELTA)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)], env={"COLUMNS": "120"})


def answer_of(*arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*arguments, "--json").stdout)
    return found


def refusal(*arguments: object) -> str:
    error = run(*arguments).exception
    assert isinstance(error, ConfigError)
    return str(error)


# --- numbers ---


@settings(max_examples=10, deadline=None)
@given(
    target=st.sampled_from([0.5, 1.0, 4.0]),
    times=st.sampled_from([1.0, 1.7, 3.0, 20.0]),
    honest=st.integers(2, 40),
    spare=st.sampled_from([None, 0, 7]),
)
def test_the_larger_noise_keeps_to_both(target: float, times: float, honest: int, spare: int | None) -> None:
    alone = target * times
    sharing = Sharing(sites=honest + 3, colluding=3, epsilon_alone=alone, spare_attempts=spare)
    plan = solve_shares(replace(QUESTION, epsilon=target), sharing)
    assert plan.together.epsilon <= target
    assert plan.share.epsilon <= alone
    assert plan.by_epsilon is not None
    assert plan.by_epsilon_alone is not None
    needed = {"epsilon": plan.by_epsilon, "epsilon alone": plan.by_epsilon_alone}
    assert plan.share.noise_multiplier == max(price.noise_multiplier for price in needed.values())
    assert plan.share.noise_multiplier == needed[plan.ruled_by].noise_multiplier
    # Each of the two is the least of four decimals for its own target.
    assert plan.by_epsilon.epsilon <= target
    assert plan.by_epsilon_alone.epsilon_alone <= alone
    less = plan.by_epsilon.noise_multiplier - 2e-4
    assert less < 0.2 or epsilon(noise_of_sum(less, honest), plan.share.steps) > target
    less = plan.by_epsilon_alone.noise_multiplier - 2e-4
    assert less < 0.2 or epsilon(less, plan.share.steps) > alone


def test_both_epsilons_are_those_of_the_numbers_beside_them() -> None:
    plan = solve_shares(QUESTION, SHARING)
    share = plan.share.noise_multiplier
    assert f"{share:.4f}" == f"{share:.15g}"
    assert (plan.rounds, plan.spare_attempts, plan.share.steps, plan.together.steps) == (16, 2, 18, 18)
    assert plan.together.noise_multiplier == noise_of_sum(share, 6)
    assert plan.share.epsilon == epsilon(share, 18)
    assert plan.together.epsilon == epsilon(noise_of_sum(share, 6), 18)
    assert plan.without_spare.epsilon == epsilon(noise_of_sum(share, 6), 16) < plan.together.epsilon
    assert plan.without_spare.epsilon_alone == epsilon(share, 16) < plan.share.epsilon
    for count, found in plan.by_honest():
        assert found == epsilon(noise_of_sum(share, count), 18)
    counts = [count for count, _ in plan.by_honest()]
    assert (counts[0], counts[-1], 6 in counts) == (1, 16, True)


def test_a_given_share_has_both_epsilons() -> None:
    plan = solve_shares(replace(QUESTION, epsilon=None, noise_multiplier=0.7), replace(SHARING, epsilon_alone=None))
    assert (plan.share.noise_multiplier, plan.share.solved_for) == (0.7, "epsilon")
    assert (plan.by_epsilon, plan.by_epsilon_alone, plan.ruled_by) == (None, None, "")
    assert (plan.share.epsilon, plan.together.epsilon) == (epsilon(0.7, 18), epsilon(noise_of_sum(0.7, 6), 18))


def test_who_asks_for_more_noise_rules() -> None:
    assert solve_shares(QUESTION, SHARING).ruled_by == "epsilon"
    assert solve_shares(QUESTION, replace(SHARING, epsilon_alone=1.5)).ruled_by == "epsilon alone"
    alone = solve_shares(QUESTION, replace(SHARING, epsilon_alone=1.0))
    # Whoever asks for the same of an upload alone gets more from the sum at no price.
    assert alone.together.epsilon < 0.4


@pytest.mark.parametrize(
    ("question", "sharing", "told"),
    [
        ({}, {"sites": 3}, "of 3 sites, 2 of which may collude, 1 stay honest"),
        ({}, {"sites": 1}, "0 stay honest"),
        ({}, {"sites": 0}, "--sites is 0 and --colluding 2; expected 1 to"),
        ({}, {"colluding": -1}, "--colluding -1"),
        ({}, {"sites": 1001}, "expected 1 to 1,000 sites, as many as one sum can be of"),
        ({}, {"sites": 1000, "colluding": 999}, "Give a smaller --colluding."),
        ({}, {"spare_attempts": -1}, "--spare-attempts is -1"),
        ({}, {"epsilon_alone": None}, "give both --epsilon and --epsilon-alone"),
        ({"epsilon": None}, {}, "give both --epsilon and --epsilon-alone"),
        ({}, {"epsilon_alone": 0.9}, "--epsilon-alone is 0.9 and --epsilon 1"),
        ({}, {"epsilon_alone": 1e4}, "--epsilon-alone is 10000; expected a number from"),
        ({"epsilon": math.nan}, {}, "--epsilon is nan"),
        ({"noise_multiplier": 1.0}, {}, "leave out --epsilon and --epsilon-alone, or it"),
        ({"steps": None}, {}, "--steps (or --epochs), one step a round"),
        ({"sample_rate": None}, {}, "--batch-size (or --sample-rate)"),
        ({"sample_rate": 2.0}, {}, "--sample-rate is 2"),
        ({"delta": None}, {}, "delta is not known"),
    ],
)
def test_mistakes_are_explained(question: dict[str, Any], sharing: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        solve_shares(replace(QUESTION, **question), replace(SHARING, **sharing))
    assert told in str(refused.value)


def test_the_signal_is_that_of_the_whole_sum() -> None:
    """A share by itself is next to nothing beside its noise, and nobody has to learn from it."""
    question = replace(QUESTION, records=40, parameters=400)
    plan = solve_shares(question, replace(SHARING, sites=40, colluding=2))
    whole = plan.whole_sum
    assert whole is not None
    assert whole.signal_to_noise == pytest.approx(math.sqrt(40) * (plan.share.signal_to_noise or 0))
    assert "noise" in plan.share.warnings()
    assert "noise" not in plan.warnings()
    few = solve_shares(replace(question, parameters=10**6), SHARING)
    assert "noise dominates: with 1,000,000 parameters" in few.warnings()["noise"]
    assert few.whole_sum is not None
    assert few.warnings()["noise"] == few.whole_sum.warnings()["noise"]
    assert solve_shares(QUESTION, SHARING).whole_sum is None
    assert "weak" in solve_shares(replace(question, delta=0.02), SHARING).warnings()["delta"]


# --- jobs ---


def make_job(**sections: Any) -> Job:
    raw: dict[str, Any] = {
        "name": "sum",
        "task": {"kind": "sequence_classification", "labels": ["x", "y"]},
        "training": {"rounds": STEPS, "local_steps": 1},
        "privacy": {
            "mechanism": "distributed",
            "sample_rate": RATE,
            "epsilon": 1.0,
            "epsilon_alone": 8.0,
            "max_colluding": 2,
        },
        "federation": {"min_sites": 8},
    }
    return parse(Job, raw | sections, source="job.toml")


@pytest.fixture
def job_file(tmp_path: Path) -> Callable[..., Path]:
    def write(**sections: Any) -> Path:
        path = tmp_path / "job.json"
        path.write_text(make_job(**sections).canonical_json())
        return path

    return write


def test_a_job_costs_what_its_plan_says(job_file: Callable[..., Path]) -> None:
    for sections in ({}, {"site_metrics": {"names": ["accuracy"], "noise_multiplier": 20.0}}):
        plan = PrivacyPlan.from_job(make_job(**sections))
        found = answer_of("--job", job_file(**sections))
        sharing, (point,) = found["sharing"], found["points"]
        assert sharing["noise_multiplier"] == point["noise_multiplier"] == plan.noise_multiplier
        assert sharing["noise_together"] == plan.of_sum.noise_multiplier
        assert (sharing["epsilon"], sharing["epsilon_alone"]) == (plan.of_sum.epsilon(), plan.epsilon())
        assert (sharing["sites"], sharing["colluding"], sharing["honest"]) == (8, 2, 6)
        assert (sharing["rounds"], sharing["spare_attempts"], point["steps"]) == (16, 2, 18)
        assert sharing["ruled_by"] == "epsilon"
        assert sharing["by_epsilon"]["noise_multiplier"] == plan.noise_multiplier
        assert sharing["by_epsilon"]["epsilon"] <= 1.0
        assert 7.99 < sharing["by_epsilon_alone"]["epsilon_alone"] <= 8.0
        by_honest = {row["honest"]: row["epsilon"] for row in sharing["by_honest"]}
        assert (by_honest[6], by_honest[1]) == (plan.of_sum.epsilon(), plan.epsilon())


def test_both_promises_are_printed_rounded_up(job_file: Callable[..., Path], tmp_path: Path) -> None:
    plan = solve_shares(replace(QUESTION, records=2048), SHARING)
    numbers = ("--records", 2048, "--delta", DELTA, "--sample-rate", RATE, "--steps", STEPS)
    shared = ("--sites", 8, "--colluding", 2, "--epsilon", 1, "--epsilon-alone", 8)
    output = run(*numbers, *shared, "--out", tmp_path / "out").output
    lines = [" ".join(line.split()) for line in output.splitlines()]
    assert f"epsilon {rounded_up(plan.together.epsilon)}" in lines
    assert f"epsilon alone {rounded_up(plan.share.epsilon)}" in lines
    for name, sigma in (
        ("of a site's share", plan.share.noise_multiplier),
        ("of the honest sum", plan.together.noise_multiplier),
    ):
        assert f"noise multiplier {name} {noise_rounded_down(sigma)} found" in lines
    text = " ".join(lines)
    by_epsilon, by_alone = plan.by_epsilon, plan.by_epsilon_alone
    assert by_epsilon is not None
    assert by_alone is not None
    assert f"Epsilon rules. Epsilon asks for shares of noise {noise_rounded_down(by_epsilon.noise_multiplier)}" in text
    assert f"at which epsilon alone would be {rounded_up(by_epsilon.epsilon_alone)}" in text
    assert (
        f"{noise_rounded_down(by_alone.noise_multiplier)}, at which epsilon would be {rounded_up(by_alone.epsilon)}"
        in text
    )
    assert (
        f"cost epsilon {rounded_up(plan.without_spare.epsilon)}, alone {rounded_up(plan.without_spare.epsilon_alone)}"
        in text
    )
    assert "against the coordinator and up to 2 sites that work with it, as long as secure aggregation does" in text
    written = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert written["sharing"]["epsilon"] == plan.together.epsilon
    assert (tmp_path / "out" / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert "Spare" not in run(*numbers, *shared, "--spare-attempts", 0).output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--sites", 8), "give both, for example 8 and 2, or with --job neither: the job says it."),
        (("--colluding", 2), "give both, for example 8 and 2"),
        (("--epsilon-alone", 2), "--epsilon-alone speaks of sites that share the noise"),
        (("--spare-attempts", 2), "--spare-attempts speaks of sites that share the noise"),
        (("--sites", 8, "--colluding", 2, "--sweep", "epochs=1:2"), "--sweep varies a plan without --sites"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments: tuple[object, ...], told: str) -> None:
    assert told in refusal("--records", 2048, "--sample-rate", RATE, *arguments)


def test_a_job_says_how_its_noise_is_shared(job_file: Callable[..., Path]) -> None:
    for arguments, told in (
        (("--sites", 8, "--colluding", 2), "the job says how its noise is shared"),
        (("--site-sizes", "64,128"), "all bring as much of it, whatever their size"),
    ):
        assert told in refusal("--job", job_file(), *arguments)


# --- accounts ---

SHARE = GaussianSteps(noise_multiplier=0.8, sample_rate=RATE, steps=12)


def export(cap: float = 4.0, alone: float | None = 9.0, *, charged: int = 3, **changes: Any) -> LedgerExport:
    time = "2031-05-04T12:00:00.000+00:00"
    given: dict[str, Any] = {"job_id": "a" * 64, "noise_multiplier": 0.9, "sample_rate": RATE, "steps": 1}
    charges = [
        ChargedSteps(**given, noise_together=1.8, round=n, attempt=1, committed=True, time=time) for n in range(charged)
    ]
    raw: dict[str, Any] = {
        "site": "ward",
        "dataset": "notes",
        "unit": "record",
        "declared_records": 2048,
        "epsilon": cap,
        "epsilon_alone": alone,
        "delta": DELTA,
        "composition": "fixed",
        "charges": tuple(charges),
        "num_entries": 3,
        "head_sha256": "0" * 64,
        "exported_at": time,
    }
    return LedgerExport(**raw | changes)


def shares_for(rounds: int) -> int:
    return -(-rounds // 10)


@pytest.mark.parametrize("composition", ["fixed", "adaptive"])
@pytest.mark.parametrize(("cap", "alone"), [(4.0, 9.0), (2.0, 90.0), (30.0, 6.0), (6.0, None), (0.2, 30.0)])
def test_a_run_fits_only_under_both_caps(cap: float, alone: float | None, composition: str) -> None:
    account = export(cap, alone, composition=composition)
    answer = can_afford(account, SHARE, local_steps=1, delta=DELTA, honest=4, spare_attempts_for=shares_for)

    def fits(steps: int, sigma: float = SHARE.noise_multiplier) -> bool:
        one = replace(SHARE, steps=steps, noise_multiplier=sigma)
        summed = replace(one, noise_multiplier=noise_of_sum(sigma, 4))
        return spent(account, [summed]) <= cap and spent(account, [one], alone=True) <= (alone or cap)

    assert answer.num_runs == sum(fits(12 * count) for count in (1, 2, 3))
    assert answer.epsilon_after[0] == spent(account, [replace(SHARE, noise_multiplier=1.6)])
    assert answer.alone_after[0] == spent(account, [SHARE], alone=True)
    assert (answer.cap, answer.cap_alone) == (cap, alone or cap)
    steps = answer.steps_affordable
    assert steps == 0 or fits(steps)
    assert not fits(steps + 1)
    wanted = 3 if answer.num_runs else 1
    if answer.num_runs < 3 and answer.noise_multiplier is not None:
        assert fits(12 * wanted, answer.noise_multiplier)
        assert not fits(12 * wanted, answer.noise_multiplier - 0.01)
        rounds = answer.rounds or 0
        assert (rounds + shares_for(rounds)) * wanted <= steps < (rounds + 1 + shares_for(rounds + 1)) * wanted


def test_a_site_s_answer_shows_both_caps(job_file: Callable[..., Path], tmp_path: Path) -> None:
    save_export(tmp_path / "export.json", export(4.0, 40.0))
    output = run("--job", job_file(), "--ledger", tmp_path / "export.json").output
    plan, account = PrivacyPlan.from_job(make_job()), export(4.0, 40.0)
    lines = [line.split() for line in output.splitlines()]
    row = next(line for line in lines if line[:2] == ["ward,", "notes"])
    alone = next(line for line in lines if line[:3] == ["each", "input", "alone"])
    assert row[3:5] == [rounded_up(spent(account, extra)) for extra in ([], [plan.of_sum.mechanism(18)])]
    by_itself = [rounded_up(spent(account, extra, alone=True)) for extra in ([], [plan.mechanism(18)])]
    assert (alone[3:5], alone[-1]) == (by_itself, "40")
    (site,) = answer_of("--job", job_file(), "--ledger", tmp_path / "export.json")["sites"]
    assert (site["cap"], site["cap_alone"]) == (4.0, 40.0)
    assert site["alone_now"] == spent(account, [], alone=True) > site["epsilon_now"]


def test_a_small_site_is_judged_by_delta_not_by_its_noise(job_file: Callable[..., Path], tmp_path: Path) -> None:
    planned = Planned(settings=[solve().share], shares=solve())
    assert planned.site_warnings(export(declared_records=8)) == {}
    assert set(planned.site_warnings(export(declared_records=64_000))) == {"delta"}


def solve() -> SharesPlan:
    return solve_shares(QUESTION, SHARING)


def test_noise_on_the_lattice_stays_there_and_other_noise_goes_up() -> None:
    assert (sharing._up(1.25), sharing._up(1.2500001)) == (1.25, 1.25 + 10.0**-SIGMA_DECIMALS)
