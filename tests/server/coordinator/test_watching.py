"""Which jobs of a coordinator others are told of, and that its command hands the options on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.coordinator.watching import watching
from server.energy import EnergySettings
from server.tracking import Watched
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.job.parsing import parse
from tests.server.tracking.told import checkpoint

pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")

CENTRAL = {
    "mechanism": "central",
    "unit": "site",
    "noise_multiplier": 1.5,
    "central": {"num_sites": 100, "clip_norm": 0.5},
}


def job_under(mechanism: str, make: Callable[..., Job]) -> Job:
    privacy = (
        CENTRAL
        if mechanism == "central"
        else {"mechanism": mechanism, "epsilon": 8.0, "delta": 1e-5, "sample_rate": 0.25}
    )
    raw = make().model_dump(mode="json", exclude_unset=True) | {"privacy": privacy}
    return parse(Job, raw | {"federation": {"min_sites": 100}}, source="test")


@pytest.mark.parametrize("mechanism", ["dp-sgd", "none", "central"])
def test_jobs_without_an_epsilon_or_with_secret_times_are_told_nobody(
    classification_job: Callable[..., Job], tmp_path: Path, mechanism: str
) -> None:
    job, folder, said = job_under(mechanism, classification_job), tmp_path / "0001-test" / "run", []
    folder.mkdir(parents=True)
    watched = Watched.of([f"tensorboard:{tmp_path / 'board'}"], energy=EnergySettings())
    with watching(watched, job, folder, ComputeConfig(device="cpu"), said.append) as observer:
        observer.round_done(checkpoint(job, 2))
        observer.ended(checkpoint(job, 3), complete=True)
    assert (tmp_path / "board" / "test" / "0001-test").is_dir() == (mechanism == "dp-sgd")
    assert (folder / "energy.json").exists() == (mechanism != "central")
    words = {"dp-sgd": [], "none": ["no epsilon covers"], "central": ["times of rounds are secret"]}[mechanism]
    assert len(said) == len(words)
    assert all(word in text for word, text in zip(words, said, strict=True))


def test_without_options_nobody_is_told(classification_job: Callable[..., Job], tmp_path: Path) -> None:
    job = classification_job()
    with watching(Watched(), job, tmp_path, ComputeConfig(), pytest.fail) as observer:
        observer.round_done(checkpoint(job, 1))
    assert not list(tmp_path.iterdir())


def test_the_command_hands_the_options_on(
    silotune: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from server.coordinator import supervisor

    seen: list[Watched | None] = []

    class Started(Exception):
        pass

    def begin(self: object, home: object, watched: Watched | None = None) -> None:
        seen.append(watched)
        raise Started

    monkeypatch.setattr(supervisor.Supervisor, "__init__", begin)
    for options in ([], ["--track", f"tensorboard:{tmp_path}", "--track-weights", "--price-per-kwh", "0.30 EUR"]):
        with pytest.raises(Started):
            silotune("coordinator", "start", tmp_path, *options)
    plain, asked = seen
    assert plain is None
    assert asked is not None
    assert [target.kind for target in asked.targets] == ["tensorboard"]
    assert asked.weights
    assert asked.energy is not None
    refused = silotune("coordinator", "start", tmp_path, "--track-weights")
    assert refused.status == 2
    assert "no --track was given" in refused.err
