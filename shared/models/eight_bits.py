"""A frozen backbone in 8 bits: whole numbers from -127 to 127, with one float32 scale for each output of a layer and each token.

What is computed is a function of its own, a little other than that of the weights in float32. So it belongs to the job: all
sites, the coordinator and whoever uses the result compute the same one (docs/decisions/0039). Adapters and head stay float32.

Guarantees (tests: tests/shared/models/test_eight_bits.py)
    * Weights are off by half a scale at most, which is 1/254 of the largest of their row.
    * Only one layer's weights are in float32 at a time, in the forward pass and in the backward pass: nothing keeps them for it.
    * Per-example gradients are those of a loop over this very function.

Absolute maximum by row: LLM.int8() (Dettmers et al. 2022), without its outliers in 16 bits: activations stay in float here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_LARGEST = 127


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return (int8 [rows, columns], float32 scale [rows, 1]) of float weights; a row of zeros gets the scale 1."""
    largest = weight.float().abs().amax(dim=1, keepdim=True)
    scale = torch.where(largest > 0, largest / _LARGEST, torch.ones_like(largest))
    return (weight.float() / scale).round().to(torch.int8), scale


class Linear8(nn.Linear):
    """A frozen linear layer.

    Attributes:
        weight: int8 [out, in], also of layers that are stored [in, out] elsewhere.
        scale: float32 [out, 1].
        residual: what an exact aggregation adds to the weights, float32 [out, in], or None.
    """

    residual: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Round `weight` [out, in]."""
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        whole, scale = rounded(weight)
        self.weight = nn.Parameter(whole, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        own_bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.register_parameter("bias", own_bias)
        self.register_buffer("residual", None, persistent=False)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (PyTorch's name)
        """Return the layer's output."""
        return _product(input, self)

    def plain(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights as they are computed with, [out, in]."""
        weight = self.weight * self.scale  # int8 times float32 is float32
        return (weight if self.residual is None else weight + self.residual).to(dtype)


class Embedding8(nn.Embedding):
    """A frozen table of embeddings; as a language model's output it is a linear layer.

    Attributes:
        weight: int8 [tokens, width].
        scale: float32 [tokens, 1].
    """

    def __init__(self, table: nn.Embedding) -> None:
        """Round the weights of `table`."""
        super().__init__(table.num_embeddings, table.embedding_dim, device="meta")
        self.padding_idx = table.padding_idx
        whole, scale = rounded(table.weight.detach())
        self.weight = nn.Parameter(whole, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (PyTorch's name)
        """Return the embeddings of tokens, float32 [..., width]."""
        return nn.functional.embedding(input, self.weight) * nn.functional.embedding(input, self.scale)

    def as_output(self, hidden: Tensor) -> Tensor:
        """Return logits [..., tokens] of hidden [..., width]."""
        return _product(hidden, self)

    def plain(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights as they are computed with, [tokens, width]."""
        return (self.weight * self.scale).to(dtype)


def in_eight_bits(backbone: nn.Module, layers: str, embedding: str) -> None:
    """Put the linear modules of the transformer layers, and the token embedding, into 8 bits, in place.

    Tables of positions, normalisations and biases stay float32: together they are a few per cent.

    Args:
        layers, embedding: paths, as in `shared.models.families.Architecture`.
    """
    within = backbone.get_submodule(layers)
    for name, module in [*within.named_modules()]:
        if type(module) is nn.Linear:
            _put(within, name, Linear8(module.weight.detach(), module.bias))
        elif type(module).__name__ == "Conv1D":
            _put(within, name, Linear8(module.weight.detach().T, module.bias))
    table = backbone.get_submodule(embedding)
    assert isinstance(table, nn.Embedding)  # noqa: S101 (of every family it is one)
    _put(backbone, embedding, Embedding8(table))
    for parameter in filter(torch.is_floating_point, backbone.parameters()):
        parameter.data = parameter.data.clone()  # what is read from a file may keep all of it in memory


def plain_weights(module: nn.Module) -> Tensor | None:
    """Return what stands for a module's weight in float32, [rows, columns]; None if it is not in 8 bits."""
    return module.plain() if isinstance(module, Linear8 | Embedding8) else None


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module.requires_grad_(False))


def _product(inputs: Tensor, layer: Linear8 | Embedding8) -> Tensor:
    """Return inputs [..., in] times the layer's weights; autograd keeps no float weights for it."""
    found: Tensor = _Product.apply(inputs, layer)  # type: ignore[no-untyped-call]
    return found


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: Linear8 | Embedding8) -> Tensor:
        ctx.layer, ctx.dtype = layer, inputs.dtype
        dtype = inputs.dtype
        if torch.is_autocast_enabled(inputs.device.type):
            dtype = torch.get_autocast_dtype(inputs.device.type)
        bias = layer.bias if isinstance(layer, Linear8) else None
        return nn.functional.linear(inputs.to(dtype), layer.plain(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return (gradient @ ctx.layer.plain(gradient.dtype)).to(ctx.dtype), None
