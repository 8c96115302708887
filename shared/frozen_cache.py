"""Cache of the activations that enter the first adapted layer.

Everything below that layer is frozen and deterministic, so what it computes for a text never changes: not between
rounds, not between LoRA ranks or seeds. The cache is keyed by token ids and shared by all models of a process that
have the same backbone and the same first adapted layer. It lives in memory only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from torch import Tensor

from shared.batches import Example, collate, micro_batches

Compute = Callable[[Tensor, Tensor], Tensor]


class FrozenCache:
    """Activations by token ids, float32 on the CPU.

    Attributes:
        num_bytes: memory held.
    """

    def __init__(self) -> None:
        self._states: dict[bytes, Tensor] = {}
        self.num_bytes = 0

    def get(self, examples: Sequence[Example]) -> list[Tensor] | None:
        """Return the activations [T_i, H] of every example, or None if one of them is not here."""
        states = [self._states.get(_key(example)) for example in examples]
        complete = [state for state in states if state is not None]
        return complete if len(complete) == len(states) else None

    def fill(self, examples: Sequence[Example], compute: Compute, *, max_tokens: int, max_bytes: int) -> None:
        """Compute what is missing, as far as `max_bytes` allows.

        Args:
            compute: function (input_ids [B, T], attention_mask [B, T]) -> activations [B, T, H].
            max_tokens: padded tokens per call.
            max_bytes: bound on `num_bytes`.
        """
        missing = list({_key(e): e for e in examples if _key(e) not in self._states}.values())
        lengths = [example.length for example in missing]
        for group in micro_batches(lengths, range(len(missing)), max_tokens):
            batch = collate([missing[index] for index in group])
            hidden = compute(batch.input_ids, batch.attention_mask).float().cpu()
            for row, index in enumerate(group):
                state = hidden[row, : lengths[index]].clone()
                if self.num_bytes + state.nbytes > max_bytes:
                    return
                self._states[_key(missing[index])] = state
                self.num_bytes += state.nbytes


@lru_cache(maxsize=4)
def shared_cache(backbone: str, first_adapted: int, device: str, dtype: str) -> FrozenCache:
    """Return the process's cache for one backbone, cut, device and precision."""
    return FrozenCache()


def _key(example: Example) -> bytes:
    return example.input_ids.numpy().tobytes()
