"""What tasks have in common: text that becomes tokens, and targets for every token.

Guarantee (tests: tests/shared/tasks/test_tokens.py): a text is tokenised only as far as the model reads, so that one of many
megabytes takes the time and memory of a short one; the tokens are those of the whole text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from shared.data.cells import text_fault
from shared.data.records import named
from shared.errors import DataError
from shared.models.batches import IGNORED
from shared.models.heads import sum_in_order

_CHARACTERS_PER_TOKEN, _MOST_CHARACTERS_PER_TOKEN = 128, 1024
_WORDS_PER_TOKEN = 16


def texts_of(records: Sequence[Any], role: str) -> list[str]:
    """Return the texts of records; `DataError` naming the record that holds none, which is never turned into one."""
    for row, record in enumerate(records, start=1):
        if (fault := text_fault(record[role])) is not None:
            raise DataError(f"{named(record, row)} has {fault} as its {role}; mend the data.")
    return [record[role] for record in records]


def begin_tokens(tokenizer: Any) -> list[int]:
    """Return the token that the backbone's own tokenizer puts before a text (Llama, OPT), or none (GPT-2, GPT-NeoX, Qwen).

    A decoder that was trained with one reads every text worse without.
    """
    plain, whole = (list(tokenizer("a", add_special_tokens=adds)["input_ids"]) for adds in (False, True))
    begin = tokenizer.bos_token_id
    return [begin] if begin is not None and whole[: 1 + len(plain)] == [begin, *plain] else []


def read_part(text: str, tokenizer: Any, max_length: int, *, end: bool = False) -> str:
    """Return a part of a long text that has the same first `max_length` tokens (with `end`, the same last ones).

    It is cut between words; within an endless one, the tokens at the cut may be others than in the whole. A text of up
    to 128 characters for each token is returned as it is; of one that has fewer tokens in 1024 characters for each (one
    endless word, or blanks), what follows is not read.
    """
    size = _CHARACTERS_PER_TOKEN * max_length
    if size >= len(text):
        return text
    for _ in range(2):
        part = _cut(text, size, end=end)
        # Twice as many tokens as are read: where there is no space to cut at, the last ones may differ.
        if len(tokenizer(part, add_special_tokens=False)["input_ids"]) >= 2 * max_length:
            return part
        size *= 4
    return _cut(text, _MOST_CHARACTERS_PER_TOKEN * max_length, end=end)


def read_words(words: list[str], tokenizer: Any, max_length: int) -> list[str]:
    """Return as many of the words as `max_length` tokens can need, a few of which may have none; see `read_part`."""
    return [read_part(word, tokenizer, max_length) for word in words[: _WORDS_PER_TOKEN * max_length]]


def _cut(text: str, size: int, *, end: bool) -> str:
    part = text[-size:] if end else text[:size]
    if end:
        place = min((found for mark in " \n\t" if (found := part.find(mark)) >= 0), default=size)
        return part[place:] if place < size // 2 else part
    place = max(part.rfind(mark) for mark in " \n\t")
    return part[:place] if place > size // 2 else part


def token_losses(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return (negative log-likelihood, whether it counts), both [B, T]; zero where it does not.

    Args:
        logits: [B, T, classes].
        targets: class of every token, int64 [B, T]; `IGNORED` where a token has none.
        label_smoothing: share of each target that is spread over all classes.
    """
    nll = nn.functional.cross_entropy(
        logits.float().flatten(0, 1),
        targets.flatten(),
        reduction="none",
        ignore_index=IGNORED,
        label_smoothing=label_smoothing,
    )
    return nll.view(targets.shape), targets != IGNORED


def mean_over_own_tokens(
    logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0, class_weights: Sequence[float] = ()
) -> Tensor:
    """Return each example's mean loss over its own tokens, [B]; see `token_losses` and `weighted`.

    A mean over all tokens of the batch would let a long record shrink the gradient of a short one; one over the weights of the
    batch would let others' labels do so.
    """
    nll, counts = token_losses(logits, targets, label_smoothing=label_smoothing)
    return sum_in_order(weighted(nll, targets, class_weights)) / counts.sum(dim=1)


def weighted(losses: Tensor, targets: Tensor, class_weights: Sequence[float]) -> Tensor:
    """Return each loss times the weight of its own class, and divided by nothing: no loss depends on other records' classes.

    Args:
        losses: float, of any shape.
        targets: class of each, int64 in the same shape; `IGNORED` where the loss is 0.
        class_weights: one for each class; empty: all 1.
    """
    if not class_weights:
        return losses
    return losses * losses.new_tensor(class_weights)[targets.clamp(min=0)]
