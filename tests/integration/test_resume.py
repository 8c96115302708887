"""A run that was stopped, or killed at any moment, ends as if nothing had happened."""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from client.ledger.ledger import Budget, Ledger
from server.rounds.observer import Observer
from server.store.checkpoint import Checkpoint
from shared.errors import RunError
from simulations.running import sites
from simulations.running.engine import run_scenario
from simulations.scenario import load_scenario
from tests.conftest import Outcome


def run(path: Path, folder: Path, **options: Any) -> Checkpoint:
    sites.forget_simulated_sites()  # a resumed run is another process: sites are read from their folders anew
    return run_scenario(load_scenario(path), folder, observer=lambda arm: Observer(), injected_seed="resume", **options)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"aggregation": {"server_optimizer": "adam"}, "training": {"optimizer": "sgd", "schedule": "cosine"}},
        {"lora": {"train": "both"}, "simulation": {"dropout_probability": 0.3}, "seed": 5},
    ],
)
def test_stop_and_resume_gives_the_same_adapter_bit_for_bit(
    scenario_file: Callable[..., Path], tmp_path: Path, sections: dict[str, Any]
) -> None:
    path = scenario_file(**sections)
    through = run(path, tmp_path / "through")
    # Sites draw by their name and the seed, so the folder does not matter.
    stopped = run(path, tmp_path / "stopped", stop_after=1)
    assert stopped.round_number == 1
    assert any(not torch.equal(stopped.adapter[name], through.adapter[name]) for name in through.adapter)
    assert run(path, tmp_path / "stopped", stop_after=2, resume=True).round_number == 2
    resumed = run(path, tmp_path / "stopped", resume=True)
    assert resumed.adapter.keys() == through.adapter.keys()
    for name, tensor in through.adapter.items():
        assert torch.equal(resumed.adapter[name], tensor), name
    assert resumed.releases == through.releases
    assert [r.metrics for r in resumed.history] == [r.metrics for r in through.history]
    for name in ("adapter_model.safetensors", "head.safetensors", "silotune_state.safetensors"):
        mine, theirs = (tmp_path / arm / "adapter" / name for arm in ("stopped", "through"))
        assert mine.read_bytes() == theirs.read_bytes(), name


def test_a_round_that_failed_is_sent_again_and_costs_nothing_twice(
    scenario_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator dies after the sites answered and before the checkpoint: they answer with the same bytes."""
    import server.runs.folder as module

    path, folder = scenario_file(), tmp_path / "run"
    through = run(path, tmp_path / "through")
    real = module.save_checkpoint

    def dies_in_round_2(where: Path, checkpoint: Checkpoint) -> None:
        if checkpoint.round_number == 2:
            raise RunError("the power went out")
        real(where, checkpoint)

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_checkpoint", dies_in_round_2)
        with pytest.raises(RunError, match="the power went out"):
            run(path, folder)
    resumed = run(path, folder, resume=True)
    assert all(torch.equal(resumed.adapter[name], tensor) for name, tensor in through.adapter.items())
    for site in ("site-1", "site-2", "site-3"):
        assert sum(event.steps for event in ledger_of(folder, site).events()) == 6


def ledger_of(folder: Path, site: str) -> Ledger:
    home = folder / "sites" / site / "home"
    return Ledger(home / "ledger.db", dataset=f"small-{site}", unit="record", budget=Budget(epsilon=1000.0, delta=1e-5))


def changed_at(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


@pytest.mark.slow
def test_kill_9_at_random_moments_then_resume_completes_and_charges_everything(
    scenario_file: Callable[..., Path],
    tmp_path: Path,
    start: Callable[..., subprocess.Popen[str]],
    silotune: Callable[..., Outcome],
) -> None:
    rounds, folder = 15, tmp_path / "run"
    # Room for what the kills cost: with a budget of exactly the plan, a site would rightly refuse its last rounds.
    path = scenario_file(training={"rounds": rounds, "local_steps": 2}, privacy={"epsilon": 1000.0})
    arguments = ("simulate", path, "--out", folder, "--resume", "--json")
    chance, kills = random.Random(), 0
    for _ in range(2):
        before = changed_at(folder / "run.json")
        with start(*arguments) as process:
            deadline = time.monotonic() + 120
            while process.poll() is None and changed_at(folder / "run.json") == before and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 1.5))  # from here on sites are trained
            if process.poll() is None:
                process.kill()
                kills += 1
            process.communicate()
    assert kills, "the runs must be killed on their way"
    resumed = silotune(*arguments)
    assert resumed.status == 0, resumed.err
    assert json.loads(resumed.out)["run_dir"] == str(folder)
    assert json.loads((folder / "run.json").read_text())["status"] == "completed"
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["round"] for record in history] == list(range(rounds + 1))
    assert all(record["failed"] == {} for record in history)
    for site in ("site-1", "site-2", "site-3"):
        ledger = ledger_of(folder, site)
        ledger.entries()
        privacy = json.loads((folder / "sites" / site / "privacy.json").read_text())
        charged = sum(event.steps for event in ledger.events())
        assert privacy["steps_executed"] == 2 * rounds
        assert privacy["randomness"] == "os"
        assert charged >= privacy["steps_executed"]
        assert ledger.spent_epsilon() >= privacy["epsilon_spent"] * (1 - 1e-9)
        # A kill costs at most the round that it interrupted.
        assert charged <= privacy["steps_executed"] + 2 * kills
