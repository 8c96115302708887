"""Privacy loss distributions of dp-accounting, with its three loops over single cells as array arithmetic.

The distributions are dp-accounting's own objects: its grid, its pessimistic discretisation (connect the dots), its
composition, its truncation of tails into the mass of infinite loss. Written anew, from the same formulas, is what it
computes one cell at a time in Python, which takes nine tenths of the time: at which noise a loss is met, the Chernoff bounds
on the support of a composition, and the sum over the tail from which epsilon follows.

Formal guarantee
    * Grid, tails and transforms are dp-accounting's: probabilities agree to 1e-12, and epsilon to 1e-7 at a delta of 1e-6 or
      more; at smaller ones the rounding of transforms shows in both (tests/shared/test_loss_distribution.py).

Sources: Doroshenko, Ghazi, Kamath, Kumar, Manurangsi 2022 (connect the dots); Koskela, Jälkö, Honkela 2020 (Fourier
transform); `dp_accounting.pld`, whose functions each docstring names.
"""

from __future__ import annotations

import math
from typing import Any

import dp_accounting  # noqa: F401 (its modules import one another; this order works)
import numpy as np
from dp_accounting.pld.pld_pmf import DensePLDPmf, create_pmf_pessimistic_connect_dots_fixed_gap
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss
from numpy.typing import NDArray
from scipy import fft

# Probability of the two tails of a composition that is counted as infinite loss; dp-accounting's default.
_TAIL = 1e-15
_CHERNOFF_ORDERS = 20


class LossDistribution:
    """Loss of one or more steps for a record that is removed and for one that is added; the worse of the two counts."""

    def __init__(self, removed: DensePLDPmf, added: DensePLDPmf | None) -> None:
        self._removed = removed
        self._added = added  # None: the same

    @classmethod
    def of_one_step(cls, noise_multiplier: float, sample_rate: float, cell: float) -> LossDistribution:
        """Return the distribution of one Poisson-subsampled Gaussian step on a grid of width `cell`."""
        removed, added = (
            _discretised(_Gaussian(noise_multiplier, sampling_prob=sample_rate, adjacency_type=direction), cell)
            for direction in (AdjacencyType.REMOVE, AdjacencyType.ADD)
        )
        # Without sampling the two are one, as in `dp_accounting.pld.privacy_loss_distribution`.
        return cls(removed, added if sample_rate < 1 else None)

    def self_compose(self, steps: int) -> LossDistribution:
        """Return the distribution of `steps` steps like this one."""
        return LossDistribution(
            _self_composed(self._removed, steps), None if self._added is None else _self_composed(self._added, steps)
        )

    def compose(self, other: LossDistribution) -> LossDistribution:
        """Return the distribution of this and the other, one after the other."""
        removed = self._removed.compose(other._removed, _TAIL)
        if self._added is None and other._added is None:
            return LossDistribution(removed, None)
        added = (self._added or self._removed).compose(other._added or other._removed, _TAIL)
        return LossDistribution(removed, added)

    def epsilon(self, delta: float) -> float:
        """Return the smallest epsilon >= 0 at `delta`, in both directions; `inf` if there is none."""
        return max(_epsilon(self._removed, delta), 0.0 if self._added is None else _epsilon(self._added, delta))


class _Gaussian(GaussianPrivacyLoss):  # type: ignore[misc]
    """dp-accounting's subsampled Gaussian, with the divergence of all cells at once."""

    def get_delta_for_epsilon(self, epsilon: Any) -> NDArray[np.float64]:
        """`AdditiveNoisePrivacyLoss.get_delta_for_epsilon` for an array, by the same formulas."""
        q = self.sampling_prob
        epsilons = np.asarray(epsilon, dtype=np.float64)
        removed = self.adjacency_type == AdjacencyType.REMOVE
        sign = 1.0 if removed else -1.0
        if q == 1.0:
            unsampled, possible = epsilons, np.full(epsilons.shape, True)
        else:
            # A loss cannot go below log(1 - q) if the record is removed, or above -log(1 - q) if it is added.
            possible = sign * epsilons > math.log1p(-q)
            # `common.log_a_times_exp_b_plus_c`: log(exp(b) / q - (1 / q - 1)), b = +- epsilon.
            first = sign * epsilons[possible] + np.log(1 / q)
            ratio = np.minimum(np.exp(np.log(1 / q - 1) - first), 1.0)  # above 1 only by rounding, at the edge
            with np.errstate(divide="ignore"):
                unsampled = sign * (first + np.log1p(-ratio))
        cut = -0.5 - unsampled * self._standard_deviation**2 + (0.0 if removed else 1.0)
        # Where no loss is above epsilon the divergence is 0, where every loss is it is 1 - exp(epsilon).
        deltas: NDArray[np.float64] = -np.expm1(epsilons) if removed else np.zeros_like(epsilons)
        deltas[possible] = self.mu_upper_cdf(cut) - np.exp(epsilons[possible] + self.mu_lower_log_cdf(cut))
        return np.clip(deltas, 0.0, 1.0)


def _discretised(loss: _Gaussian, cell: float) -> DensePLDPmf:
    """`privacy_loss_distribution._create_pld_pmf_from_monotone_privacy_loss` with connect-the-dots."""
    bounds = loss.connect_dots_bounds()
    low, high = math.floor(bounds.epsilon_lower / cell), math.ceil(bounds.epsilon_upper / cell)
    deltas = loss.get_delta_for_epsilon(np.arange(low, high + 1) * cell)
    return create_pmf_pessimistic_connect_dots_fixed_gap(cell, low, high, deltas).to_dense_pmf()


def _self_composed(pmf: DensePLDPmf, steps: int) -> DensePLDPmf:
    """`DensePLDPmf.self_compose`, whose bounds take more time than its transforms."""
    probs = pmf._probs
    low, high = _chernoff_bounds(probs, steps)
    length = high - low + 1
    # Complex as there, though probabilities are real: the rounding of transforms is then the same to the last bit.
    size = fft.next_fast_len(max(length, len(probs)))
    composed = np.real(fft.ifft(fft.fft(probs, size) ** steps))
    # What wraps around lies outside the bounds: at most the mass of the tails, which is counted as infinite loss.
    composed = np.roll(composed, -low)[:length]
    infinite = _TAIL - math.expm1(steps * math.log1p(-pmf._infinity_mass))
    return DensePLDPmf(pmf._discretization, pmf._lower_loss * steps + low, composed, infinite, True)


def _chernoff_bounds(probs: NDArray[np.float64], steps: int) -> tuple[int, int]:
    """`common.compute_self_convolve_bounds`: outside of these cells a composition has at most the mass `_TAIL`."""
    low, high = 0, (len(probs) - 1) * steps
    factor = np.exp(np.arange(len(probs)) / len(probs))
    allowed = math.log(2 / _TAIL)
    for sign in (1, -1):
        weighted = probs
        for order in range(1, _CHERNOFF_ORDERS + 1):
            weighted = weighted * factor if sign > 0 else weighted / factor
            bound = (steps * math.log(weighted.sum()) + allowed) * len(probs) / (sign * order)
            low, high = (low, min(high, math.ceil(bound))) if sign > 0 else (max(low, math.floor(bound)), high)
    return low, high


def _epsilon(pmf: DensePLDPmf, delta: float) -> float:
    """`DensePLDPmf.get_epsilon_for_delta`: the epsilon at which mass above it, less e^epsilon times theirs, is delta."""
    if pmf._infinity_mass > delta:
        return math.inf
    losses = (pmf._lower_loss + np.arange(len(pmf._probs) - 1, -1, -1)) * pmf._discretization
    probs = np.flip(pmf._probs)
    with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore"):
        upper = pmf._infinity_mass + np.cumsum(probs)  # P(loss >= this one)
        lower = np.cumsum(probs * np.exp(-losses))  # the same of the other distribution
        crossed = np.log((upper - delta) / lower)  # epsilon, if exactly these losses are above it
    # The first cell, from the top, that lies at or below the epsilon of those above it: it is not among them.
    stops = np.flatnonzero((upper[:-1] > delta) & (lower[:-1] > 0) & (crossed[:-1] >= losses[1:]))
    last = int(stops[0]) if len(stops) else len(probs) - 1
    vanished = np.flatnonzero((upper[: last + 1] >= delta) & (lower[: last + 1] == 0))
    if len(vanished):  # exp(-loss) is 0 in double precision
        return max(0.0, float(losses[vanished[0]]))
    if upper[last] <= lower[last] + delta:
        return 0.0
    return float(crossed[last])
