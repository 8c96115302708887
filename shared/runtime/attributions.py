"""Which words moved a prediction: integrated gradients (Sundararajan, Taly, Yan 2017) over the embeddings, by Captum.

The path leads from a *baseline*, the text with every token but the tokenizer's special ones replaced by its padding token (or its
mask token, if asked for; by the end of text where there is neither, as in GPT-2), to the text. What is explained is one number:
for labels the log-odds of one of them, log(p / (1 - p)); for a score the score. The attributions of the words add up to what that
number is for the text minus what it is for the baseline.

Guarantees (tests: tests/shared/runtime/test_attributions.py)
    * *Completeness*: the gap between that sum and that difference is returned, and is at most `MOST_GAP` of the sum of all
      absolute attributions; the number of steps is doubled until it is, and an explanation that does not get there is refused.
    * A linear model's attributions are its weights times the input minus the baseline.
    * Weights and gradients of the model are as before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from shared.errors import ConfigError, DataError, ModelError
from shared.job.parsing import nearest
from shared.models.tunable import TunableModel
from shared.runtime.runtime import Runtime
from shared.tasks.predicting import Predicting, Read

MOST_GAP = 0.01
"""Of the sum of all absolute attributions."""
_ROUNDING = 1e-4
MOST_STEPS = 1024
Baseline = Literal["pad", "mask"]


@dataclass(frozen=True, kw_only=True)
class Word:
    """A word and what it adds to the output.

    Attributes:
        text: 0, or 1 for the second text of a pair.
        begin, end: its place in that text.
    """

    text: int
    begin: int
    end: int
    word: str
    attribution: float


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Why a model says what it says of one text.

    Attributes:
        kind: of the task.
        texts: the text, or both of a pair.
        says: the prediction, such as "positive, probability 0.873".
        target: what the attributions add up to, in words.
        output, baseline_output: that number for the text and for the baseline.
        baseline: the token that stands for the absence of a word.
        words: in their order; of what the model read.
        steps: of the integration.
        gap: sum of the attributions minus (output minus baseline output).
        unread: texts that go on beyond what the model read.
    """

    kind: str
    texts: tuple[str, ...]
    says: str
    target: str
    output: float
    baseline_output: float
    baseline: str
    words: tuple[Word, ...]
    steps: int
    gap: float
    unread: tuple[int, ...] = ()

    @property
    def total(self) -> float:
        """Sum of the attributions."""
        return self.output - self.baseline_output + self.gap

    @property
    def largest(self) -> float:
        """Largest absolute attribution of a word."""
        return max((abs(word.attribution) for word in self.words), default=0.0)


@dataclass(frozen=True)
class Integrated:
    """Attributions [T] and what they add up to."""

    attributions: Tensor
    output: float
    baseline_output: float
    steps: int

    @property
    def gap(self) -> float:
        """Sum of the attributions minus the difference of the outputs."""
        return float(self.attributions.sum()) - (self.output - self.baseline_output)


def explain(
    runtime: Runtime,
    text: str,
    *,
    label: str | None = None,
    word: int | None = None,
    baseline: Baseline = "pad",
    steps: int = 32,
    most_steps: int = MOST_STEPS,
    before_each: Callable[[int], None] = lambda num_texts: None,
) -> Explanation:
    """Return which words moved the prediction of one text.

    Args:
        runtime: of a run, in float32.
        text: for `pair_matching` both texts with a tab between them.
        label: explain this one; by default the one that is predicted.
        word: for `token_classification` the number of the word, from 1; by default the first of the first entity.
        baseline: which token stands for an absent word, where the tokenizer has it.
        steps: to begin with.
        most_steps: to which they are doubled.
        before_each: called before each pass of the model with the number of texts in it; what it raises ends the explanation.

    Raises:
        ConfigError: if the task has nothing to attribute, Captum is absent, or an option does not fit.
        DataError: if the text does not fit the task.
        ModelError: if the integral does not converge.
    """
    model, task = runtime.model, runtime.task
    if not isinstance(task, Predicting) or not isinstance(model, TunableModel):
        raise ConfigError(f"the run's task is {task.kind!r}, which has no prediction of a text to explain.")
    _check_options(task, label=label, word=word, steps=steps)
    read = _read(runtime, task, text)
    ids = read.example.input_ids[None].to(model.device)

    def outputs_of(embeddings: Tensor) -> Tensor:
        before_each(len(embeddings))
        mask = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        return model.from_embeddings(embeddings, mask) / runtime.temperature

    chosen = task.explained(read, outputs_of(model.embeddings(ids)).detach(), label, word)
    token, name = baseline_token(runtime.tokenizer, baseline)
    replaced = torch.where(torch.tensor([place is None for place in read.places], device=ids.device), ids, token)
    found = integrate(
        lambda embeddings: chosen.of(outputs_of(embeddings)),
        model.embeddings(ids),
        model.embeddings(replaced),
        steps=steps,
        most_steps=most_steps,
        at_once=max(1, runtime.compute.micro_batch_tokens // ids.shape[1]),
    )
    return Explanation(
        kind=task.kind,
        texts=read.texts,
        says=chosen.says,
        target=chosen.target,
        output=found.output,
        baseline_output=found.baseline_output,
        baseline=name,
        words=_words(read, found.attributions),
        steps=found.steps,
        gap=found.gap,
        unread=_unread(read),
    )


def _check_options(task: Predicting, *, label: str | None, word: int | None, steps: int) -> None:
    """Raise `ConfigError` for an option that does not fit the task."""
    if not 2 <= steps <= MOST_STEPS:
        raise ConfigError(f"--steps is {steps}; give 2 to {MOST_STEPS}.")
    if word is not None and not task.by_word:
        raise ConfigError("--word is for token_classification, where each word has its own prediction; leave it out.")
    if label is not None and label not in task.config.labels:
        raise ConfigError(f"--label is {label!r}; {nearest(label, list(task.config.labels))}")


def integrate(
    forward: Callable[[Tensor], Tensor],
    inputs: Tensor,
    baseline: Tensor,
    *,
    steps: int,
    most_steps: int = MOST_STEPS,
    at_once: int = 64,
) -> Integrated:
    """Return integrated gradients of `forward` on the straight path from `baseline` to `inputs`, by Gauss-Legendre quadrature.

    Args:
        forward: from embeddings [S, T, H] to one number each, [S].
        inputs, baseline: [1, T, H].
        steps: to begin with; doubled until the gap is small enough, up to `most_steps`.
        at_once: points of the path in one call of `forward`.

    Raises:
        ModelError: if it does not get small enough.
    """
    method = _captum()(forward)
    with torch.no_grad():
        output, before = (float(forward(place)) for place in (inputs, baseline))
    while True:
        values = method.attribute(inputs, baselines=baseline, n_steps=steps, internal_batch_size=at_once)
        found = Integrated(values.detach().double().sum(dim=-1)[0].cpu(), output, before, steps)
        allowed = max(MOST_GAP * float(found.attributions.abs().sum()), _ROUNDING * max(1.0, abs(output), abs(before)))
        if abs(found.gap) <= allowed:
            return found
        if steps >= most_steps:
            raise ModelError(
                f"with {steps} steps the attributions add up to {output - before + found.gap:.4g} where the output changes by "
                f"{output - before:.4g}; {allowed:.2g} may be missing. They would not be faithful. Try another --baseline."
            )
        steps = min(2 * steps, most_steps)


def baseline_token(tokenizer: Any, wanted: Baseline) -> tuple[int, str]:
    """Return id and name of the token that stands for an absent word: the one asked for, else the tokenizer's end of text."""
    token = getattr(tokenizer, f"{wanted}_token", None)
    identity = getattr(tokenizer, f"{wanted}_token_id", None)
    if token is None or identity is None:
        token, identity = tokenizer.eos_token, tokenizer.eos_token_id
    if token is None or identity is None:
        raise ConfigError(f"the tokenizer has no {wanted} token and no end of text; try another --baseline.")
    return int(identity), str(token)


# --- words ---


def _read(runtime: Runtime, task: Predicting, text: str) -> Read:
    tokenizer = runtime.tokenizer
    if not tokenizer.is_fast:
        raise ModelError(
            "the backbone's tokenizer does not say which token belongs to which word; a fast one is needed."
        )
    if not text.strip():
        raise DataError("there is no text to explain.")
    record = task.question(text, "the text", tokenizer, runtime.max_length)
    encoded = task.tokenized([record], tokenizer, runtime.max_length, return_offsets_mapping=True)
    (example,) = runtime.encode([record])
    return Read(record, example, task.places(record, encoded))


def _words(read: Read, attributions: Tensor) -> tuple[Word, ...]:
    """Return the words with the sums of their pieces."""
    spans: dict[tuple[int, int], tuple[int, int]] = {}
    sums: dict[tuple[int, int], float] = {}
    for place, value in zip(read.places, attributions.tolist(), strict=True):
        if place is not None:
            text, begin, end, number = place
            first, last = spans.get((text, number), (begin, end))
            spans[text, number] = (min(first, begin), max(last, end))
            sums[text, number] = sums.get((text, number), 0.0) + value
    found = []
    for (text, number), (begin, end) in spans.items():
        raw = read.texts[text][begin:end]
        # Some tokenizers count the space before a word to it.
        start, word = begin + len(raw) - len(raw.lstrip()), raw.strip()
        found.append(Word(text=text, begin=start, end=start + len(word), word=word, attribution=sums[text, number]))
    return tuple(found)


def _unread(read: Read) -> tuple[int, ...]:
    last = [0] * len(read.texts)
    for place in read.places:
        if place is not None:
            last[place[0]] = max(last[place[0]], place[2])
    return tuple(i for i, text in enumerate(read.texts) if text[last[i] :].strip())


def _captum() -> Any:
    try:
        from captum.attr import IntegratedGradients
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "captum":
            raise
        raise ConfigError(
            "explaining needs the package captum, which is not installed: pip install 'silotune[explain]' (or captum)."
        ) from None
    return IntegratedGradients
