"""Texts of different lengths in one row of tokens, so that only attention pays for padding.

Guarantee (tests: tests/shared/test_packing.py, tests/shared/test_models.py): a token meets the tokens of its own text and no
others, and what comes out is what the padded batch gives, up to floating-point rounding.

The linear layers, norms and activations of a transformer treat each token by itself. They get the tokens of all texts as
[1, N, H]; attention alone is computed on texts that are padded to [B, T], by the function that is registered here with
transformers under the name `PACKED`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PACKED = "silotune_packed"


@dataclass(frozen=True)
class Packing:
    """Where the tokens of B texts lie in a padded batch [B, T] and in a row of N.

    Attributes:
        size, length: B and T.
        places: place in the flattened batch of each token of the row, int64 [N]; None if nothing is padded.
    """

    size: int
    length: int
    places: Tensor | None

    @classmethod
    def of(cls, mask: Tensor) -> Packing:
        """Return the packing of a batch with `mask`, bool [B, T], True where there is a token."""
        places = mask.flatten().nonzero().squeeze(1)
        size, length = mask.shape
        return cls(size, length, None if len(places) == mask.numel() else places)

    def pack(self, padded: Tensor) -> Tensor:
        """Return the tokens [1, N, ...] of a padded batch [B, T, ...]."""
        flat = padded.reshape(1, self.size * self.length, *padded.shape[2:])
        return flat if self.places is None else _Gather.apply(flat, self.places)  # type: ignore[no-untyped-call]

    def pad(self, row: Tensor) -> Tensor:
        """Return the batch [B, T, ...] that holds the tokens [1, N, ...], and zeros elsewhere."""
        if self.places is not None:
            row = _Scatter.apply(row, self.places, self.size * self.length)  # type: ignore[no-untyped-call]
        return row.reshape(self.size, self.length, *row.shape[2:])


# Each is the other's derivative. Autograd's own for indexing adds up, one place after the other, what never meets here.


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flat: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.count = flat.shape[1]
        return flat.index_select(1, places)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _scattered(gradients[0], ctx.saved_tensors[0], ctx.count), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, row: Tensor, places: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(places)
        return _scattered(row, places, count)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].index_select(1, ctx.saved_tensors[0]), None, None


def _scattered(row: Tensor, places: Tensor, count: int) -> Tensor:
    return row.new_zeros(1, count, *row.shape[2:]).index_copy_(1, places, row)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Scaled-dot-product attention on packed texts, in the form that transformers asks of an attention function.

    Args:
        module: the attention layer.
        query, key, value: [1, heads, N, d] if there is a packing, else [B, heads, T, d].
        attention_mask: bool [B, 1, T, T] of the padded texts, or None.
        packing: of the tokens.
        options: for `sdpa_attention_forward` of transformers.

    Returns:
        (what each token attended to, [1, N, heads, d] or [B, T, heads, d]; None)
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if packing is not None:
        query, key, value = (packing.pad(t.transpose(1, 2)).transpose(1, 2) for t in (query, key, value))
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return (output if packing is None else packing.pack(output)), None


def register_attention() -> None:
    """Make `PACKED` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, sdpa_mask)  # for whoever calls the backbone as a whole, as generation does
