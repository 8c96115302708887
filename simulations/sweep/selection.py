"""What choosing the best of several private trials costs, if only the best one is released (Papernot and Steinke 2022).

The mechanism. Draw the number of trials K from a distribution that was fixed beforehand; run K times: choose a setting
uniformly at random, train it privately, score it on public data. Release the best trial, and nothing of the others, nor K.

Formal guarantees (tests: tests/simulations/sweep/test_sweep_selection.py)
    * `selection_epsilon` is an upper bound on epsilon, at the given delta, of the release of the best trial, under add or
      remove one record: theorem 2 of arXiv:2110.03620 for a truncated negative binomial K (geometric: eta = 1; logarithmic:
      eta = 0) and theorem 6 for a Poisson K, as dp-accounting computes them for `RepeatAndSelectDpEvent`. A trial's Rényi
      divergence is bounded, at each order, by the largest among the settings, since the setting is chosen independently of
      the data (test_epsilon_is_that_of_the_papers_formula, test_several_mechanisms_count_as_the_worst_at_each_order).
    * `draw_num_trials` draws from exactly that distribution, up to 2**-64, with the operating system's generator: a seed that
      somebody knows would reveal K, and the bound needs it hidden (test_draws_follow_the_distribution_and_reject_others).
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import count
from typing import Literal

import dp_accounting
import numpy as np
from dp_accounting.rdp import rdp_privacy_accountant
from numpy.typing import NDArray
from scipy.optimize import brentq

from shared.errors import ConfigError
from shared.privacy.accounting import GaussianSteps, check_delta

Distribution = Literal["geometric", "logarithmic", "poisson"]
DISTRIBUTIONS: tuple[Distribution, ...] = ("geometric", "logarithmic", "poisson")
MAX_MEAN = 1000.0
_SHAPES = {"geometric": 1.0, "logarithmic": 0.0, "poisson": math.inf}
# At whole orders a subsampled Gaussian's divergence is a finite sum; at others the accountant's series may not converge.
_WHOLE_ORDERS = (*range(2, 65), 80, 96, 128, 256, 512)
_ORDERS = (1.01, *(1 + step / 10 for step in range(1, 91)), *map(float, _WHOLE_ORDERS[9:]))


@dataclass(frozen=True, kw_only=True)
class NumTrials:
    """The distribution of the number of trials.

    Attributes:
        distribution: geometric and logarithmic give at least 1 trial; Poisson may give none, and then nothing is released.
        mean: expected number of trials, above 1.
    """

    distribution: Distribution
    mean: float

    def __post_init__(self) -> None:
        if self.distribution not in DISTRIBUTIONS:
            raise ConfigError(
                f"the number of trials is {self.distribution!r}; expected one of {', '.join(DISTRIBUTIONS)}."
            )
        if not 1 < self.mean <= MAX_MEAN:
            raise ConfigError(f"the mean number of trials is {self.mean:g}; expected above 1 and at most {MAX_MEAN:g}.")

    @property
    def shape(self) -> float:
        """eta of the paper: 1 geometric, 0 logarithmic, infinite Poisson."""
        return _SHAPES[self.distribution]

    def probabilities(self) -> Iterator[tuple[int, float]]:
        """Yield (k, P[K = k]) from the smallest k on, without end (definition 1 of the paper)."""
        if self.distribution == "poisson":
            for number in count():
                yield number, math.exp(number * math.log(self.mean) - self.mean - math.lgamma(number + 1))
        gamma = _gamma(self.distribution, self.mean)
        number, probability = 1, gamma if self.distribution == "geometric" else (1 - gamma) / -math.log(gamma)
        while True:
            yield number, probability
            probability *= (1 - gamma) * (number + self.shape) / (number + 1)
            number += 1


def draw_num_trials(law: NumTrials, *, draw: Callable[[int], int] = secrets.randbits) -> int:
    """Return one draw of K by inversion.

    Args:
        draw: returns that many uniform bits; another one than the operating system's is for tests only.
    """
    uniform = Fraction(draw(64), 2**64)
    below = Fraction(0)
    for number, probability in law.probabilities():
        below += Fraction(probability)
        # Rounding leaves some 1e-16 of the mass unassigned; the smallest terms stand for it.
        if uniform < below or (number > law.mean and probability < 1e-30):
            return number
    raise AssertionError("the probabilities have no end")


def selection_epsilon(mechanisms: Iterable[GaussianSteps], law: NumTrials, *, delta: float) -> float:
    """Return epsilon at `delta` of releasing the best of a random number of trials.

    Args:
        mechanisms: what a trial of each setting executes; one of them is chosen at random for every trial.
        law: distribution of the number of trials.
        delta: failure probability, in (0, 1).

    Returns:
        epsilon >= 0, `inf` if it cannot be bounded.

    Raises:
        ConfigError: if there is no mechanism.
    """
    check_delta(delta)
    curves = [_rdp_of_one(mechanism) for mechanism in sorted(set(mechanisms))]
    if not curves:
        raise ConfigError("there is no setting to select from; name the values of an axis.")
    worst = np.max(np.stack(curves), axis=0)
    released = rdp_privacy_accountant._compute_rdp_repeat_and_select(_ORDERS, worst, law.mean, law.shape)
    epsilon, _ = rdp_privacy_accountant.compute_epsilon(_ORDERS, released, delta)
    return float(epsilon)


def _rdp_of_one(mechanism: GaussianSteps) -> NDArray[np.float64]:
    """Return an upper bound on the Rényi divergence of one trial at each of `_ORDERS`.

    Between whole orders by interpolation: (order - 1) times the divergence is convex in the order, and 0 at order 1, so chords
    lie above it (van Erven and Harremoës 2014, corollary 2).
    """
    accountant = rdp_privacy_accountant.RdpAccountant(
        list(_WHOLE_ORDERS), dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    )
    step = dp_accounting.PoissonSampledDpEvent(
        mechanism.sample_rate, dp_accounting.GaussianDpEvent(mechanism.noise_multiplier)
    )
    accountant.compose(step, mechanism.steps)
    above_one = np.array([0, *(order - 1 for order in _WHOLE_ORDERS)], dtype=np.float64)
    convex = above_one * np.array([0, *accountant.rdp], dtype=np.float64)
    wanted = np.array(_ORDERS) - 1
    return np.asarray(np.interp(wanted, above_one, convex) / wanted, dtype=np.float64)


def _gamma(distribution: Distribution, mean: float) -> float:
    """Return the paper's gamma for a mean (definition 1): closed for eta = 1, solved for eta = 0."""
    if distribution == "geometric":
        return 1 / mean

    def excess(log_gamma: float) -> float:
        # mean = (1/gamma - 1) / log(1/gamma)
        return math.expm1(-log_gamma) / -log_gamma - mean

    # The mean falls from infinity to 1 as gamma goes from 0 to 1.
    return math.exp(float(brentq(excess, -60.0, -1e-12, xtol=1e-15, rtol=1e-14)))
