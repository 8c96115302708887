"""Replies: a language model learns to answer; the loss is on the response alone, the prompt is only read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shared.data.records import named
from shared.errors import DataError, ModelError
from shared.job.kinds import RULES
from shared.models.batches import IGNORED, Batch, Example
from shared.tasks.base import Prediction, Record
from shared.tasks.causal_lm import CausalLanguageModelling
from shared.tasks.tokens import begin_tokens, read_part, texts_of


class Replies(CausalLanguageModelling):
    """See `shared.tasks.base.Task`. Records have `prompt` and `response`."""

    kind = "replies"
    about = "replies: a response to a prompt"
    content = "prompts with responses"
    roles = RULES["replies"].roles

    def shown(self, prediction: Prediction) -> str:
        """Return a prompt and, below it, the response."""
        return f"{prediction['text']}\n{prediction['continuation']}"

    def start(self, text: str, tokenizer: Any, max_length: int) -> list[int]:
        """Return the tokens after which a response begins."""
        return prompt_tokens(text, tokenizer, max_length)

    def encode(self, records: Sequence[Record], tokenizer: Any, max_length: int) -> list[Example]:
        """Tokenise prompt, line end, response and end of text.

        The prompt may fill half of `max_length`; of a longer one the end is kept. A response that is cut gets no end.
        """
        _line_end(tokenizer)  # a fault of the backbone, whatever the records are
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        examples = []
        pairs = zip(texts_of(records, "prompt"), texts_of(records, "response"), strict=True)
        for row, (text, reply) in enumerate(pairs, start=1):
            prompt = prompt_tokens(text, tokenizer, max_length)
            response = tokenizer(read_part(reply, tokenizer, max_length), add_special_tokens=False)["input_ids"]
            if not response:
                raise DataError(
                    f"{named(records[row - 1], row)} has an empty response, so there is nothing to learn; remove it."
                )
            ids = torch.tensor([*prompt, *response, *end][:max_length], dtype=torch.int64)
            targets = ids.clone()
            targets[: len(prompt)] = IGNORED
            examples.append(Example(ids, targets))
        return examples

    def probe(self, input_ids: Tensor, number: int) -> Example:
        """Return a response after a prompt of one token or a few."""
        targets = input_ids.clone()
        targets[: 1 + number % (len(targets) - 1)] = IGNORED
        return Example(input_ids, targets)

    def targets(self, batch: Batch) -> Tensor:
        """Return the tokens of the response, int64 [B, T], and `IGNORED` elsewhere."""
        return batch.targets


def prompt_tokens(prompt: str, tokenizer: Any, max_length: int) -> list[int]:
    """Return the begin of a text, the tokens of a prompt and the line end before its response.

    They are at most half of `max_length`, but one at least; of a longer prompt the end is kept.

    Raises:
        ModelError: if the tokenizer has no token for a line end.
    """
    prompt = read_part(prompt, tokenizer, max_length, end=True)
    ids: list[int] = [*tokenizer(prompt, add_special_tokens=False)["input_ids"], *_line_end(tokenizer)]
    room, begin = max(1, max_length // 2), begin_tokens(tokenizer)
    begin = begin if len(begin) < room else []
    return [*begin, *ids[-(room - len(begin)) :]]


def _line_end(tokenizer: Any) -> list[int]:
    """Return the tokens of a line end; ModelError if there are none."""
    separator: list[int] = tokenizer("\n", add_special_tokens=False)["input_ids"]
    if not separator:
        raise ModelError("the backbone's tokenizer knows no line end, which parts a prompt from its response.")
    return separator
