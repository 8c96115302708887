"""Activation functions of which a number is the same to the last bit wherever it stands in a tensor.

PyTorch computes a function of many numbers in as many parts as there are threads, each by vectors of the processor and what is
left at its end one by one. SiLU, the sigmoid and the fused GELU by tanh round differently by vector and by one. Where the parts
end follows from the number of rows, that is, from the company of a text, so from three threads on its last bits did
(docs/decisions/0017).

Guarantees (tests: tests/shared/models/test_activations.py)
    * What `steady` puts in place of such a function is made of functions that round one way: exponential, hyperbolic tangent and
      the four operations; forward and backward (test_what_is_put_in_place_rounds_one_way).
    * It is the same function to 2e-6, and finite with finite gradients for all numbers (test_it_is_the_same_function).
    * After `steady` a function is computed of numbers without gaps, whatever layer it stands in
      (test_half_of_a_row_is_computed_as_a_whole_one).
    * `rounds_one_way` finds those that do not (test_functions_that_round_two_ways_are_found).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_NUMBERS = 2048
_ONE_BY_ONE = 7
"""Fewer than are computed by vectors: PyTorch takes two at a time, of 4 (NEON), 8 (AVX2) or 16 (AVX-512) numbers."""
_LEAST = -80.0
"""Below it exp(-x) times anything is near what float32 holds; x / (1 + exp(80)) is 0 but for 1e-33."""


class SteadySiLU(nn.Module):
    """x / (1 + exp(-slope x)): SiLU at slope 1 (Elfwing et al. 2018), the quick GELU at 1.702 (Hendrycks and Gimpel 2016)."""

    def __init__(self, slope: float = 1.0) -> None:
        super().__init__()
        self.slope = slope

    def extra_repr(self) -> str:
        """Return what tells one from another."""
        return f"slope={self.slope}"

    def forward(self, values: Tensor) -> Tensor:
        """Return the function of each number, in the type of `values`; computed in float32, as the fused function is."""
        exact = values.float()
        return (exact / (1 + torch.exp(-(self.slope * exact).clamp(min=_LEAST)))).to(values.dtype)


class SteadyTanhGELU(nn.Module):
    """GELU by tanh (Hendrycks and Gimpel 2016), as GPT-2 has it, computed in float32."""

    def forward(self, values: Tensor) -> Tensor:
        """Return the function of each number, in the type of `values`."""
        exact = values.float()
        inner = (2 / torch.pi) ** 0.5 * (exact + 0.044715 * exact * exact * exact)
        return (0.5 * exact * (1 + torch.tanh(inner))).to(values.dtype)


def steady(model: nn.Module) -> None:
    """Put functions that round one way in place of those that are known to round two ways, everywhere in a model.

    Each activation function gets its numbers without gaps from then on: PyTorch computes GELU another way, which rounds two ways,
    where it is given half of each row, as ModernBERT's gate takes it.
    """
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            if (instead := _instead_of(module)) is not None:
                setattr(parent, name, instead)
    for module in filter(_is_activation, model.modules()):
        module.register_forward_pre_hook(_without_gaps)


def _without_gaps(_: nn.Module, entering: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(values.contiguous() for values in entering)


def _instead_of(module: nn.Module) -> nn.Module | None:
    match type(module).__name__:
        case "SiLU" | "SiLUActivation":
            return SteadySiLU()
        case "QuickGELUActivation":
            return SteadySiLU(1.702)
        case "GELUTanh":
            return SteadyTanhGELU()
    return None


def activations_of(model: nn.Module) -> list[nn.Module]:
    """Return a model's activation functions, one of each kind."""
    return list({repr(module): module for module in model.modules() if _is_activation(module)}.values())


def _is_activation(module: nn.Module) -> bool:
    homes = ("torch.nn.modules.activation", "transformers.activations", __name__)
    other = isinstance(module, nn.MultiheadAttention | nn.Softmax)
    return type(module).__module__ in homes and next(module.children(), None) is None and not other


def rounds_one_way(function: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether numbers come out of a function, and gradients back, as they do one by one, tried out on public numbers."""
    generator = torch.Generator().manual_seed(0)
    values, grown = (torch.randn(_NUMBERS, generator=generator).to(device, dtype) for _ in range(2))
    parts = [slice(begin, begin + _ONE_BY_ONE) for begin in range(0, _NUMBERS, _ONE_BY_ONE)]
    at_once = _there_and_back(function, 3 * values, grown)
    one_by_one = [_there_and_back(function, 3 * values[part], grown[part]) for part in parts]
    return torch.equal(at_once, torch.cat(one_by_one, dim=1))


def _there_and_back(function: nn.Module, values: Tensor, grown: Tensor) -> Tensor:
    """Return the function of each number and the gradient of its sum with weights, [2, numbers]."""
    entering = values.detach().clone().requires_grad_()
    with torch.enable_grad():
        out = function(entering)
        (gradient,) = torch.autograd.grad(out, entering, grown)
    return torch.stack([out.detach(), gradient])
