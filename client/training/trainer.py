"""The local DP round, readable top to bottom: from one record's gradient to one noised update.

One loop serves a real site, alone, and a simulation, which trains many sites side by side over one frozen backbone.

Formal guarantees (unit and relation as in the plan; for a private plan)
    * The returned delta depends on the records only through `local_steps` Poisson-subsampled Gaussian releases with
      the plan's sample_rate, max_grad_norm and noise_multiplier (tests/client/training/test_trainer.py; planted faults:
      tests/client/training/test_faults.py). Everything after the noise is post-processing.
    * One record (or person) more or less moves a step's sum by at most max_grad_norm in floating point, whatever adapter the
      coordinator sent: the gradients of all others stay the same to the last bit, and so does their part of the sum
      (tests/client/training/test_sensitivity.py). That this machine's libraries play along is tried out before a job is
      trained, and on every round's own adapter (`client.training.independence`).
    * Sampling and noise of a site come from its own `SiteRandomness` alone.
    * What a site gets when it is trained with others is what it gets alone, up to floating-point rounding: no other site's
      record, value or noise takes part (tests/client/training/test_many_sites.py).
    * `Observations` are not private. They stay at the site.

Per-example gradients come through Opacus' hooks (Yousefpour et al. 2021; `client.training.per_example`). Clipping, noise and
normalisation are `shared.privacy.mechanism`; see docs/decisions/0002-mechanism.md for why not Opacus' optimiser.
"""

from __future__ import annotations

import bisect
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from client.training.backward import backward
from client.training.per_example import GradientsBySite, PerExampleHooks, most_examples
from shared.job.training import TrainingConfig
from shared.models.batches import Example
from shared.privacy.mechanism import ClippedSum, per_example_gradients
from shared.privacy.persons import Persons, PersonSum
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import SiteRandomness
from shared.runtime.runtime import Runtime
from shared.tensors.optimizers import build_optimizer, dump_optimizer, restore_optimizer, set_learning_rate


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

    def add(self, total: ClippedSum, loss_sum: float, *, num_records: int) -> None:
        """Take in one step."""
        self.losses.append(loss_sum / num_records if num_records else math.nan)
        self.num_examples += total.num_examples
        self.num_clipped += total.num_clipped
        self.num_non_finite += total.num_non_finite


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


@dataclass(frozen=True, kw_only=True)
class SiteRecords:
    """What a site's gradients are computed from.

    Attributes:
        examples: the site's encoded records.
        persons: whose record each of `examples` is; None unless persons are the unit of privacy.
        views: further views of the examples, equally many of each, those of the first first; a record's gradient is the mean
            over it and its views (augmentation multiplicity, De et al. 2022).
    """

    examples: Sequence[Example]
    persons: Persons | None = None
    views: Sequence[Example] = ()

    @property
    def views_each(self) -> int:
        """K, how many views there are of each example, itself included."""
        return 1 + len(self.views) // max(len(self.examples), 1)

    def with_views(self, records: Sequence[int]) -> list[int]:
        """Return the places of records and their views among all examples and, behind them, all views; see `pool_of`."""
        first, each = len(self.examples), self.views_each - 1
        return [
            place
            for record in records
            for place in (record, *range(first + record * each, first + (record + 1) * each))
        ]

    def part(self, records: Sequence[int]) -> SiteRecords:
        """Return some of the records, with all that belongs to them; persons keep their numbers."""
        every = [*self.examples, *self.views]
        places = [place for record in records for place in self.with_views([record])[1:]]
        return SiteRecords(
            examples=[self.examples[record] for record in records],
            persons=None if self.persons is None else Persons(self.persons.owners[list(records)]),
            views=[every[place] for place in places],
        )


@dataclass(frozen=True, kw_only=True)
class LocalWork(SiteRecords):
    """What one site brings to a round.

    Attributes:
        declared_records: the site's public number of records, or of persons if they are the unit of privacy; times
            sample_rate it is the divisor of every noisy sum.
        randomness: the site's own source.
        optimizer_state: moments after the site's previous round, empty before the first.
    """

    declared_records: int
    randomness: SiteRandomness
    optimizer_state: Mapping[str, Tensor] = field(default_factory=dict)


Drawn = Sequence[Sequence[Sequence[int]]]
"""The records that enter a step, by site and unit of privacy; see `draw`."""

Sums = Callable[
    [Runtime, Sequence[Example], Sequence[SiteRecords], Drawn, PrivacyPlan, PerExampleHooks],
    tuple[list[ClippedSum], list[float]],
]
"""`clipped_sums`, or what computes the same with further processes (`client.training.processes`)."""


def train_local_rounds(
    runtime: Runtime,
    works: Sequence[LocalWork],
    start: Mapping[str, Tensor],
    *,
    training: TrainingConfig,
    plan: PrivacyPlan,
    round_number: int,
    sums: Sums | None = None,
) -> list[LocalRound]:
    """Train the adapters of one site, or of several simulated ones side by side, for one round.

    The sites share each forward pass of the frozen backbone and nothing else: every one has its own values, coins, clipped
    sum, noise and moments, and what it gets is what it would get alone, up to floating-point rounding.

    Args:
        runtime: loaded backbone, adapters, head and task; of a single site it holds the trained values afterwards.
        works: what each site brings, at least one.
        start: the global adapter.
        training: number of steps, optimiser, schedule.
        plan: what will be executed and accounted at every site.
        round_number: 1-based; positions the public learning-rate schedule.
        sums: computes step 3; None is `clipped_sums`, in this process alone.

    Returns:
        One result per site, in order.

    Raises:
        PrivacyError: if plan and persons do not belong together, or the model's gradients cannot be clipped.
        ValueError: if the optimisers of the sites have taken different numbers of steps.
    """
    for work in works:
        plan.check_persons(work.persons)
    # 1. Start from the global adapter, each site with its own moments.
    runtime.load(start)
    trainable = runtime.model.trainable()
    stacks = {name: stacked(parameter, len(works)) for name, parameter in trainable.items()}
    optimizer = build_optimizer(stacks, runtime.model.head_parameters(), training)
    restore_optimizer(optimizer, stacks, [work.optimizer_state for work in works])
    pool = pool_of(works)
    seen = [Observations() for _ in works]

    values: dict[Tensor, Tensor] | None = None
    if len(works) > 1:
        values = {parameter: stacks[name] for name, parameter in trainable.items()}
    with per_example_hooks(runtime.model, values) as hooks:
        for step in range(training.local_steps):
            # 2. Every unit of privacy, a record or a person, enters the step by its own coin.
            drawn = [draw(plan, work, round_number, step) for work in works]
            # 3. Each unit's gradient is clipped and added to its site's sum.
            totals, losses = (sums or clipped_sums)(runtime, pool, works, drawn, plan, hooks)
            for site, (work, total) in enumerate(zip(works, totals, strict=True)):
                # 4. One noise event per logical step and site, also when the sample is empty.
                noise = work.randomness.stream("noise", round_number=round_number, step=step)
                noisy = plan.add_noise(total.sums, noise)
                # 5. Divide by the expected batch size, never by the drawn one. From here on all is post-processing.
                expected_batch_size = plan.expected_batch_size(work.declared_records)
                for stack, value in zip(stacks.values(), noisy, strict=True):
                    if stack.grad is None:
                        stack.grad = torch.empty_like(stack)
                    stack.grad[site].copy_(value / expected_batch_size)
                seen[site].add(total, losses[site], num_records=sum(map(len, drawn[site])))
            # 6. The optimiser moves the adapters.
            set_learning_rate(optimizer, training, (round_number - 1) * training.local_steps + step)
            optimizer.step()

    return [
        LocalRound(
            delta={name: stack.detach()[site].cpu() - start[name] for name, stack in stacks.items()},
            optimizer_state=dump_optimizer(optimizer, stacks, site),
            executed_steps=training.local_steps,
            observations=seen[site],
        )
        for site in range(len(works))
    ]


def pool_of(works: Sequence[SiteRecords]) -> list[Example]:
    """Return what all sites bring, site by site: its examples, then their views."""
    return [example for work in works for part in (work.examples, work.views) for example in part]


def clipped_sums(
    runtime: Runtime,
    pool: Sequence[Example],
    works: Sequence[SiteRecords],
    drawn: Drawn,
    plan: PrivacyPlan,
    hooks: PerExampleHooks,
) -> tuple[list[ClippedSum], list[float]]:
    """Return the sums of clipped gradients, and of losses, by site, over the units that were drawn.

    Per-example gradients come from passes over micro-batches of all sites; those of a person's records, and of a record's views,
    are averaged over all micro-batches; then each unit's is clipped, over adapter and head together, and added to its site's sum.

    Args:
        pool: `pool_of` the works, which stays the same over a round.

    Raises:
        PrivacyError: if a record that was drawn did not come to its sum exactly once.
    """
    drawn = [
        [work.with_views(group) if work.views else group for group in groups]
        for work, groups in zip(works, drawn, strict=True)
    ]
    parameters = list(runtime.model.trainable().values())
    totals = [plan.new_sum([parameter.shape for parameter in parameters]) for _ in works]
    sums = [
        total if work.persons is None and not work.views else PersonSum(total, groups)
        for total, work, groups in zip(totals, works, drawn, strict=True)
    ]
    loss_sums = [0.0] * len(works)
    first_row = [0, *itertools.accumulate(len(work.examples) + len(work.views) for work in works)]
    pooled = [
        [first + row for row in group] for first, groups in zip(first_row[:-1], drawn, strict=True) for group in groups
    ]
    shares = GradientsBySite(first_row, sums)
    for rows, batch in runtime.grouped_batches(pool, pooled, most_examples(parameters)):
        owners = [bisect.bisect_right(first_row, row) - 1 for row in rows]
        if len(works) > 1:
            hooks.owners = torch.tensor(owners, device=runtime.model.device)
        losses = backward(runtime, batch, hooks)
        shares.add(per_example_gradients(parameters, len(losses)), rows, owners)
        for site, loss in zip(owners, losses.tolist(), strict=True):
            loss_sums[site] += loss
    shares.flush()
    for receiver in sums:
        if isinstance(receiver, PersonSum):
            receiver.close()
    shares.check(row for group in pooled for row in group)
    return totals, [loss / work.views_each for loss, work in zip(loss_sums, works, strict=True)]


def stacked(parameter: nn.Parameter, count: int) -> nn.Parameter:
    """Return the values of `count` sites, [count, *shape]; of one site a view, so that the model moves with it."""
    value = parameter.detach().unsqueeze(0)
    return nn.Parameter(value if count == 1 else value.repeat(count, *([1] * parameter.ndim)))


def draw(plan: PrivacyPlan, work: LocalWork, round_number: int, step: int) -> list[list[int]]:
    """Return the records that enter a step, by unit of privacy: each alone, or a person's together."""
    num_units = len(work.examples) if work.persons is None else work.persons.count
    coins = work.randomness.stream("sampling", round_number=round_number, step=step)
    drawn = plan.sample(num_units, coins).tolist()
    if work.persons is None or plan.records_per_person is None:
        return [[record] for record in drawn]
    own_records = work.randomness.stream("records", round_number=round_number, step=step)
    return work.persons.choose(drawn, plan.records_per_person, own_records)


@contextmanager
def per_example_hooks(model: nn.Module, stacks: Mapping[Tensor, Tensor] | None = None) -> Iterator[PerExampleHooks]:
    """Attach the per-example gradient hooks for the duration of the block; see `PerExampleHooks`."""
    hooks = PerExampleHooks(model, stacks)
    try:
        with warnings.catch_warnings():
            # The lowest adapter's input needs no gradient: that is what the frozen layers below are for.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            yield hooks
    finally:
        hooks.remove_hooks()
