"""A head that starts from the names of its labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from client.training.adapter_bounds import check_bounds
from shared.errors import ConfigError
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.privacy.plan import PrivacyPlan
from shared.runtime import label_names
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


def test_only_where_it_is_asked_for(classification_job: Callable[..., Job], task_job: Callable[..., Job]) -> None:
    job = classification_job()
    assert "head_start" not in job.model_dump(mode="json")["task"]
    assert float(weights(load_runtime(job, CPU)).norm(dim=1).max()) < 0.3
    with pytest.raises(ConfigError, match="head_start is for sequence_classification"):
        task_job({"kind": "causal_lm", "head_start": "label-names"})
