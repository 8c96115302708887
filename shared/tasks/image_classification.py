"""Image classification: one label per image, cross-entropy; losses and metrics are those of sequence classification.

An image enters an example as its pixel values, channel by channel and row by row, each as one of `PIXEL_STEPS` + 1 steps of the
job's public range. So batches, caches, proofs and audits see what they know: whole numbers in a row, of one length here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared.data.records import named
from shared.errors import DataError
from shared.job.kinds import RULES
from shared.models.batches import Example
from shared.models.heads import init_linear
from shared.models.images import PIXEL_STEPS
from shared.numbers import read_number
from shared.tasks.base import Prediction, Record
from shared.tasks.sequence_classification import SequenceClassification


class ImageClassification(SequenceClassification):
    """See `shared.tasks.base.Task`."""

    kind = "image_classification"
    about = "classification: one label for an image"
    content = "images, each with one label"
    roles = RULES["image_classification"].roles

    def build_head(self, backbone: nn.Module, hidden_size: int, *, seed: int) -> nn.Module:
        """Return a linear classifier of the vectors that leave the network's other layers, drawn from the public seed."""
        head = nn.Linear(hidden_size, len(self.config.labels))
        init_linear(head, seed=seed, name="head")
        return head

    def encode(self, records: Sequence[Record], tokenizer: Any, max_length: int) -> list[Example]:
        """Scale pixels by the public range and turn labels into class indices.

        `pixels` is a list of numbers, or a text of numbers with spaces or commas between them, as in a CSV cell.
        """
        targets = self.targets(records)
        return [
            Example(self._steps(record["pixels"], named(record, row)), target)
            for row, (record, target) in enumerate(zip(records, targets, strict=True), start=1)
        ]

    def _steps(self, pixels: Any, name: str) -> Tensor:
        """Return the pixel values of one record, called `name` in errors, as steps of the range, int64 [pixels]."""
        size = self.config.num_pixels
        cells = pixels.replace(",", " ").split() if isinstance(pixels, str) else pixels
        try:
            # NumPy, too, takes the text 1_3 for 13, and true for 1; numbers it reads by itself, for there are millions of them.
            if isinstance(cells, list) and {*map(type, cells)} & {str, bool}:
                cells = [*map(read_number, cells)]
            values = np.asarray(cells, np.float64)
        except (ValueError, TypeError, OverflowError):
            # The error's text would hold a pixel value.
            raise DataError(
                f"{name} has pixels that are no numbers; expected a list of {size} numbers, or a text of them "
                "with spaces between."
            ) from None
        if values.shape != (size,):
            raise DataError(
                f"{name} has pixels of shape {list(values.shape)}, expected {size} numbers in one row "
                "(task.image_shape: channels x height x width, channel by channel and row by row)."
            )
        assert self.config.pixel_range is not None  # noqa: S101 (checked by TaskConfig)
        low, high = self.config.pixel_range
        if not ((values >= low) & (values <= high)).all():  # NaN is in no range
            raise DataError(
                f"{name} has a pixel outside task.pixel_range, {low:g} to {high:g}. Mend the data, or give the range of "
                "the format in the job, not that of the data."
            )
        return torch.from_numpy(np.rint((values - low) / (high - low) * PIXEL_STEPS).astype(np.int64))

    def probe(self, input_ids: Tensor, number: int) -> Example:
        """Return an image of class `number` modulo the number of classes, filled with these values over and over."""
        size = self.config.num_pixels
        return super().probe(input_ids.repeat(-(-size // len(input_ids)))[:size], number)

    def question(self, text: str, name: str, tokenizer: Any, max_length: int) -> Record:
        """Return the record of an image that is written as numbers with spaces between them."""
        return {"pixels": text}

    def shown(self, prediction: Prediction) -> str:
        """Return label and probability."""
        return f"{prediction['label']}  {prediction['probability']:.3f}"
