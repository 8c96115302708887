"""A finished run, and `silotune` in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.observer import Observer
from simulations.engine import run_scenario
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
