"""Robust rules: what stands in for the mean where a site may poison its update.

All updates of a round are kept until the last came, in float32, so memory grows with the sites; a round that would need more
than `MOST_BYTES` is refused before anybody is asked. Updates are put in an order of their own before anything is computed, so
the order in which they came changes no bit (tests/server/aggregation/test_robust.py). A rule reads noised updates and public
weights only: it is post-processing, and no epsilon changes.

What the rules can and cannot do under noise, measured: docs/robust-aggregation.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import assert_never

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.aggregation.mean import WeightedMean
from shared.errors import ConfigError
from shared.job.federation import RobustRule
from shared.tensors.adapters import Shapes

MOST_BYTES = 2**30
"""Of the updates of one round, kept together."""
_BLOCK = 1 << 14  # coordinates that are sorted at once
_WEISZFELD_STEPS, _CLIPPING_STEPS = 50, 10
_NEAREST = 1e-9  # share of the median distance below which two points count as one

Rows = NDArray[np.float32]
Vector = NDArray[np.float64]


class RobustMean:
    """A robust rule over the updates of one round, each with a weight."""

    def __init__(self, rule: RobustRule, shapes: Shapes, asked_weight: int, *, num_sites: int, trim: float) -> None:
        """Begin a round.

        Args:
            rule: which.
            shapes: of every update.
            asked_weight: of everyone who may add an update.
            num_sites: how many those are.
            trim: share of the weight that the trimmed mean leaves out at each end.

        Raises:
            ConfigError: if their updates together would take more memory than `MOST_BYTES`.
        """
        size = sum(shape.numel() for shape in shapes.values())
        if 4 * size * num_sites > MOST_BYTES:
            raise ConfigError(
                f"aggregation.robust {rule!r} keeps the updates of all sites until the last has come: {num_sites:,} of "
                f"{4 * size / 1e6:,.1f} MB are more than the {MOST_BYTES / 2**30:g} GiB that are allowed. Set "
                "federation.sites_per_round, train fewer values, or set aggregation.robust to 'none'."
            )
        self._rule, self._trim, self._shapes = rule, trim, shapes
        self._checked = WeightedMean(shapes, asked_weight)  # bounds values and weights
        self._found: list[tuple[bytes, int]] = []

    def add(self, update: Mapping[str, Tensor], weight: int) -> None:
        """Keep one update.

        Raises:
            AdapterError: if a value is too large, NaN or infinite; nothing was kept.
        """
        self._checked.add(update, weight)
        row = np.concatenate([update[name].numpy().reshape(-1) for name in self._shapes])
        self._found.append((row.astype("<f4", copy=False).tobytes(), weight))

    def result(self) -> dict[str, Tensor]:
        """Return what stands in for the mean, float64.

        Raises:
            ValueError: if nothing was added.
        """
        if not self._found:
            raise ValueError("no update was added, so there is no mean")
        self._found.sort()
        rows = [np.frombuffer(row, "<f4") for row, _ in self._found]
        weights = np.array([weight for _, weight in self._found], np.float64)
        vector = torch.from_numpy(robust_mean(self._rule, rows, weights / weights.sum(), trim=self._trim))
        parts = torch.split(vector, [shape.numel() for shape in self._shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}


def robust_mean(rule: RobustRule, rows: Sequence[Rows], weights: Vector, *, trim: float) -> Vector:
    """Return what a rule makes of `rows`, one vector a site, with `weights` that add up to 1."""
    if rule == "trimmed_mean":
        return trimmed_mean(rows, weights, trim)
    if rule == "geometric_median":
        return geometric_median(rows, weights)
    if rule == "centred_clipping":
        return centred_clipping(rows, weights)
    if rule == "none":
        raise ValueError("no rule; the mean is `WeightedMean`")
    assert_never(rule)


def trimmed_mean(rows: Sequence[Rows], weights: Vector, trim: float) -> Vector:
    """Return the mean of each coordinate without the share `trim` of the weight at either end (Yin et al. 2018).

    A site that an end cuts through keeps the rest of its weight.
    """
    size = len(rows[0])
    result = np.empty(size)
    for begin in range(0, size, _BLOCK):
        block = np.stack([row[begin : begin + _BLOCK] for row in rows]).astype(np.float64)
        order = np.argsort(block, axis=0, kind="stable")
        ends = np.cumsum(weights[order], axis=0)
        kept = np.clip(ends, trim, 1 - trim) - np.clip(ends - weights[order], trim, 1 - trim)
        result[begin : begin + _BLOCK] = (np.take_along_axis(block, order, axis=0) * kept).sum(axis=0) / kept.sum(
            axis=0
        )
    return result


def geometric_median(rows: Sequence[Rows], weights: Vector) -> Vector:
    """Return the point with the least weighted sum of distances, by smoothed Weiszfeld steps (Pillutla et al. 2022)."""
    centre = _mean(rows, weights)
    for _ in range(_WEISZFELD_STEPS):
        distances = _distances(rows, centre)
        near = _NEAREST * weighted_median(distances, weights)
        if not near > 0:  # half of the weight is at one point
            return _mean(rows, weights * (distances == 0))
        pull = weights / np.maximum(distances, near)
        centre = _mean(rows, pull)
    return centre


def centred_clipping(rows: Sequence[Rows], weights: Vector) -> Vector:
    """Return the centre from which the clipped updates cancel (Karimireddy et al. 2021), found from zero.

    The radius is the weighted median of the distances from the centre, anew in every step.
    """
    centre = np.zeros(len(rows[0]))
    for _ in range(_CLIPPING_STEPS):
        distances = _distances(rows, centre)
        radius = weighted_median(distances, weights)
        share = weights * np.minimum(
            1.0, np.divide(radius, distances, out=np.ones_like(distances), where=distances > 0)
        )
        # centre + sum of share * (row - centre)
        centre = (1 - share.sum()) * centre + share.sum() * _mean(rows, share)
    return centre


def weighted_median(values: Vector, weights: Vector) -> float:
    """Return the smallest value at or below which lies half of the weight."""
    order = np.argsort(values, kind="stable")
    place = int(np.searchsorted(np.cumsum(weights[order]), 0.5 * weights.sum() * (1 - 1e-12)))
    return float(values[order][min(place, len(values) - 1)])


def _mean(rows: Sequence[Rows], weights: Vector) -> Vector:
    total = np.zeros(len(rows[0]))
    for row, weight in zip(rows, weights / weights.sum(), strict=True):
        total += weight * row.astype(np.float64)
    return total


def _distances(rows: Sequence[Rows], centre: Vector) -> Vector:
    return np.array([np.linalg.norm(row.astype(np.float64) - centre) for row in rows])
