"""The production trainer on canaries whose gradients are known: what the audits of tiers 1 and 2 run.

The model is linear, so a record's gradient is the record itself; everything else is `client.training.trainer`. No file of a
site is read, no ledger is charged: the records are canaries only.

Guarantee (tests: tests/client/training/test_faults.py): the noisy sums that are returned are those that the optimiser stepped
with, and nothing else moved the adapter or entered the optimiser's moments, whichever the optimiser is; otherwise
`PrivacyError` is raised. Adapter and moments are computed a second time, from the noisy sums and public numbers alone, by the
formulas of `_replay`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from client.training.trainer import LocalRound, LocalWork, train_local_rounds
from shared.errors import PrivacyError
from shared.job.compute import ComputeConfig
from shared.job.training import TrainingConfig
from shared.models.batches import Batch, Example
from shared.models.frozen_cache import FrozenCache
from shared.models.tunable import TrainedModel
from shared.privacy.persons import Persons
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import SiteRandomness
from shared.runtime.runtime import Runtime
from shared.tasks import Task

LEARNING_RATE = 0.5
DECLARED_RECORDS = 64
MICRO_BATCH = 24
_ROUNDING = 1e-5  # of float32, relative to the largest value that the optimiser reached


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
    """A `simulations.audit.mechanism.Release` through `train_local_rounds`.

    Attributes:
        training: what one call executes: a round of `local_steps` noisy steps by this optimiser.
        companions: sites that are trained side by side with the audited one, as in a simulation.
    """

    def __init__(
        self,
        new_randomness: Callable[[], SiteRandomness] = SiteRandomness.from_os,
        *,
        dimension: int,
        steps: int,
        micro_batch: int = MICRO_BATCH,
        companions: int = 0,
        optimizer: TrainingConfig | None = None,
    ) -> None:
        """Prepare a release of `steps` noisy steps, by the optimiser of a job's `[training]`; without one, by plain SGD."""
        self.companions = companions
        self.runtime = canary_runtime(dimension, micro_batch)
        self.new_randomness = new_randomness
        chosen = optimizer or TrainingConfig(rounds=1, optimizer="sgd", momentum=0.0)
        self.training = chosen.model_copy(
            update={
                "rounds": 1,
                "local_steps": steps,
                "learning_rate": LEARNING_RATE,
                "warmup_steps": min(chosen.warmup_steps, steps - 1),
                "early_stopping": None,
            }
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
        _check_moved_by(used, result, self.training, num_adapter=dimension_of_adapter(self.runtime))
        return used * plan.expected_batch_size(DECLARED_RECORDS)


def dimension_of_adapter(runtime: Runtime) -> int:
    """Return how many of the canary model's weights are adapter; the others are head."""
    return cast(CanaryModel, runtime.model).adapter.in_features


def _persons(owners: NDArray[np.intp], place: int, companions: int) -> Persons:
    """Return whose records a site has; companions have the first of them only."""
    return Persons(owners[: len(owners) // (2 + place)] if place < companions else owners)


def _flat_gradient(optimizer: torch.optim.Optimizer) -> NDArray[np.float64]:
    """Return what the last site's values are moved by."""
    parts = [p.grad[-1].flatten() for group in optimizer.param_groups for p in group["params"]]
    return cast(NDArray[np.float64], torch.cat(parts).double().numpy())


def _check_moved_by(
    used: NDArray[np.float64], result: LocalRound, training: TrainingConfig, *, num_adapter: int
) -> None:
    """Raise `PrivacyError` unless a round's adapter and moments follow from the noisy sums `used` [steps, dimension]."""
    if not np.isfinite(used).all():
        return  # a faulty mechanism may hand out NaN; judging it is the audit's business
    factors = np.ones(used.shape[1])
    factors[num_adapter:] = training.head_learning_rate_factor
    moved, moments = _replay(used, factors, training)
    found = {"": _flat(result.delta, "")} | {key: _flat(result.optimizer_state, f"|{key}") for key in moments}
    for key, expected in ({"": moved} | moments).items():
        tolerance = _ROUNDING * np.abs(expected).max() + 1e-12
        if not np.allclose(found[key], expected, rtol=0, atol=tolerance):
            raise PrivacyError(
                f"{'the moments ' + key if key else 'the adapter'} moved by something else than the noisy sums that the "
                "optimiser received; what leaves is not accounted."
            )


def _flat(tensors: dict[str, Tensor], suffix: str) -> NDArray[np.float64]:
    """Return the values of adapter and head, in this order, as one vector."""
    return torch.cat([tensors[name + suffix].flatten() for name in ("adapter.weight", "head.weight")]).double().numpy()


def _replay(
    used: NDArray[np.float64], factors: NDArray[np.float64], training: TrainingConfig
) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    """Return (values, moments by PyTorch's names) that the optimiser of `training` reaches from zero, in float64.

    Sources: AdamW, Loshchilov and Hutter 2019, algorithm 2, with PyTorch's beta2 0.999 and epsilon 1e-8; SGD with momentum as
    PyTorch writes it, v = mu v + g. They read nothing but their arguments.
    """
    value, first, second = (np.zeros(used.shape[1]) for _ in range(3))
    beta, decay = training.momentum, training.weight_decay
    for step, gradient in enumerate(used):
        rates = _public_rate(training, step) * factors
        if training.optimizer == "adamw":
            first = beta * first + (1 - beta) * gradient
            second = 0.999 * second + 0.001 * gradient**2
            corrected = np.sqrt(second / (1 - 0.999 ** (step + 1))) + 1e-8
            value = value - rates * decay * value - rates * first / (1 - beta ** (step + 1)) / corrected
        else:
            first = beta * first + gradient + decay * value
            value = value - rates * first
    if training.optimizer == "adamw":
        return value, {"exp_avg": first, "exp_avg_sq": second}
    return value, {"momentum_buffer": first} if beta else {}


def _public_rate(training: TrainingConfig, step: int) -> float:
    """Return the learning rate of a step of the one round: it reads the job and the number of the step."""
    progress = step / training.local_steps
    since_top = max(progress - 0.3, 0) / 0.7
    schedule = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "one-cycle": 0.04 + 3.2 * progress if progress < 0.3 else (1 + math.cos(math.pi * since_top)) / 2,
    }
    return training.learning_rate * schedule[training.schedule] * min(1.0, (step + 1) / (training.warmup_steps + 1))
