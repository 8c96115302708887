"""One step a round: how records are spread over sites changes nothing but the noise (decision 0026)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from client.training.trainer import LocalWork, train_local_rounds
from server.aggregation import Aggregation
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import SiteRandomness
from shared.runtime.runtime import load_runtime
from shared.tensors.adapters import shapes_of

CPU = ComputeConfig(device="cpu", precision="float32")
Parts = list[list[int]]

MIXED: Parts = [list(range(30)), list(range(30, 50)), list(range(50, 60))]
SKEWED: Parts = [
    list(range(0, 60, 2)),
    [*range(1, 60, 4)],
    [*range(3, 60, 4)],
]  # the first has one label, the others the other
NOWHERE_ELSE: Parts = [list(range(60))]


def moved(job: Job, records: list[dict[str, Any]], parts: Parts) -> Tensor:
    """How far the job moves the adapter, as one vector, with these records at each site."""
    runtime, plan = load_runtime(job, CPU), PrivacyPlan.from_job(job)
    examples = runtime.encode(records)
    adapter, state = dict(runtime.initial), {}
    moments: list[dict[str, Tensor]] = [{} for _ in parts]
    for round_number in range(1, job.training.rounds + 1):
        works = [
            LocalWork(
                examples=[examples[row] for row in rows],
                declared_records=len(rows),
                randomness=SiteRandomness.injected(f"site {number}"),
                optimizer_state=moments[number],
            )
            for number, rows in enumerate(parts)
        ]
        done = train_local_rounds(runtime, works, adapter, training=job.training, plan=plan, round_number=round_number)
        moments = [result.optimizer_state for result in done]
        sizes = [len(rows) for rows in parts]
        total = Aggregation(adapter, state, shapes_of(adapter), sizes, config=job.aggregation, exact_scaling=None)
        for result, size in zip(done, sizes, strict=True):
            total.add(result.delta, size)
        adapter, state = total.result()
    return torch.cat([(value - runtime.initial[name]).flatten() for name, value in sorted(adapter.items())])


def difference(first: Tensor, second: Tensor) -> float:
    return float((first - second).norm() / second.norm())


def test_with_one_step_a_round_skew_changes_nothing(
    classification_job: Callable[..., Job], records: list[dict[str, Any]]
) -> None:
    def job(**training: int) -> Job:
        return classification_job(
            training={"optimizer": "sgd", "momentum": 0.9, "learning_rate": 0.5, "schedule": "linear", **training},
            privacy={"mechanism": "none", "sample_rate": 1.0},
        )

    one = job(rounds=4, local_steps=1)
    together = moved(one, records, NOWHERE_ELSE)
    assert float(together.norm()) > 0.1
    for parts in (MIXED, SKEWED):
        assert difference(moved(one, records, parts), together) < 1e-3
    several = job(rounds=1, local_steps=4)
    assert difference(moved(several, records, NOWHERE_ELSE), together) < 1e-3
    assert difference(moved(several, records, SKEWED), together) > 0.05
