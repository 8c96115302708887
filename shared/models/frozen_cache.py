"""Cache of what is frozen of a text, what enters the first adapted layer: in memory, and beyond that in a sealed file.

Everything below that layer is frozen and deterministic, so what it computes for a text never changes: not between
rounds, not between LoRA ranks or seeds. The cache is keyed by token ids and shared by all models of a process that
have the same backbone and the same first adapted layer. The shortest texts come first: they fill the memory, longer ones go
to the file, and what fits in neither is computed in every step.

Formal guarantees (tests: tests/shared/models/test_frozen_cache.py)
    * What `get` returns is bit for bit what was computed, in its type (bfloat16 or float32), from either tier
      (test_both_tiers_return_what_was_computed).
    * What was computed of a text is the same to the last bit whichever texts shared its micro-batch (`shared.models.packing`),
      so it makes no difference to a step which texts of a site are here (tests/client/training/test_sensitivity.py).
    * The file is a `ScratchFile`: sealed, nameless, gone with the process. A full disk, a read-only folder or changed bytes cost
      time only (test_a_full_disk_is_no_error, test_changed_bytes_are_computed_again).
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from shared.files.scratch_file import OVERHEAD, ScratchFile
from shared.models.batches import Example, collate, micro_batches

Compute = Callable[[Tensor, Tensor], Tensor]
Told = Callable[[int, int], None]
"""Is told how many texts are done, and of how many."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Sealed:
    """Where in the file an activation lies, and what it is."""

    number: int
    shape: torch.Size
    dtype: torch.dtype


class FrozenCache:
    """Activations by token ids, on the CPU: bfloat16 where they were computed so, else float32.

    Attributes:
        num_bytes: memory held.
    """

    def __init__(self) -> None:
        self._states: dict[bytes, Tensor | _Sealed] = {}
        self._file: ScratchFile | None = None
        self._file_failed = False
        self.num_bytes = 0

    @property
    def file_bytes(self) -> int:
        """Bytes in the file, sealed."""
        return self._file.size if self._file else 0

    def get(self, examples: Sequence[Example]) -> list[Tensor] | None:
        """Return the activations of every example, [T_i, H] or one vector [1, H], or None if one of them is not here."""
        found = [self._states.get(example.key) for example in examples]
        if any(place is None for place in found):
            return None  # before anything is read from the file
        states = []
        for example, place in zip(examples, found, strict=True):
            state = self._unsealed(example.key, place) if isinstance(place, _Sealed) else place
            if state is None:
                return None
            states.append(state)
        return states

    def fill(
        self,
        examples: Sequence[Example],
        compute: Compute,
        *,
        max_tokens: int,
        max_bytes: int,
        max_file_bytes: int = 0,
        folder: Path | None = None,
        told: Told = lambda done, of: None,
    ) -> None:
        """Compute what is missing, as far as the two bounds allow.

        Args:
            compute: function (input_ids [B, T], attention_mask [B, T]) -> activations [B, T, H], or one vector each [B, 1, H].
            max_tokens: padded tokens per call.
            max_bytes: bound on `num_bytes`.
            max_file_bytes: bound on `file_bytes`; 0: no file.
            folder: where the file lies; None is the system's temporary folder.
            told: about progress, if there is anything to compute.
        """
        missing = list({e.key: e for e in examples if e.key not in self._states}.values())
        lengths = [example.length for example in missing]
        done = 0
        for group in micro_batches(lengths, range(len(missing)), max_tokens):
            told(done, len(missing))
            done += len(group)
            batch = collate([missing[index] for index in group])
            hidden = compute(batch.input_ids, batch.attention_mask)
            hidden = (hidden if hidden.dtype == torch.bfloat16 else hidden.float()).cpu()
            states = ((missing[index].key, hidden[row, : lengths[index]].clone()) for row, index in enumerate(group))
            if not all(self._hold(key, state, max_bytes, max_file_bytes, folder) for key, state in states):
                break
        if missing:
            told(len(missing), len(missing))

    def forget(self) -> None:
        """Forget everything that was computed; what lies in the file stays there, unread, until the process ends."""
        self._states.clear()
        self.num_bytes = 0

    def _hold(self, key: bytes, state: Tensor, max_bytes: int, max_file_bytes: int, folder: Path | None) -> bool:
        """Keep `state` in memory or in the file; False if there is room in neither."""
        if self.num_bytes + state.nbytes > max_bytes:
            return self._spill(key, state, max_file_bytes, folder)
        self._states[key] = state
        self.num_bytes += state.nbytes
        return True

    def _spill(self, key: bytes, state: Tensor, max_file_bytes: int, folder: Path | None) -> bool:
        """Write `state` to the file; False if there is no room for it or no file."""
        if self._file_failed or self.file_bytes + state.nbytes + OVERHEAD > max_file_bytes:
            return False
        try:
            place = folder or Path(tempfile.gettempdir())
            self._file = self._file or ScratchFile(place)
            number = self._file.append(state.contiguous().view(torch.uint8).numpy().tobytes())
        except OSError as error:
            self._file_failed = True
            _LOG.warning(
                "no more frozen activations go to the cache file in %s (%s); what is missing is computed in every step. Make "
                "room, or set compute.cache_file_megabytes or compute.cache_file_folder.",
                place,
                error.strerror or error,
            )
            return False
        self._states[key] = _Sealed(number, state.shape, state.dtype)
        return True

    def _unsealed(self, key: bytes, place: _Sealed) -> Tensor | None:
        """Return the activation at `place`; None, and never again, if the file does not hold it any more."""
        assert self._file is not None  # noqa: S101 (there is no `_Sealed` without it)
        try:
            data = self._file.read(place.number)
        except OSError as error:
            self._states.pop(key, None)
            _LOG.warning(
                "an entry of the cache file is lost (%s); it is computed in every step.", error.strerror or error
            )
            return None
        return torch.frombuffer(bytearray(data), dtype=place.dtype).view(place.shape)


@lru_cache(maxsize=4)
def shared_cache(backbone: str, cut: int | str, device: str, dtype: str) -> FrozenCache:
    """Return the process's cache for one backbone, what is kept of it, device and precision."""
    return FrozenCache()
