"""Exact averaging of LoRA when both factors are trained.

The mean of the products is not the product of the means: mean(B_i A_i) != mean(B_i) mean(A_i). The difference is kept
as a dense residual of the frozen weight (FedEx-LoRA, Singhal et al. 2024), so the next global model computes with
exactly the mean of the sites' weights. Everything here reads released values only: it is post-processing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from server.strategies.mean import weighted_mean
from shared.models import RESIDUAL

_A, _B = ".lora_A.weight", ".lora_B.weight"


def exact_lora_mean(
    current: Mapping[str, Tensor],
    updates: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    scaling: float,
) -> dict[str, Tensor]:
    """Return the global adapter whose effective weights are the weighted mean of the sites' effective weights.

    Args:
        current: global adapter with factors, head and residuals [out, in].
        updates: per site, deltas of factors and head.
        weights: one positive number per update.
        scaling: alpha / rank.
    """
    mean = weighted_mean(updates, weights)
    following = {name: current[name] + mean[name] for name in mean}
    share = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    for name in current:
        if not name.endswith(RESIDUAL):
            continue
        module = name.removesuffix(RESIDUAL)
        key_a, key_b = module + _A, module + _B
        product = torch.zeros(current[name].shape, dtype=torch.float64)
        for part, update in zip(share, updates, strict=True):
            factor_a = (current[key_a] + update[key_a]).double()
            factor_b = (current[key_b] + update[key_b]).double()
            product += part * (factor_b @ factor_a)
        product -= following[key_b].double() @ following[key_a].double()
        following[name] = (current[name].double() + scaling * product).float()
    return following
