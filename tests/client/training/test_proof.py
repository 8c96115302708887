"""The proof before training: passes for what is built, and fails for every sabotage with its own message."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import client.training.proof as proof_module
from client.training.proof import prove_trainer
from client.training.trainer import per_example_hooks
from shared.errors import PrivacyError
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.models.batches import Batch
from shared.privacy.mechanism import ClippedSum
from shared.runtime.runtime import Runtime, load_runtime
from shared.tasks.causal_lm import CausalLanguageModelling
from shared.tasks.sequence_classification import SequenceClassification
from shared.tasks.tokens import token_losses

CPU = ComputeConfig(device="cpu", precision="float32")
COMBINATIONS = [
    *((task, train) for task in ("classification", "language") for train in ("b", "both")),
    ("classification", "none"),
]


@pytest.fixture
def job_of(classification_job: Callable[..., Any], language_job: Callable[..., Any]) -> Callable[..., Job]:
    def build(task: str = "classification", train: str = "b") -> Job:
        return (classification_job if task == "classification" else language_job)(lora={"train": train})

    return build


@pytest.fixture
def runtime(job_of: Callable[..., Job]) -> Runtime:
    return load_runtime(job_of(), CPU)


def values(runtime: Runtime) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in runtime.model.named_parameters()}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("task", "train"), COMBINATIONS)
def test_what_is_built_passes_and_is_left_as_it_was(
    job_of: Callable[..., Job], task: str, train: str, precision: str
) -> None:
    runtime = load_runtime(job_of(task, train), CPU.model_copy(update={"precision": precision}))
    before = values(runtime)
    prove_trainer(runtime)
    prove_trainer(runtime)
    after = values(runtime)
    assert all(torch.equal(before[name], after[name]) for name in before)


def hooks_with(monkeypatch: pytest.MonkeyPatch, sabotage: Callable[[Any], None]) -> None:
    """Do `sabotage` to the model once its hooks are attached."""

    @contextmanager
    def sabotaged(model: Any) -> Iterator[None]:
        with per_example_hooks(model):
            sabotage(model)
            yield

    monkeypatch.setattr(proof_module, "per_example_hooks", sabotaged)


def test_a_parameter_replaced_after_the_hooks_is_refused(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a move to another device may do: the optimiser's parameter is no longer the one that is used."""
    head = runtime.model.head.linear
    original = head.weight

    def detach(model: Any) -> None:
        del head.weight
        head.weight = original.detach().clone()  # a plain tensor: computes, but is not trained

    hooks_with(monkeypatch, detach)
    try:
        with pytest.raises(PrivacyError, match="would not be clipped"):
            prove_trainer(runtime)
    finally:
        del head.weight
        head.weight = original
    monkeypatch.undo()
    prove_trainer(runtime)


def test_a_parameter_frozen_after_the_hooks_is_refused(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = runtime.model.head.linear.weight
    trainable = runtime.model.trainable()
    monkeypatch.setattr(type(runtime.model), "trainable", lambda self: dict(trainable))
    hooks_with(monkeypatch, lambda model: weight.requires_grad_(False))
    try:
        with pytest.raises(PrivacyError, match="would not be clipped"):
            prove_trainer(runtime)
    finally:
        weight.requires_grad_(True)


def test_a_parameter_with_a_vanishing_gradient_is_refused(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """A detached path: a gradient exists but is zero for everyone."""
    gradients = proof_module.per_example_gradients

    def without_first(parameters: Any, size: int) -> list[Tensor]:
        first, *others = gradients(parameters, size)
        return [torch.zeros_like(first), *others]

    monkeypatch.setattr(proof_module, "per_example_gradients", without_first)
    first = next(iter(runtime.model.trainable()))
    with pytest.raises(PrivacyError, match=f"proof 1 failed: {first} gets no gradient"):
        prove_trainer(runtime)


def test_a_detached_adapter_is_refused(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = type(runtime.model)._run_layers
    monkeypatch.setattr(type(runtime.model), "_run_layers", lambda self, *arguments: forward(self, *arguments).detach())
    with pytest.raises(PrivacyError, match=r"would not be clipped|proof 1 failed"):
        prove_trainer(runtime)


def test_a_frozen_weight_that_changes_is_refused(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = runtime.model.layers()[0].output.dense.weight
    original = frozen.detach().clone()

    def drift(model: Any) -> None:
        with torch.no_grad():
            frozen.add_(1e-6)

    hooks_with(monkeypatch, drift)
    try:
        with pytest.raises(PrivacyError, match="proof 4 failed: a frozen weight changed"):
            prove_trainer(runtime)
    finally:
        with torch.no_grad():
            frozen.copy_(original)


@pytest.mark.parametrize("factor", [3.0, 0.0])
def test_a_head_outside_the_clip_vector_is_refused(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    add = ClippedSum.add
    head = [name.startswith("head.") for name in runtime.model.trainable()]

    def scaled(self: ClippedSum, gradients: Sequence[Tensor]) -> None:
        add(self, gradients)
        for total, is_head in zip(self._sums, head, strict=True):
            total *= factor if is_head else 1.0

    monkeypatch.setattr(ClippedSum, "add", scaled)
    with pytest.raises(PrivacyError, match="proof 2 failed"):
        prove_trainer(runtime)


def test_a_loss_divided_by_the_tokens_of_the_batch_is_refused(
    job_of: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    def coupled(self: CausalLanguageModelling, outputs: Tensor, batch: Batch) -> Tensor:
        nll, real = token_losses(*self._shifted(outputs, batch))
        return nll.sum(dim=1) / real.sum()

    monkeypatch.setattr(CausalLanguageModelling, "per_example_loss", coupled)
    with pytest.raises(PrivacyError, match="proof 3 failed"):
        prove_trainer(load_runtime(job_of("language"), CPU))


def test_a_coupled_loss_with_a_tiny_gradient_is_refused(
    job_of: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Coupling may not hide below an absolute tolerance, nor in reduced precision."""

    def coupled(self: CausalLanguageModelling, outputs: Tensor, batch: Batch) -> Tensor:
        nll, real = token_losses(*self._shifted(outputs, batch))
        return 0.02 * nll.sum(dim=1) / real.sum()

    monkeypatch.setattr(CausalLanguageModelling, "per_example_loss", coupled)
    for precision in ("float32", "bfloat16"):
        with pytest.raises(PrivacyError, match="proof 3 failed"):
            prove_trainer(load_runtime(job_of("language"), CPU.model_copy(update={"precision": precision})))


@pytest.mark.parametrize("kind", ["mean over the batch", "class weights of the batch", "contrast with a neighbour"])
def test_a_loss_that_couples_the_batch_is_refused(runtime: Runtime, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    loss = SequenceClassification.per_example_loss

    def coupled(self: SequenceClassification, outputs: Tensor, batch: Batch) -> Tensor:
        losses = loss(self, outputs, batch)
        if kind == "mean over the batch":
            return losses / len(losses)
        if kind == "class weights of the batch":
            return losses / torch.bincount(batch.targets, minlength=2)[batch.targets]
        return losses + 0.1 * (outputs - outputs.roll(1, dims=0)).square().sum(dim=1)

    monkeypatch.setattr(SequenceClassification, "per_example_loss", coupled)
    with pytest.raises(PrivacyError, match="proof 3 failed"):
        prove_trainer(runtime)


def test_a_step_that_moves_nothing_is_refused(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    check = proof_module._check_one_step
    monkeypatch.setattr(
        proof_module, "_check_one_step", lambda r, gradients, frozen: check(r, [g * 0 for g in gradients], frozen)
    )
    with pytest.raises(PrivacyError, match="proof 4 failed: one noiseless step left"):
        prove_trainer(runtime)
