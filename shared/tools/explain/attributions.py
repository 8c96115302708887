"""Which words moved a prediction: integrated gradients (Sundararajan, Taly, Yan 2017) over the embeddings, by Captum.

The path leads from a *baseline*, the text with every token but the tokenizer's special ones replaced by its padding token (or its
mask token, if asked for; by the end of text where there is neither, as in GPT-2), to the text. What is explained is one number:
for labels the log-odds of one of them, log(p / (1 - p)); for a score the score. The attributions of the words add up to what that
number is for the text minus what it is for the baseline.

Guarantees (tests: tests/shared/tools/explain/test_attributions.py)
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
from shared.job.job import Job
from shared.job.parsing import nearest
from shared.models.batches import IGNORED, Example
from shared.models.tunable import TunableModel
from shared.runtime.inference import pair_record
from shared.runtime.runtime import Runtime
from shared.tasks.token_classification import entities, word_places
from shared.tasks.tokens import read_part, read_words

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
    job: Job,
    text: str,
    *,
    label: str | None = None,
    word: int | None = None,
    baseline: Baseline = "pad",
    steps: int = 32,
) -> Explanation:
    """Return which words moved the prediction of one text.

    Args:
        runtime: of a run, in float32.
        text: for `pair_matching` both texts with a tab between them.
        label: explain this one; by default the one that is predicted.
        word: for `token_classification` the number of the word, from 1; by default the first of the first entity.
        baseline: which token stands for an absent word, where the tokenizer has it.
        steps: to begin with.

    Raises:
        ConfigError: if the task has nothing to attribute, Captum is absent, or an option does not fit.
        DataError: if the text does not fit the task.
        ModelError: if the integral does not converge.
    """
    model = runtime.model
    if job.task.kind in ("causal_lm", "replies") or not isinstance(model, TunableModel):
        raise ConfigError(f"the run's task is {job.task.kind!r}, which has no prediction of a text to explain.")
    if not 2 <= steps <= MOST_STEPS:
        raise ConfigError(f"--steps is {steps}; give 2 to {MOST_STEPS}.")
    if (word is not None) and job.task.kind != "token_classification":
        raise ConfigError("--word is for token_classification, where each word has its own prediction; leave it out.")
    if label is not None and label not in job.task.labels:
        raise ConfigError(f"--label is {label!r}; {nearest(label, list(job.task.labels))}.")
    read = _read(runtime, job, text)
    ids = read.example.input_ids[None].to(model.device)
    outputs = model.from_embeddings(model.embeddings(ids), torch.ones_like(ids, dtype=torch.bool)).detach()
    chosen = _choose(runtime, job, read, outputs, label, word)
    token, name = baseline_token(runtime.tokenizer, baseline)
    replaced = torch.where(torch.tensor([place is None for place in read.places], device=ids.device), ids, token)

    def forward(embeddings: Tensor) -> Tensor:
        mask = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        return chosen.of(model.from_embeddings(embeddings, mask))

    found = integrate(
        forward,
        model.embeddings(ids),
        model.embeddings(replaced),
        steps=steps,
        at_once=max(1, runtime.compute.micro_batch_tokens // ids.shape[1]),
    )
    return Explanation(
        kind=job.task.kind,
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


def integrate(
    forward: Callable[[Tensor], Tensor], inputs: Tensor, baseline: Tensor, *, steps: int, at_once: int = 64
) -> Integrated:
    """Return integrated gradients of `forward` on the straight path from `baseline` to `inputs`, by Gauss-Legendre quadrature.

    Args:
        forward: from embeddings [S, T, H] to one number each, [S].
        inputs, baseline: [1, T, H].
        steps: to begin with; doubled until the gap is small enough, up to `MOST_STEPS`.
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
        if steps >= MOST_STEPS:
            raise ModelError(
                f"with {steps} steps the attributions add up to {output - before + found.gap:.4g} where the output changes by "
                f"{output - before:.4g}; {allowed:.2g} may be missing. They would not be faithful. Try another --baseline."
            )
        steps = min(2 * steps, MOST_STEPS)


def baseline_token(tokenizer: Any, wanted: Baseline) -> tuple[int, str]:
    """Return id and name of the token that stands for an absent word: the one asked for, else the tokenizer's end of text."""
    token = getattr(tokenizer, f"{wanted}_token", None)
    identity = getattr(tokenizer, f"{wanted}_token_id", None)
    if token is None or identity is None:
        token, identity = tokenizer.eos_token, tokenizer.eos_token_id
    if token is None or identity is None:
        raise ConfigError(f"the tokenizer has no {wanted} token and no end of text; try another --baseline.")
    return int(identity), str(token)


# --- what is explained ---


@dataclass(frozen=True)
class _Chosen:
    """One number of a model's outputs, and how to speak of it."""

    of: Callable[[Tensor], Tensor]
    says: str
    target: str


def _choose(runtime: Runtime, job: Job, read: _Read, outputs: Tensor, label: str | None, word: int | None) -> _Chosen:
    if job.task.kind == "regression":
        assert job.task.target_range is not None  # noqa: S101 (checked by TaskConfig)
        low, high = job.task.target_range
        score = float(runtime.task.scores(outputs))  # type: ignore[attr-defined]
        return _Chosen(
            lambda found: low + (found[:, 0].float() + 1) * (high - low) / 2,
            f"score {score:.3f}",
            "the score, before it is put on the range's border",
        )
    if job.task.kind != "token_classification":
        warmth = runtime.temperature
        return _log_odds(job.task.labels, outputs[0] / warmth, label, lambda found: found / warmth, "")
    place, name = _place_of_word(job.task.labels, read, outputs[0], word)
    return _log_odds(job.task.labels, outputs[0, place], label, lambda found: found[:, place], f" at word {name}")


def _log_odds(
    labels: tuple[str, ...], logits: Tensor, label: str | None, pick: Callable[[Tensor], Tensor], where: str
) -> _Chosen:
    """Return log(p / (1 - p)) of a label as what is explained; of two labels that is the difference of their logits."""
    best = int(logits.argmax())
    index = best if label is None else labels.index(label)
    others = [i for i in range(len(labels)) if i != index]
    probability = float(logits.float().softmax(dim=-1)[best])

    def of(outputs: Tensor) -> Tensor:
        found = pick(outputs).float()
        return found[:, index] - found[:, others].logsumexp(dim=-1)

    return _Chosen(
        of,
        f"{labels[best]}, probability {probability:.3f}{where}",
        f"log-odds of {labels[index]!r} against all other labels{where}",
    )


def _place_of_word(labels: tuple[str, ...], read: _Read, logits: Tensor, word: int | None) -> tuple[int, str]:
    """Return the token that carries a word's prediction, and what to call the word."""
    targets = torch.as_tensor(read.example.target)
    first = (targets != IGNORED).nonzero().flatten().tolist()
    if word is None:
        tags = [labels[i] for i in logits[first].argmax(dim=-1).tolist()]
        found = entities(tags)
        if not found:
            raise DataError("the model finds no entity in the text; name the word to explain by --word N.")
        number = found[0][1]
    else:
        number = word - 1
    if not 0 <= number < len(first):
        raise DataError(
            f"--word is {word}, but the model reads {len(first)} words of the text; give 1 to {len(first)}."
        )
    begin, end = next(place[1:3] for place in read.places if place is not None and place[3] == number)
    return first[number], f"{number + 1} ({read.texts[0][begin:end]})"


# --- words ---


@dataclass(frozen=True)
class _Read:
    """A text as the model reads it.

    Attributes:
        places: of each token: text, begin and end of its word, and the word's number; None for a special token.
    """

    texts: tuple[str, ...]
    example: Example
    places: tuple[tuple[int, int, int, int] | None, ...]


def _read(runtime: Runtime, job: Job, text: str) -> _Read:
    tokenizer = runtime.tokenizer
    if not tokenizer.is_fast:
        raise ModelError(
            "the backbone's tokenizer does not say which token belongs to which word; a fast one is needed."
        )
    if not text.strip():
        raise DataError("there is no text to explain.")
    options: dict[str, Any] = {"max_length": runtime.max_length, "return_offsets_mapping": True}
    texts: tuple[str, ...] = (text,)
    record: dict[str, Any] = {"text": text}
    if job.task.kind == "token_classification":
        spans = word_places(text)
        words = [text[a:b] for a, b in spans]
        if not words:
            raise DataError("the text has no words.")
        record = {"tokens": words}
        read = read_words(words, tokenizer, runtime.max_length)
        encoded = tokenizer([read], is_split_into_words=True, truncation=True, **options)
    elif job.task.kind == "pair_matching":
        record = pair_record(text, "the text")
        texts = (record["text"], record["pair"])
        first, second = (read_part(part, tokenizer, runtime.max_length) for part in texts)
        encoded = tokenizer([first], [second], truncation="longest_first", **options)
    else:
        encoded = tokenizer([read_part(text, tokenizer, runtime.max_length)], truncation=True, **options)
    (example,) = runtime.encode([record])
    if encoded["input_ids"][0] != example.input_ids.tolist():
        raise AssertionError("the task reads other tokens than those whose places are known")
    places: list[tuple[int, int, int, int] | None] = []
    for number, part, (begin, end) in zip(
        encoded.word_ids(0), encoded.sequence_ids(0), encoded["offset_mapping"][0], strict=True
    ):
        if number is None:
            places.append(None)
        elif job.task.kind == "token_classification":
            places.append((0, *spans[number], number))
        else:
            places.append((part or 0, begin, end, number))
    return _Read(texts, example, tuple(places))


def _words(read: _Read, attributions: Tensor) -> tuple[Word, ...]:
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


def _unread(read: _Read) -> tuple[int, ...]:
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
