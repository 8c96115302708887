"""A job at the upper end of everything that it may ask for: what is charged is also answered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client.site.site import Site
from shared.job.job import Job
from shared.limits import MAX_GRAD_NORM, MAX_LEARNING_RATE, MAX_LORA_ALPHA
from shared.runtime.runtime import load_runtime
from shared.tensors.adapters import shapes_of
from shared.wire.messages import Refusal, TrainReply, TrainRequest
from shared.wire.updates import decode_update
from tests.client.conftest import COMPUTE


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("train", ["b", "both", "none"])
def test_the_largest_numbers_of_a_job_are_charged_and_answered(
    site_home: Callable[..., Path],
    private_job: Callable[..., Job],
    request_for: Callable[..., TrainRequest],
    optimizer: str,
    train: str,
) -> None:
    training: dict[str, Any] = {
        "rounds": 2,
        "local_steps": 6,
        "optimizer": optimizer,
        "learning_rate": MAX_LEARNING_RATE,
        "head_learning_rate_factor": MAX_LEARNING_RATE,
    }
    lora = {"alpha": MAX_LORA_ALPHA, "rank": 1, "train": train}
    job = private_job(training=training, lora=lora, privacy={"max_grad_norm": MAX_GRAD_NORM})
    site = Site(site_home())
    reply = site.answer(request_for(job, 1))
    assert isinstance(reply, TrainReply)
    # Refuses what is no finite number.
    shapes = shapes_of(load_runtime(job, COMPUTE).initial)
    decode_update(reply.update, shapes, "float32")
    # The next adapter, which such a run would lead to, is refused before anything is charged.
    spent = site.ledger().spent_epsilon()
    refused = site.answer(request_for(job, 2, shift=1e6))
    assert isinstance(refused, Refusal)
    assert (refused.code, site.ledger().spent_epsilon()) == ("AdapterError", spent)
