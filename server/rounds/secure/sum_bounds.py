"""How long the sum of a round can be, from the job's plan and the declared sizes alone; no other sum is used.

One site can add anything to a sum, and nobody can tell which one did. What is possible is judged by the sum itself, before
anything of it may touch the adapter: an adapter that the sites do not take any more would end the run for good.

Guarantees (tests: tests/server/rounds/secure/test_sum_bounds.py)
    * A sum of honest sites is refused with probability below 1e-9 in a round, whatever their records are, as long as each holds
      fewer than twice the records (or persons) that it declares.
    * Whatever passes moves no coordinate further than every site grants an honest round (`client.training.adapter_bounds`), so
      the next adapter is not refused because of it.
    * Judging reads the opened sum and public numbers: post-processing, no epsilon changes.

In steps of the grid, S = 2^24 of them in the clipping bound, with N sites of declared sizes n_i, rate q, d coordinates, and v the
variance of one share:
    signal   at most K units drawn of M = sum of (2 n_i - 1), each a vector of norm at most S: norm and coordinates at most K S
    noise    N shares, sub-Gaussian with parameter N v (Canonne, Kamath, Steinke 2020, corollary 17)
    norm     K S + sqrt(N v) times the largest norm of d such numbers of parameter 1 (Hsu, Kakade, Zhang 2012: as of normal ones)
    one      K S + sqrt(N v) z, with 2 d exp(-z^2 / 2) the probability that any coordinate of the noise is larger
K by Bernstein's bound on the binomial tail. Each of the three events has a probability of at most 1e-10.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from server.rounds.update_bounds import longest_noise, most_drawn
from shared.privacy.plan import PrivacyPlan
from shared.privacy.shares import GRID_STEPS, share_variance

_RARE = 1e-10


class SumBounds:
    """The bounds on one opened sum.

    Attributes:
        norm: largest L2 norm, in steps of the grid.
        coordinate: largest absolute value of a coordinate, in steps of the grid.
    """

    def __init__(self, plan: PrivacyPlan, declared: Sequence[int], num_words: int) -> None:
        """Compute the bounds.

        Args:
            plan: of one site's share.
            declared: size of each site in the sum.
            num_words: coordinates.
        """
        units = sum(2 * size - 1 for size in declared)
        signal = GRID_STEPS * most_drawn(units, plan.sample_rate, _RARE)
        deviation = math.sqrt(len(declared) * share_variance(plan.noise_multiplier))
        self.norm = signal + deviation * longest_noise(num_words, _RARE)
        self.coordinate = signal + deviation * math.sqrt(2 * math.log(2 * num_words / _RARE))

    def problem(self, total: NDArray[np.int64]) -> str | None:
        """Return in what a sum is beyond the bounds, in units of the clipping bound C; None if it is not.

        Args:
            total: the opened sum, shape [coordinates].
        """
        values = total.astype(np.float64)  # the least whole number has no positive counterpart among them
        for what, found, most in (
            ("is {} C long", float(np.linalg.norm(values)), self.norm),
            ("has a coordinate of {} C", float(np.max(np.abs(values))), self.coordinate),
        ):
            if not found <= most:
                return f"{what.format(f'{found / GRID_STEPS:.3g}')}, where honest ones reach {most / GRID_STEPS:.3g} C"
        return None
