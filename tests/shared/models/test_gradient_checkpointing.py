"""Activations that are computed once more in the backward pass: gradients are the same bits, and less is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from client.training.proof import prove_trainer
from client.training.trainer import LocalWork, train_local_rounds
from shared.models import tunable
from shared.models.batches import Example
from shared.models.families import ARCHITECTURES
from shared.models.tunable import TunableModel
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import SiteRandomness
from shared.runtime.runtime import Runtime, load_own_runtime
from tests.shared.models.test_families import CPU, TASKS, away_from_zero, gradients_of, job_of, losses_of, made

__all__ = ["made"]
RECOMPUTING = CPU.model_copy(update={"gradient_checkpointing": True})


def pair_of(folder: Path, kind: str, task: str, **sections: Any) -> tuple[Runtime, Runtime]:
    """Return the same model with and without."""
    job = job_of(folder, kind, task, lora={"last_layers": None}, **sections)
    return load_own_runtime(job, CPU), load_own_runtime(job, RECOMPUTING)


@pytest.mark.parametrize("kind", ["bert", "modernbert", "gpt2", "opt", "qwen3"])
def test_per_example_gradients_are_the_same_to_the_last_bit(kind: str, made: Callable[..., Path]) -> None:
    task = "causal_lm" if ARCHITECTURES[kind].causal else "token_classification"
    plain, recomputing = pair_of(made(kind), kind, task)
    examples = plain.encode(TASKS[task][1])[:6]
    state = away_from_zero(plain)
    found = []
    for runtime in (plain, recomputing):
        runtime.load(state)
        found.append(gradients_of(runtime, examples))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    prove_trainer(recomputing)


def second_site(runtime: Runtime) -> dict[str, Tensor]:
    """Return what the second of two sites that train side by side gets from a round."""
    job = job_of(Path(runtime.task.model.backbone), "bert", "sequence_classification")
    examples = runtime.encode(TASKS["sequence_classification"][1])
    works = [
        LocalWork(examples=examples[i::2], declared_records=8, randomness=SiteRandomness.injected(f"site {i}"))
        for i in range(2)
    ]
    plan, start = PrivacyPlan.from_job(job), away_from_zero(runtime)
    return train_local_rounds(runtime, works, start, training=job.training, plan=plan, round_number=1)[1].delta


@pytest.mark.parametrize("bits", [32, 8])
def test_rounds_of_several_sites_are_the_same(bits: int, made: Callable[..., Path]) -> None:
    """Each example meets its own site's values in the second computation, too; the noise is that of the same key."""
    plain, recomputing = pair_of(made("bert"), "bert", "sequence_classification", model={"backbone_bits": bits})
    expected, found = second_site(plain), second_site(recomputing)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def kept_bytes(runtime: Runtime, examples: list[Example]) -> int:
    """Return the bytes of what autograd keeps after a forward pass and is no parameter."""
    found: dict[int, int] = {}
    own = {tensor.untyped_storage().data_ptr() for tensor in runtime.model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage()
        if place.data_ptr() not in own:
            found[place.data_ptr()] = place.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = losses_of(runtime, examples)
        total = sum(found.values())
        losses.sum().backward()
    return total


def test_less_is_kept(made: Callable[..., Path]) -> None:
    """Of twelve layers: what enters each, instead of all that is computed in it."""
    folder = made("bert", num_hidden_layers=12)
    plain, recomputing = pair_of(folder, "bert", "sequence_classification")
    examples = plain.encode(TASKS["sequence_classification"][1])
    for runtime in (plain, recomputing):
        runtime.load(away_from_zero(plain))
    assert kept_bytes(recomputing, examples) < 0.25 * kept_bytes(plain, examples)


# --- planted faults ---


def test_fault_the_second_computation_knows_no_packing(
    made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The usual way, around a layer alone: by then nothing says which token is whose, and whose site's values it meets."""

    def run_layers(self: TunableModel, hidden: Tensor, packing: Any, start: int, stop: int) -> Tensor:
        with self._packed(packing):
            for layer in self.layers()[start:stop]:
                options = {"packing": packing, "causal": self.architecture.causal}
                hidden = tunable.checkpoint(layer, hidden, use_reentrant=False, **options)
        return hidden

    _, recomputing = pair_of(made("bert"), "bert", "sequence_classification")
    monkeypatch.setattr(TunableModel, "_run_layers", run_layers)
    with pytest.raises((RuntimeError, CheckpointError)):  # shapes that do not belong together
        second_site(recomputing)
