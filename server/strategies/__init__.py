"""Aggregation as small pure functions: updates in, next global adapter out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from server.strategies.exact import exact_lora_mean
from server.strategies.mean import weighted_mean
from server.strategies.optimizers import apply_update
from shared.config import AggregationConfig

Adapter = dict[str, Tensor]


def aggregate(
    current: Mapping[str, Tensor],
    updates: Sequence[Mapping[str, Tensor]],
    declared_records: Sequence[int],
    server_state: Mapping[str, Tensor],
    *,
    config: AggregationConfig,
    exact_scaling: float | None,
) -> tuple[Adapter, Adapter]:
    """Return (next global adapter, next state of the server optimiser).

    Args:
        current: the global adapter that the sites started from.
        updates: one delta per site, in an order that does not depend on arrival.
        declared_records: public size of each site, for weights "declared".
        server_state: state of the server optimiser, empty before the first round.
        config: weights and server optimiser of the job.
        exact_scaling: alpha / rank if both LoRA factors were trained and the mean of their products must be kept.
    """
    weights = [1.0] * len(updates) if config.weights == "equal" else [float(n) for n in declared_records]
    if exact_scaling is not None:
        return exact_lora_mean(current, updates, weights, exact_scaling), {}
    return apply_update(current, weighted_mean(updates, weights), server_state, config)


__all__ = ["Adapter", "aggregate", "apply_update", "exact_lora_mean", "weighted_mean"]
