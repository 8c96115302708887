"""The production trainer on canaries whose gradients are known: what the audits of tiers 1 and 2 run.

The model is linear, so a record's gradient is the record itself; everything else is `client.trainer`. No file of a site is
read, no ledger is charged: the records are canaries only.

Guarantee (tests: tests/client/test_faults.py): the noisy sums that are returned are those that the optimiser stepped
with, and nothing else moved the adapter; otherwise `PrivacyError` is raised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from client.trainer import LocalWork, train_local_rounds
from shared.batches import Batch, Example
from shared.config import ComputeConfig, TrainingConfig
from shared.errors import PrivacyError
from shared.frozen_cache import FrozenCache
from shared.models import TrainedModel
from shared.privacy.persons import Persons
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import SiteRandomness
from shared.runtime import Runtime
from shared.tasks import Task

LEARNING_RATE = 0.5
DECLARED_RECORDS = 64
_ROUNDING = 1e-4  # relative to the distance that the optimiser travelled


class CanaryModel(TrainedModel):
    """Loss of a record = <adapter and head weights, record>, so its gradient is the record.

    Attributes:
        records: float32 [records, dimension].
    """

    def __init__(self, dimension: int) -> None:
        super().__init__()
        half = dimension // 2
        self.adapter = nn.Linear(half, 1, bias=False)
        self.head = nn.Linear(dimension - half, 1, bias=False)
        self.records = torch.zeros(0, dimension)

    def forward(self, batch: Batch) -> Tensor:
        """Return one value per record [B]; `input_ids` holds row numbers."""
        rows = self.records[batch.input_ids[:, 0]]
        half = self.adapter.in_features
        return cast(Tensor, self.adapter(rows[:, :half])[:, 0] + self.head(rows[:, half:])[:, 0])


class CanaryTask:
    """The model's output is the loss."""

    def per_example_loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return `outputs`."""
        return outputs


def canary_runtime(dimension: int, micro_batch: int) -> Runtime:
    """Return a runtime that trains `dimension` weights on micro-batches of up to `micro_batch` records."""
    model = CanaryModel(dimension)
    return Runtime(
        model=model,
        task=cast(Task, CanaryTask()),
        tokenizer=None,
        max_length=1,
        compute=ComputeConfig(micro_batch_tokens=micro_batch),
        autocast_dtype=None,
        initial={name: torch.zeros_like(p) for name, p in model.trainable().items()},
        cache=FrozenCache(),
    )


class TrainerRelease:
    """A `shared.privacy.audit.mechanism.Release` through `train_local_rounds`.

    The optimiser is plain SGD, whatever the job's: it comes after the noise, and with it every step can be checked.

    Attributes:
        training: what one call executes; `local_steps` noisy steps.
        companions: sites that are trained side by side with the audited one, as in a simulation.
    """

    def __init__(
        self,
        new_randomness: Callable[[], SiteRandomness] = SiteRandomness.from_os,
        *,
        dimension: int,
        steps: int,
        micro_batch: int = 24,
        companions: int = 0,
    ) -> None:
        self.companions = companions
        self.runtime = canary_runtime(dimension, micro_batch)
        self.new_randomness = new_randomness
        self.training = TrainingConfig(
            rounds=1, local_steps=steps, optimizer="sgd", momentum=0.0, learning_rate=LEARNING_RATE
        )

    def __call__(self, plan: PrivacyPlan, gradients: NDArray[np.float64]) -> NDArray[np.float64]:
        """Train one round on units of privacy with these gradients [units, dimension]; return the noisy sums [steps, dimension].

        Raises:
            PrivacyError: if the adapter moved by anything else than these sums.
        """
        copies = 1 if plan.records_per_person is None else plan.records_per_person + 1
        owners = np.tile(np.arange(len(gradients)), copies)
        cast(Any, self.runtime.model).records = torch.from_numpy(gradients[owners]).float()
        examples = [Example(torch.tensor([row])) for row in range(len(owners))]
        works = [
            LocalWork(
                # Companions hold the same records, some of them, so that whatever mixes two sites changes the sum.
                examples=examples[: len(examples) // (2 + place)] if place < self.companions else examples,
                declared_records=DECLARED_RECORDS,
                randomness=self.new_randomness(),
                persons=None if plan.records_per_person is None else _persons(owners, place, self.companions),
            )
            for place in range(self.companions + 1)
        ]
        seen: list[NDArray[np.float64]] = []
        handle = register_optimizer_step_pre_hook(lambda optimizer, *_: seen.append(_flat_gradient(optimizer)))
        try:
            result = train_local_rounds(
                self.runtime, works, self.runtime.initial, training=self.training, plan=plan, round_number=1
            )[-1]
        finally:
            handle.remove()
        used = np.stack(seen)
        delta = torch.cat([result.delta[name].flatten() for name in ("adapter.weight", "head.weight")]).numpy()
        _check_moved_by(used, delta)
        return used * plan.expected_batch_size(DECLARED_RECORDS)


def _persons(owners: NDArray[np.intp], place: int, companions: int) -> Persons:
    """Return whose records a site has; companions have the first of them only."""
    return Persons(owners[: len(owners) // (2 + place)] if place < companions else owners)


def _flat_gradient(optimizer: torch.optim.Optimizer) -> NDArray[np.float64]:
    """Return what the last site's values are moved by."""
    parts = [p.grad[-1].flatten() for group in optimizer.param_groups for p in group["params"]]
    return cast(NDArray[np.float64], torch.cat(parts).double().numpy())


def _check_moved_by(used: NDArray[np.float64], delta: NDArray[np.float32]) -> None:
    with np.errstate(invalid="ignore"):  # a faulty mechanism may hand out NaN; judging it is the audit's business
        tolerance = _ROUNDING * LEARNING_RATE * np.abs(used).sum(axis=0).max() + 1e-6
        if np.allclose(delta, -LEARNING_RATE * used.sum(axis=0), rtol=0, atol=tolerance, equal_nan=True):
            return
        if not np.isfinite(used).all():
            return
    raise PrivacyError(
        "the adapter moved by something else than the noisy sums that the optimiser received; what leaves is not accounted."
    )
