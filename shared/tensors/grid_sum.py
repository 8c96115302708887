"""Sums of tensors that do not depend on the order of their terms, bit for bit, and keep none of them.

Every term is rounded to a multiple of one step, a power of two, and added as an integer in float64. Integers below 2**53
are added without rounding, so the sum of the rounded terms is exact, whatever their order
(tests/shared/tensors/test_grid_sum.py). Floating-point sums of the terms themselves would differ in their last bits with the
order in which sites answer; sorting them first would mean to keep them all.

Error of n terms of magnitude m at most: n/2 steps from rounding to the nearest (n steps towards zero, and then no term
grows), and 2**-53 m for each product with a factor that is not a power of two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.tensors.adapters import Shapes

_BITS = 52  # one less than exact integers in float64 have, for the halves that rounding adds
_BLOCK = 1 << 16  # numbers handled at once: few calls, and half a megabyte of them stays in the processor's cache


class GridSum:
    """A sum by name of tensors of fixed shapes.

    Attributes:
        step: the grid's step; every sum is a multiple of it.
    """

    def __init__(
        self, shapes: Shapes, *, reach: float, towards_zero: bool = False, dtype: type[np.floating] = np.float32
    ) -> None:
        """Begin with zero.

        Args:
            shapes: name and shape of every part of a term.
            reach: what the magnitudes of one coordinate of all terms, factors included, add up to at most. The caller's
                promise: beyond twice of it sums are rounded, and their order may show.
            towards_zero: cut terms off instead of rounding them to the nearest, so that no coordinate ever grows.
            dtype: of the terms.
        """
        self._shapes = {name: torch.Size(shape) for name, shape in shapes.items()}
        # The least power of two from `reach` on, by 2**52.
        self.step = math.ldexp(1.0, math.frexp(math.nextafter(reach, 0.0))[1] - _BITS)
        self._round = np.trunc if towards_zero else np.rint
        size = sum(shape.numel() for shape in self._shapes.values())
        self._sums, self._staged = np.zeros(size), np.zeros(size, dtype)
        self._scratch = np.empty(min(_BLOCK, size))

    def stage(self, term: Mapping[str, Tensor]) -> NDArray[np.floating]:
        """Take the next term, tensors on the CPU by name, and return its numbers in one array, for a look before `add`."""
        place = 0
        for name, shape in self._shapes.items():
            values, size = term[name].numpy().reshape(-1), shape.numel()
            if len(values) != size:
                raise ValueError(f"{name!r} has {len(values)} numbers, expected {size}")
            np.copyto(self._staged[place : place + size], values)
            place += size
        return self._staged

    def add(self, factor: float = 1.0) -> None:
        """Add `factor` times what was staged, which must be finite, once."""
        scale = factor / self.step
        exact = math.frexp(scale)[0] == 0.5  # a power of two: exact in the terms' own precision, where it is faster
        for begin in range(0, len(self._staged), _BLOCK):
            term, sums = self._staged[begin : begin + _BLOCK], self._sums[begin : begin + _BLOCK]
            widened = self._scratch[: len(term)]
            if exact:
                np.multiply(term, scale, out=term)
                self._round(term, out=term)
                np.copyto(widened, term)
            else:
                np.copyto(widened, term)
                np.multiply(widened, scale, out=widened)
                self._round(widened, out=widened)
            np.add(sums, widened, out=sums)

    def total(self) -> dict[str, Tensor]:
        """Return the sum by name, float64 and exact; adding may go on."""
        sizes = [shape.numel() for shape in self._shapes.values()]
        parts = torch.split(torch.from_numpy(self._sums * self.step), sizes)
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}
