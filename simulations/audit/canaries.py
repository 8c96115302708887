"""Gradient canaries: the strongest observer of a one-run audit, who sees every noisy sum and knows every canary's gradient.

Guarantee (test: tests/simulations/audit/test_one_run_audit.py): the coins reach the mechanism only through the records that it is
given, so `simulations.audit.one_run` may judge the scores.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dct

from shared.privacy.plan import PrivacyPlan
from simulations.audit.mechanism import Release
from simulations.audit.one_run import Training, draw_coins

Array = NDArray[np.float64]

GRADIENT_NORM = 100.0
"""Norm of a canary's gradient in units of the clipping bound: clipping makes it 1, a missing clip does not."""


def orthonormal_directions(count: int, *, seed: int) -> Array:
    """Return `count` orthonormal rows in as many dimensions, each spread over all coordinates, hence adapter and head."""
    signs = np.random.default_rng([seed, 1]).choice([-1.0, 1.0], size=count)
    rows: Array = dct(np.eye(count), norm="ortho", axis=0) * signs
    return rows


def train_on_gradient_canaries(release: Release, plan: PrivacyPlan, *, num_canaries: int, seed: int) -> Training:
    """Train once on those canaries whose coin says "in", and score all of them.

    Args:
        release: the mechanism, for `num_canaries` trainable weights and `plan.planned_steps` steps.
        plan: what is claimed.
        seed: public seed of coins and directions; the mechanism draws its own randomness.
    """
    directions = orthonormal_directions(num_canaries, seed=seed)
    included = draw_coins(num_canaries, seed=seed)
    sums = release(plan, directions[included] * GRADIENT_NORM * plan.max_grad_norm)
    seen = sums @ directions.T / plan.max_grad_norm  # [steps, canaries]: 1 where sampled, plus noise
    return Training(scores=log_likelihood_ratio(seen, plan), included=included)


def log_likelihood_ratio(seen: Array, plan: PrivacyPlan) -> Array:
    """Return ln P(seen | in) / P(seen | out) of each canary under `plan`: the most powerful score (Neyman, Pearson 1933).

    Args:
        seen: components of the noisy sums along the canaries, in units of the clipping bound, [steps, canaries].
    """
    exponent = (seen - 0.5) / plan.noise_multiplier**2
    if plan.sample_rate < 1:
        exponent = np.logaddexp(np.log1p(-plan.sample_rate), np.log(plan.sample_rate) + exponent)
    ratio: Array = exponent.sum(axis=0)
    return ratio
