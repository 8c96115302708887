"""A compliance report of a run whose records promise something else than its job: the job counts, and the report says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.reports.compliance.facts import Facts
from server.reports.compliance.reading import read_facts
from server.rounds.observer import Observer
from simulations.running.engine import run_scenario
from simulations.scenario import load_scenario

SHARES: dict[str, Any] = {
    "training": {"rounds": 2, "local_steps": 1, "optimizer": "sgd", "learning_rate": 0.5},
    "privacy": {"mechanism": "distributed", "max_colluding": 0, "spare_attempts": 2},
    "federation": {"min_sites": 2},
}


@pytest.fixture(scope="module")
def honest_run(write_scenario: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A completed run of three sites that share the noise; tests must not change it."""
    folder = tmp_path_factory.mktemp("shares")
    run_scenario(load_scenario(write_scenario(folder, **SHARES)), folder / "run", observer=lambda arm: Observer())
    return folder / "run"


@pytest.fixture
def run(honest_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(honest_run, tmp_path / "run"))


def forge(run: Path, **changes: Any) -> None:
    """Change every site's record."""
    for path in run.glob("sites/*/privacy.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def stated(facts: Facts) -> tuple[Any, ...]:
    headline = facts.headline
    assert headline is not None
    return (
        headline.epsilon,
        facts.epsilon_alone,
        facts.guarantees[0].statement,
        [site.statement for site in facts.sites],
    )


def test_an_honest_run_has_no_discrepancy(honest_run: Path) -> None:
    facts = read_facts(honest_run)
    assert facts.discrepancies == ()
    assert facts.epsilon_alone is not None
    assert facts.headline is not None
    assert facts.headline.epsilon < facts.epsilon_alone


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shared": {"honest": 7, "colluding": 0}}, "noise that 7 honest sites share"),
        ({"shared": {"honest": 2, "colluding": 5}}, "against the coordinator and up to 5 sites that work with it"),
        ({"shared": None, "epsilon_alone": None}, "recorded with all its noise at each site"),
        ({"steps_planned": 2}, "recorded with 2 planned steps, the job plans 4"),
        ({"epsilon_alone": 0.5}, "recorded epsilon 0.5000 for what it sends by itself"),
        ({"epsilon_planned": 0.5}, "recorded epsilon 0.5000 for its whole plan"),
        ({"epsilon_planned": None}, "recorded epsilon none for its whole plan"),
    ],
)
def test_what_a_record_promises_beyond_the_job_is_never_repeated(
    run: Path, honest_run: Path, changes: dict[str, Any], said: str
) -> None:
    forge(run, **changes)
    facts = read_facts(run)
    assert sum(said in problem for problem in facts.discrepancies) == 3
    assert stated(facts) == stated(read_facts(honest_run))


def test_noise_that_no_job_shares_is_not_divided_among_sites(
    write_scenario: Callable[..., Path], tmp_path: Path
) -> None:
    run_scenario(
        load_scenario(write_scenario(tmp_path, training={"rounds": 1})),
        tmp_path / "run",
        observer=lambda arm: Observer(),
    )
    before = stated(read_facts(tmp_path / "run"))
    forge(tmp_path / "run", shared={"honest": 100, "colluding": 0}, steps_planned=1)
    facts = read_facts(tmp_path / "run")
    assert stated(facts) == before
    assert any("noise that 100 honest sites share" in problem for problem in facts.discrepancies)
    assert any("1 planned steps, the job plans 2" in problem for problem in facts.discrepancies)
