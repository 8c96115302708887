"""The coordinator's optimiser step is the one that a site takes on the same noised gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from client.training.trainer import LocalWork, train_local_rounds
from server.aggregation.gradient import gradient_step
from shared.job.compute import ComputeConfig
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import SiteRandomness
from shared.runtime.runtime import load_runtime

Records = list[dict[str, Any]]
SETTINGS: list[dict[str, Any]] = [
    {"optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.1, "schedule": "linear"},
    {"optimizer": "sgd", "learning_rate": 0.1, "momentum": 0.9, "head_learning_rate_factor": 3.0, "warmup_steps": 2},
]


@pytest.mark.parametrize("training", SETTINGS, ids=["adamw", "sgd"])
@pytest.mark.parametrize("train", ["b", "both", "none"])
def test_three_steps_equal_those_of_a_site_to_the_last_bit(
    classification_job: Callable[..., Any],
    records: Records,
    monkeypatch: pytest.MonkeyPatch,
    training: dict[str, Any],
    train: str,
) -> None:
    job = classification_job(lora={"train": train}, training={"rounds": 3, "local_steps": 1, **training})
    runtime = load_runtime(job, ComputeConfig(device="cpu", precision="float32"))
    examples, declared, plan = runtime.encode(records), 32, PrivacyPlan.from_job(job)
    seen: list[list[Tensor]] = []
    add_noise = PrivacyPlan.add_noise
    monkeypatch.setattr(PrivacyPlan, "add_noise", lambda *args: seen.append(add_noise(*args)) or seen[-1])

    at_site = {name: value.clone() for name, value in runtime.initial.items()}
    here, moments, state = dict(at_site), {}, {}
    for number in (1, 2, 3):
        result = train_local_rounds(
            runtime,
            [
                LocalWork(
                    examples=examples,
                    declared_records=declared,
                    randomness=SiteRandomness.injected(f"gradient/{number}"),
                    optimizer_state=moments,
                )
            ],
            at_site,
            training=job.training,
            plan=plan,
            round_number=number,
        )[0]
        moments = result.optimizer_state
        at_site = {name: value.detach().clone() for name, value in runtime.model.trainable().items()}
        noisy = {
            name: value / plan.expected_batch_size(declared) for name, value in zip(at_site, seen[-1], strict=True)
        }
        here, state = gradient_step(here, noisy, state, training=job.training, step=number - 1)
        for name, value in at_site.items():
            assert torch.equal(here[name], value), (number, name)
    assert moments.keys() == state.keys()
    # Without its moments, or at another place of the schedule, it would be another step.
    assert any(
        not torch.equal(v, here[n]) for n, v in gradient_step(here, noisy, {}, training=job.training, step=0)[0].items()
    )
