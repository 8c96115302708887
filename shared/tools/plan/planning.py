"""The planner's arithmetic: what is missing from a plan, and what to mind about it.

The mechanism is the Poisson-subsampled Gaussian of `shared.privacy.accounting`: `steps` T releases, each with
noise_multiplier sigma and sample_rate q. Its four quantities are the rate (q, or batch_size B = q n), the length (T, or
epochs E with T = round(E n / B)), the noise and epsilon; any one of them follows from the three others and delta.

Formal guarantees
    * The epsilon of a `Setting` is `compose_epsilon` of its own noise_multiplier, sample_rate and steps: an upper bound
      for exactly the numbers beside it, also after they were rounded
      (tests/shared/tools/plan/test_planning.py::test_epsilon_agrees_with_dp_accounting).
    * What was solved for keeps to the epsilon that was asked for: it is never above
      (tests/shared/tools/plan/test_planning.py::test_what_was_solved_for_keeps_to_epsilon).

Sources: Abadi et al. 2016 (DP-SGD, Algorithm 1); the sources of `shared.privacy.accounting`. Batch size against noise as
the measure of a step's usefulness: Sander, Stock, Sablayrolles 2023 ("TAN without a burn") and McKenna et al. 2025
("Scaling laws for differentially private language models"; its noise-batch ratio is the inverse of ours).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from shared.epsilons import as_set, delta_rounded_up, rate_rounded_up, rounded_up
from shared.errors import ConfigError, excerpt
from shared.limits import (
    MAX_EPSILON,
    MAX_NOISE_MULTIPLIER,
    MAX_STEPS,
    MIN_DELTA,
    MIN_EPSILON,
    MIN_NOISE_MULTIPLIER,
    MIN_SAMPLE_RATE,
)
from shared.privacy.accountant.crossing import crossing
from shared.privacy.accounting import (
    MAX_MEAN_LOSS,
    GaussianSteps,
    affordable_steps,
    calibrate_noise_multiplier,
    compose_epsilon,
    likely_steps,
    mean_loss,
)
from shared.privacy.sizes import default_delta

Quantity = Literal["noise", "epsilon", "steps", "rate"]
WEAK_EPSILON = 10.0
"""Above it the odds of a guess about one record may grow more than e^10 = 22,000-fold."""
LITTLE_AMPLIFICATION = 0.5
"""Above this sample_rate a record is in most steps, so that sampling hides it no more."""
MIN_SIGNAL_TO_NOISE = 1.0
"""Below it the noise of a step is longer than the longest sum of gradients that there can be."""
FEWEST_PARAMETERS = 1000
"""Trainable parameters that are assumed where none are named: fewer than any useful adapter has."""

_RATE_LATTICE = 1_000_000  # without `records` a solved sample_rate is a multiple of a millionth
_BATCH_SLACK = 1e-4  # a solved batch above 10,000 records is the largest up to this share
SIGMA_DECIMALS = 4  # of a solved noise_multiplier, so that what is printed is what was accounted
_SMALL_RATE = 1e-3  # small enough for an estimate of many steps
_CURVE_POINTS = 14


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is known of a plan. Exactly one of rate, length, noise_multiplier and epsilon is left None.

    Attributes:
        records: number n of records, public; needed for `batch_size` and for the default of delta.
        batch_size: expected batch size B, records per step; the rate is B / n.
        sample_rate: q, in (0, 1]; instead of `batch_size`.
        steps: noisy steps T.
        epochs: expected passes E over the records; T = round(E n / B); instead of `steps`.
        noise_multiplier: sigma, in units of max_grad_norm.
        epsilon: the most that may be spent.
        delta: failure probability; None is `default_delta(records)`.
        parameters: trainable parameters, adapter and head together.
    """

    records: int | None = None
    batch_size: int | None = None
    sample_rate: float | None = None
    steps: int | None = None
    epochs: float | None = None
    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float | None = None
    parameters: int | None = None


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A complete plan; see `Question`. `epsilon` is what these very numbers cost, `solved_for` what was found."""

    noise_multiplier: float
    sample_rate: float
    steps: int
    epsilon: float
    delta: float
    records: int | None = None
    parameters: int | None = None
    solved_for: Quantity | None = None

    @property
    def mechanism(self) -> GaussianSteps:
        """The plan as the accountant takes it."""
        return GaussianSteps(noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate, steps=self.steps)

    @property
    def epochs(self) -> float:
        """Expected passes over the records: T q."""
        return self.steps * self.sample_rate

    @property
    def batch_size(self) -> float | None:
        """Expected records per step: q n."""
        return None if self.records is None else self.sample_rate * self.records

    @property
    def signal_to_noise(self) -> float | None:
        """B / sigma: norm B C of the sum of B clipped gradients that all point one way, over the noise sigma C of one
        coordinate. The inverse of the noise-batch ratio (McKenna et al. 2025)."""
        return None if self.batch_size is None else self.batch_size / self.noise_multiplier

    @property
    def signal_to_noise_vector(self) -> float | None:
        """B / (sigma sqrt(d)): the same sum over the length sigma C sqrt(d) of the noise in all d parameters."""
        if self.signal_to_noise is None or self.parameters is None:
            return None
        return self.signal_to_noise / math.sqrt(self.parameters)

    def warnings(self) -> dict[str, str]:
        """Return what is to be minded about this plan, by its subject, each with what to change."""
        found = {"delta": self._delta(), "epsilon": self._epsilon(), "sampling": self._rate(), "noise": self._noise()}
        return {subject: text for subject, text in found.items() if text}

    def _delta(self) -> str | None:
        if self.records is None or self.delta <= 1 / (10 * self.records):
            return None
        return (
            f"delta {delta_rounded_up(self.delta)} is weak for {self.records:,} records: it is above 1/(10 n) = "
            f"{1 / (10 * self.records):.1e}. Use --delta {default_delta(self.records):.1e} or less."
        )

    def _epsilon(self) -> str | None:
        if self.epsilon <= WEAK_EPSILON:
            return None
        return (
            f"epsilon {rounded_up(self.epsilon)} is a weak claim (above {WEAK_EPSILON:g}): the odds of a guess about one "
            "record may grow more than 22,000-fold. Use more noise, fewer steps or a smaller batch."
        )

    def _rate(self) -> str | None:
        if self.sample_rate <= LITTLE_AMPLIFICATION:
            return None
        return (
            f"sample_rate {rate_rounded_up(self.sample_rate, 3)} leaves no amplification by sampling: every record is "
            f"in most of the steps (above {LITTLE_AMPLIFICATION:g}). The numbers above have that in. With few records it is a "
            "good choice, which `silotune new` makes; with many, try a smaller batch with more steps."
        )

    def _noise(self) -> str | None:
        if self.signal_to_noise is None:
            return None
        parameters = self.parameters or FEWEST_PARAMETERS
        ratio = self.signal_to_noise / math.sqrt(parameters)
        if ratio >= MIN_SIGNAL_TO_NOISE:
            return None
        assumed = "" if self.parameters else " (assumed; name yours with --parameters)"
        return (
            f"noise dominates: with {parameters:,} parameters{assumed} the noise of one step is {1 / ratio:.1f} times as long "
            "as the longest possible sum of gradients. Use a larger batch, fewer steps, a larger epsilon, or fewer "
            "parameters (lora.rank, lora.last_layers)."
        )


def solve(question: Question) -> Setting:
    """Return the plan with the one missing quantity found.

    Raises:
        ConfigError: if a number is out of range, too few or too many are given, or nothing fits.
    """
    _check_ranges(question)
    missing = _missing(question)
    delta = _delta_of(question)
    epsilon, sigma = question.epsilon, question.noise_multiplier
    batch, population = _rate_of(question, delta)
    rate = batch / population
    steps = 0 if missing == "steps" else _steps_of(question, batch, population)
    if missing == "noise":
        assert epsilon is not None  # noqa: S101 (checked by _missing)
        sigma = calibrate_noise_multiplier(
            epsilon=epsilon, delta=delta, sample_rate=rate, steps=steps, decimals=SIGMA_DECIMALS
        )
    assert sigma is not None  # noqa: S101 (likewise)
    if missing == "steps":
        assert epsilon is not None  # noqa: S101 (likewise)
        steps = affordable_steps([], noise_multiplier=sigma, sample_rate=rate, budget=epsilon, delta=delta)
        if not steps:
            raise ConfigError(
                f"not even one step fits in epsilon {as_set(epsilon)} with noise multiplier {as_set(sigma)} and sample rate "
                f"{rate_rounded_up(rate)}. Give more epsilon, more noise or a smaller batch."
            )
    return Setting(
        noise_multiplier=sigma,
        sample_rate=rate,
        steps=steps,
        epsilon=_bounded_epsilon(sigma, rate, steps, delta),
        delta=delta,
        records=question.records,
        parameters=question.parameters,
        solved_for=missing,
    )


def epsilon_by_steps(sigma: float, rate: float, *, most: int, delta: float) -> list[tuple[int, float]]:
    """Return (steps, epsilon) from 1 to `most` steps of one mechanism, dense at first, where the curve is steep."""
    lengths = sorted({1 + round((most - 1) * (part / _CURVE_POINTS) ** 2) for part in range(_CURVE_POINTS + 1)})
    return [(length, _bounded_epsilon(sigma, rate, length, delta)) for length in lengths]


def epsilon_by_noise(rate: float, steps: int, *, least: float, most: float, delta: float) -> list[tuple[float, float]]:
    """Return (epsilon, noise multiplier) for noise multipliers from `least` to `most`, for a curve."""
    least = max(least, MIN_NOISE_MULTIPLIER)
    sigmas = [least * (most / least) ** (part / _CURVE_POINTS) for part in range(_CURVE_POINTS + 1)]
    events = [GaussianSteps(noise_multiplier=sigma, sample_rate=rate, steps=steps) for sigma in sigmas]
    statable = [event.noise_multiplier for event in events if mean_loss(event) <= MAX_MEAN_LOSS]
    return [(_bounded_epsilon(sigma, rate, steps, delta), sigma) for sigma in statable]


def check_delta_for(delta: float, records: int) -> None:
    """Raise `ConfigError` if `delta` would allow to publish a whole record of this many."""
    if delta >= 1 / records:
        raise ConfigError(
            f"delta is {delta_rounded_up(delta)}, which would allow to publish a whole record: with {records:,} records "
            f"it must be below 1/n = {1 / records:.1e}; use at most {default_delta(records):.1e}."
        )


def check_statable(event: GaussianSteps) -> None:
    """Raise `ConfigError` where epsilon is without meaning and the accountant would need gigabytes to find it."""
    if mean_loss(event) > MAX_MEAN_LOSS:
        raise ConfigError(
            f"no useful epsilon can be stated for noise multiplier {as_set(event.noise_multiplier)}, sample rate "
            f"{rate_rounded_up(event.sample_rate)} and {event.steps:,} steps: it would be about a thousand or more. Use "
            "more noise, fewer steps or a smaller batch."
        )


# name, least, most, whether the least itself is out of range
_RANGES: tuple[tuple[str, float, float, bool], ...] = (
    ("records", 1, 1e12, False),
    ("batch_size", 1, 1e12, False),
    ("sample_rate", MIN_SAMPLE_RATE, 1, False),
    ("steps", 1, MAX_STEPS, False),
    ("epochs", 0, 1e6, True),
    ("noise_multiplier", MIN_NOISE_MULTIPLIER, MAX_NOISE_MULTIPLIER, False),
    ("epsilon", MIN_EPSILON, MAX_EPSILON, False),
    ("parameters", 1, 1e12, False),
)


def _check_ranges(question: Question) -> None:
    for name, least, most, open_below in _RANGES:
        value = getattr(question, name)
        if value is not None and not (least < value <= most or (value == least and not open_below)):
            below = "above" if open_below else "from"
            # A whole number of 400 digits is no float.
            shown = excerpt(value) if isinstance(value, int) else f"{value:g}"
            raise ConfigError(f"{_option(name)} is {shown}; expected a number {below} {least:g} to {most:,.12g}.")
    if question.delta is not None and not MIN_DELTA <= question.delta < 1:
        raise ConfigError(
            f"--delta is {as_set(question.delta)}; expected a number from {MIN_DELTA:g} to below 1, for example 1e-5."
        )


def _missing(question: Question) -> Quantity:
    for one, other in (("batch_size", "sample_rate"), ("steps", "epochs")):
        if getattr(question, one) is not None and getattr(question, other) is not None:
            raise ConfigError(f"{_option(one)} and {_option(other)} say the same; leave out one of the two.")
    if question.batch_size is not None:
        if question.records is None:
            raise ConfigError("--batch-size alone is no rate; add --records, or give --sample-rate instead.")
        if question.batch_size > question.records:
            raise ConfigError(
                f"--batch-size is {question.batch_size:,}, but there are {question.records:,} records; give at most that many."
            )
    given: dict[Quantity, bool] = {
        "rate": question.batch_size is not None or question.sample_rate is not None,
        "steps": question.steps is not None or question.epochs is not None,
        "noise": question.noise_multiplier is not None,
        "epsilon": question.epsilon is not None,
    }
    names: dict[Quantity, str] = {
        "rate": "--batch-size (or --sample-rate)",
        "steps": "--epochs (or --steps)",
        "noise": "--noise-multiplier",
        "epsilon": "--epsilon",
    }
    missing = [quantity for quantity, known in given.items() if not known]
    if not missing:
        raise ConfigError(
            "all four quantities are given, so nothing is left to find; leave out " + _any_of(names.values())
        )
    if len(missing) > 1:
        give = ("one of " if len(missing) == 2 else "all but one of ") + _any_of(
            names[quantity] for quantity in missing
        )
        raise ConfigError(f"{len(missing)} quantities are missing, and one can be found; give {give}")
    return missing[0]


def _any_of(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}."


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _delta_of(question: Question) -> float:
    if question.delta is None:
        if question.records is None:
            raise ConfigError("delta is not known; give --records, from which it follows, or --delta.")
        return default_delta(question.records)
    if question.records is not None:
        check_delta_for(question.delta, question.records)
    return question.delta


def _rate_of(question: Question, delta: float) -> tuple[float, float]:
    """Return (B, n), or (q, 1) where the rate is given as such; the largest that fits if it is what is asked for."""
    if question.batch_size is not None and question.records is not None:
        return question.batch_size, question.records
    if question.sample_rate is not None:
        return question.sample_rate, 1.0
    population = question.records or _RATE_LATTICE
    return _largest_batch(question, population, delta), population


def _steps_of(question: Question, batch: float, population: float) -> int:
    if question.steps is not None:
        return question.steps
    assert question.epochs is not None  # noqa: S101 (checked by _missing)
    steps = round(question.epochs * population / batch)
    if not 1 <= steps <= MAX_STEPS:
        raise ConfigError(
            f"--epochs {question.epochs:g} at sample rate {rate_rounded_up(batch / population)} is {steps:,} steps; "
            f"expected 1 to {MAX_STEPS:,}. Change one of the two."
        )
    return steps


def _bounded_epsilon(sigma: float, rate: float, steps: int, delta: float) -> float:
    """Return epsilon, or raise `ConfigError` where no useful one can be stated."""
    event = GaussianSteps(noise_multiplier=sigma, sample_rate=rate, steps=steps)
    check_statable(event)
    epsilon = compose_epsilon([event], delta)
    if not math.isfinite(epsilon):
        raise ConfigError(
            f"the accountant cannot bound epsilon at delta {delta_rounded_up(delta)}; use a larger delta or more noise."
        )
    return epsilon


def _largest_batch(question: Question, population: int, delta: float) -> int:
    """Return the largest B whose plan keeps to epsilon, up to `_BATCH_SLACK`.

    Epsilon rises with B while T stays; where `epochs` are given it falls a little whenever T does. So the search first
    finds some B that fits and whose successor does not, then looks whether a larger B with fewer steps fits as well.
    """
    epsilon, sigma = question.epsilon, question.noise_multiplier
    assert epsilon is not None  # noqa: S101 (checked by _missing)
    assert sigma is not None  # noqa: S101 (likewise)

    def steps(batch: int) -> int:
        return question.steps or round((question.epochs or 0) * population / batch)

    def cost(batch: int) -> float:
        length, rate = steps(batch), batch / population
        if length > MAX_STEPS:
            return math.inf
        event = GaussianSteps(noise_multiplier=sigma, sample_rate=rate, steps=length)
        return compose_epsilon([event], delta)

    def fits(batch: int) -> bool:
        return cost(batch) <= epsilon

    def largest_from(start: int, guess: float) -> int:  # `start` fits
        if start == longest:
            return start
        return crossing(cost, epsilon, rising=True, least=start + 1, most=longest, guess=guess, slack=_BATCH_SLACK)[0]

    def next_with_fewer_steps(batch: int) -> int:
        return largest(lambda b: steps(b) >= steps(batch), batch, population) + 1

    first = 1 if steps(1) <= MAX_STEPS else largest(lambda b: steps(b) > MAX_STEPS, 1, population) + 1
    longest = largest(lambda b: steps(b) >= 1, first, population)
    if not (steps(first) >= 1 and fits(first)):
        raise ConfigError(
            f"no batch is small enough for epsilon {as_set(epsilon)} with noise multiplier {as_set(sigma)} over that "
            "many steps. Give more epsilon, more noise or fewer steps."
        )
    batch = largest_from(first, population * _likely_rate(question, sigma, epsilon, delta))
    while (larger := next_with_fewer_steps(batch)) <= longest and fits(larger):
        batch = largest_from(larger, larger)
    return batch


def _likely_rate(question: Question, sigma: float, epsilon: float, delta: float) -> float:
    """Return where to look first for a rate: by `likely_steps`, for which T q^2 is what counts."""
    steps = likely_steps([], noise_multiplier=sigma, sample_rate=_SMALL_RATE, budget=epsilon, delta=delta)
    square = steps * _SMALL_RATE**2
    return math.sqrt(square / question.steps) if question.steps else square / (question.epochs or 1)


def largest(holds: Callable[[int], bool], least: int, most: int) -> int:
    """Return an n in [least, most] where `holds` and beyond which it does not, or `most`; taken to hold at `least`."""
    low, stride = least, 1
    while low < most:
        high = min(low + stride, most)
        if not holds(high):
            break
        low, stride = high, stride * 2
    else:
        return most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
