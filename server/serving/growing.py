"""Texts that a language model continues together: some join, some leave, and every step adds one token to each.

Guarantee (tests: tests/server/serving/test_growing.py): the logits of a text are those that it has alone, whoever else is in the
group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.runtime.export.exported import Exported
from shared.runtime.inference import next_logits
from shared.runtime.runtime import Runtime


class Growing(ABC):
    """A group of rows; a row is a text with the tokens that were added."""

    @abstractmethod
    def join(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Add rows behind those that are there; return their next logits, float32 [new rows, vocabulary]."""

    @abstractmethod
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Add one token to each row; return the next logits of all, float32 [rows, vocabulary]."""

    @abstractmethod
    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order."""


class Recomputed(Growing):
    """By a model that keeps no keys and values: each step reads every text from its begin."""

    def __init__(self, runtime: Runtime | Exported) -> None:
        self._runtime = runtime
        self._rows: list[list[int]] = []

    def join(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """See `Growing`."""
        new = [list(prompt) for prompt in prompts]
        self._rows += new
        return next_logits(self._runtime, new)

    def step(self, tokens: Sequence[int]) -> Tensor:
        """See `Growing`."""
        for row, token in zip(self._rows, tokens, strict=True):
            row.append(token)
        return next_logits(self._runtime, self._rows)

    def keep(self, rows: Sequence[int]) -> None:
        """See `Growing`."""
        self._rows = [self._rows[row] for row in rows]


class Cached(Growing):
    """By a graph with keys and values of earlier tokens as inputs and outputs (`shared.runtime.export.graphs.gpt2`).

    Rows of different length are padded with places that the mask hides; positions follow from the mask.

    Args:
        session: of ONNX Runtime.
        caches: name, heads and width of each input that holds keys or values.
    """

    def __init__(self, session: Any, caches: Sequence[tuple[str, int, int]]) -> None:
        self._session, self._names = session, [name for name, _, _ in caches]
        self._outputs = ["logits", *(name.replace("past_key_values", "present") for name in self._names)]
        self._empty = [np.zeros((0, heads, 0, width), np.float32) for _, heads, width in caches]
        self._mask: NDArray[np.int64] = np.zeros((0, 0), np.int64)
        self._past: list[NDArray[np.float32]] = self._empty

    def join(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """See `Growing`."""
        longest = max(len(prompt) for prompt in prompts)
        ids = np.zeros((len(prompts), longest), np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # padded on the left, so that the last place is the last token of all
            ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = prompt, 1
        nothing = [np.zeros((len(prompts), *one.shape[1:]), np.float32) for one in self._empty]
        logits, past = self._run(ids, mask, nothing)
        length = max(longest, self._mask.shape[1])
        self._mask = np.concatenate([_longer(self._mask, length, axis=1), _longer(mask, length, axis=1)])
        pairs = zip(self._past, past, strict=True)
        self._past = [np.concatenate([_longer(a, length, axis=2), _longer(b, length, axis=2)]) for a, b in pairs]
        return logits

    def step(self, tokens: Sequence[int]) -> Tensor:
        """See `Growing`."""
        self._mask = np.concatenate([self._mask, np.ones((len(tokens), 1), np.int64)], axis=1)
        logits, self._past = self._run(np.asarray(tokens, np.int64)[:, None], self._mask, self._past)
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """See `Growing`."""
        if not rows:
            self._mask, self._past = np.zeros((0, 0), np.int64), self._empty
            return
        mask = self._mask[list(rows)]
        begin = int(mask.any(axis=0).argmax())  # places that only rows which left had
        self._mask, self._past = mask[:, begin:], [one[list(rows)][:, :, begin:] for one in self._past]

    def _run(
        self, ids: NDArray[np.int64], mask: NDArray[np.int64], past: Sequence[NDArray[np.float32]]
    ) -> tuple[Tensor, list[NDArray[np.float32]]]:
        feed = {"input_ids": ids, "attention_mask": mask, **dict(zip(self._names, past, strict=True))}
        logits, *present = self._session.run(self._outputs, feed)
        return torch.from_numpy(logits[:, -1]).float(), present


def _longer(values: NDArray[Any], length: int, *, axis: int) -> NDArray[Any]:
    """Return values with empty places put before them along an axis, up to `length`."""
    missing = [(0, 0)] * values.ndim
    missing[axis] = (length - values.shape[axis], 0)
    return np.pad(values, missing) if missing[axis][0] else values
