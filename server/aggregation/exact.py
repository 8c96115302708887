"""Exact averaging of LoRA when both factors are trained.

The mean of the products is not the product of the means: mean(B_i A_i) != mean(B_i) mean(A_i). The difference is kept
as a dense residual of the frozen weight (FedEx-LoRA, Singhal et al. 2024), so the next global model computes with
exactly the mean of the sites' weights. Everything here reads released values only: it is post-processing.

With B_i = B + b_i and A_i = A + a_i the mean is B A + B mean(a_i) + mean(b_i) A + mean(b_i a_i). The sums that it takes, of
a_i, b_i and b_i a_i, grow by one site at a time.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from server.aggregation.mean import WeightedMean
from shared.models.tunable import RESIDUAL
from shared.tensors.adapters import Shapes

_A, _B = ".lora_A.weight", ".lora_B.weight"


class ExactLoraMean:
    """The global adapter whose effective weights are the weighted mean of the sites' effective weights.

    The order of adding changes no bit: the product of one site's factors is computed from them alone, and all sums are
    `WeightedMean`s.
    """

    def __init__(self, current: Mapping[str, Tensor], shapes: Shapes, asked_weight: int, scaling: float) -> None:
        """Begin a mean.

        Args:
            current: global adapter with factors, head and residuals [out, in].
            shapes: of every update: factors and head.
            asked_weight: of everyone who may add an update.
            scaling: alpha / rank.
        """
        self._current, self._scaling = current, scaling
        self._modules = [name.removesuffix(RESIDUAL) for name in current if name.endswith(RESIDUAL)]
        self._updates = WeightedMean(shapes, asked_weight)
        full = {module: current[module + RESIDUAL].shape for module in self._modules}
        self._products = WeightedMean(full, asked_weight, dtype=np.float64)

    def add(self, update: Mapping[str, Tensor], weight: int = 1) -> None:
        """Add one site's deltas.

        Raises:
            AdapterError: if a value, or one of the product of its factors, is too large; nothing was added.
        """
        self._updates.check(update)
        products = {module: update[module + _B].double() @ update[module + _A].double() for module in self._modules}
        self._products.add(products, weight)
        self._updates.add(update, weight)

    def result(self) -> dict[str, Tensor]:
        """Return the next global adapter."""
        current, mean, products = self._current, self._updates.result(), self._products.result()
        following = {name: current[name] + mean[name].float() for name in mean}
        for module in self._modules:
            name_a, name_b = module + _A, module + _B
            before_a, before_b = current[name_a].double(), current[name_b].double()
            product = before_b @ (before_a + mean[name_a]) + mean[name_b] @ before_a + products[module]
            product -= following[name_b].double() @ following[name_a].double()
            residual = module + RESIDUAL
            following[residual] = (current[residual].double() + self._scaling * product).float()
        return following
