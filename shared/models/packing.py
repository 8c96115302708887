"""Texts of different lengths in one row of tokens, so that nothing but attention sees texts, and nothing pays much for padding.

Guarantees (tests: tests/shared/models/test_packing.py, tests/shared/models/test_tunable.py)
    * A token meets the tokens of its own text and no others, and what comes out is what a padded batch gives, up to
      floating-point rounding. What stands in a padded place of a text is zero or a copy of its own first token, so that not
      even a NaN passes from one text to another. What stands behind a row's last token is read by no one and so has no
      gradient.
    * The shapes in which a text is computed follow from its own length and from nothing else: `padded_length` in attention
      and in products by text; in products over the whole row, a number of places that is one of `whole_rows`. Libraries add up
      in an order that follows from the shape, so this is what makes a text's result the same to the last bit in whatever
      company (tests/client/training/test_sensitivity.py; docs/decisions/0017). That this machine's do is tried out by
      `client.training.independence`.

The linear layers, norms and activations of a transformer treat each token by itself. They get the tokens of all texts as
[1, N, H]; attention alone is computed on padded texts, those of similar length together, by the function that is registered
here with transformers under the name `PACKED`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

PACKED = "silotune_packed"

ROWS, FEWEST_ROWS = 16, 64
"""Rows of a matrix product that is the same to the last bit wherever a row stands and however many there are: a multiple of
`ROWS`, and not below `FEWEST_ROWS`. Measured for MKL and oneDNN, float32 and bfloat16; others take another way in the library."""


def whole_rows(count: int, step: int = 0) -> int:
    """Return how many rows a product of `count` rows gets: the next multiple of `step`, or `ROWS`, from `FEWEST_ROWS` on."""
    step = max(step, ROWS)
    return max(FEWEST_ROWS, -(-count // step) * step)


def in_whole_rows(module: nn.Module, values: Tensor) -> Tensor:
    """Return what a linear layer makes of a padded batch [B, T, H], in a number of rows that is one of `whole_rows`."""
    rows = values.flatten(0, -2)
    filled = nn.functional.pad(rows, (0, 0, 0, whole_rows(len(rows)) - len(rows)))
    return module(filled)[: len(rows)].unflatten(0, values.shape[:-1])  # type: ignore[no-any-return]


# How many different lengths of an even row there are between one power of two and the next.
_ROWS_PER_OCTAVE = 16


@dataclass(frozen=True)
class AttentionGroup:
    """Some texts of a batch that attend in one call.

    Attributes:
        texts: their rows in the batch, int64 [G].
        length: places of each, `padded_length` of their own tokens.
        mask: True where there is a token, bool [G, length]. There is one also if nothing is padded: without, attention would take
            another way, and whether it can would depend on the company.
    """

    texts: Tensor
    length: int
    mask: Tensor


def padded_length(length: int) -> int:
    """Return the places that a text of `length` tokens gets: two lengths between one power of two and the next, 8 at least."""
    step = max(8, 2 ** ((length - 1).bit_length() - 2)) if length > 1 else 8
    return -(-length // step) * step


class Packing:
    """Where the tokens of B texts lie in a padded batch [B, T] and in a row of N places.

    Attributes:
        size, length, count: B, T and the number of tokens.
        room: N, the number of tokens and a few more.
        groups: the texts by their padded length, for attention and products by text.
    """

    def __init__(self, mask: Tensor, *, even: bool = False) -> None:
        """Describe a batch.

        Args:
            mask: bool [B, T], True where there is a token; texts are padded on the right.
            even: add up to one place for every 16 tokens, so that few different lengths of row occur: a library that compiles
                a product for each shape (oneDNN) then seldom meets a new one. Without, it is the fewest `whole_rows`.
        """
        self.size, self.length = mask.shape
        self._mask = mask
        self._lengths = mask.sum(dim=1).cpu()
        self.count = int(self._lengths.sum())
        self.room = whole_rows(self.count, 2 ** self.count.bit_length() // _ROWS_PER_OCTAVE // 2 if even else 0)
        # Every place of row, batch and groups is the same one.
        self._full = self.count == self.room == mask.numel() and padded_length(self.length) == self.length

    def fit(self, tokens: Tensor) -> Tensor:
        """Return the tokens of all texts, one after the other, as a row: [1, count, H] as [1, N, H]."""
        return tokens if self.room == self.count else nn.functional.pad(tokens, (0, 0, 0, self.room - self.count))

    def pack(self, padded: Tensor) -> Tensor:
        """Return the row [1, N, ...] of a padded batch [B, T, ...]."""
        flat = padded.reshape(1, self.size * self.length, *padded.shape[2:])
        return flat if self._full else _Gather.apply(flat, self._places, self.room)  # type: ignore[no-untyped-call]

    def pad(self, row: Tensor) -> Tensor:
        """Return the batch [B, T, ...] that holds the tokens of a row [1, N, ...], and zeros elsewhere."""
        if not self._full:
            row = _Scatter.apply(row, self._places, self.size * self.length)  # type: ignore[no-untyped-call]
        return row.reshape(self.size, self.length, *row.shape[2:])

    def for_attention(self, row: Tensor) -> list[Tensor]:
        """Return for each group its texts [G, length, ...]; a padded place holds the text's first token."""
        if not self._full:
            row = _Spread.apply(row, self._sources, self._group_places)  # type: ignore[no-untyped-call]
        return self._split(row)

    def by_text(self, row: Tensor) -> list[Tensor]:
        """Return for each group its texts [G, length, ...]; a padded place holds zeros. No derivative is recorded."""
        if not self._full:
            row = _scattered(row, self._group_places, self._num_places)
        return self._split(row)

    def from_attention(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the row [1, N, ...] of what `for_attention` gave, in the same shapes."""
        rows = [part.reshape(1, -1, *part.shape[2:]) for part in parts]
        row = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
        return row if self._full else _Gather.apply(row, self._group_places, self.room)  # type: ignore[no-untyped-call]

    @cached_property
    def positions(self) -> Tensor:
        """Number of each token of a row within its text, int64 [1, N]; 0 behind the last one."""
        return self.pack(torch.arange(self.length, device=self._mask.device).repeat(self.size, 1))

    @cached_property
    def groups(self) -> list[AttentionGroup]:
        """See the class."""
        texts: dict[int, list[int]] = {}
        for text, length in enumerate(self._lengths.tolist()):
            texts.setdefault(padded_length(length), []).append(text)
        found = []
        for length in sorted(texts):
            rows = torch.tensor(texts[length])
            mask = torch.arange(length) < self._lengths[rows][:, None]
            found.append(AttentionGroup(rows, length, mask.to(self._mask.device)))
        return found

    @property
    def _num_places(self) -> int:
        return sum(len(group.texts) * group.length for group in self.groups)

    def _split(self, row: Tensor) -> list[Tensor]:
        sizes = [len(group.texts) * group.length for group in self.groups]
        return [
            part.reshape(len(group.texts), group.length, *row.shape[2:])
            for part, group in zip(torch.split(row, sizes, dim=1), self.groups, strict=True)
        ]

    @cached_property
    def _places(self) -> Tensor:
        """Place of each token of the row in the flattened batch, int64 [N]."""
        return self._mask.flatten().nonzero().squeeze(1)

    @cached_property
    def _sources(self) -> Tensor:
        """Token of the row for each place of all groups, int64 [P]; its text's first one where it is padded."""
        first = self._lengths.cumsum(0) - self._lengths
        parts = []
        for group in self.groups:
            steps = torch.arange(group.length)
            inside = steps < self._lengths[group.texts][:, None]
            parts.append((first[group.texts][:, None] + steps * inside).flatten())
        return torch.cat(parts).to(self._mask.device)

    @cached_property
    def _group_places(self) -> Tensor:
        """Place of each token of the row among those of all groups, int64 [N]."""
        begins = torch.empty(self.size, dtype=torch.int64)
        place = 0
        for group in self.groups:
            begins[group.texts] = place + torch.arange(len(group.texts)) * group.length
            place += len(group.texts) * group.length
        within = torch.arange(self.length) < self._lengths[:, None]
        return (begins[:, None] + torch.arange(self.length))[within].to(self._mask.device)


# Autograd's own derivative of indexing adds up, one place after the other, what never meets here.


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flat: Tensor, places: Tensor, room: int) -> Tensor:
        ctx.save_for_backward(places)
        ctx.count = flat.shape[1]
        return _row(flat, places, room)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _scattered(gradients[0], ctx.saved_tensors[0], ctx.count), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, row: Tensor, places: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(places)
        ctx.room = row.shape[1]
        return _scattered(row, places, count)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _row(gradients[0], ctx.saved_tensors[0], ctx.room), None, None


class _Spread(torch.autograd.Function):
    """Copies of tokens in padded places get no gradient: attention masks them."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, sources: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.room = row.shape[1]
        return row.index_select(1, sources)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _row(gradients[0], ctx.saved_tensors[0], ctx.room), None, None


def _row(flat: Tensor, places: Tensor, room: int) -> Tensor:
    """Return [1, room, ...]: what stands in `places` of [1, M, ...], then zeros."""
    row = flat.new_empty(1, room, *flat.shape[2:])
    torch.index_select(flat, 1, places, out=row[:, : len(places)])
    row[:, len(places) :] = 0
    return row


def _scattered(row: Tensor, places: Tensor, count: int) -> Tensor:
    """Return [1, count, ...]: the first of the row [1, N, ...] in `places`, zeros elsewhere."""
    return row.new_zeros(1, count, *row.shape[2:]).index_copy_(1, places, row[:, : len(places)])


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing | None = None,
    causal: bool = False,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Scaled-dot-product attention on packed texts, in the form that transformers asks of an attention function.

    Args:
        module: the attention layer.
        query, key, value: [1, heads, N, d] if there is a packing, else [B, heads, T, d].
        attention_mask: for transformers' own function, where there is no packing.
        packing: of the tokens.
        causal: whether a token sees only those to its left; with a packing.
        sliding_window: a token sees those that are fewer places away; None: all.
        options: for `sdpa_attention_forward` of transformers.

    Returns:
        (what each token attended to, [1, N, heads, d] or [B, T, heads, d]; None)
    """
    if packing is None:
        return _attend(module, [query, key, value], attention_mask, options), None
    spread = (packing.for_attention(tensor.transpose(1, 2)) for tensor in (query, key, value))
    parts = [
        _attend(
            module, [tensor.transpose(1, 2) for tensor in tensors], _mask_of(group, causal, sliding_window), options
        )
        for group, *tensors in zip(packing.groups, *spread, strict=True)
    ]
    return packing.from_attention(parts), None


def _attend(module: nn.Module, tensors: list[Tensor], mask: Tensor | None, options: Mapping[str, Any]) -> Tensor:
    """Return attention's output [G, T, heads, d] for query, key and value [G, heads, T, d], in their type."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    dtype = tensors[0].dtype
    if dtype != torch.bfloat16 or tensors[0].device.type != "cpu":
        output: Tensor = sdpa_attention_forward(module, *tensors, attention_mask=mask, **options)[0]
        return output
    # On a processor both passes take two to eight times as long in bfloat16 as in float32 between casts, at the lengths of texts
    # (PyTorch 2.13.0, benchmarks/attention.py).
    with torch.autocast("cpu", enabled=False):
        output = sdpa_attention_forward(module, *(t.float() for t in tensors), attention_mask=mask, **options)[0]
    return output.to(dtype)


def _mask_of(group: AttentionGroup, causal: bool, sliding_window: int | None = None) -> Tensor:
    """Return which token may see which, bool [G, 1, length, length]."""
    size, length = len(group.texts), group.length
    device = group.mask.device
    # Right padding: a token that sees those to its left alone never sees a pad.
    mask = (
        torch.ones(length, length, dtype=torch.bool, device=device).tril() if causal else group.mask[:, None, None, :]
    )
    if sliding_window is not None and sliding_window < length:
        places = torch.arange(length, device=device)
        distance = places[:, None] - places
        # A padded place sees itself at least: the softmax over nothing is no number, and would reach a gradient.
        mask = mask & (distance.abs() < sliding_window) | (distance == 0)
    return mask.expand(size, 1, length, length)


def register_attention() -> None:
    """Make `PACKED` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, sdpa_mask)  # for whoever calls the backbone as a whole, as generation does
