"""A small run, and a registry that holds it; what takes seconds is made once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from server.registry.adding import add
from server.registry.registry import Registry
from server.rounds.observer import Observer
from shared.trust.signing import save_signing_key
from simulations.running.engine import run_scenario
from simulations.scenario import load_scenario
from tests.server.registry.keys import KEYS, OFFICER, SIGNER


@pytest.fixture(scope="session")
def small_run(write_scenario: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A completed run of two sites with randomness of the operating system; tests must not change it."""
    folder = tmp_path_factory.mktemp("registry-run")
    scenario = load_scenario(write_scenario(folder, training={"rounds": 1}, partition={"num_sites": 2}))
    run_scenario(scenario, folder / "run", observer=lambda arm: Observer())
    return folder / "run"


@pytest.fixture
def run(small_run: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(small_run, tmp_path / "run"))


@pytest.fixture(scope="session")
def filled(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with two versions of the model `films`, whose officer is not the signer; tests must not change it."""
    registry = Registry(tmp_path_factory.mktemp("filled") / "models")
    for note in ("the first", "the second"):
        add(registry, small_run, "films", signer=("sam", SIGNER), note=note)
    head, _, _ = registry.policy_file.read_text().partition("[officers]")
    registry.policy_file.write_text(f'{head}[officers]\nolga = "{OFFICER.verify_key.text}"\n')
    return registry.path


@pytest.fixture
def registry(filled: Path, tmp_path: Path) -> Registry:
    """A copy of it that a test may change."""
    return Registry(Path(shutil.copytree(filled, tmp_path / "models")))


@pytest.fixture
def key_files(tmp_path: Path) -> dict[str, Path]:
    """The key file of each person."""
    for name, key in KEYS.items():
        save_signing_key(tmp_path / f"{name}.key", key, None)
    return {name: tmp_path / f"{name}.key" for name in KEYS}


@pytest.fixture
def in_child() -> Callable[[Callable[[], None]], Callable[[], int]]:
    """Return a function that starts another one in a process of its own, and returns what waits for its status.

    The process is a copy of this one, so that what was computed is not computed again.
    """

    def start(act: Callable[[], None]) -> Callable[[], int]:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                act()
                status = 0
            finally:
                os._exit(status)
        return lambda: os.waitpid(child, 0)[1]

    return start
