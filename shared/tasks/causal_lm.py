"""Causal language modelling: predict the next token; one record is one text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from shared.data.records import named
from shared.errors import ConfigError, DataError, ModelError
from shared.job.kinds import RULES, TaskKind
from shared.models.batches import IGNORED, Batch, Example
from shared.models.families import architecture_of
from shared.models.heads import TiedLanguageHead
from shared.tasks.base import Evaluation, Prediction, Record, Task
from shared.tasks.tokens import begin_tokens, mean_over_own_tokens, read_part, texts_of, token_losses


class CausalLanguageModelling(Task):
    """See `shared.tasks.base.Task`."""

    kind: ClassVar[TaskKind] = "causal_lm"
    about = "language modelling: the next token of a text"
    content = "texts"
    roles: ClassVar[tuple[str, ...]] = RULES["causal_lm"].roles
    primary_metric = RULES["causal_lm"].primary_metric
    higher_is_better = False
    causal_lm = True

    def build_head(self, backbone: nn.Module, hidden_size: int, *, seed: int) -> nn.Module:
        """Return the token embedding as output; it stays frozen, so the tie cannot corrupt per-example gradients.

        Who loads a backbone with an output of its own puts that in its place (`OwnLanguageHead`).
        """
        architecture = architecture_of(str(backbone.config.model_type))  # type: ignore[union-attr]
        if not architecture.causal:
            raise ModelError(
                "task.kind is 'causal_lm', but the backbone sees the whole text at once (a BERT-like encoder); use a "
                "left-to-right backbone such as GPT-2 or Qwen."
            )
        return TiedLanguageHead(backbone.get_submodule(architecture.embedding))  # type: ignore[arg-type]

    def encode(self, records: Sequence[Record], tokenizer: Any, max_length: int) -> list[Example]:
        """Tokenise texts, begin each as the backbone's tokenizer does, and end it, so that generation learns where to stop.

        A text that fills `max_length` is cut and gets no end: it does not end there.
        """
        if not records:
            return []
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        texts = [read_part(text, tokenizer, max_length) for text in texts_of(records, "text")]
        encoded = tokenizer(texts, truncation=True, max_length=max_length, add_special_tokens=False)["input_ids"]
        begin = begin_tokens(tokenizer)
        examples = [Example(torch.tensor([*begin, *ids, *end][:max_length], dtype=torch.int64)) for ids in encoded]
        for row, ids in enumerate(encoded, start=1):
            if len(ids) + len(end) < 2:
                raise DataError(
                    f"{named(records[row - 1], row)} has fewer than two tokens, so there is nothing to predict; remove it."
                )
        return examples

    def start(self, text: str, tokenizer: Any, max_length: int) -> list[int]:
        """Return the tokens after which a continuation begins.

        Raises:
            ConfigError: if there are none.
        """
        end = tokenizer.eos_token_id
        text = read_part(text, tokenizer, max_length, end=True)
        begin = begin_tokens(tokenizer)
        tokens: list[int] = [*begin, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        tokens = tokens or ([] if end is None else [end])
        if not tokens:
            raise ConfigError(
                "there is no text to continue, and the tokenizer has no token to start from; give a text."
            )
        return tokens

    def shown(self, prediction: Prediction) -> str:
        """Return a text with its continuation."""
        return str(prediction["text"] + prediction["continuation"])

    def probe(self, input_ids: Tensor, number: int) -> Example:
        """Return the tokens; they are their own target."""
        return Example(input_ids)

    def per_example_loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the mean negative log-likelihood over each example's own tokens, [B], from logits [B, T, V]."""
        return mean_over_own_tokens(*self._shifted(outputs, batch))

    def evaluate(self, parts: Iterable[tuple[Tensor, Batch]]) -> Evaluation:
        """Return the mean loss per token and the perplexity exp(loss)."""
        total, tokens = 0.0, 0
        for outputs, batch in parts:
            nll, real = token_losses(*self._shifted(outputs, batch))
            total += float(nll.double().sum())
            tokens += int(real.sum())
        loss = total / tokens
        return Evaluation(metrics={"loss": loss, "perplexity": math.exp(min(loss, 700.0))})

    def targets(self, batch: Batch) -> Tensor:
        """Return the token that stands at each place, int64 [B, T], or `IGNORED` where nothing is to be predicted."""
        return batch.input_ids.masked_fill(~batch.attention_mask, IGNORED)

    def _shifted(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what is predicted after each token but the last, and what follows it."""
        return logits[:, :-1], self.targets(batch)[:, 1:]
