"""Tasks that say something of a text: how a user's text becomes a record, what is said of it, and which number explains it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shared.models.batches import Example
from shared.tasks.base import Prediction, Record, Task
from shared.tasks.tokens import read_part, texts_of

Place = tuple[int, int, int, int]
"""Of a token: number of its text, begin and end of its word there, and the word's number."""


@dataclass(frozen=True)
class Read:
    """A text as the model reads it.

    Attributes:
        record: of `Predicting.question`.
        places: of each token; None for a special token.
    """

    record: Record
    example: Example
    places: tuple[Place | None, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """The text, or both of a pair."""
        return tuple(self.record[role] for role in ("text", "pair") if role in self.record)


@dataclass(frozen=True)
class Explained:
    """One number of a model's outputs, and how to speak of it.

    Attributes:
        of: the number of each row of outputs, [B].
        says: the prediction, such as "positive, probability 0.873".
        target: what the number is, in words.
    """

    of: Callable[[Tensor], Tensor]
    says: str
    target: str


class Predicting(Task):
    """A task whose outputs are a prediction of a text, an image or each of its words."""

    by_word: ClassVar[bool] = False
    """True if each word has a prediction of its own."""

    def question(self, text: str, name: str, tokenizer: Any, max_length: int) -> Record:
        """Return the record, without a target, of a text that a user gave.

        Raises:
            DataError: calling it `name`, if it does not fit the task.
        """
        return {"text": text}

    @abstractmethod
    def answer(self, record: Record, example: Example, output: Tensor) -> Prediction:
        """Return what the head's output says of a record of `question`."""

    def encode(self, records: Sequence[Record], tokenizer: Any, max_length: int) -> list[Example]:
        """Tokenise texts and give each its target."""
        targets = self.targets(records)
        if not records:
            return []
        encoded = self.tokenized(records, tokenizer, max_length)["input_ids"]
        return [Example(torch.tensor(ids, dtype=torch.int64), t) for ids, t in zip(encoded, targets, strict=True)]

    @abstractmethod
    def targets(self, records: Sequence[Record]) -> Sequence[Any]:
        """Return the target of every record, or any if it has none because it is to be predicted; `DataError` as `encode`."""

    def tokenized(self, records: Sequence[Record], tokenizer: Any, max_length: int, **options: Any) -> Any:
        """Return what the tokenizer makes of records, cut to `max_length` tokens."""
        texts = [read_part(text, tokenizer, max_length) for text in texts_of(records, "text")]
        return tokenizer(texts, truncation=True, max_length=max_length, **options)

    def places(self, record: Record, encoded: Any) -> tuple[Place | None, ...]:
        """Return the place of each token of one record, None for a special token; `encoded` is `tokenized` with offsets."""
        found = zip(encoded.word_ids(0), encoded.sequence_ids(0), encoded["offset_mapping"][0], strict=True)
        return tuple(None if word is None else (text or 0, begin, end, word) for word, text, (begin, end) in found)

    @abstractmethod
    def explained(self, read: Read, outputs: Tensor, label: str | None, word: int | None) -> Explained:
        """Return which number of the outputs [1, ...] explains the prediction.

        Args:
            label: explain this one; None is the predicted one.
            word: number of the word whose prediction is explained, from 1; None leaves the choice to the task.

        Raises:
            DataError: if there is no such word.
        """


def log_odds(
    labels: tuple[str, ...], logits: Tensor, label: str | None, pick: Callable[[Tensor], Tensor], where: str = ""
) -> Explained:
    """Return log(p / (1 - p)) of a label as what is explained; of two labels that is the difference of their logits.

    Args:
        logits: of the prediction, [labels].
        label: None is the likeliest.
        pick: returns such logits of outputs, [B, labels].
        where: goes behind all words.
    """
    best = int(logits.argmax())
    index = best if label is None else labels.index(label)
    others = [i for i in range(len(labels)) if i != index]
    probability = float(logits.float().softmax(dim=-1)[best])

    def of(outputs: Tensor) -> Tensor:
        found = pick(outputs).float()
        return found[:, index] - found[:, others].logsumexp(dim=-1)

    return Explained(
        of,
        f"{labels[best]}, probability {probability:.3f}{where}",
        f"log-odds of {labels[index]!r} against all other labels{where}",
    )
