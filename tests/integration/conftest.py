"""A finished run, and `silotune` in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from server.rounds.observer import Observer
from shared.job.job import Job
from shared.models.backbones import backbone_sha256
from simulations.federation.processes import Federation
from simulations.running.engine import run_scenario
from simulations.scenario import load_scenario

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "cli")


@pytest.fixture(scope="session")
def finished_run(write_scenario: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A completed run of three sites, with randomness of the operating system; tests must not change it."""
    folder = tmp_path_factory.mktemp("finished")
    scenario = load_scenario(write_scenario(folder, training={"rounds": 2}))
    run_scenario(scenario, folder / "run", observer=lambda arm: Observer())
    return folder / "run"


@pytest.fixture
def start() -> Callable[..., subprocess.Popen[str]]:
    """Return a function that starts `silotune` as a process."""

    def launch(*arguments: object, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            **options,
        )

    return launch


@pytest.fixture(scope="session")
def federation_job(classification_job: Callable[..., Job]) -> Callable[..., Job]:
    """Return a builder of small jobs on the tiny BERT for real federations: two rounds of two steps, two sites."""

    def build(**sections: Any) -> Job:
        defaults: dict[str, Any] = {
            "training": {"rounds": 2, "local_steps": 2, "learning_rate": 0.05},
            "privacy": {"epsilon": 8.0, "delta": 1e-5, "sample_rate": 0.25, "noise_multiplier": 1.0},
            "federation": {"min_sites": 2, "round_timeout_seconds": 60.0},
        }
        for name, value in sections.items():
            defaults[name] = {**defaults[name], **value} if name in defaults else value
        return classification_job(**defaults)

    return build


@pytest.fixture(scope="session")
def found_federation(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Federation]]:
    """Return a founder of federations: CA, coordinator and sites on disk, nothing started; all are stopped at the end.

    `sites` names the sites; `policy` replaces keys of their policy.toml; further arguments go to `Federation`.
    """
    made: list[Federation] = []

    def found(
        sites: Sequence[str] = ("a", "b"), *, epsilon: float = 8.0, policy: dict[str, Any] | None = None, **options: Any
    ) -> Federation:
        environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | options.pop("environment", {})
        federation = Federation(tmp_path_factory.mktemp("federation"), environment=environment, **options)
        federation.found()
        rules = {"backbones": {str(tiny_bert): backbone_sha256(tiny_bert)}, **(policy or {})}
        for index, name in enumerate(sites):
            federation.join(name, site_records(index), epsilon=epsilon, policy=rules)
        made.append(federation)
        return federation

    yield found
    for federation in made:
        federation.stop()


LINES = (
    "a quiet joy from start to end",
    "a dull plot",
    "a bright and funny cast",
    "it drags and it bores",
    "well made",
)


def site_records(index: int, number: int = 40) -> list[dict[str, Any]]:
    """Return the records of one small site."""
    return [
        {"text": f"{LINES[(i + index) % 5]} {LINES[(i // 5) % 5]}", "label": ["good", "bad"][(i + index) % 2]}
        for i in range(number)
    ]


@pytest.fixture(scope="session")
def evaluation_records() -> list[dict[str, Any]]:
    """Public evaluation records of the small federations."""
    return site_records(7, 20)
