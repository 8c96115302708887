"""How many texts of each class there are, when a classifier that errs has counted them.

Predicted shares are biased: where 5 % are positive, and the classifier takes 80 % of these and 20 % of the others for it, 23 %
are predicted. The *adjusted count* undoes that with the rates at which the classifier errs, known from labelled evaluation
records (Forman 2008, "Quantifying counts and costs via classification"; with several classes, Vucetic and Obradovic 2001).

Guarantees (tests: tests/shared/tools/monitor/test_quantification.py)
    * Exact counts of predictions that come from known shares through the matrix give these shares back.
    * The 95 % interval covers the true share about that often, sampling of window and of evaluation records taken together.

Assumption, which no test of the predictions alone can check: P(prediction | true class) is what it was on the evaluation records;
only the shares of the classes change. A new kind of text within a class breaks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
_MOST_NUMBERS = 2_000_000  # held for the draws of the interval


class Adjusted(NamedTuple):
    """An adjusted share and its 95 % interval, in [0, 1]."""

    share: float
    low: float
    high: float


class AdjustedCount:
    """Adjusts the counts of a classifier by its confusion matrix."""

    def __init__(self, confusion: Sequence[Sequence[int]], *, draws: int = 1000, seed: int = 0) -> None:
        """Prepare from a confusion matrix.

        Args:
            confusion: rows are true classes, columns predicted ones; every class has a record.
            draws: of the parametric bootstrap; fewer are taken where there are many classes.
            seed: of the bootstrap, so that the same counts give the same interval.

        Raises:
            ValueError: if a class has no evaluation record.
        """
        counts = np.asarray(confusion, dtype=np.int64)
        if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or (counts.sum(axis=1) == 0).any():
            raise ValueError("a confusion matrix needs a record of every class")
        self._seed = seed
        generator = np.random.default_rng(seed)
        self._draws = max(100, min(draws, _MOST_NUMBERS // counts.size))
        rates = counts / counts.sum(axis=1, keepdims=True)
        drawn = np.stack(
            [
                generator.multinomial(row.sum(), rate, self._draws) / row.sum()
                for row, rate in zip(counts, rates, strict=True)
            ],
            axis=1,
        )
        # Predicted shares are rates^T times true shares.
        self._inverse = np.linalg.pinv(rates.T)
        self._inverses = np.linalg.pinv(drawn.transpose(0, 2, 1))

    def shares(self, counts: Sequence[int]) -> Matrix:
        """Return the adjusted share of each class [K], without intervals."""
        found = np.asarray(counts, dtype=np.float64) / sum(counts)
        adjusted: Matrix = to_simplex((self._inverse @ found)[None])[0]
        return adjusted

    def __call__(self, counts: Sequence[int]) -> list[Adjusted]:
        """Return for each class its adjusted share, from the predicted counts (at least one)."""
        found = np.asarray(counts, dtype=np.float64) / sum(counts)
        windows = np.random.default_rng(self._seed).multinomial(sum(counts), found, self._draws) / sum(counts)
        drawn = to_simplex(np.einsum("dij,dj->di", self._inverses, windows))
        low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
        return [
            Adjusted(float(share), float(min(a, share)), float(max(b, share)))
            for share, a, b in zip(self.shares(counts), low, high, strict=True)
        ]


def to_simplex(rows: Matrix) -> Matrix:
    """Return the nearest shares (at least 0, sum 1) of every row [N, K], by Euclidean distance (Duchi et al. 2008)."""
    ordered = np.sort(rows, axis=1)[:, ::-1]
    excess = (np.cumsum(ordered, axis=1) - 1) / np.arange(1, rows.shape[1] + 1)
    last = (ordered > excess).sum(axis=1) - 1
    found: Matrix = np.maximum(rows - excess[np.arange(len(rows)), last][:, None], 0)
    return found
