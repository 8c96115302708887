"""The private mechanism: Poisson sampling, per-example clipping, one Gaussian noise event per logical step.

Formal guarantees (relation: add or remove one record; each is checked in tests/shared/privacy/test_mechanism.py and by the
planted faults of tests/client/training/test_faults.py)
    * `poisson_sample` includes each record independently with the same probability.
    * `ClippedSum` changes by at most `max_grad_norm` (C) in L2 norm, over all parameters together, when one example is added or
      removed, however the logical batch is cut into micro-batches, whatever gradients in float32 or bfloat16 hold, for every C
      that a job may ask for (`shared.limits.MIN_GRAD_NORM`). None is computed in float64: scaling its largest numbers down to
      so small a C would leave few digits. The others' part of the sum stays the same to the last bit: every clipped vector is
      put on a grid, and sums on a grid are exact (test_the_sum_is_the_same_to_the_last_bit_in_any_order_and_cut). What the
      gradients themselves owe to the company is for the model to rule out: `shared.models.packing`
      (tests/client/training/test_sensitivity.py).
    * `add_gaussian_noise` adds independent N(0, std^2) to every coordinate, drawn in float64 on the CPU.

Source: DP-SGD, Abadi et al. 2016, algorithm 1, with Poisson sampling and normalisation by the expected batch size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import PrivacyError
from shared.privacy.randomness import KeyStream

# Vectors are clipped to this share of C. It has to hold what the grid adds to a norm, at most sqrt(d) / 2**31 of C, and the
# rounding of the norm itself, d * 2**-52. Nothing in it depends on the precision in which gradients were computed.
CLIP_MARGIN = 1.0 - 1e-5

# Steps of the grid in C, at least; twice as many at most. In float64 sums of vectors on it are exact up to 2**22 C.
_GRID = 2**30

# Values that are clipped and added at once on a processor: 8 MB in float64. Several times as many leave its cache, and memory of
# that size is asked of the system anew each time (1.3 to 2.6 times as slow).
_VALUES_AT_ONCE = 2**20

_MOST_COORDINATES = 10**8
"""More would not fit into `CLIP_MARGIN`; a LoRA adapter has a ten-thousandth to a hundredth of it."""


def poisson_sample(num_records: int, sample_rate: float, stream: KeyStream) -> NDArray[np.intp]:
    """Return the indices of a Poisson sample: every record enters independently with `sample_rate`; may be empty."""
    return np.flatnonzero(stream.bernoulli(num_records, sample_rate))


def per_example_gradients(parameters: Sequence[torch.nn.Parameter], batch_size: int) -> list[Tensor]:
    """Take the per-example gradients that Opacus hooks left on `parameters` and clear them.

    Returns:
        One tensor of shape [batch_size, *parameter.shape] per parameter, in order.

    Raises:
        PrivacyError: if a parameter got no gradient, or one without the batch dimension: such a parameter would
            escape clipping.
    """
    gradients = []
    for parameter in parameters:
        gradient = getattr(parameter, "grad_sample", None)
        expected = (batch_size, *parameter.shape)
        if not isinstance(gradient, Tensor) or tuple(gradient.shape) != expected:
            found = (
                "none" if gradient is None else str(tuple(getattr(gradient, "shape", ())) or type(gradient).__name__)
            )
            raise PrivacyError(
                f"a trainable parameter has per-example gradient {found}, expected shape {expected}; it would not be "
                "clipped. Train only linear layers whose input has the batch as its first dimension."
            )
        gradients.append(gradient)
        parameter.grad_sample = None  # type: ignore[attr-defined]
        parameter.grad = None
    return gradients


class ClippedSum:
    """Sum of per-example gradients, each clipped to `max_grad_norm` over all parameters as one vector.

    Attributes:
        num_examples: examples added so far (private, stays at the site).
        num_clipped: examples whose norm exceeded `max_grad_norm` (private, stays at the site).
        num_non_finite: examples whose gradient held NaN or infinity and was replaced by zero (private).
    """

    _dtype = torch.float64

    def __init__(self, shapes: Sequence[torch.Size], max_grad_norm: float) -> None:
        size = sum(shape.numel() for shape in shapes)
        if size > _MOST_COORDINATES:
            raise PrivacyError(
                f"{size:,} trained values are more than the {_MOST_COORDINATES:,} for which the clipping bound is proven; "
                "lower lora.rank, or adapt fewer layers."
            )
        self._total = torch.zeros(size, dtype=self._dtype)
        self._sums = list(_views(self._total, shapes))
        self._max_grad_norm = max_grad_norm
        self.num_examples = self.num_clipped = self.num_non_finite = 0

    def add(self, gradients: Sequence[Tensor]) -> None:
        """Clip and add a micro-batch.

        Args:
            gradients: one tensor [batch, *shape] per parameter; the batch dimension is the example.
        """
        on_processor = gradients[0].device.type == "cpu"
        rows = _VALUES_AT_ONCE // max(len(self._total), 1) if on_processor else len(gradients[0])
        for some in zip(*(torch.split(gradient.detach(), max(rows, 1)) for gradient in gradients), strict=True):
            self._add(some)

    def _add(self, gradients: Sequence[Tensor]) -> None:
        vectors = vectors_of(gradients)
        norms = norms_of_rows(vectors)
        finite = norms.isfinite()
        bound = CLIP_MARGIN * self._max_grad_norm
        scale = bound / norms.clamp(min=bound)
        if not bool(finite.all()):
            # 0 * NaN is NaN: a non-finite example is removed before the product, not by it.
            vectors = torch.where(finite[:, None].to(vectors.device), vectors, 0.0)
            scale = torch.where(finite, scale, 0.0)
        clipped = self._as_added(vectors.mul_(scale.to(vectors.device)[:, None]))
        self._total += clipped.sum(dim=0).cpu().to(self._dtype)
        self.num_examples += len(norms)
        self.num_clipped += int((norms > self._max_grad_norm)[finite].sum())
        self.num_non_finite += int((~finite).sum())

    def on_grid(self, vectors: Tensor) -> Tensor:
        """Return float64 `vectors`, changed in place: every coordinate a whole multiple of one power of two, near C / 2**30."""
        unit = 2.0 ** math.frexp(self._max_grad_norm / _GRID)[1] / 2
        # A power of two, so neither product rounds; a division would take several times as long.
        return vectors.mul_(1 / unit).round_().mul_(unit)

    def _as_added(self, clipped: Tensor) -> Tensor:
        """Return clipped float64 vectors, which may change in place, as they enter the sum: such that sums are exact."""
        return self.on_grid(clipped)

    @property
    def flat(self) -> Tensor:
        """The sum as one vector over all parameters: float64, or int64 where it is in whole steps. `sums` follow from it."""
        return self._total

    def count(self, *, num_examples: int, num_clipped: int, num_non_finite: int) -> None:
        """Take in how many examples another part of the same sum has, which was added to `flat` in place."""
        self.num_examples += num_examples
        self.num_clipped += num_clipped
        self.num_non_finite += num_non_finite

    def check(self) -> None:
        """Raise `PrivacyError` unless this can be a sum of `num_examples` clipped vectors: on the grid, no longer than they."""
        flat = torch.cat([part.flatten() for part in self.sums])
        whole = not self.flat.is_floating_point() or torch.equal(self.on_grid(flat.clone()), flat)
        if not whole or not float(torch.linalg.vector_norm(flat)) <= self.num_examples * self._max_grad_norm:
            raise PrivacyError(
                "what came for the sum of a step is no sum of clipped gradients, for it is longer than they can be, or off their "
                "grid; nothing was released."
            )

    @property
    def max_grad_norm(self) -> float:
        """The clipping bound C."""
        return self._max_grad_norm

    @property
    def sums(self) -> list[Tensor]:
        """The clipped sums, float64 on the CPU, one per parameter."""
        return self._sums


def vectors_of(gradients: Sequence[Tensor]) -> Tensor:
    """Return one vector over all parameters for each example of a micro-batch: float64 [batch, coordinates].

    In float64: float32 understates the norm of millions of coordinates and rounds long sums by more than the margin.

    Args:
        gradients: one tensor [batch, *shape] per parameter.
    """
    flat = [gradient.detach().flatten(1) for gradient in gradients]
    sizes = [part.shape[1] for part in flat]
    vectors = torch.empty((len(flat[0]), sum(sizes)), dtype=torch.float64, device=flat[0].device)
    for place, part in zip(torch.split(vectors, sizes, dim=1), flat, strict=True):
        place.copy_(part)  # at once from one precision to the other: no copy in between
    return vectors


def norms_of_rows(vectors: Tensor) -> Tensor:
    """Return the L2 norm of every row of float64 `vectors` [batch, coordinates], on the CPU.

    Row by row: the order of a sum over a whole matrix, and with it the last bit, depends on the number of rows.
    """
    if not len(vectors):
        return torch.zeros(0, dtype=torch.float64)
    return torch.stack([torch.linalg.vector_norm(row) for row in vectors]).cpu()


def _views(vector: Tensor, shapes: Sequence[torch.Size]) -> Iterator[Tensor]:
    """Return the parts of one vector over all parameters, each in its shape."""
    parts = torch.split(vector, [shape.numel() for shape in shapes])
    return (part.view(shape) for part, shape in zip(parts, shapes, strict=True))


class PlainSum(ClippedSum):
    """The same sum without clipping, for non-private baselines."""

    def __init__(self, shapes: Sequence[torch.Size]) -> None:
        super().__init__(shapes, max_grad_norm=1e30)

    def on_grid(self, vectors: Tensor) -> Tensor:
        """Return `vectors` as they are."""
        return vectors


def add_gaussian_noise(sums: Sequence[Tensor], std: float, stream: KeyStream) -> list[Tensor]:
    """Return `sums` plus independent N(0, std^2) noise per coordinate; float64 on the CPU, same shapes."""
    noise = torch.from_numpy(stream.normal(sum(total.numel() for total in sums)) * std)
    return [total + part for total, part in zip(sums, _views(noise, [total.shape for total in sums]), strict=True)]
