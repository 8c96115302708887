"""Weighted mean of updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def weighted_mean(updates: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return sum(w_i * update_i) / sum(w_i) by name, accumulated in float64, returned in float32.

    Args:
        updates: at least one; all with the same names and shapes.
        weights: one positive number per update.

    Raises:
        ValueError: if there is no update or a weight is not positive.
    """
    if not updates or len(updates) != len(weights) or min(weights) <= 0:
        raise ValueError(f"{len(updates)} updates with weights {list(weights)}; expected one positive weight for each")
    total = sum(weights)
    mean: dict[str, Tensor] = {}
    for name, first in updates[0].items():
        accumulated = torch.zeros(first.shape, dtype=torch.float64)
        for update, weight in zip(updates, weights, strict=True):
            accumulated.add_(update[name].double(), alpha=weight / total)
        mean[name] = accumulated.float()
    return mean
