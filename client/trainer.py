"""The local DP round, readable top to bottom: from one record's gradient to one noised update.

Formal guarantees (unit and relation as in the plan; for a private plan)
    * The returned delta depends on the records only through `local_steps` Poisson-subsampled Gaussian releases with
      the plan's sample_rate, max_grad_norm and noise_multiplier (tests/client/test_trainer.py; planted faults:
      tests/client/test_faults.py). Everything after the noise is post-processing.
    * Sampling and noise come from the given `SiteRandomness` alone.
    * `Observations` are not private. They stay at the site.

Per-example gradients come from Opacus' hooks (Yousefpour et al. 2021). Clipping, noise and normalisation are
`shared.privacy.mechanism`; see docs/decisions/0002-mechanism.md for why not Opacus' optimiser.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from opacus.grad_sample.grad_sample_module import GradSampleHooks
from torch import Tensor, nn

from shared.batches import Example
from shared.config import TrainingConfig
from shared.privacy.mechanism import per_example_gradients
from shared.privacy.persons import Persons, PersonSum
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import SiteRandomness
from shared.runtime import Runtime


@dataclass
class Observations:
    """What the site saw while training. Not private: never leaves the site.

    Attributes:
        losses: mean training loss of every step's sample, NaN for an empty sample.
        num_examples, num_clipped: totals over the round, of records or persons, whichever is the unit of privacy.
        num_non_finite: records whose gradient was replaced by zero.
    """

    losses: list[float] = field(default_factory=list)
    num_examples: int = 0
    num_clipped: int = 0
    num_non_finite: int = 0


@dataclass(frozen=True, kw_only=True)
class LocalRound:
    """Result of one round at one site.

    Attributes:
        delta: trained values minus start values, float32 on the CPU, by name. This is what leaves the site.
        optimizer_state: moments of the local optimiser by "name|key"; read only noised gradients, stay at the site.
        executed_steps: noisy steps taken.
        observations: private; stay at the site.
    """

    delta: dict[str, Tensor]
    optimizer_state: dict[str, Tensor]
    executed_steps: int
    observations: Observations


def train_local_round(
    runtime: Runtime,
    examples: Sequence[Example],
    start: Mapping[str, Tensor],
    *,
    training: TrainingConfig,
    plan: PrivacyPlan,
    declared_records: int,
    randomness: SiteRandomness,
    round_number: int,
    optimizer_state: Mapping[str, Tensor] | None = None,
    persons: Persons | None = None,
) -> LocalRound:
    """Train the adapter for one round.

    Args:
        runtime: loaded backbone, adapters, head and task.
        examples: the site's encoded records.
        start: the global adapter.
        training: number of steps, optimiser, schedule.
        plan: what will be executed and accounted.
        declared_records: the site's public number of records, or of persons if they are the unit of privacy; times
            sample_rate it is the divisor of every noisy sum.
        randomness: the site's own source.
        round_number: 1-based; positions the public learning-rate schedule.
        optimizer_state: moments after the site's previous round, or None.
        persons: whose record each of `examples` is; None unless persons are the unit of privacy.

    Raises:
        PrivacyError: if plan and persons do not belong together, or the model's gradients cannot be clipped.
    """
    plan.check_persons(persons)
    num_units = len(examples) if persons is None else persons.count
    # 1. Start from the global adapter, with the site's own moments.
    runtime.load(start)
    model, task = runtime.model, runtime.task
    trainable = model.trainable()
    parameters = list(trainable.values())
    optimizer = build_optimizer(trainable, model.head_parameters(), training)
    restore_optimizer(optimizer, trainable, optimizer_state or {})
    expected_batch_size = plan.expected_batch_size(declared_records)
    seen = Observations()

    with per_example_hooks(model):
        for step in range(training.local_steps):
            # 2. Every unit of privacy, a record or a person, enters the step by its own coin.
            drawn = plan.sample(num_units, randomness.stream("sampling", round_number=round_number, step=step))
            groups = [[record] for record in drawn.tolist()]
            if persons is not None and plan.records_per_person is not None:
                own_records = randomness.stream("records", round_number=round_number, step=step)
                groups = persons.choose(drawn.tolist(), plan.records_per_person, own_records)
            # 3. Per-example gradients, a person's averaged over all micro-batches; then each unit's is clipped, over adapter
            #    and head together, and added.
            total = plan.new_sum([p.shape for p in parameters])
            by_person = None if persons is None else PersonSum(total, groups)
            loss_sum = 0.0
            for rows, batch in runtime.grouped_batches(examples, groups):
                with runtime.autocast():
                    losses = task.per_example_loss(model(batch), batch)
                losses.sum().backward()  # type: ignore[no-untyped-call]
                gradients = per_example_gradients(parameters, len(losses))
                if by_person is None:
                    total.add(gradients)
                else:
                    by_person.add(gradients, rows)
                loss_sum += float(losses.detach().sum())
            if by_person is not None:
                by_person.close()
            # 4. One noise event per logical step, also when the sample is empty.
            noisy = plan.add_noise(total.sums, randomness.stream("noise", round_number=round_number, step=step))
            # 5. Divide by the expected batch size, never by the drawn one. From here on all is post-processing.
            for parameter, value in zip(parameters, noisy, strict=True):
                parameter.grad = (value / expected_batch_size).to(parameter)
            # 6. The optimiser moves the adapter.
            set_learning_rate(optimizer, training, (round_number - 1) * training.local_steps + step)
            optimizer.step()
            num_records = sum(map(len, groups))
            seen.losses.append(loss_sum / num_records if num_records else math.nan)
            seen.num_examples += total.num_examples
            seen.num_clipped += total.num_clipped
            seen.num_non_finite += total.num_non_finite

    delta = {name: p.detach().cpu().float() - start[name] for name, p in trainable.items()}
    return LocalRound(
        delta=delta,
        optimizer_state=dump_optimizer(optimizer, trainable),
        executed_steps=training.local_steps,
        observations=seen,
    )


@contextmanager
def per_example_hooks(model: nn.Module) -> Iterator[None]:
    """Attach Opacus' per-example gradient hooks for the duration of the block.

    They are attached here, after the model reached its device: hooks that outlive a move watch the old parameters.
    """
    hooks = GradSampleHooks(model, loss_reduction="sum")
    try:
        with warnings.catch_warnings():
            # The lowest adapter's input needs no gradient: that is what the frozen layers below are for.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            yield
    finally:
        hooks.remove_hooks()
        _forget_unfinished(model)


def _forget_unfinished(model: nn.Module) -> None:
    """Remove what the hooks keep between forward and backward: after an error there, the next round would trip over it."""
    for owner in (*model.modules(), *model.parameters()):
        for name in ("activations", "max_batch_len", "grad_sample", "_current_grad_sample"):
            if name in vars(owner):
                delattr(owner, name)


def build_optimizer(
    trainable: Mapping[str, nn.Parameter], head: set[str], training: TrainingConfig
) -> torch.optim.Optimizer:
    """Return AdamW or SGD with one group for the adapter and one for the head."""
    groups = [
        {"params": [p for name, p in trainable.items() if (name in head) == is_head], "factor": factor}
        for is_head, factor in ((False, 1.0), (True, training.head_learning_rate_factor))
    ]
    groups = [group for group in groups if group["params"]]
    if training.optimizer == "adamw":
        return torch.optim.AdamW(
            groups,
            lr=training.learning_rate,
            betas=(training.momentum, 0.999),
            weight_decay=training.weight_decay,
        )
    return torch.optim.SGD(
        groups, lr=training.learning_rate, momentum=training.momentum, weight_decay=training.weight_decay
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, training: TrainingConfig, step: int) -> None:
    """Set the learning rate of the public schedule for global step `step` (0-based, over all planned steps)."""
    progress = min(step / training.planned_steps, 1.0)
    factor = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    for group in optimizer.param_groups:
        group["lr"] = training.learning_rate * factor[training.schedule] * group["factor"]


def dump_optimizer(optimizer: torch.optim.Optimizer, trainable: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the optimiser's moments as CPU tensors by "parameter name|key"."""
    return {
        f"{name}|{key}": value.detach().cpu().clone()
        for name, parameter in trainable.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, trainable: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]
) -> None:
    """Put back what `dump_optimizer` returned."""
    for full_name, value in state.items():
        name, _, key = full_name.partition("|")
        parameter = trainable[name]
        # Step counters are scalars that PyTorch keeps on the CPU.
        device = parameter.device if value.ndim else torch.device("cpu")
        optimizer.state[parameter][key] = value.clone().to(device)
