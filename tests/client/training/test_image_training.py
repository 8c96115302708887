"""Networks for images under the private trainer: exact per-example gradients, sites side by side, faults that must be found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import client.training.per_example as per_example_module
from client.training.per_example import PerExampleHooks
from client.training.proof import prove_trainer
from client.training.trainer import LocalRound, LocalWork, per_example_hooks, train_local_rounds
from shared.errors import PrivacyError
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.models.batches import Example, collate
from shared.models.images import ImageModel
from shared.privacy.mechanism import per_example_gradients
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import SiteRandomness
from shared.runtime.runtime import Runtime, _load_runtime, load_runtime

CPU = ComputeConfig(device="cpu", precision="float32", micro_batch_tokens=60)  # 15 images
TASK = {"kind": "image_classification", "labels": ["a", "b", "c"], "image_shape": [1, 8, 8], "pixel_range": [0, 16]}
SIZES = (11, 0, 1, 30)


@pytest.fixture
def job(task_job: Callable[..., Job]) -> Job:
    return task_job(TASK, training={"local_steps": 3, "optimizer": "sgd", "learning_rate": 0.5})


@pytest.fixture
def runtime(job: Job) -> Runtime:
    return load_runtime(job, CPU)


def images(runtime: Runtime, count: int) -> list[Example]:
    pixels = torch.randint(0, 17, (count, 64), generator=torch.Generator().manual_seed(5)).tolist()
    return runtime.encode([{"pixels": row, "label": "abc"[i % 3]} for i, row in enumerate(pixels)])


CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1, "bias": False},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    {"kernel_size": 1, "stride": 3},
    {"kernel_size": 3, "groups": 2},  # left to Opacus
    {"kernel_size": (2, 3), "padding": "same"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
]


@pytest.mark.parametrize("norm", [(1, 6), (3, 6), None], ids=str)
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_gradients_of_convolutions_equal_those_of_a_loop(options: dict[str, Any], norm: tuple[int, int] | None) -> None:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(4, 6, **options),
        *([nn.GroupNorm(*norm, eps=0.1)] if norm else []),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(2),
    ]
    model = nn.Sequential(nn.Conv2d(2, 4, 3), *layers, nn.Flatten(), nn.Linear(24, 3))
    for layer in model:
        if isinstance(layer, nn.GroupNorm):  # it begins with factors of 1, which would hide a fault
            nn.init.uniform_(layer.weight, 0.5, 2.0)
            nn.init.normal_(layer.bias)
    inputs, targets = torch.randn(5, 2, 9, 8), torch.tensor([0, 1, 2, 0, 1])
    plain = model(inputs)
    with per_example_hooks(model):
        outputs = model(inputs)
        torch.testing.assert_close(outputs, plain)
        nn.functional.cross_entropy(outputs, targets, reduction="sum").backward()
        found = per_example_gradients(list(model.parameters()), 5)
    for row in range(5):
        loss = nn.functional.cross_entropy(model(inputs[row : row + 1]), targets[row : row + 1])
        for gradient, alone in zip(found, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            torch.testing.assert_close(gradient[row], alone, rtol=1e-4, atol=1e-6)


def test_which_layers_are_left_to_opacus() -> None:
    known = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Linear(2, 2))
    stacks = {parameter: parameter.detach().unsqueeze(0) for parameter in known.parameters()}
    PerExampleHooks(known, stacks).remove_hooks()
    for layer in (nn.Conv2d(2, 4, 3, groups=2), nn.LayerNorm(4)):
        stacks = {parameter: parameter.detach().unsqueeze(0) for parameter in layer.parameters()}
        with pytest.raises(ValueError, match="several sites"):
            PerExampleHooks(nn.Sequential(layer), stacks)
    without = nn.GroupNorm(2, 4)
    assert per_example_module._is_ours(without)
    without.bias = None
    assert not per_example_module._is_ours(without)


def assert_same_round(found: LocalRound, expected: LocalRound) -> None:
    assert found.delta.keys() == expected.delta.keys()
    for name, value in expected.delta.items():
        assert float(value.abs().max()) > 0
        assert float((found.delta[name] - value).norm()) < 2e-4 * float(value.norm()), name
    assert found.observations.num_examples == expected.observations.num_examples
    assert found.observations.num_clipped == expected.observations.num_clipped


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_site_trained_with_others_is_trained_as_if_alone(
    task_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """Their values differ after the first step, so a convolution that met another site's would be seen."""
    job = task_job(
        TASK,
        training={"local_steps": 4, "optimizer": optimizer, "learning_rate": 0.5 if optimizer == "sgd" else 0.05},
        privacy={"sample_rate": 0.5, "max_grad_norm": 100.0, "noise_multiplier": 0.2},
    )
    runtime, plan = load_runtime(job, CPU), PrivacyPlan.from_job(job)
    # Without noise, and with nothing clipped, a difference is one of gradients. With SGD the noise is left on.
    if optimizer == "adamw":
        monkeypatch.setattr(PrivacyPlan, "add_noise", lambda plan, sums, stream: sums)
    examples, works, begin = images(runtime, sum(SIZES)), [], 0
    for number, size in enumerate(SIZES):
        works.append(
            LocalWork(
                examples=examples[begin : begin + size],
                declared_records=16,
                randomness=SiteRandomness.injected(f"site {number}"),
            )
        )
        begin += size
    keys = {"training": job.training, "plan": plan, "round_number": 1}
    together = train_local_rounds(runtime, works, runtime.initial, **keys)
    for number, (found, work) in enumerate(zip(together, works, strict=True)):
        if work.examples or optimizer == "sgd":
            # A source gives a stream once; the site alone is to meet the same coins and noise again.
            alone = replace(work, randomness=SiteRandomness.injected(f"site {number}"))
            assert_same_round(found, train_local_rounds(runtime, [alone], runtime.initial, **keys)[0])
    assert not torch.equal(together[0].delta["features.0.weight"], together[3].delta["features.0.weight"])


def test_the_noise_reaches_every_weight(runtime: Runtime, job: Job) -> None:
    """A site without records moves by its noise alone: convolutions, normalisations and head, all of them."""
    result = train_local_rounds(
        runtime,
        [LocalWork(examples=[], declared_records=16, randomness=SiteRandomness.injected("noise"))],
        runtime.initial,
        training=job.training,
        plan=PrivacyPlan.from_job(job),
        round_number=1,
    )[0]
    assert result.delta.keys() == runtime.initial.keys()
    assert all(bool((value != 0).all()) for value in result.delta.values())


def planted(job: Job, layer: nn.Module) -> Runtime:
    """A runtime of its own, with `layer` in the place of the first normalisation."""
    _load_runtime.cache_clear()
    runtime = load_runtime(job, CPU)
    _load_runtime.cache_clear()
    assert isinstance(runtime.model, ImageModel)
    runtime.model.features[1] = layer
    runtime.model.train_mode()
    runtime.initial = {name: value.detach().clone() for name, value in runtime.model.trainable().items()}
    return runtime


def test_a_layer_that_mixes_images_fails_the_proof(job: Job) -> None:
    prove_trainer(planted(job, nn.GroupNorm(4, 16)))
    faulty = planted(job, nn.Sequential(nn.GroupNorm(4, 16), _Mixing()))
    with pytest.raises(PrivacyError, match=r"proof 3 failed: .* depends on the others"):
        prove_trainer(faulty)


class _Mixing(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs - inputs.mean(dim=0, keepdim=True) / 2


def test_batch_norm_is_refused(job: Job) -> None:
    from opacus.validators.errors import UnsupportedModuleError

    with pytest.raises((PrivacyError, UnsupportedModuleError, NotImplementedError)):
        prove_trainer(planted(job, nn.BatchNorm2d(16)))


@pytest.mark.parametrize("fault", ["scale", "product"])
def test_a_sampler_that_shares_gradients_fails_the_proof(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Planted: an example's gradient holds half of its neighbour's."""
    name = {"scale": "_keep_scale", "product": "_keep"}[fault]
    real = getattr(per_example_module, name)

    def shared(module: nn.Module, inputs: Tensor, gradient: Tensor, *others: object) -> None:
        real(module, inputs, gradient + 0.5 * gradient.roll(1, dims=0), *others)

    prove_trainer(runtime)
    monkeypatch.setattr(per_example_module, name, shared)
    with pytest.raises(PrivacyError, match="proof 3 failed"):
        prove_trainer(runtime)


def test_a_weight_that_is_not_trained_fails_the_proof(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(module: nn.GroupNorm, inputs: Tensor, gradient: Tensor) -> None:
        per_example_module._add(module.weight, torch.zeros(len(inputs), *module.weight.shape))
        per_example_module._add(module.bias, gradient.flatten(2).sum(dim=2))

    monkeypatch.setattr(per_example_module, "_keep_scale", lost)
    with pytest.raises(PrivacyError, match=r"proof 1 failed: features\.1\.weight gets no gradient"):
        prove_trainer(runtime)


def test_the_model_is_as_before_after_training(runtime: Runtime) -> None:
    examples = images(runtime, 4)
    with per_example_hooks(runtime.model):
        runtime.task.per_example_loss(runtime.model(collate(examples)), collate(examples)).sum().backward()
    for module in runtime.model.modules():
        assert "forward" not in vars(module)
    assert not any(hasattr(parameter, "grad_sample") for parameter in runtime.model.parameters())
