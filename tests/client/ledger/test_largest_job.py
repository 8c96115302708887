"""Whether the sentence about a job that the budget cannot finish is true: a ledger is charged with that job."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client.ledger.account import Budget, Charge
from client.ledger.largest_job import unfinished
from client.ledger.ledger import Ledger
from shared.errors import BudgetExceeded
from shared.privacy.accounting import GaussianSteps, calibrate_noise_multiplier
from simulations.federation.processes import change_toml
from tests.conftest import Outcome

ROUNDS = 20


def policy(**changes: Any) -> dict[str, Any]:
    limits = {"max_epsilon_per_job": 8.0, "max_steps": 200, "max_sample_rate": 1.0, "min_noise_multiplier": 0.3}
    return limits | changes


def rounds_that_fit(path: Path, budget: Budget, limits: dict[str, Any]) -> int:
    """Return how many of a job's rounds a new ledger lets pass."""
    sigma = calibrate_noise_multiplier(
        epsilon=limits["max_epsilon_per_job"],
        delta=budget.delta,
        sample_rate=limits["max_sample_rate"],
        steps=limits["max_steps"],
    )
    step = GaussianSteps(
        noise_multiplier=sigma, sample_rate=limits["max_sample_rate"], steps=limits["max_steps"] // ROUNDS
    )
    ledger = Ledger(path, dataset="x", unit="record", budget=budget)
    for number in range(ROUNDS):
        charge = Charge(job_id="j", round=number + 1, request_sha256=f"{number:064x}", mechanism=step)
        try:
            ledger.commit(ledger.reserve(charge), executed_steps=step.steps, release_sha256="0" * 64)
        except BudgetExceeded:
            return number
    return ROUNDS


@pytest.mark.parametrize(
    ("budget", "limits", "cost"),
    [
        (Budget(epsilon=8.0, delta=1e-5, composition="adaptive"), policy(), "8.74"),
        (Budget(epsilon=8.8, delta=1e-5, composition="adaptive"), policy(), ""),
        (Budget(epsilon=8.8, delta=1e-5, composition="adaptive"), policy(max_sample_rate=0.05), "9.50"),
        (Budget(epsilon=8.0, delta=1e-5, composition="fixed"), policy(), ""),
        (Budget(epsilon=7.9, delta=1e-5, composition="fixed"), policy(max_sample_rate=0.1), "8.00"),
        (Budget(epsilon=1.0, delta=1e-6, composition="adaptive"), policy(max_epsilon_per_job=0.5), ""),
    ],
)
def test_a_job_at_the_policys_limits_stops_early_exactly_where_it_is_said(
    tmp_path: Path, budget: Budget, limits: dict[str, Any], cost: str
) -> None:
    said = unfinished(budget, limits)
    fitting = rounds_that_fit(tmp_path / "ledger.db", budget, limits)
    assert (fitting < ROUNDS) == bool(said) == bool(cost)
    if cost:
        assert f"may need {cost} of the budget ({budget.composition} composition), which is {budget.epsilon:g}," in said
        enough = replace(budget, epsilon=float(cost))  # its orders are others, which matter little
        assert rounds_that_fit(tmp_path / "more.db", enough, limits) >= ROUNDS - 1


def test_no_job_comes_near_a_limit_that_its_noise_forbids() -> None:
    small = Budget(epsilon=8.0, delta=1e-5, composition="adaptive")
    assert unfinished(small, policy(max_epsilon_per_job=1000.0))
    assert not unfinished(small, policy(max_epsilon_per_job=1000.0, min_noise_multiplier=20.0))
    assert not unfinished(small, policy(max_epsilon_per_job=1e-9)), "no noise makes such a job"


def test_of_two_caps_the_one_that_is_too_small_is_named() -> None:
    caps = Budget(epsilon=9.0, delta=1e-5, composition="adaptive", epsilon_alone=20.0)
    assert not unfinished(caps, policy(max_epsilon_alone=15.0))
    assert "lower max_epsilon_alone, or raise budget.epsilon_alone" in unfinished(caps, policy(max_epsilon_alone=20.0))
    both = unfinished(replace(caps, epsilon=8.0), policy(max_epsilon_alone=20.0))
    assert "lower max_epsilon_per_job, or raise budget.epsilon " in both
    assert "a job of epsilon_alone 20, which policy.toml accepts" in both, "each cap has its own clause"
    unset = unfinished(replace(caps, epsilon_alone=None), policy(max_epsilon_alone=15.0))
    assert "which is 9, as budget.epsilon_alone is not set, and would stop" in unset
    assert "lower max_epsilon_alone, or set budget.epsilon_alone in site.toml" in unset
    once = unfinished(replace(caps, epsilon=8.0, epsilon_alone=None), policy(max_epsilon_alone=None))
    assert once.count("which policy.toml accepts") == 1


def test_site_init_and_site_check_say_so(tmp_path: Path, silotune: Callable[..., Outcome]) -> None:
    (tmp_path / "notes.csv").write_text("note,triage\na,x\nb,y\n")
    asked = ["--name", "north", "--coordinator", "127.0.0.1:9", "--data", tmp_path / "notes.csv"]
    asked += ["--column", "text=note", "--column", "label=triage"]
    made = silotune("site", "init", tmp_path / "north", *asked)
    (note,) = [line for line in made.out.splitlines() if line.startswith("note: ")]
    assert "a job of epsilon 8, which policy.toml accepts, may need 8.74 of the budget" in note
    assert "note:" not in silotune("site", "init", tmp_path / "south", *asked, "--composition", "fixed").out

    def policy_finding() -> tuple[str, str]:
        change_toml(
            tmp_path / "north" / "policy.toml", signers={"lead": "ed25519:__Qy9frwZW1KOQBSfGZ_o90bFiqMX7npAVWVp9Y1nso"}
        )
        found = json.loads(silotune("site", "check", tmp_path / "north", "--offline", "--json").out)
        (one,) = [finding for finding in found if finding["name"] == "policy"]
        return one["outcome"], one["text"]

    outcome, text = policy_finding()
    assert (outcome, note.removeprefix("note: ").removesuffix(".") in text) == ("warning", True)
    change_toml(tmp_path / "north" / "policy.toml", max_epsilon_per_job=7.0)
    assert policy_finding()[0] == "ok"
