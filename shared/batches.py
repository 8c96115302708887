"""Examples, padded micro-batches, and how a logical batch is cut into them.

Cutting a logical batch into micro-batches changes speed and memory, never the private sum
(test: tests/client/test_trainer.py::test_micro_batching_does_not_change_the_sum).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Example:
    """One encoded record.

    Attributes:
        input_ids: token ids, int64 [T], T >= 1.
        target: class index, or 0 where the tokens are their own target.
    """

    input_ids: Tensor
    target: int = 0

    @property
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
        hidden: cached activations that enter the first adapted layer, float [B, T, H], or None.
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
    size, length = len(examples), max(example.length for example in examples)
    input_ids = torch.zeros(size, length, dtype=torch.int64)
    mask = torch.zeros(size, length, dtype=torch.bool)
    for row, example in enumerate(examples):
        input_ids[row, : example.length] = example.input_ids
        mask[row, : example.length] = True
    states = None
    if hidden is not None:
        states = hidden[0].new_zeros(size, length, hidden[0].shape[-1])
        for row, state in enumerate(hidden):
            states[row, : len(state)] = state
    targets = torch.tensor([example.target for example in examples], dtype=torch.int64)
    return Batch(input_ids, mask, targets, states)


def micro_batches(lengths: Sequence[int], indices: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Cut `indices` into groups of similar length whose padded size stays within `max_tokens`.

    Args:
        lengths: tokens of every record, indexed by the values of `indices`.
        indices: the records of one logical batch; may be empty.
        max_tokens: padded tokens per group; a single longer record still forms a group of its own.
    """
    return micro_batches_of_groups(lengths, [[index] for index in indices], max_tokens)


def micro_batches_of_groups(
    lengths: Sequence[int], groups: Sequence[Sequence[int]], max_tokens: int
) -> Iterator[list[int]]:
    """Cut groups of records into micro-batches, so that at most one group is unfinished between two of them.

    Args:
        lengths: tokens of every record.
        groups: the records of each person, none of them empty; groups of one are `micro_batches`.
        max_tokens: padded tokens per micro-batch; a single longer record still forms one of its own.
    """
    inner = [sorted(group, key=lambda i: (lengths[i], i)) for group in groups]
    batch: list[int] = []
    longest = 0
    for index in (index for group in sorted(inner, key=lambda g: (lengths[g[-1]], g[-1])) for index in group):
        if batch and max(longest, lengths[index]) * (len(batch) + 1) > max_tokens:
            yield batch
            batch, longest = [], 0
        batch.append(index)
        longest = max(longest, lengths[index])
    if batch:
        yield batch
