"""Noise shares: a site's clipped sum in whole steps of a grid, and the site's part of the noise that is on the sum of all sites.

A step of the grid is C / 2^24. Every site adds its share to its own sum and sends the result modulo 2^64 under masks. Whoever
sees only the sum of the sites sees the noise of them all.

Formal guarantees (relation: add or remove one unit, a record or a person; tests: tests/shared/privacy/test_shares.py)
    * A unit moves `IntegerSum.total` by whole numbers of an L2 norm of at most 2^24, hence by at most C: its clipped vector is
      cut *towards zero*, so no coordinate grows, and sums of integers are exact whatever their order and micro-batches
      (test_one_example_moves_the_total_by_at_most_the_bound). Rounding to the nearest step could add sqrt(d) / 2 steps to a unit,
      and to the site's sum the more where it is rounded once (test_fault_rounding_to_nearest).
    * A share is discrete Gaussian with parameter `share_variance`, never less than (noise_multiplier C)^2, drawn exactly
      (test_shares_have_their_variance). Nothing is clamped after it was added: whoever clamps tells that a sum was large.
    * The noise of H shares, each with noise multiplier sigma, protects as the accountant's Gaussian of sigma sqrt(H) does, up to
      1e-120 in epsilon over any job: a discrete Gaussian of that variance is a continuous one that was rounded at random
      (tests/shared/privacy/test_share_law.py; executed noise: tests/shared/privacy/test_aggregate_noise.py).
    * No sum wraps around: `check_reach` refuses a job in which one might.

Sources: Kairouz, Liu, Steinke 2021 (arXiv:2102.06387), sums of discrete Gaussians; Canonne, Kamath, Steinke 2020.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.epsilons import noise_rounded_down
from shared.errors import PrivacyError
from shared.privacy.discrete_gaussian import discrete_gaussian
from shared.privacy.mechanism import ClippedSum
from shared.privacy.randomness import KeyStream

GRID_STEPS = 1 << 24
"""Steps of the grid in the clipping bound C."""

SMOOTHING = 16
"""Variance on top, in steps squared: by so much smoothed, whole numbers look like all numbers, up to 1e-136."""

_REACH = 1 << 62
# Standard deviations of the noise that count as its largest value: above them lies less than 2 exp(-128) of it (Canonne, Kamath,
# Steinke 2020, corollary 17), so that of 1e8 coordinates in 2^24 steps any is there with a probability below 2^-130.
_FURTHEST = 16


class IntegerSum(ClippedSum):
    """Sum of per-example gradients, each clipped to `max_grad_norm` and cut towards zero to whole steps of the grid."""

    _dtype = torch.int64

    def _as_added(self, clipped: Tensor) -> Tensor:
        # Up to 2^24 each, so that sums of a micro-batch are exact in float64 too. What the factor's rounding adds to a norm, the
        # margin of the clipping holds.
        return clipped.mul_(GRID_STEPS / self._max_grad_norm).trunc_()

    @property
    def sums(self) -> list[Tensor]:
        """The clipped sums in units of a gradient, float64 on the CPU, one per parameter."""
        return [part.double() * (self._max_grad_norm / GRID_STEPS) for part in self._sums]

    @property
    def total(self) -> NDArray[np.int64]:
        """The sum in steps of the grid over all parameters, flat, shape [coordinates]."""
        found: NDArray[np.int64] = self._total.numpy()
        return found


def share_variance(noise_multiplier: float, grid_steps: int = GRID_STEPS) -> int:
    """Return the parameter sigma^2 of a share in steps squared: (noise_multiplier grid_steps)^2, rounded up, and `SMOOTHING`.

    Args:
        noise_multiplier: of one site's share, in units of the clipping bound, > 0.
        grid_steps: steps of the grid in the clipping bound.
    """
    if not (math.isfinite(noise_multiplier) and noise_multiplier > 0):
        raise PrivacyError(f"the noise multiplier of a share is {noise_multiplier}; expected a finite number above 0.")
    return math.ceil((Fraction(noise_multiplier) * grid_steps) ** 2) + SMOOTHING


def with_share(total: NDArray[np.int64], *, noise_multiplier: float, stream: KeyStream) -> NDArray[np.uint64]:
    """Return a site's sum with its share of the noise, modulo 2^64: the words that are masked.

    Args:
        total: `IntegerSum.total`, shape [coordinates].
        noise_multiplier: of one site's share.
        stream: private randomness of this one sum.
    """
    share = discrete_gaussian(share_variance(noise_multiplier), len(total), stream)
    return (total + share).view(np.uint64)


def gradient_of(
    total: NDArray[np.int64], shapes: Sequence[torch.Size], *, max_grad_norm: float, expected_batch_size: float
) -> list[Tensor]:
    """Return the mean gradient of a noisy sum over sites: float32, one tensor per parameter.

    Args:
        total: sum of the sites' words, opened, shape [coordinates].
        shapes: of the parameters, in order.
        max_grad_norm: the clipping bound C.
        expected_batch_size: sampling rate times the declared sizes of the sites in the sum.
    """
    flat = torch.from_numpy(total * (max_grad_norm / GRID_STEPS / expected_batch_size)).float()
    parts = torch.split(flat, [shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def check_sizes(declared: Sequence[int], *, noise_multiplier: float) -> None:
    """Raise `PrivacyError` if a sum of sites could wrap around, each of fewer than twice the units that it declares."""
    check_reach(num_units=2 * sum(declared), num_sites=len(declared), noise_multiplier=noise_multiplier)


def check_reach(*, num_units: int, num_sites: int, noise_multiplier: float) -> None:
    """Raise `PrivacyError` if the sum over all sites could pass 2^62 steps, were every unit drawn and the noise at its largest.

    Args:
        num_units: most records, or persons, that all sites together can hold.
        num_sites: shares in the sum.
        noise_multiplier: of one site's share.
    """
    noise = _FURTHEST * math.isqrt(num_sites * share_variance(noise_multiplier)) + _FURTHEST
    if num_units * GRID_STEPS + noise > _REACH:
        most = max((_REACH - noise) // GRID_STEPS, 0)
        raise PrivacyError(
            f"with {num_units:,} records or persons at {num_sites:,} sites a noisy sum could pass 2^62 steps of its grid and "
            f"wrap around; at noise multiplier {noise_rounded_down(noise_multiplier)} there may be {most:,}. Admit fewer or "
            "smaller sites."
        )
