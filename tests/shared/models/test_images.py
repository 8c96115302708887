"""Networks for images: the same weights for whoever has the job, no statistics, a declared identity, and what a job may ask."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shared.errors import ConfigError, ModelError
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.job.model import ModelConfig
from shared.models.backbones import refuse_batch_norm
from shared.models.batches import collate
from shared.models.images import PIXEL_STEPS, ImageModel, image_network_sha256
from shared.models.tunable import RESIDUAL
from shared.runtime.runtime import Runtime, load_runtime

CPU = ComputeConfig(device="cpu", precision="float32")
TASK = {"kind": "image_classification", "labels": ["a", "b", "c"], "image_shape": [1, 8, 8], "pixel_range": [0, 16]}


def build(task_job: Callable[..., Job], shape: tuple[int, int, int] = (1, 8, 8), **sections: Any) -> Runtime:
    return load_runtime(task_job({**TASK, "image_shape": shape}, **sections), CPU)


def test_weights_follow_from_the_public_seed_alone(task_job: Callable[..., Job]) -> None:
    first = build(task_job)
    torch.manual_seed(7)
    load_runtime.__globals__["_load_runtime"].cache_clear()
    again, other = build(task_job), build(task_job, seed=1)
    assert again.model is not first.model
    assert first.initial.keys() == again.initial.keys()
    for name, value in first.initial.items():
        assert torch.equal(again.initial[name], value), name
        if value.ndim > 1:
            assert not torch.equal(other.initial[name], value), name


def test_every_weight_is_trained_and_nothing_else_is_kept(task_job: Callable[..., Job]) -> None:
    model = build(task_job).model
    assert isinstance(model, ImageModel)
    assert {*model.trainable()} == {name for name, _ in model.named_parameters()}
    assert model.head_parameters() == {"head.bias", "head.weight"}
    assert list(model.buffers()) == []
    refuse_batch_norm(model)
    assert any(isinstance(module, nn.GroupNorm) for module in model.modules())
    assert (model.lora_factors(), model.first_adapted) == ({}, 0)


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 5, 7), (2, 9, 4), (1, 28, 28), (3, 64, 48)])
def test_images_of_all_sizes(task_job: Callable[..., Job], shape: tuple[int, int, int]) -> None:
    runtime = build(task_job, shape)
    number = shape[0] * shape[1] * shape[2]
    ends = [[0.0] * number, [16.0] * number, [float(i % 17) for i in range(number)]]
    examples = runtime.encode([{"pixels": pixels, "label": "b"} for pixels in ends])
    assert [example.length for example in examples] == [number] * 3
    assert (int(examples[0].input_ids.max()), int(examples[1].input_ids.min())) == (0, PIXEL_STEPS)
    outputs = runtime.model(collate(examples))
    assert outputs.shape == (3, 3)
    assert bool(outputs.isfinite().all())
    # Large images do not make large models.
    assert sum(parameter.numel() for parameter in runtime.model.parameters()) < 8_000


def test_an_image_s_output_is_its_own(task_job: Callable[..., Job]) -> None:
    """In training mode too: no image changes what another one computes."""
    runtime = build(task_job)
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 17, (6, 64), generator=generator).tolist()
    examples = runtime.encode([{"pixels": pixels, "label": "a"} for pixels in images])
    together = runtime.model(collate(examples))
    alone = torch.cat([runtime.model(collate([example])) for example in examples])
    torch.testing.assert_close(together, alone)


def test_the_identity_is_of_these_layers(task_job: Callable[..., Job]) -> None:
    """Sites name the network by this hash: whoever changes the layers must change `identity` and the numbers here."""
    runtime = build(task_job, (3, 32, 32))
    layers = [repr(layer).replace(", bias=True)", ")") for layer in runtime.model.features]
    assert layers == [
        "Conv2d(3, 16, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)",
        "GroupNorm(4, 16, eps=1e-05, affine=True)",
        "Tanh()",
        "AvgPool2d(kernel_size=2, stride=2, padding=0)",
        "Conv2d(16, 32, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)",
        "GroupNorm(4, 32, eps=1e-05, affine=True)",
        "Tanh()",
        "AdaptiveAvgPool2d(output_size=(4, 4))",
        "Flatten(start_dim=1, end_dim=-1)",
    ]
    expected = "ece234120075ea358500d94452626c4d1a3d8443f041a7940f40dbdd481ae19e"
    assert image_network_sha256(ModelConfig(backbone="cnn:small")) == expected


def test_an_unknown_network_is_refused(task_job: Callable[..., Job]) -> None:
    with pytest.raises(ModelError, match="no network for images is called 'cnn:smal'; did you mean 'small'"):
        build(task_job, model={"backbone": "cnn:smal"})


def test_residuals_of_an_adapter_are_refused(task_job: Callable[..., Job]) -> None:
    runtime = build(task_job)
    with pytest.raises(ModelError, match="adapts no layer"):
        runtime.load(runtime.initial | {"layer.query" + RESIDUAL: torch.zeros(2, 2)})
    runtime.load(runtime.initial)
    assert runtime.initial_global(exact=True).keys() == runtime.initial.keys()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"backbone": "embedded:all-minilm-l6-v2"}}, "belong together"),
        ({"model": {"max_length": 32}}, r"model\.max_length is for language models"),
        ({"model": {"revision": "0" * 40}}, r"model\.revision is for language models"),
        ({"lora": {"rank": 4, "train": "both"}}, r"lora\.rank is for language models.*Remove lora\.rank, lora\.train"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    task_job: Callable[..., Job], sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        task_job(TASK, **sections)


def test_a_network_for_images_reads_no_texts(classification_job: Callable[..., Job]) -> None:
    with pytest.raises(ConfigError, match="belong together"):
        classification_job(model={"backbone": "cnn:small"})


def test_jobs_of_older_versions_keep_their_hash(classification_job: Callable[..., Job]) -> None:
    text = classification_job(model={"backbone": str(Path("bert"))}).canonical_json()
    assert "image_shape" not in text
    assert "pixel_range" not in text


def test_a_job_survives_its_own_json(task_job: Callable[..., Job]) -> None:
    job = task_job(TASK)
    again = Job.model_validate_json(job.canonical_json())
    assert (again, again.sha256) == (job, job.sha256)
