"""Examples, padded micro-batches, and how a logical batch is cut into them.

Cutting a logical batch into micro-batches changes speed and memory, never the private sum
(test: tests/client/training/test_trainer.py::test_micro_batching_does_not_change_the_sum).
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

# What one more micro-batch costs, in places that are only padding, as a part of the token budget: 512 of 2,048. Padding costs
# little (shared.models.packing). Measured on two processor cores with MiniLM-L6; from one half to an eighth it is flat.
_CUTS_PER_BUDGET = 4


Lengths = Sequence[int] | Mapping[int, int]
"""Tokens by record."""

IGNORED = -100
"""Target of a token that has none; PyTorch's own default."""


@dataclass(frozen=True)
class Example:
    """One encoded record.

    Attributes:
        input_ids: token ids, int64 [T], T >= 1; of an image its pixel values (`shared.tasks.image_classification`).
        target: class index; a number; several whole numbers, such as a class or `IGNORED` for each token, int64 [K]; or 0 where
            the tokens are their own target.
    """

    input_ids: Tensor
    target: int | float | Tensor = 0

    @cached_property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.input_ids)

    @cached_property
    def key(self) -> bytes:
        """What the activations of frozen layers depend on, for look-ups in every step."""
        return self.input_ids.numpy().tobytes()


@dataclass
class Batch:
    """A padded micro-batch of B examples of up to T tokens.

    Attributes:
        input_ids: token ids, int64 [B, T], padded on the right.
        attention_mask: True where there is a token, bool [B, T].
        targets: whatever the task's loss needs, first dimension B.
        hidden: cached activations that enter the first adapted layer, of the tokens alone, text after text: float [1, N, H]; or
            one vector of each text, [1, B, H], where the model has no more to see (`TunableModel.pools_frozen`); or None.
    """

    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor
    hidden: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """Return this batch on `device`."""
        hidden = None if self.hidden is None else self.hidden.to(device, non_blocking=True)
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.targets.to(device), hidden)


def collate(examples: Sequence[Example], hidden: Sequence[Tensor] | None = None) -> Batch:
    """Pad examples on the right to the longest of them.

    Args:
        examples: B examples.
        hidden: cached activations [T_i, H] of each example, or None.
    """
    lengths = torch.tensor([example.length for example in examples])
    input_ids = _padded([example.input_ids for example in examples])
    mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
    states = None if hidden is None else torch.cat(list(hidden)).unsqueeze(0)
    return Batch(input_ids, mask, _targets([example.target for example in examples]), states)


def _padded(rows: Sequence[Tensor], value: int = 0) -> Tensor:
    """Return rows [T_i, ...] as [B, longest, ...], filled up with `value`."""
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def _targets(targets: Sequence[int | float | Tensor]) -> Tensor:
    """Return the targets of B examples: int64 [B], float32 [B], or int64 [B, longest] padded with `IGNORED`."""
    rows = [target for target in targets if isinstance(target, Tensor)]
    if rows:
        return _padded(rows, IGNORED)
    return torch.tensor(targets, dtype=torch.float32 if isinstance(targets[0], float) else torch.int64)


def micro_batches(
    lengths: Lengths, indices: Sequence[int], max_tokens: int, max_examples: int = sys.maxsize
) -> Iterator[list[int]]:
    """Cut `indices` into micro-batches: padding against the fixed cost of one more; see `cut_by_length`.

    Args:
        lengths: tokens of every record that is among `indices`.
        indices: the records of one logical batch; may be empty.
        max_tokens: padded tokens per micro-batch; a single longer record still forms one of its own.
        max_examples: records per micro-batch, at least 1.
    """
    return cut_by_length(
        lengths,
        indices,
        cost_of_cut=max_tokens / _CUTS_PER_BUDGET,
        max_tokens=max_tokens,
        max_examples=max_examples,
    )


def cut_by_length(
    lengths: Lengths,
    indices: Sequence[int],
    *,
    cost_of_cut: float,
    max_tokens: int = sys.maxsize,
    max_examples: int = sys.maxsize,
) -> Iterator[list[int]]:
    """Cut `indices`, sorted by length, into parts whose padded tokens and `cost_of_cut` each are least together.

    Of all cuts between records of different length the cheapest is found by dynamic programming over the lengths that
    occur; a part with more than `max_tokens` padded tokens, or `max_examples` records, is then cut evenly.

    Args:
        lengths: tokens of every record that is among `indices`.
        indices: may be empty.
        cost_of_cut: of every part, in padded tokens.
        max_tokens: padded tokens of a part; a single longer record still forms one of its own.
        max_examples: records of a part, at least 1.
    """
    ordered = sorted(indices, key=lambda i: (lengths[i], i))
    if not ordered:
        return
    # Places at which a cut may lie: where the length changes.
    places = [p for p in range(1, len(ordered)) if lengths[ordered[p]] != lengths[ordered[p - 1]]] + [len(ordered)]
    best, cut_before = [0.0], [0]
    begins = [0, *places]
    for end, place in enumerate(places, start=1):
        longest = lengths[ordered[place - 1]]
        counts = [place - begin for begin in begins[:end]]
        pieces = [max(-(-longest * count // max_tokens), -(-count // max_examples)) for count in counts]
        costs = [
            cost + longest * count + cost_of_cut * num for cost, count, num in zip(best, counts, pieces, strict=True)
        ]
        cheapest = min(range(end), key=costs.__getitem__)
        best.append(costs[cheapest])
        cut_before.append(cheapest)
    cuts = [len(places)]
    while cuts[-1]:
        cuts.append(cut_before[cuts[-1]])
    for begin, end in itertools.pairwise(reversed(cuts)):
        part = ordered[begins[begin] : begins[end]]
        yield from _evenly(part, max(1, min(max_tokens // lengths[part[-1]], max_examples)))


def _evenly(part: list[int], most: int) -> Iterator[list[int]]:
    """Cut a part into as few pieces of about equal size as there can be with `most` records in one."""
    pieces = -(-len(part) // most)
    for piece in range(pieces):
        yield part[len(part) * piece // pieces : len(part) * (piece + 1) // pieces]


def micro_batches_of_groups(
    lengths: Lengths, groups: Sequence[Sequence[int]], max_tokens: int, max_examples: int = sys.maxsize
) -> Iterator[list[int]]:
    """Cut groups of records into micro-batches, so that at most one group is unfinished between two of them.

    Args:
        lengths: tokens of every record that is in a group.
        groups: the records of each person, none of them empty; groups of one are `micro_batches`.
        max_tokens: padded tokens per micro-batch; a single longer record still forms one of its own.
        max_examples: records per micro-batch, at least 1.
    """
    if all(len(group) == 1 for group in groups):
        yield from micro_batches(lengths, [group[0] for group in groups], max_tokens, max_examples)
        return
    inner = [sorted(group, key=lambda i: (lengths[i], i)) for group in groups]
    batch: list[int] = []
    longest = 0
    for index in (index for group in sorted(inner, key=lambda g: (lengths[g[-1]], g[-1])) for index in group):
        full = len(batch) == max_examples or max(longest, lengths[index]) * (len(batch) + 1) > max_tokens
        if batch and full:
            yield batch
            batch, longest = [], 0
        batch.append(index)
        longest = max(longest, lengths[index])
    if batch:
        yield batch
