"""Pairs: whether a second text belongs to a first, such as an answer to a question or an item to a description.

Both texts go through the backbone together (a cross-encoder), so that its attention compares them.

Each record is one pair with its own label, and the unit of privacy is the pair. Pairs that do not match must stand in the data
as records of their own: a site that made them up by mixing its records would let one record change the losses of others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from shared.errors import DataError
from shared.job.kinds import RULES
from shared.models.batches import Batch, Example
from shared.tasks.base import Evaluation, Prediction, Record
from shared.tasks.sequence_classification import SequenceClassification
from shared.tasks.tokens import read_part, texts_of

RECALL_AT = (1, 3, 10)


class PairMatching(SequenceClassification):
    """See `shared.tasks.base.Task`. Records have `text`, `pair` and `label`, the second of the job's labels for a match."""

    kind = "pair_matching"
    about = "pairs: whether two texts belong together"
    content = "pairs of texts, each with one label"
    roles = RULES["pair_matching"].roles
    primary_metric = RULES["pair_matching"].primary_metric

    def targets(self, records: Sequence[Record]) -> Sequence[Any]:
        """Return class and number of the first text of every pair: equal texts have one number."""
        queries: dict[str, int] = {}
        targets = super().targets(records)
        numbers = [queries.setdefault(text, len(queries)) for text in texts_of(records, "text")]
        return [torch.tensor(pair) for pair in zip(targets, numbers, strict=True)]

    def tokenized(self, records: Sequence[Record], tokenizer: Any, max_length: int, **options: Any) -> Any:
        """Return what the tokenizer makes of pairs, of which the longer text is cut first."""
        first, second = (
            [read_part(text, tokenizer, max_length) for text in texts_of(records, role)] for role in ("text", "pair")
        )
        return tokenizer(first, second, truncation="longest_first", max_length=max_length, **options)

    def question(self, text: str, name: str, tokenizer: Any, max_length: int) -> Record:
        """Return the record of a pair that is written with a tab between its texts."""
        first, tab, second = text.partition("\t")
        if not tab or not first.strip() or not second.strip():
            raise DataError(f"{name} is no pair; give both texts with a tab between them.")
        return {"text": first.strip(), "pair": second.strip()}

    def shown(self, prediction: Prediction) -> str:
        """Return label, probability and both texts."""
        return f"{super().shown(prediction)} | {prediction['pair']}"

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
        ranking = ranking_metrics(torch.cat(scores), torch.cat(queries), torch.cat(matches))
        return replace(found, metrics=found.metrics | ranking)


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
