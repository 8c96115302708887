"""Views of a record: the same text or image, slightly changed, with the same target.

Augmentation multiplicity (De et al. 2022, "Unlocking High-Accuracy Differentially Private Image Classification through Scale",
section 3.2): the gradients of all views of a record are averaged before they are clipped, so a record moves a sum by no more than
without views, and epsilon does not change.

Guarantees (tests: tests/shared/tasks/test_views.py)
    * A record's views follow from its own tokens or pixels, the job's public seed and nothing else: no other record, no order
      and no secret takes part, and every step sees the same ones, so what is frozen of them is computed once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.job.job import Job
from shared.models.batches import Example


def views_of(examples: Sequence[Example], job: Job, tokenizer: Any) -> list[Example]:
    """Return the `views - 1` changed views of every example, those of the first example first; none if the job asks for none.

    Args:
        tokenizer: the backbone's own; None of images.
    """
    config, shape = job.training.augmentation, job.task.image_shape
    if config is None:
        return []
    special = np.asarray([] if tokenizer is None else sorted(tokenizer.all_special_ids), np.int64)
    views = []
    for example in examples:
        digest = hashlib.sha256(b"silotune view\0" + job.seed.to_bytes(8, "big") + example.key).digest()
        coins = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))
        for _ in range(config.views - 1):
            if shape is None:
                changed = _thinned(example.input_ids, special, config.token_dropout, coins)
            else:
                changed = _moved(example.input_ids, shape, config.shift, coins)
            views.append(Example(changed, example.target))
    return views


def _thinned(input_ids: Tensor, special: NDArray[np.int64], dropout: float, coins: np.random.Generator) -> Tensor:
    """Return the tokens [T'] without those that a coin takes out; all of them if no word would be left."""
    tokens = input_ids.numpy()
    is_special = np.isin(tokens, special)
    kept = is_special | (coins.random(len(tokens)) >= dropout)
    return torch.from_numpy(tokens[kept].copy()) if (kept & ~is_special).any() else input_ids


def _moved(pixels: Tensor, shape: tuple[int, int, int], most: int, coins: np.random.Generator) -> Tensor:
    """Return the image [channels x height x width, flat] moved by whole pixels, the border repeated."""
    _, height, width = shape
    down, right = coins.integers(-most, most + 1, size=2)
    rows = np.clip(np.arange(height) - down, 0, height - 1)
    columns = np.clip(np.arange(width) - right, 0, width - 1)
    return torch.from_numpy(pixels.numpy().reshape(shape)[:, rows][:, :, columns].reshape(-1).copy())
