"""What is loaded is what was verified, whatever happens to the folder meanwhile."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from server.registry import promotion
from server.registry.adding import add
from server.registry.references import Resolved, resolve
from server.registry.registry import Registry
from server.serving import models
from server.serving.models import Plan, load
from shared.errors import ConfigError, ModelError, RegistryError, TrustError
from shared.job.compute import ComputeConfig
from shared.models.batches import Example
from shared.runtime.export.exporting import export
from shared.runtime.export.folder import ModelFolder
from shared.runtime.inference import head_outputs, load_model
from tests.server.registry.keys import OFFICER, SIGNER

EXAMPLES = [Example(torch.tensor(ids)) for ids in ([2, 9, 10, 3], [2, 11, 3], [2, 30, 31, 32, 33, 3])]
TORCH = Plan("torch")


def outputs_of(run: Path) -> torch.Tensor:
    return torch.stack(head_outputs(load_model(run, ComputeConfig(device="cpu", precision="float32")), EXAMPLES))


@pytest.mark.parametrize("plan", [Plan("auto"), Plan("onnx"), TORCH, Plan("onnx", "int8")])
def test_every_engine_computes_what_the_run_does(small_run: Path, registry: Registry, plan: Plan) -> None:
    model = load(resolve(registry, "films"), plan)
    assert (model.version, model.engine) == ("films:2", "torch" if plan.engine == "torch" else "onnx")
    assert model.precision == (plan.precision or "float32")
    error = (torch.stack(model.outputs(EXAMPLES)) - outputs_of(small_run)).abs().max()
    assert float(error) < (0.05 if plan.precision == "int8" else 1e-4)


@pytest.mark.parametrize(
    ("threads", "at_once", "each"), [(1, 1, 1), (2, 2, 1), (3, 3, 1), (7, 4, 1), (8, 4, 2), (64, 4, 16)]
)
def test_threads_are_shared_out_to_batches(threads: int, at_once: int, each: int) -> None:
    plan = Plan(threads=threads)
    assert (plan.at_once, plan.threads_of_each, plan.threads_of_one) == (at_once, each, threads)


def test_only_graphs_compute_several_batches_at_once_and_each_as_alone(registry: Registry) -> None:
    graph, torch_one = (load(resolve(registry, "films"), Plan(engine, threads=3)) for engine in ("onnx", "torch"))
    assert (graph.at_once, torch_one.at_once) == (3, 1)
    alone = torch.stack(graph.outputs(EXAMPLES))
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda _: graph.outputs(EXAMPLES), range(60)))
    assert all(torch.equal(torch.stack(one), alone) for one in together)


def test_two_versions_stand_side_by_side(registry: Registry, small_run: Path) -> None:
    first = load(resolve(registry, "films:1"), TORCH)
    before = torch.stack(first.outputs(EXAMPLES))
    second = load(resolve(registry, "films:2"), TORCH)
    assert isinstance(second.runtime, type(first.runtime))
    with torch.no_grad():
        for parameter in second.runtime.model.parameters():  # type: ignore[union-attr]
            parameter.zero_()
    assert torch.equal(torch.stack(first.outputs(EXAMPLES)), before)


def test_a_changed_version_is_not_served(registry: Registry) -> None:
    version = resolve(registry, "films:2").folder
    state = version / "adapter" / "silotune_state.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"x")
    with pytest.raises(TrustError, match="changed"):
        load(resolve(registry, "films:2"), TORCH)


def test_what_is_loaded_is_what_was_verified(
    registry: Registry, small_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody swaps the files in the moment after they were verified: the model is still the verified one."""
    found = resolve(registry, "films:2")
    real = models.verify

    def swapped(version: Any) -> Any:
        examined = real(version)
        for path in found.folder.rglob("*.safetensors"):
            path.write_bytes(b"swapped")
        shutil.rmtree(found.folder / "sites", ignore_errors=True)
        return examined

    monkeypatch.setattr(models, "verify", swapped)
    model = load(found, TORCH)
    assert torch.allclose(torch.stack(model.outputs(EXAMPLES)), outputs_of(small_run), atol=1e-4)


def test_a_retired_version_is_not_served(registry: Registry) -> None:
    promotion.retire(registry, resolve(registry, "films:1").version, OFFICER)  # type: ignore[arg-type]
    with pytest.raises(RegistryError, match="retired"):
        load(resolve(registry, "films:1"), TORCH)


def test_an_exported_version_is_served_as_it_is(registry: Registry, small_run: Path, tmp_path: Path) -> None:
    made = export(ModelFolder.read(small_run), tmp_path / "int8", "onnx", "int8")
    version = add(registry, made.path, "films", signer=("sam", SIGNER))
    model = load(resolve(registry, version.reference), Plan())
    assert (model.version, model.engine, model.precision) == ("films:3", "onnx", "int8")
    with pytest.raises(ConfigError, match="--precision float32"):
        load(resolve(registry, version.reference), Plan(precision="float32"))
    with pytest.raises(ConfigError, match="leave --engine out"):
        load(resolve(registry, version.reference), TORCH)


def test_a_model_that_computes_no_numbers_is_refused(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "head_outputs", lambda *_: [torch.tensor([float("nan")])] * 2)
    with pytest.raises(ModelError, match="no number"):
        load(resolve(registry, "films"), TORCH)


def test_nothing_is_left_in_the_temporary_folder(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "own"))
    load(resolve(registry, "films"), Plan("onnx"))
    assert list((tmp_path / "own").iterdir()) == []


def test_without_onnx_runtime_pytorch_answers(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    assert load(resolve(registry, "films"), Plan()).engine == "torch"


def test_a_folder_that_was_changed_is_refused(small_run: Path, tmp_path: Path) -> None:
    made = export(ModelFolder.read(small_run), tmp_path / "graph", "onnx", "float32")
    graph = made.path / "model.onnx"
    graph.write_bytes(graph.read_bytes() + b" ")
    with pytest.raises(ModelError, match="not as it was written"):
        load(Resolved(made.path, None, ""), Plan())
    assert replace(TORCH, engine="onnx").engine == "onnx"


@pytest.mark.parametrize("shape", [(3,), (1,), (4, 2), ()])
def test_what_the_task_cannot_answer_with_does_not_take_over(
    shape: tuple[int, ...], registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = torch.zeros(shape)
    monkeypatch.setattr(models.Model, "outputs", lambda self, examples: [wrong for _ in examples])
    with pytest.raises(ModelError, match="its task has 2 outputs"):
        load(resolve(registry, "films"), TORCH)


def test_an_answer_for_each_text(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.Model, "outputs", lambda self, examples: [torch.zeros(2)])
    with pytest.raises(ModelError, match="to one text and to two"):
        load(resolve(registry, "films"), TORCH)
