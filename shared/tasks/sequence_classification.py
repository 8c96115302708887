"""Sequence classification: one label per text, cross-entropy."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shared.data.records import named
from shared.errors import DataError
from shared.job.kinds import RULES, TaskKind
from shared.limits import MAX_TABLE_LABELS
from shared.models.batches import Batch, Example
from shared.models.heads import PooledClassifier, init_linear
from shared.tasks.base import Evaluation, Prediction, Record
from shared.tasks.predicting import Explained, Predicting, Read, log_odds
from shared.tasks.tokens import weighted

_ROC_POINTS = 200


class SequenceClassification(Predicting):
    """See `shared.tasks.base.Task`."""

    kind: ClassVar[TaskKind] = "sequence_classification"
    about = "classification: one label for a text"
    content = "texts, each with one label"
    roles: ClassVar[tuple[str, ...]] = RULES["sequence_classification"].roles
    primary_metric = RULES["sequence_classification"].primary_metric
    higher_is_better = True

    def build_head(self, backbone: nn.Module, hidden_size: int, *, seed: int) -> nn.Module:
        """Return a pooled linear classifier drawn from the public seed."""
        head = PooledClassifier(hidden_size, len(self.config.labels), self.model.pooling)
        init_linear(head.linear, seed=seed, name="head.linear")
        return head

    def targets(self, records: Sequence[Record]) -> Sequence[Any]:
        """Return the class of every record; the first, if it has no label."""
        labels = self.config.labels
        index = {label: i for i, label in enumerate(labels)}
        targets = []
        for row, record in enumerate(records, start=1):
            label = str(record["label"]) if "label" in record else labels[0]
            if label not in index:
                # The label itself may be private: only its row is named.
                raise DataError(
                    f"{named(record, row)} has a label that is not among task.labels ({', '.join(labels)}). Mend the data "
                    "or add the label to the job."
                )
            targets.append(index[label])
        return targets

    def answer(self, record: Record, example: Example, output: Tensor) -> Prediction:
        """Return the likeliest label and all probabilities."""
        probabilities: dict[str, float] = dict(
            zip(self.config.labels, output.float().softmax(dim=-1).tolist(), strict=True)
        )
        label, probability = max(probabilities.items(), key=operator.itemgetter(1))
        return {**record, "label": label, "probability": probability, "probabilities": probabilities}

    def shown(self, prediction: Prediction) -> str:
        """Return label, probability and text."""
        return f"{prediction['label']}  {prediction['probability']:.3f}  {prediction['text']}"

    def explained(self, read: Read, outputs: Tensor, label: str | None, word: int | None) -> Explained:
        """Return the log-odds of a label."""
        return log_odds(self.config.labels, outputs[0], label, lambda found: found)

    def probe(self, input_ids: Tensor, number: int) -> Example:
        """Return an example of class `number` modulo the number of classes."""
        return Example(input_ids, number % len(self.config.labels))

    def check_site(self, examples: Sequence[Example]) -> None:
        """Refuse an empty site and one whose records all have one label."""
        super().check_site(examples)
        if len({_class_of(example) for example in examples}) < 2:
            raise DataError(
                "all records of the site have one and the same label, so its updates would only push towards that label. "
                "Add records of other labels, or leave the site out."
            )

    def per_example_loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return cross-entropy per example [B], times its class's weight, from logits [B, labels]."""
        true, smoothing = self.classes(outputs, batch)[1], self.config.label_smoothing
        losses = nn.functional.cross_entropy(outputs.float(), true, reduction="none", label_smoothing=smoothing)
        return weighted(losses, true, self.config.class_weights)

    def classes(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the most probable class and the label of each text."""
        return outputs.argmax(dim=-1), batch.targets

    def evaluate(self, parts: Iterable[tuple[Tensor, Batch]]) -> Evaluation:
        """Return loss, accuracy, macro F1 and the confusion matrix; of two labels also the ROC curve and its area."""
        from sklearn.metrics import f1_score, roc_auc_score, roc_curve  # slow to import; sites do not evaluate

        labels = self.config.labels
        losses, predicted, targets, margins = [], [], [], []
        for outputs, batch in parts:
            guessed, true = self.classes(outputs, batch)
            losses.append(nn.functional.cross_entropy(outputs.float(), true, reduction="none"))
            predicted.append(guessed)
            targets.append(true)
            margins.append((outputs[:, -1] - outputs[:, 0]).float())
        truth, guess = torch.cat(targets).cpu().numpy(), torch.cat(predicted).cpu().numpy()
        cells = _confusion_cells(truth, guess)
        whole = len(labels) <= MAX_TABLE_LABELS
        metrics: dict[str, float | None] = {
            "loss": float(torch.cat(losses).mean()),
            "accuracy": float((truth == guess).mean()),
            "macro_f1": float(f1_score(truth, guess, average="macro", zero_division=0.0)),
        }
        curve = None
        if len(labels) == 2 and len({*truth.tolist()}) == 2:
            margin = torch.cat(margins).cpu().numpy()
            metrics["auc"] = float(roc_auc_score(truth, margin))
            curve = _thinned(np.stack(roc_curve(truth, margin)[:2], axis=1))
        return Evaluation(
            metrics=metrics,
            labels=labels,
            confusion=_table(cells, len(labels)) if whole else None,
            confusion_cells=None if whole else cells,
            roc=curve,
        )


def _confusion_cells(truth: NDArray[np.int64], guess: NDArray[np.int64]) -> list[list[int]]:
    """Return [true, predicted, count] of every pair of classes that occurs: as many as records, however many classes."""
    pairs, counts = np.unique(np.stack([truth, guess], axis=1), axis=0, return_counts=True)
    return [[*pair, count] for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True)]


def _table(cells: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Return the cells as a full table, rows are true classes."""
    table = [[0] * size for _ in range(size)]
    for true, predicted, count in cells:
        table[true][predicted] = count
    return table


def _thinned(points: NDArray[np.float64]) -> list[list[float]]:
    """Return at most `_ROC_POINTS` of the points, ends kept."""
    kept = np.unique(np.linspace(0, len(points) - 1, min(len(points), _ROC_POINTS)).round().astype(int))
    return [[float(x), float(y)] for x, y in points[kept]]


def _class_of(example: Example) -> int:
    return int(torch.as_tensor(example.target).flatten()[0])
