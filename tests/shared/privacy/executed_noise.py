"""What a run of noisy sums executed, against what its statement says; for tests of every way by which sums are added up.

Of a thousand correct runs about six are found at fault, so that a test with a fixed seed passes for good or never.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from shared.privacy.shares import GRID_STEPS

LEVEL = 1e-3  # of each finding


def faults_of_noise(noise: NDArray[np.int64], variances: NDArray[np.float64]) -> list[str]:
    """Return what is wrong with the noise of many sums: nothing, or some of "too little", "too much", "reused".

    Args:
        noise: opened sums less the exact sums of what sites drew, in steps of the grid, shape [sums, coordinates].
        variances: of the noise that each sum should hold, in steps squared, shape [sums].
    """
    unit = noise / np.sqrt(variances)[:, None]
    found = []
    low, high = stats.chi2.interval(1 - LEVEL, unit.size)
    square = float((unit**2).sum())
    if square < low:
        found.append("too little")
    if square > high:
        found.append("too much")
    # Noise of one sum that is in another as well, of one coordinate in another, or in all of them a little.
    for values in (unit, unit.T):
        low, high = stats.chi2.interval(1 - LEVEL, values.shape[1])
        together = values.sum(axis=0) / math.sqrt(len(values))
        if not low <= float((together**2).sum()) <= high or _most_alike(values) > 1:
            found.append("reused")
            break
    return found


def _most_alike(values: NDArray[np.float64]) -> float:
    """Return the largest correlation of two rows, or of all rows at one distance, in units of what independent ones have."""
    count, size = values.shape
    norms = np.linalg.norm(values, axis=1)
    alike = values @ values.T / np.outer(norms, norms) * math.sqrt(size)
    distances = np.arange(1, count)
    at_distance = [abs(alike.trace(int(apart))) / math.sqrt(count - apart) for apart in distances]
    pairs = count * (count - 1) / 2
    return float(
        max(
            np.abs(np.triu(alike, 1)).max() / stats.norm.isf(LEVEL / 2 / pairs),
            max(at_distance) / stats.norm.isf(LEVEL / 2 / len(distances)),
        )
    )


def moves_by_at_most_the_bound(with_unit: NDArray[np.uint64], without: NDArray[np.uint64]) -> bool:
    """Return whether one unit moved a site's words by at most the clipping bound, without rounding.

    Args:
        with_unit, without: words of equal noise, shape [coordinates].
    """
    return sum(int(step) ** 2 for step in (with_unit - without).view(np.int64)) <= GRID_STEPS**2
