"""Which settings follow from public counts: declared sizes, number of sites, kind of task, epsilon.

No record is asked. What stands here was found by a study on public data (docs/decisions/0018-settings-from-counts.md), on records
that no figure is reported on:

    * **One step a round.** What sites send in a round then adds up to one noisy gradient of all records, however labels are
      spread: training at one place with sqrt(sites) times the noise. With several steps between two averages, sites whose
      labels differ walk apart (docs/decisions/0026-one-step-a-round.md). Language models, which AdamW trains, and networks for
      images were not part of that study and keep four.
    * **Large samples.** At one epsilon the noise on the sum of all steps, against what the records can add up to, falls as
      q sqrt(T) / sigma grows; at epsilon 8 that is 0.9 for T = 32 and q 1/8, 1.5 for T = 32 and q 1/2, 1.7 for T = 16 and
      q 1. So q is 1 in 16 steps, until a step sees more records than it needs.
    * **A learning rate that fits the noise.** Heads see vectors normalised to the length sqrt(hidden size), so
      what the noise of all steps adds to an output has one scale whatever the data: the rate is chosen so that
      this noise is `Rates.noise` on a weight, and is cut where little noise would allow a rate that clipped
      gradients cannot use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from shared.job.kinds import TaskKind
from shared.privacy.accounting import calibrate_noise_multiplier

STEPS, STEPS_ON_SAMPLES = 16, 32
"""On all records in every step, and on samples of them, each of which needs less time."""
SEVERAL_STEPS = 4
"""Between two averages, of the kinds that do not take one."""
MOMENTUM = 0.9
MOST_RECORDS_IN_A_STEP = 16_384
"""At all sites together; more average nothing that noise has not blurred already."""
SAMPLE_RATES = (1.0, 0.5, 0.25, 0.125, 0.0625)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What differs between kinds of task.

    Attributes:
        noise: standard deviation, on one trained weight, of the noise of all steps together at the learning rate.
        most: largest product of learning rate and number of steps.
        max_grad_norm: clipping bound C.
        largest_rate: of sampling. Where LoRA does much of the work, more and smaller steps go further than few on all records.
        rounds: in which it trains; None for as many as steps, one in each.
    """

    noise: float
    most: float
    max_grad_norm: float
    largest_rate: float = 1.0
    rounds: int | None = None


RATES: Mapping[TaskKind, Rates] = {
    "sequence_classification": Rates(noise=0.11, most=128.0, max_grad_norm=1.0),
    "pair_matching": Rates(noise=0.11, most=128.0, max_grad_norm=1.0),
    "token_classification": Rates(noise=0.065, most=128.0, max_grad_norm=0.5, largest_rate=0.5),
    "regression": Rates(noise=0.004, most=3.2, max_grad_norm=1.0),
    "image_classification": Rates(noise=0.7, most=160.0, max_grad_norm=1.0, largest_rate=0.5, rounds=20),
}
"""The others are language models: AdamW trains them, whose steps do not grow with the noise; see `settings_for`."""

HEAD_OFFSET = 0.25
"""`task.head_offset` of scores, whose range seldom has their mean in its middle; a larger one overshoots."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What the rule reads; all of it public.

    Attributes:
        kind: kind of task.
        sites: declared number of records, or persons, of each site.
        epsilon, delta: the promise of each site.
    """

    kind: TaskKind
    sites: tuple[int, ...]
    epsilon: float
    delta: float


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Keys of a scenario that the rule chooses.

    Attributes:
        noise_multiplier: that they lead to; not written, for the job calibrates it.
        noise_on_a_step: standard deviation of the noise on one weight of the mean gradient of a step, over all sites.
        enough: False if the noise is so large that little can be learned.
    """

    rounds: int
    local_steps: int
    optimizer: str
    momentum: float
    learning_rate: float
    schedule: str
    sample_rate: float
    max_grad_norm: float
    noise_multiplier: float
    noise_on_a_step: float
    enough: bool

    @property
    def steps(self) -> int:
        """Noisy steps of a site."""
        return self.rounds * self.local_steps

    @property
    def epochs(self) -> float:
        """Expected passes over a site's records."""
        return self.steps * self.sample_rate


def settings_for(counts: Counts) -> Settings:
    """Return the settings that follow from the counts."""
    rates = RATES.get(counts.kind)
    if rates is None:  # few steps of AdamW, and a narrow bound, for gradients of next-token prediction are short
        return _by_adamw(counts, rounds=4, local_steps=SEVERAL_STEPS, rate=0.125, bound=0.05)
    rate, rounds, local_steps = min(sample_rate(counts.sites), rates.largest_rate), rates.rounds, SEVERAL_STEPS
    if rounds is None:
        rounds, local_steps = STEPS if rate == 1 else STEPS_ON_SAMPLES, 1
    found = _by_adamw(counts, rounds=rounds, local_steps=local_steps, rate=rate, bound=rates.max_grad_norm)
    wanted = rates.noise / (found.noise_on_a_step * accumulated(found.steps, MOMENTUM))
    most = rates.most / found.steps
    return replace(found, optimizer="sgd", learning_rate=two_digits(min(wanted, most)), enough=wanted >= most / 20)


def _by_adamw(counts: Counts, *, rounds: int, local_steps: int, rate: float, bound: float) -> Settings:
    steps = rounds * local_steps
    sigma = calibrate_noise_multiplier(epsilon=counts.epsilon, delta=counts.delta, sample_rate=rate, steps=steps)
    return Settings(
        rounds=rounds,
        local_steps=local_steps,
        optimizer="adamw",
        momentum=MOMENTUM,
        learning_rate=0.1,
        schedule="linear",
        sample_rate=rate,
        max_grad_norm=bound,
        noise_multiplier=sigma,
        noise_on_a_step=sigma * bound * noise_share(counts.sites) / rate,
        enough=sum(counts.sites) >= 2_000,
    )


def sample_rate(sites: tuple[int, ...]) -> float:
    """Return the largest of `SAMPLE_RATES` at which a step sees at most `MOST_RECORDS_IN_A_STEP` records, or the smallest."""
    total = sum(sites)
    return next((rate for rate in SAMPLE_RATES if rate * total <= MOST_RECORDS_IN_A_STEP), SAMPLE_RATES[-1])


def noise_share(sites: tuple[int, ...]) -> float:
    """Return the standard deviation of the mean of the sites' noise, where each adds 1 / size and weighs by its size."""
    return math.sqrt(len(sites)) / sum(sites)


def accumulated(steps: int, momentum: float) -> float:
    """Return the standard deviation that noise of 1 in every step has in the end, at learning rate 1.

    A step's noise moves the weights in all later steps, by momentum, at their linearly falling rates.
    """
    total, pull = 0.0, 0.0
    for step in reversed(range(steps)):
        pull = momentum * pull + (1 - step / steps)
        total += pull**2
    return math.sqrt(total)


def two_digits(value: float) -> float:
    """Return `value` rounded to two significant digits."""
    return float(f"{value:.2g}")
