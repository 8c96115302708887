"""Weighted mean of updates that are added one by one, in any order, and forgotten."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from shared.errors import AdapterError
from shared.tensors.adapters import Shapes
from shared.tensors.grid_sum import GridSum

LARGEST_VALUE = 4096.0
"""No trained weight moves as far in one round; the bound makes a grid possible on which sums are exact."""
DIVERGED = "site's training diverged"


class WeightedMean:
    """sum(w_i * update_i) / sum(w_i) by name; the order of adding changes no bit (tests/server/aggregation/test_strategies.py).

    Weights enter as w / 2**b with 2**b >= the total weight of everyone asked, which is public and known before the round. So
    they add up to at most 1, their scaling is exact, and the grid's step is 2**-40 for any number of sites.

    Error of the mean before it is rounded to float32, where `came` of the `asked` weight came from n sites: at most
    n * 2**-40 * asked / came + 2**-51 * max|update|
    (test_the_mean_keeps_its_error_bound). With a hundred sites of equal weight: 1e-10, typically 1e-12.
    """

    def __init__(self, shapes: Shapes, asked_weight: int, *, dtype: type[np.floating] = np.float32) -> None:
        """Begin a mean.

        Args:
            shapes: of every update.
            asked_weight: of everyone who may add an update.
            dtype: of the updates.

        Raises:
            ValueError: if nobody may.
        """
        if asked_weight < 1:
            raise ValueError(f"the total weight is {asked_weight}; expected at least 1")
        self._asked, self._came = asked_weight, 0
        self._denominator = 1 << (asked_weight - 1).bit_length()
        self._sum = GridSum(shapes, reach=LARGEST_VALUE, dtype=dtype)

    def add(self, update: Mapping[str, Tensor], weight: int = 1) -> None:
        """Add one update.

        Raises:
            AdapterError: if a value is too large, NaN or infinite; nothing was added.
            ValueError: if the weight is not positive, or more came than was asked for.
        """
        if weight < 1 or self._came + weight > self._asked:
            raise ValueError(f"weight {weight} after {self._came} of {self._asked}; expected from 1 to what is left")
        self.check(update)
        self._came += weight
        self._sum.add(weight / self._denominator)

    def check(self, update: Mapping[str, Tensor]) -> None:
        """Raise `AdapterError` if a value is too large, NaN or infinite."""
        values = self._sum.stage(update)
        # One look at all of them at once; NaN passes no comparison. NumPy's, for it starts no threads for so little.
        if not values.size or (values.min() >= -LARGEST_VALUE and values.max() <= LARGEST_VALUE):
            return
        for name, tensor in update.items():
            largest = float(tensor.abs().max()) if tensor.numel() else 0.0
            if not largest <= LARGEST_VALUE:
                raise AdapterError(
                    f"tensor {name!r} holds values up to {largest:g}, expected at most {LARGEST_VALUE:g} in magnitude: the "
                    f"{DIVERGED}. Lower training.learning_rate."
                )

    def result(self) -> dict[str, Tensor]:
        """Return the mean, float64.

        Raises:
            ValueError: if nothing was added.
        """
        if not self._came:
            raise ValueError("no update was added, so there is no mean")
        back = self._denominator / self._came
        return {name: total.mul_(back) for name, total in self._sum.total().items()}
