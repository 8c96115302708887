"""Pairs: whether a second text belongs to a first, such as an answer to a question or an item to a description.

Both texts go through the backbone together (a cross-encoder), so that its attention compares them.

Each record is one pair with its own label, and the unit of privacy is the pair. Pairs that do not match must stand in the data
as records of their own: a site that made them up by mixing its records would let one record change the losses of others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shared.models.batches import Batch, Example
from shared.tasks.base import Evaluation, Record
from shared.tasks.sequence_classification import SequenceClassification
from shared.tasks.tokens import read_part, texts_of

RECALL_AT = (1, 3, 10)


@dataclass(frozen=True)
class PairMatching(SequenceClassification):
    """See `shared.tasks.base.Task`. Records have `text`, `pair` and `label`, the second of the job's labels for a match."""

    roles: ClassVar[tuple[str, ...]] = ("text", "pair", "label")
    primary_metric = "mrr"

    def encode(self, records: Sequence[Record], tokenizer: Any, max_length: int) -> list[Example]:
        """Tokenise pairs, of which the longer text is cut first; remember which pairs have the same first text."""
        targets = self._targets(records)
        if not records:
            return []
        queries: dict[str, int] = {}
        whole = texts_of(records, "text")
        numbers = [queries.setdefault(text, len(queries)) for text in whole]
        first, second = (
            [read_part(text, tokenizer, max_length) for text in texts] for texts in (whole, texts_of(records, "pair"))
        )
        encoded = tokenizer(first, second, truncation="longest_first", max_length=max_length)["input_ids"]
        return [
            Example(torch.tensor(ids, dtype=torch.int64), torch.tensor([target, query]))
            for ids, target, query in zip(encoded, targets, numbers, strict=True)
        ]

    def probe(self, input_ids: Tensor, number: int) -> Example:
        """Return a pair that matches if `number` is odd."""
        return Example(input_ids, torch.tensor([number % 2, number]))

    def classes(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the more probable class and the label of each pair."""
        return outputs.argmax(dim=-1), batch.targets[:, 0]

    def evaluate(self, parts: Iterable[tuple[Tensor, Batch]]) -> Evaluation:
        """Return the metrics of a classifier, and of a ranking: for each first text its pairs, the likeliest match first.

        MRR is the mean of 1 / rank of the first match, recall@k the mean share of the matches among the first k, both over the
        first texts that have a match and something else. Pairs with equal scores count as if the match came last.
        """
        scores, queries, matches, kept = [], [], [], []
        for outputs, batch in parts:
            kept.append((outputs, batch))
            scores.append((outputs[:, 1] - outputs[:, 0]).double().cpu())
            queries.append(batch.targets[:, 1].cpu())
            matches.append(batch.targets[:, 0].cpu() == 1)
        found = super().evaluate(kept)
        return Evaluation(
            metrics=found.metrics | ranking_metrics(torch.cat(scores), torch.cat(queries), torch.cat(matches)),
            labels=found.labels,
            confusion=found.confusion,
            roc=found.roc,
        )


def ranking_metrics(scores: Tensor, queries: Tensor, matches: Tensor) -> dict[str, float | None]:
    """Return "mrr", "recall@k" and "queries", how many first texts they are a mean of; without any they are undefined.

    Args:
        scores: float [pairs], higher for a likelier match.
        queries: number of each pair's first text, int [pairs].
        matches: bool [pairs].
    """
    reciprocal: list[float] = []
    recalls: dict[int, list[float]] = {k: [] for k in RECALL_AT}
    for query in torch.unique(queries):
        own = queries == query
        right, wrong = scores[own & matches], scores[own & ~matches]
        if not len(right) or not len(wrong):
            continue
        # A match's rank: itself, every better pair, and every pair that is no match and no worse.
        ranks = 1 + (right[:, None] < right).sum(dim=1) + (right[:, None] <= wrong).sum(dim=1)
        reciprocal.append(1 / int(ranks.min()))
        for k, values in recalls.items():
            values.append(float((ranks <= k).double().mean()))
    count = len(reciprocal)
    mean = {"mrr": reciprocal, **{f"recall@{k}": values for k, values in recalls.items()}}
    return {name: sum(values) / count if count else None for name, values in mean.items()} | {"queries": float(count)}
