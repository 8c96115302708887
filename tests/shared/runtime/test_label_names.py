"""A head that starts from the names of its labels, or takes off what they have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from client.training.adapter_bounds import check_bounds
from shared.errors import ConfigError
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.models.batches import Example
from shared.models.heads import PooledClassifier
from shared.models.tunable import TunableModel
from shared.privacy.plan import PrivacyPlan
from shared.runtime import label_names
from shared.runtime.export.peft import HEAD_FILE, save_peft_folder
from shared.runtime.label_names import LENGTH
from shared.runtime.runtime import Runtime, load_runtime

CPU = ComputeConfig(device="cpu", precision="float32")
LABELS = ["lost_card", "exchange-rate", "change_pin"]
OF_LABEL = {
    "lost_card": ["I think I lost my card, what now?", "My card is lost"],
    "exchange-rate": ["What rate do you use to exchange my money?", "Are your exchange rates good"],
    "change_pin": ["How can I set a new PIN?", "I want to change my PIN"],
}


def named(classification_job: Callable[..., Job], **sections: Any) -> Job:
    task = {"labels": LABELS, "head_start": "label-names"}
    return classification_job(task=task, model={"backbone": "embedded:all-minilm-l6-v2"}, **sections)


def weights(runtime: Runtime) -> torch.Tensor:
    return runtime.initial["head.linear.weight"]


def test_names_know_something_before_training(classification_job: Callable[..., Job]) -> None:
    runtime = load_runtime(named(classification_job), CPU)
    runtime.load(runtime.initial)
    records = [{"text": text, "label": label} for label, texts in OF_LABEL.items() for text in texts]
    examples = runtime.encode(records)
    with torch.no_grad():
        for _, batch in runtime.grouped_batches(examples, [[row] for row in range(len(examples))]):
            assert runtime.model(batch).argmax(dim=1).tolist() == batch.targets.tolist()


def test_rows_have_one_length_and_the_names_mean_is_taken_out(classification_job: Callable[..., Job]) -> None:
    runtime = load_runtime(named(classification_job), CPU)
    assert weights(runtime).norm(dim=1).tolist() == pytest.approx([LENGTH] * 3, rel=1e-5)
    assert not runtime.initial["head.linear.bias"].any()
    # Without their mean, of three directions none is near another one.
    products = weights(runtime) @ weights(runtime).T
    assert float((products - products.diag().diag()).max()) < 0.2


def test_every_site_finds_what_the_coordinator_sent(
    classification_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = named(classification_job)
    sent = load_runtime(job, CPU).initial
    monkeypatch.setattr(label_names, "_NAMES_AT_ONCE", 1)
    with_other_numbers = ComputeConfig(device="cpu", precision="bfloat16")
    own = load_runtime(job.model_copy(update={"seed": job.seed}), with_other_numbers).initial
    assert own is not sent
    check_bounds(job, PrivacyPlan.from_job(job), own, sent, rounds_before=0)


def test_names_that_look_alike_give_no_direction(classification_job: Callable[..., Job], tiny_bert: Any) -> None:
    task = {"labels": ["♣", "♥"], "head_start": "label-names"}  # both unknown to the tokenizer
    runtime = load_runtime(classification_job(task=task, model={"backbone": str(tiny_bert)}), CPU)
    assert float(weights(runtime).norm()) < 1e-3


def centred(classification_job: Callable[..., Job], **sections: Any) -> Job:
    task = {"labels": LABELS, "head_centre": "label-names"}
    return classification_job(task=task, model={"backbone": "embedded:all-minilm-l6-v2"}, **sections)


def examples_of(runtime: Runtime) -> list[Example]:
    return runtime.encode([{"text": text, "label": label} for label, texts in OF_LABEL.items() for text in texts])


def gradient(runtime: Runtime, example: Example) -> torch.Tensor:
    """Return the gradient of one example's loss by the head's weights, flat."""
    runtime.model.zero_grad()
    for _, batch in runtime.grouped_batches([example], [[0]]):
        runtime.task.per_example_loss(runtime.model(batch), batch).sum().backward()
    grad = runtime.model.trainable()["head.linear.weight"].grad
    assert grad is not None
    return grad.flatten()


def test_what_all_names_have_in_common_takes_less_of_each_gradient(classification_job: Callable[..., Job]) -> None:
    """Before training, with the same head: texts of one label point the same way, and those of others less so."""
    alike = []
    for job in (
        classification_job(task={"labels": LABELS}, model=centred(classification_job).model.model_dump()),
        centred(classification_job),
    ):
        runtime = load_runtime(job, CPU)
        runtime.load(
            {
                name: torch.zeros_like(value) if name.startswith("head.") else value
                for name, value in runtime.initial.items()
            }
        )
        first, second = (
            runtime.encode([{"text": text, "label": "lost_card"} for text in texts])
            for texts in (OF_LABEL["lost_card"][:1], OF_LABEL["change_pin"][:1])
        )
        alike.append(float(torch.cosine_similarity(gradient(runtime, first[0]), gradient(runtime, second[0]), dim=0)))
    # Two texts of different fields under one label: all that their gradients share is what every text has in common.
    assert alike[1] < alike[0] - 0.1


@pytest.mark.parametrize("train", ["b", "none"])
def test_the_centre_is_taken_off_what_is_cached_as_well(classification_job: Callable[..., Job], train: str) -> None:
    job = centred(classification_job, lora={"train": train, "last_layers": 1})
    runtime = load_runtime(job, CPU)
    runtime.load(runtime.initial)
    examples = examples_of(runtime)
    fresh = torch.cat([outputs for outputs, _ in runtime.outputs(examples)])
    runtime.warm_cache(examples)
    assert torch.equal(fresh, torch.cat([outputs for outputs, _ in runtime.outputs(examples)]))


def test_a_cache_is_shared_with_jobs_of_another_centre(classification_job: Callable[..., Job]) -> None:
    plain = classification_job(
        task={"labels": LABELS}, model=centred(classification_job).model.model_dump(), lora={"train": "none"}
    )
    with_centre = centred(classification_job, lora={"train": "none"})
    runtimes = [load_runtime(job, CPU) for job in (plain, with_centre)]
    assert runtimes[0].cache is runtimes[1].cache
    examples = examples_of(runtimes[0])
    runtimes[0].warm_cache(examples)
    outputs = []
    for runtime in runtimes:
        runtime.load(runtimes[0].initial)
        outputs.append(torch.cat([found for found, _ in runtime.outputs(examples)]))
    head = runtimes[1].model.head
    assert isinstance(head, PooledClassifier)
    weight, bias = head.folded()
    assert torch.allclose(outputs[1], outputs[0] - runtimes[0].initial["head.linear.bias"] + bias, atol=1e-5)
    assert weight.shape == (3, 384)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)


def test_an_exported_head_needs_no_centre(classification_job: Callable[..., Job], tmp_path: Path) -> None:
    """By the lines of the folder's README: pool, normalise, multiply, add."""
    job = centred(classification_job)
    runtime = load_runtime(job, CPU)
    save_peft_folder(tmp_path, runtime, job, runtime.initial_global(job.averages_products))
    examples = examples_of(runtime)
    head, model = load_file(tmp_path / HEAD_FILE), runtime.model
    assert isinstance(model, TunableModel)
    ours = torch.cat([found for found, _ in runtime.outputs(examples)])
    pooled = [model.pooled(b.input_ids, b.attention_mask) for b in runtime.batches(examples, range(len(examples)))]
    with torch.no_grad():
        theirs = torch.cat(pooled) @ head["linear.weight"].T + head["linear.bias"]
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.equal(head["linear.bias"], runtime.initial["head.linear.bias"])


def test_only_where_it_is_asked_for(classification_job: Callable[..., Job], task_job: Callable[..., Job]) -> None:
    job = classification_job()
    assert not {"head_start", "head_centre"} & job.model_dump(mode="json")["task"].keys()
    assert float(weights(load_runtime(job, CPU)).norm(dim=1).max()) < 0.3
    for key in ("head_start", "head_centre"):
        with pytest.raises(ConfigError, match=f"{key} is for sequence_classification"):
            task_job({"kind": "causal_lm", key: "label-names"})
    with pytest.raises(ConfigError, match="head_offset is for regression"):
        task_job({"kind": "causal_lm", "head_offset": 0.25})
