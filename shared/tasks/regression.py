"""Scores: a number for a text, squared error.

Guarantee (test: tests/shared/tasks/test_tasks.py): a label counts only as far as the job's public range reaches. Within it the
number is mapped to [-1, 1], so that learning rate and clipping bound mean the same whatever the unit is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shared.data.records import named
from shared.errors import DataError
from shared.job.kinds import RULES
from shared.models.batches import Batch, Example
from shared.models.heads import PooledClassifier
from shared.numbers import comma_hint, read_number
from shared.tasks.base import Evaluation, Prediction, Record
from shared.tasks.predicting import Explained, Predicting, Read

MOST_PAIRS = 2000
"""Pairs of true and predicted numbers that an evaluation keeps for the plot."""


class Regression(Predicting):
    """See `shared.tasks.base.Task`. Records have `text` and `score`, a number."""

    kind = "regression"
    about = "scores: a number for a text"
    content = "texts, each with a number"
    roles = RULES["regression"].roles
    primary_metric = RULES["regression"].primary_metric
    higher_is_better = False

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest number, public."""
        assert self.config.target_range is not None  # noqa: S101 (checked by TaskConfig)
        return self.config.target_range

    def build_head(self, backbone: nn.Module, hidden_size: int, *, seed: int) -> nn.Module:
        """Return a pooled linear map to one number that answers the middle of the range: every weight is 0.

        Drawn weights would answer at random, +-0.4 of half the range, and clipped steps that take that back learn nothing else.
        """
        head = PooledClassifier(hidden_size, 1, self.model.pooling)
        nn.init.zeros_(head.linear.weight)
        nn.init.zeros_(head.linear.bias)
        if self.config.head_offset:
            head.centre = torch.full((hidden_size,), -self.config.head_offset)
        return head

    def targets(self, records: Sequence[Record]) -> Sequence[Any]:
        """Clip scores to the job's range and map it to [-1, 1]; records without a score get its middle."""
        low, high = self.bounds
        targets = []
        for row, record in enumerate(records, start=1):
            try:
                score = read_number(record["score"]) if "score" in record else (low + high) / 2
            except ValueError:
                hint = comma_hint([record["score"]])
                raise DataError(
                    f"{named(record, row)} has a score that is no finite number{hint}; mend the data."
                ) from None
            targets.append(2 * (min(max(score, low), high) - low) / (high - low) - 1)
        return targets

    def answer(self, record: Record, example: Example, output: Tensor) -> Prediction:
        """Return the score."""
        return {**record, "score": float(self.scores(output[None])[0])}

    def shown(self, prediction: Prediction) -> str:
        """Return score and text."""
        return f"{prediction['score']:.3f}  {prediction['text']}"

    def explained(self, read: Read, outputs: Tensor, label: str | None, word: int | None) -> Explained:
        """Return the score as the head has it: at the border of the range it would not move with the words."""
        return Explained(
            lambda found: self._unmapped(found[:, 0].float()),
            f"score {float(self.scores(outputs)):.3f}",
            "the score, before it is put on the range's border",
        )

    def probe(self, input_ids: Tensor, number: int) -> Example:
        """Return an example with one of a few scores."""
        return Example(input_ids, number % 5 / 2 - 1.0)

    def check_site(self, examples: Sequence[Example]) -> None:
        """Refuse an empty site and one whose records all have one score."""
        super().check_site(examples)
        if len({example.target for example in examples}) < 2:
            raise DataError(
                "all records of the site have one and the same score, or all lie on one side of task.target_range; check the "
                "range, or leave the site out."
            )

    def per_example_loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the squared error in the mapped range, [B], from outputs [B, 1]."""
        return (outputs[:, 0].float() - batch.targets).square()

    def scores(self, outputs: Tensor) -> Tensor:
        """Return the predicted numbers [B] in the job's own unit; what lies outside the range is put on its border."""
        return self._unmapped(outputs[:, 0].float().clamp(-1, 1))

    def evaluate(self, parts: Iterable[tuple[Tensor, Batch]]) -> Evaluation:
        """Return the loss, and MAE, RMSE and R^2 in the job's own unit, of predictions and labels within its range.

        Beside them the MAE of answering with the mean of these labels alone, which a model has to beat.
        """
        losses, found, true = [], [], []
        for outputs, batch in parts:
            losses.append(self.per_example_loss(outputs, batch))
            found.append(self.scores(outputs))
            true.append(self._unmapped(batch.targets))
        predicted, targets = torch.cat(found).double().cpu(), torch.cat(true).double().cpu()
        errors, distances = predicted - targets, targets - targets.mean()
        spread = float(distances.square().sum())
        return Evaluation(
            metrics={
                "loss": float(torch.cat(losses).mean()),
                "mae": float(errors.abs().mean()),
                "mae_of_mean": float(distances.abs().mean()),
                "rmse": float(errors.square().mean().sqrt()),
                "r2": 1 - float(errors.square().sum()) / spread if spread else None,
            },
            pairs=torch.stack([targets, predicted], dim=1)[:MOST_PAIRS].tolist(),
        )

    def _unmapped(self, values: Tensor) -> Tensor:
        low, high = self.bounds
        return low + (values + 1) * (high - low) / 2
