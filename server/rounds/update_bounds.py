"""How long a site's noised update can be, and how short, from the job's plan alone; what no honest site sends is left out.

Guarantees (tests: tests/server/rounds/test_update_bounds.py)
    * An honest update is refused, or flagged, with probability below 1e-9 for each site and round, whatever its records are, as
      long as it trains on fewer than twice the records (or persons) that it declares.
    * What counts as honest follows from the job and the public size that also gives the site its weight: whoever declares few
      records may send a longer update, and weighs less.
    * Judging reads a noised update and public numbers, so it is post-processing: no epsilon changes.

With learning rate l_t, momentum m, weight decay w, noise multiplier sigma, clipping bound C, rate q, declared size n and a group
(adapter, or head with its own factor on l_t) of d coordinates:
    noise of a step    N(0, s^2) in each coordinate, s = sigma C / (q n)
    signal of a step   at most B = C K / (q n), with K units drawn of fewer than 2 n (Bernstein's bound on the binomial tail)
SGD is linear in the noisy gradients: the round's update is the sum of a_t g_t with weights a_t that follow from l_t, m and w, and
of earlier rounds' gradients, weakened by m, where momentum was kept; weight decay adds what it takes of known values. So
    upper    sum of a_t B, and s sqrt(sum of a_t^2) times the largest norm of d standard normal numbers
    lower    the noise of the steps t >= k is independent of all but the signals of the steps t > k: the update is at least
             s sqrt(sum over t >= k of a_t^2) times the smallest such norm (whatever it is added to: Anderson 1955), less
             the sum over t > k of a_t B; the best k counts
AdamW moves a coordinate by at most l_t R_t in step t, with R_t the largest ratio of its moments after t steps
(`largest_ratio_after`), whatever the gradients are; this is the upper bound of each coordinate, and there is no lower one, for
without noise its steps are just as long.

Norms of normal numbers: Laurent and Massart 2000, lemma 1. What an encoding loses, and adds one round later, is bounded by its
precision (`shared.wire.updates`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from shared.errors import AdapterError
from shared.job.job import Job
from shared.job.training import TrainingConfig
from shared.privacy.plan import PrivacyPlan
from shared.tensors.adapters import Shapes

FAILURE = 1e-9
"""Bound on the probability with which an honest update of one site and round is refused or flagged."""
_RARE = FAILURE / 10  # of each of the events whose probabilities add up
_BETA2 = 0.999
_TITLES = (("adapter", False), ("head", True))
_SLACK = 1.01  # sums in float32, and what an encoding lost of an earlier round's weight decay
_LOSS = {
    "float32": 0.0,
    "bfloat16": 2.0**-8,
    "int8": 1 / 254,
}  # of a tensor's largest value, at most, in each coordinate


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Tensors with one learning rate: the adapter or the head.

    Attributes:
        title: in errors.
        names: of the tensors.
        size: coordinates.
        factor: on the learning rate.
    """

    title: str
    names: tuple[str, ...]
    size: int
    factor: float


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How far the gradients of a round move a value that starts at one place.

    Attributes:
        steps: a_t, the move by a gradient of 1 in step t.
        history: the move by a momentum of 1 that was kept from earlier rounds.
        shrunk: the share of the start value that weight decay takes.
    """

    steps: Sequence[float]
    history: float
    shrunk: float

    @classmethod
    def of(cls, rates: Sequence[float], *, momentum: float, decay: float) -> Weights:
        """Return the weights of SGD as PyTorch computes it: b = m b + g + w x, then x = x - l b."""
        value, kept, steps = (
            1.0,
            0.0,
            [],
        )  # derivatives of the last value by value and momentum, from the last step backwards
        for rate in reversed(rates):
            kept -= rate * value
            steps.append(-kept)
            value, kept = value + decay * kept, momentum * kept
        return cls(steps=steps[::-1], history=-kept, shrunk=1.0 - value)


class UpdateBounds:
    """The bounds of one round of a job."""

    def __init__(
        self,
        job: Job,
        plan: PrivacyPlan,
        start: Mapping[str, Tensor],
        shapes: Shapes,
        number: int,
        *,
        earlier: Sequence[Mapping[str, float]] = (),
    ) -> None:
        """Prepare the bounds of a round.

        Args:
            job, plan: what the sites execute; where they add no noise, nothing is bounded.
            start: the global adapter that they start from.
            shapes: names and shapes of every update.
            number: of the round, 1-based.
            earlier: `adapter_norms` of the adapters that earlier rounds started from. Where weight decay and momentum come
                together and one of them is not known, as in a run of an older version, there is no upper bound.
        """
        self._plan, self._training, self._number = plan, job.training, number
        self._loss = _LOSS[job.federation.update_dtype]
        self._start, self._earlier = start, earlier
        self._before = (number - 1) * job.training.local_steps
        self._groups = list(_groups(shapes, job.training)) if plan.private else []
        # Each costs as much as a round has steps, and most of a thousand sites declare one of a few sizes.
        self._coordinate, self._shrunk = functools.cache(self._find_coordinate), functools.cache(self._find_shrunk)
        self._upper, self._lower = functools.cache(self._find_upper), functools.cache(self._find_lower)

    def check(self, update: Mapping[str, Tensor], declared: int) -> str | None:
        """Judge the update of a site that declares so many records or persons.

        Returns:
            What is suspicious about it, or None.

        Raises:
            AdapterError: if no honest site sends one so large.
        """
        doubts = []
        for group in self._groups:
            if self._training.optimizer == "adamw":
                self._check_coordinates(group, update)
            elif doubt := self._check_norm(group, update, declared):
                doubts.append(doubt)
        return "; ".join(doubts) or None

    def largest(self, group: str, declared: int) -> float:
        """Return the upper bound on the norm of a group of an update, "adapter" or "head"; infinity if there is none."""
        (found,) = (one for one in self._groups if one.title == group)
        if self._training.optimizer == "adamw":
            return math.sqrt(found.size) * self._coordinate(found)
        return self._upper(found, declared)

    def smallest(self, group: str, declared: int) -> float:
        """Return the lower bound likewise, of an update that is sent as it is; 0 if there is none."""
        (found,) = (one for one in self._groups if one.title == group)
        return 0.0 if self._training.optimizer == "adamw" else self._lower(found, declared)

    # --- AdamW: every coordinate ---

    def _check_coordinates(self, group: _Group, update: Mapping[str, Tensor]) -> None:
        bound, shrunk = self._coordinate(group), self._shrunk(group)
        for name in group.names:
            room = bound + shrunk * self._start[name].abs().double()
            excess = float((update[name].abs().double() / (_SLACK * room)).max()) if update[name].numel() else 0.0
            if not excess <= 1:
                raise AdapterError(
                    f"its update moves a value of {name!r} {excess:.3g} times as far as {self._training.local_steps} steps of "
                    f"adamw can by the job's learning rate; no honest site sends that, so it was left out"
                )

    def _find_coordinate(self, group: _Group) -> float:
        """Return how far a coordinate can move, but for weight decay, with what encodings carried over and lost."""
        number = self._training.local_steps

        def reach(before: int) -> float:
            return sum(
                rate * largest_ratio_after(before + step + 1, self._training.momentum, _BETA2)
                for step, rate in enumerate(self._rates(group, before))
            )

        now = reach(self._before)
        if not self._loss:
            return now
        earlier = self._training.learning_rate * group.factor * number
        earlier *= largest_ratio_after(max(self._before, 1), self._training.momentum, _BETA2) if self._before else 0.0
        lost = max(now, earlier) + self._shrunk(group) * max(
            float(self._start[name].abs().max()) for name in group.names
        )
        return now + 2 * self._loss / (1 - self._loss) * lost

    def _find_shrunk(self, group: _Group) -> float:
        left = math.prod(1 - rate * self._training.weight_decay for rate in self._rates(group, self._before))
        return 1 - left

    # --- SGD: the norm ---

    def _check_norm(self, group: _Group, update: Mapping[str, Tensor], declared: int) -> str | None:
        norm = norm_of(update, group.names)
        upper = self._upper(group, declared)
        if not norm <= _SLACK * upper:
            raise AdapterError(
                f"its update is {norm:.3g} long in the {group.title}; by the job's plan no honest one of a site that declares "
                f"{declared:,} {self._plan.unit}s is longer than {upper:.3g}, so it was left out"
            )
        lost = math.sqrt(
            sum((self._loss * float(update[name].abs().max())) ** 2 * update[name].numel() for name in group.names)
        )
        lower = self._lower(group, declared)
        if norm + lost < lower / _SLACK:
            return (
                f"its update is {norm:.3g} long in the {group.title}, but the noise that the plan prescribes to a site that "
                f"declares {declared:,} {self._plan.unit}s would alone make it {lower:.3g}: the site seems to add too little"
            )
        return None

    def _find_upper(self, group: _Group, declared: int) -> float:
        training = self._training
        weights = self._weights(self._rates(group, self._before))
        # Of earlier rounds; the schedule only lowers it.
        full = self._weights([training.learning_rate * group.factor] * training.local_steps)
        decayed = abs(weights.shrunk) * norm_of(self._start, group.names)
        if self._before and training.momentum and training.weight_decay:
            decayed += self._decay_kept(group, weights, full, declared)
        sent = self._reach(weights, group.size, declared) + decayed
        if not self._loss:
            return sent
        # A coordinate can hold all of the signal.
        coordinate = max(self._reach(one, 1, declared) for one in (weights, full)) + decayed
        return sent + 2 * self._loss / (1 - self._loss) * math.sqrt(group.size) * coordinate

    def _decay_kept(self, group: _Group, weights: Weights, full: Weights, declared: int) -> float:
        """Return how far the weight decay of earlier rounds moves the values, as the momentum that was kept holds it.

        A value of an earlier round was where that round started, plus what it was moved there, which such decay was part of.
        """
        training = self._training
        starts = [norms.get(group.title) for norms in self._earlier]
        if None in starts or len(starts) < self._number - 1:
            return math.inf
        kept = training.weight_decay / (1 - training.momentum)
        share = kept * max(abs(full.history), abs(weights.history))
        if share >= 1:
            return math.inf
        farthest = max(norm_of(self._start, group.names), *(start for start in starts if start is not None))
        values = (farthest + self._reach(full, group.size, declared)) / (1 - share)
        return abs(weights.history) * kept * values

    def _reach(self, weights: Weights, size: int, declared: int) -> float:
        """Return the largest norm of `size` coordinates of what gradients of this round and of earlier ones move."""
        signal, std = self._signal(declared), self._std(declared)
        momentum = self._training.momentum
        length = sum(abs(weight) for weight in weights.steps)
        square = sum(weight * weight for weight in weights.steps)
        if self._before and momentum:
            length += abs(weights.history) * (1 - momentum**self._before) / (1 - momentum)
            square += weights.history**2 * (1 - momentum ** (2 * self._before)) / (1 - momentum**2)
        # Of single coordinates the largest of all counts; there are fewer than 10^8 (`shared.privacy.mechanism`).
        rare = _RARE if size > 1 else _RARE / 1e8
        return length * signal + std * math.sqrt(square) * longest_noise(size, rare)

    def _find_lower(self, group: _Group, declared: int) -> float:
        signal, std = self._signal(declared), self._std(declared)
        noise = std * shortest_noise(group.size, _RARE)
        best = square = later = 0.0
        for weight in reversed(self._weights(self._rates(group, self._before)).steps):
            square += weight * weight
            best = max(best, noise * math.sqrt(square) - later)
            later += abs(weight) * signal
        return best

    def _weights(self, rates: Sequence[float]) -> Weights:
        return Weights.of(rates, momentum=self._training.momentum, decay=self._training.weight_decay)

    def _std(self, declared: int) -> float:
        plan = self._plan
        return plan.noise_multiplier * plan.max_grad_norm / plan.expected_batch_size(declared)

    def _signal(self, declared: int) -> float:
        """Return B, for all steps that this round's update remembers at once."""
        plan = self._plan
        steps = self._before + self._training.local_steps
        drawn = most_drawn(2 * declared - 1, plan.sample_rate, _RARE / steps)
        return plan.max_grad_norm * drawn / plan.expected_batch_size(declared)

    def _rates(self, group: _Group, before: int) -> list[float]:
        training = self._training
        return [group.factor * training.learning_rate_at(before + step) for step in range(training.local_steps)]


def norm_of(tensors: Mapping[str, Tensor], names: Iterable[str]) -> float:
    """Return the L2 norm of some tensors as one vector."""
    return math.sqrt(sum(float(tensors[name].double().square().sum()) for name in names))


def adapter_norms(adapter: Mapping[str, Tensor], shapes: Shapes) -> dict[str, float]:
    """Return the norms of what is trained of an adapter, by group: "adapter" and "head"."""
    groups = {title: [name for name in shapes if name.startswith("head.") == head] for title, head in _TITLES}
    return {title: norm_of(adapter, names) for title, names in groups.items() if names}


def longest_noise(size: int, failure: float) -> float:
    """Return what the norm of `size` standard normal numbers exceeds with at most this probability."""
    x = -math.log(failure)
    return math.sqrt(size + 2 * math.sqrt(size * x) + 2 * x)


def shortest_noise(size: int, failure: float) -> float:
    """Return what the norm of `size` standard normal numbers falls below with at most this probability."""
    return math.sqrt(max(size - 2 * math.sqrt(-size * math.log(failure)), 0.0))


def most_drawn(num_units: int, rate: float, failure: float) -> float:
    """Return how many of `num_units` a Poisson sample exceeds with at most this probability."""
    mean, x = num_units * rate, -math.log(failure)
    return min(mean + x / 3 + math.sqrt(x * x / 9 + 2 * mean * x), num_units)


def largest_ratio_after(steps: int, beta1: float, beta2: float) -> float:
    """Return a bound on Adam's |first moment| / sqrt(second), both corrected, after one to so many steps of any gradients.

    By Cauchy and Schwarz, of the sums that the moments are; it rises with the number of steps once it is above 1.
    """
    ratio = beta1**2 / beta2
    if steps * math.log(max(ratio, 1.0)) > 700:  # beyond what a float holds
        return math.inf
    terms = steps if ratio == 1 else (1 - ratio**steps) / (1 - ratio)
    square = ((1 - beta1) / (1 - beta1**steps)) ** 2 * (1 - beta2**steps) / (1 - beta2) * terms
    return max(1.0, math.sqrt(square))


def _groups(shapes: Shapes, training: TrainingConfig) -> list[_Group]:
    found = []
    for title, head in _TITLES:
        names = tuple(name for name in shapes if name.startswith("head.") == head)
        size = int(np.sum([shapes[name].numel() for name in names], dtype=int))
        if size:
            factor = training.head_learning_rate_factor if head else 1.0
            found.append(_Group(title=title, names=names, size=size, factor=factor))
    return found
