"""Server optimisers: the mean update is a pseudo-gradient (Reddi et al. 2021, "Adaptive Federated Optimization")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import assert_never

import torch
from torch import Tensor

from shared.job.federation import AggregationConfig

_BETA2 = 0.99
_EPSILON = 1e-8


def apply_update(
    current: Mapping[str, Tensor],
    mean: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    config: AggregationConfig,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return (next adapter, next state).

    Args:
        current: global adapter.
        mean: mean of the sites' deltas, same names.
        state: moments by "name|m", "name|v" and the step counter "|step"; empty before the first round.
        config: `none` adds learning rate times mean; `momentum` is FedAvgM; `adam` is FedAdam with bias correction.
    """
    rate, beta = config.server_learning_rate, config.server_momentum
    if config.server_optimizer == "none":
        return {name: current[name] + rate * mean[name] for name in mean}, {}
    step = state.get("|step", torch.zeros(())) + 1
    following: dict[str, Tensor] = {"|step": step}
    adapter: dict[str, Tensor] = {}
    for name, update in mean.items():
        zero = torch.zeros_like(update)
        first = state.get(f"{name}|m", zero)
        if config.server_optimizer == "momentum":
            first = beta * first + update
            direction = first
        elif config.server_optimizer == "adam":
            second = _BETA2 * state.get(f"{name}|v", zero) + (1 - _BETA2) * update.square()
            first = beta * first + (1 - beta) * update
            following[f"{name}|v"] = second
            corrected = second / (1 - _BETA2 ** float(step))
            direction = first / (1 - beta ** float(step)) / (corrected.sqrt() + _EPSILON)
        else:
            assert_never(config.server_optimizer)
        following[f"{name}|m"] = first
        adapter[name] = current[name] + rate * direction
    return adapter, following
