"""One job, one ServerApp and one ClientApp: in one process and in Flower's simulation on Ray, the same adapter.

By the patient where sites release by themselves, by the record where their sum is secure.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from server.rounds.observer import Observer
from server.store.checkpoint import Checkpoint
from shared.errors import ConfigError, RunError
from shared.privacy.statement import SiteRelease
from simulations.running import engine, sites
from simulations.running.engine import run_scenario
from simulations.scenario import load_scenario

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install silotune[ray]"
    ),
]


@pytest.fixture(scope="module", autouse=True)
def _stop_ray() -> Iterator[None]:
    yield
    import ray

    ray.shutdown()


def run(path: Path, folder: Path, backend: str, *, resume: bool = False, actors: int = 2) -> Checkpoint:
    sites.forget_simulated_sites()
    # In float32, or rounding differs too much between sites that share a batch and sites alone.
    scenario = load_scenario(
        path, [f"simulation.backend={backend}", f"simulation.num_actors={actors}", "compute.precision=float32"]
    )
    return run_scenario(scenario, folder, observer=lambda arm: Observer(), injected_seed="transport", resume=resume)


def without_hashes(checkpoint: Checkpoint) -> dict[str, SiteRelease]:
    """What each site released, but for the hashes: an update's last bits depend on the threads that summed it."""
    return {site: replace(release, updates=()) for site, release in checkpoint.releases.items()}


def test_both_transports_give_the_same_adapter_with_the_same_drop_outs(
    scenario_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    for factory in ("make_server_app", "make_client_app"):
        real = getattr(engine, factory)

        def counted(
            *args: object, _real: Callable[..., object] = real, _name: str = factory, **kwargs: object
        ) -> object:
            made.append(_name)
            return _real(*args, **kwargs)

        monkeypatch.setattr(engine, factory, counted)
    path = scenario_file(
        seed=5,
        simulation={"dropout_probability": 0.3},
        training={"rounds": 4},
        partition={"num_sites": 5},
        privacy={"unit": "patient", "records_per_person": 3},
        data={"train": {"path": "train.csv", "columns": {"text": "review", "label": "verdict", "person": "mrn"}}},
    )
    lines = (path.parent / "train.csv").read_text(encoding="utf-8").splitlines()
    by_patient = [f"{lines[0]},mrn", *(f"{line},{number % 25}" for number, line in enumerate(lines[1:]))]
    (path.parent / "train.csv").write_text("\n".join(by_patient), encoding="utf-8")
    in_process = run(path, tmp_path / "in-process", "in-process")
    on_ray = run(path, tmp_path / "ray", "ray")
    assert sorted(made) == ["make_client_app"] * 2 + ["make_server_app"] * 2

    failed = [record.failed for record in in_process.history]
    assert any(failed), "the test must drop some sites"
    assert [record.failed for record in on_ray.history] == failed
    assert [record.sites for record in on_ray.history] == [record.sites for record in in_process.history]
    assert without_hashes(on_ray) == without_hashes(in_process)
    assert {release.unit for release in on_ray.releases.values()} == {"patient"}
    assert on_ray.adapter.keys() == in_process.adapter.keys()
    for name, tensor in in_process.adapter.items():
        torch.testing.assert_close(on_ray.adapter[name], tensor, rtol=1e-4, atol=1e-5)
    assert any(bool(tensor.abs().max() > 1e-2) for tensor in in_process.adapter.values()), "nothing was learned"


def test_an_error_of_the_run_arrives_as_it_is(scenario_file: Callable[..., Path], tmp_path: Path) -> None:
    """Not as Flower's own: a user sees what was found and what to do."""
    folder = tmp_path / "run"
    run(scenario_file(training={"rounds": 1}), folder, "in-process")
    with pytest.raises(RunError, match="resume with the scenario that the run was started with"):
        run(scenario_file(training={"rounds": 1}, partition={"num_sites": 4}), folder, "ray", resume=True)


def secure_scenario(scenario_file: Callable[..., Path]) -> Path:
    return scenario_file(
        training={"rounds": 2, "local_steps": 1},
        privacy={"mechanism": "distributed", "max_colluding": 0},
        federation={"min_sites": 3},
    )


def test_what_a_site_drew_stays_in_its_process_so_ray_gets_one(
    scenario_file: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"with privacy\.mechanism 'distributed' it must be 1"):
        run(secure_scenario(scenario_file), tmp_path / "two", "ray", actors=2)


@pytest.mark.endurance
def test_secure_sums_are_the_same_on_both_transports(scenario_file: Callable[..., Path], tmp_path: Path) -> None:
    path = secure_scenario(scenario_file)
    in_process = run(path, tmp_path / "in-process", "in-process")
    on_ray = run(path, tmp_path / "ray", "ray", actors=1)
    assert [record.sites for record in on_ray.history] == [record.sites for record in in_process.history]
    for name, tensor in in_process.adapter.items():
        torch.testing.assert_close(on_ray.adapter[name], tensor, rtol=1e-3, atol=1e-5)
