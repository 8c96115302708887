"""Sequence classification: one label per text, cross-entropy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from sklearn.metrics import confusion_matrix, f1_score
from torch import Tensor, nn

from shared.batches import Batch, Example
from shared.config import ModelConfig, TaskConfig
from shared.errors import DataError
from shared.heads import PooledClassifier, init_linear
from shared.tasks.base import Evaluation, Record


@dataclass(frozen=True)
class SequenceClassification:
    """See `shared.tasks.base.Task`."""

    labels: tuple[str, ...]
    pooling: str

    roles: ClassVar[tuple[str, ...]] = ("text", "label")
    primary_metric = "accuracy"
    higher_is_better = True
    causal_lm = False

    @classmethod
    def from_config(cls, task: TaskConfig, model: ModelConfig) -> SequenceClassification:
        """Build from the job's sections."""
        return cls(labels=task.labels, pooling=model.pooling)

    def build_head(self, backbone: nn.Module, hidden_size: int, *, seed: int) -> nn.Module:
        """Return a pooled linear classifier drawn from the public seed."""
        head = PooledClassifier(hidden_size, len(self.labels), self.pooling)
        init_linear(head.linear, seed=seed, name="head.linear")
        return head

    def encode(self, records: Sequence[Record], tokenizer: Any, max_length: int) -> list[Example]:
        """Tokenise texts (with the tokenizer's special tokens) and turn labels into class indices."""
        targets = self._targets(records)
        if not records:
            return []
        encoded = tokenizer([str(r["text"]) for r in records], truncation=True, max_length=max_length)["input_ids"]
        return [Example(torch.tensor(ids, dtype=torch.int64), t) for ids, t in zip(encoded, targets, strict=True)]

    def _targets(self, records: Sequence[Record]) -> list[int]:
        """Return the class of every record; the first, if it has no label because it is to be labelled."""
        index = {label: i for i, label in enumerate(self.labels)}
        targets = []
        for row, record in enumerate(records, start=1):
            label = str(record["label"]) if "label" in record else self.labels[0]
            if label not in index:
                # The label itself may be private: only its row is named.
                raise DataError(
                    f"record {row} has a label that is not among task.labels ({', '.join(self.labels)}). Mend the data or "
                    "add the label to the job."
                )
            targets.append(index[label])
        return targets

    def probe(self, input_ids: Tensor, number: int) -> Example:
        """Return an example of class `number` modulo the number of classes."""
        return Example(input_ids, number % len(self.labels))

    def check_site(self, examples: Sequence[Example]) -> None:
        """Refuse an empty site and one whose records all have one label."""
        if not examples:
            raise DataError("the site has no records; it cannot take part.")
        if len({_class_of(example) for example in examples}) < 2:
            raise DataError(
                "all records of the site have one and the same label, so its updates would only push towards that label. "
                "Add records of other labels or leave the site out (scenario: raise partition.alpha or min_records)."
            )

    def per_example_loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return cross-entropy per example [B] from logits [B, labels]."""
        return nn.functional.cross_entropy(outputs.float(), batch.targets, reduction="none")

    def classes(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the most probable class and the label of each text."""
        return outputs.argmax(dim=-1), batch.targets

    def evaluate(self, parts: Iterable[tuple[Tensor, Batch]]) -> Evaluation:
        """Return loss, accuracy, macro F1 and the confusion matrix."""
        losses, predicted, targets = [], [], []
        for outputs, batch in parts:
            losses.append(self.per_example_loss(outputs, batch))
            guessed, true = self.classes(outputs, batch)
            predicted.append(guessed)
            targets.append(true)
        truth, guess = torch.cat(targets).cpu().numpy(), torch.cat(predicted).cpu().numpy()
        matrix = confusion_matrix(truth, guess, labels=range(len(self.labels)))
        return Evaluation(
            metrics={
                "loss": float(torch.cat(losses).mean()),
                "accuracy": float((truth == guess).mean()),
                "macro_f1": float(f1_score(truth, guess, average="macro", zero_division=0.0)),
            },
            labels=self.labels,
            confusion=matrix.tolist(),
        )


def _class_of(example: Example) -> int:
    return int(torch.as_tensor(example.target).flatten()[0])
