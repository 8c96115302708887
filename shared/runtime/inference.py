"""Use what was trained: label texts or images, find entities, rate or pair texts, or continue them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from shared.errors import ConfigError, ModelError, model_errors
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.job.job_file import load_job
from shared.models.batches import Example
from shared.runtime.calibration import load_temperature
from shared.runtime.export.exported import Exported, load_exported
from shared.runtime.export.folder import MODEL_FILE, ModelFolder
from shared.runtime.export.peft import load_state
from shared.runtime.runtime import Runtime, load_runtime
from shared.tasks.base import Prediction
from shared.tasks.causal_lm import CausalLanguageModelling
from shared.tasks.predicting import Predicting
from shared.tasks.token_classification import word_places

_CANNOT_ANSWER = "the model cannot answer these texts"
Outputs = Callable[[Sequence[Example]], list[Tensor]]
"""Returns the head's output of every example; see `head_outputs`."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: tokens to add at most.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: sample among the k likeliest tokens; 0 is all of them.
        top_p: and of these among the likeliest that have this probability together; 1 is all of them.
        num_sequences: continuations per text.
        seed: makes sampling repeatable; None does not.
    """

    max_new_tokens: int = 40
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    num_sequences: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.num_sequences < 1 or self.top_k < 0:
            raise ConfigError(
                f"max_new_tokens {self.max_new_tokens} and num_sequences {self.num_sequences} must be at least 1, top_k "
                f"{self.top_k} at least 0."
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p:g}; give a number above 0, and 1 at most.")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature is {self.temperature:g}; give a finite number from 0 (greedy) up.")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed}; give a whole number from 0 to 2^63 - 1.")

    def new_generator(self) -> torch.Generator:
        """Return the source of the random choices; without a seed it starts from the operating system's entropy."""
        generator = torch.Generator()
        if self.seed is None:
            # PyTorch's default generator starts from one and the same number in every process.
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def load_tuned(run_dir: Path, job: Job, compute: ComputeConfig) -> Runtime:
    """Return the runtime of a run with its final adapter loaded, and with its temperature if it has one.

    Raises:
        AdapterError: if the run has none.
    """
    with model_errors(f"the model in {run_dir} cannot be loaded"):
        runtime = load_runtime(job, compute)
        folder = run_dir / "adapter"
        runtime.load(load_state(folder, runtime, job), temperature=load_temperature(folder))
    return runtime


def load_model(path: Path, compute: ComputeConfig) -> Runtime | Exported:
    """Return what a run folder or an exported model folder holds, ready to predict or to generate.

    Args:
        compute: of a run; an exported model runs on the processor in its own precision.

    Raises:
        SilotuneError: see `load_tuned` and `load_exported`.
    """
    if not os.path.lexists(path / MODEL_FILE):
        return load_tuned(path, load_job(path), compute)
    found = load_exported(ModelFolder.read(path))
    with model_errors(f"the model in {path} cannot answer"):
        if isinstance(found.task, Predicting):
            require_answers(found.task, found.max_length, partial(head_outputs, found), str(path))
        else:
            require_logits(next_logits(found, [[1, 2]]), name=str(path))
    return found


def require_answers(task: Predicting, max_length: int, outputs: Outputs, name: str) -> None:
    """Let a model answer once, which proves that it can.

    Args:
        name: of the model, for errors.

    Raises:
        ModelError: if what comes out are no numbers, or others than the task has.
    """
    ids = torch.zeros(max_length, dtype=torch.int64) if task.kind == "image_classification" else torch.arange(1, 3)
    found = [*outputs([Example(ids)]), *outputs([Example(ids), Example(ids)])]
    require_logits(*found, name=name)
    width, axes = len(task.config.labels) or 1, 2 if task.kind == "token_classification" else 1
    if len(found) != 3 or any(one.dim() != axes or one.shape[-1] != width for one in found):
        shapes = ", ".join(str(list(one.shape)) for one in found)
        raise ModelError(
            f"{name} answers {shapes} to one text and to two, and its task has {width} outputs for each; do not use it."
        )


def require_logits(*found: Tensor, name: str) -> None:
    """Raise `ModelError` unless what a model computes are numbers."""
    if not all(bool(torch.isfinite(one).all()) for one in found):
        raise ModelError(f"{name} computes what is no number; do not use it.")


def predict(runtime: Runtime | Exported, texts: Sequence[str], *, outputs: Outputs | None = None) -> list[Prediction]:
    """Return what the model says of every text or image, in order: a label, entities, a score, or whether a pair matches.

    Args:
        texts: for `pair_matching` both texts with a tab between them; for `image_classification` the pixel values of an image
            with spaces between them.
        outputs: computes the outputs; None is the model of `runtime`.

    Raises:
        ConfigError: if the run is a language model.
        DataError: naming the text that does not fit the task.
    """
    task = runtime.task
    if not isinstance(task, Predicting):
        raise ConfigError(f"the run's task is {task.kind!r}, which does not label texts; use `silotune generate`.")
    with model_errors(_CANNOT_ANSWER):
        records = [
            task.question(text, f"text {number}", runtime.tokenizer, runtime.max_length)
            for number, text in enumerate(texts, start=1)
        ]
        examples = runtime.encode(records)
        rows = (outputs or partial(head_outputs, runtime))(examples)
        return [task.answer(record, example, row) for record, example, row in zip(records, examples, rows, strict=True)]


def head_outputs(runtime: Runtime | Exported, examples: Sequence[Example]) -> list[Tensor]:
    """Return the head's output of every example, in order, on the CPU; of tokens [T or more, classes]."""
    if isinstance(runtime, Exported):
        return runtime.outputs(examples)
    # Sorted by length as micro-batches are, so that the outputs come in this order.
    order = sorted(range(len(examples)), key=lambda index: examples[index].length)
    outputs = (row for batch, _ in runtime.outputs([examples[index] for index in order]) for row in batch.cpu())
    found = dict(zip(order, outputs, strict=True))
    return [found[index] for index in range(len(examples))]


def generate(runtime: Runtime | Exported, text: str, decoding: Decoding) -> list[str]:
    """Return `decoding.num_sequences` continuations of one text; see `generate_all`."""
    return generate_all(runtime, [text], decoding)[0]


def generate_all(runtime: Runtime | Exported, texts: Sequence[str], decoding: Decoding) -> list[list[str]]:
    """Return `decoding.num_sequences` continuations of each text, or responses to it, without the text itself.

    Raises:
        ConfigError: if the run is not a language model.
    """
    task = runtime.task
    if not isinstance(task, CausalLanguageModelling):
        raise ConfigError(f"the run's task is {task.kind!r}, which does not continue texts; use `silotune predict`.")
    with model_errors(_CANNOT_ANSWER):
        return _continued(runtime, task, texts, decoding)


def _continued(
    runtime: Runtime | Exported, task: CausalLanguageModelling, texts: Sequence[str], decoding: Decoding
) -> list[list[str]]:
    tokenizer = runtime.tokenizer
    end = tokenizer.eos_token_id
    starts = [task.start(text, tokenizer, runtime.max_length) for text in texts for _ in range(decoding.num_sequences)]
    generator = decoding.new_generator()
    # All sequences grow together, so that one forward pass serves them.
    added: list[list[int]] = [[] for _ in starts]
    growing = list(range(len(starts)))
    for _ in range(decoding.max_new_tokens):
        logits = next_logits(runtime, [[*starts[row], *added[row]] for row in growing])
        for row, token in zip(growing, choose_tokens(logits, decoding, generator).tolist(), strict=True):
            added[row].append(token)
        growing = [row for row in growing if added[row][-1] != end]
        if not growing:
            break
    found = [str(tokenizer.decode(_before(tokens, end), skip_special_tokens=True)) for tokens in added]
    return [found[i : i + decoding.num_sequences] for i in range(0, len(found), decoding.num_sequences)]


def distinct(texts: Sequence[str], n: int) -> float:
    """Return distinct-n (Li et al. 2016): different sequences of n words as a share of all of them; 0 if there are none.

    Words are those of `word_places`, so that Chinese counts by characters. Low values tell of replies that are all alike.
    """
    words = [[text[a:b].casefold() for a, b in word_places(text)] for text in texts]
    grams = [tuple(own[i : i + n]) for own in words for i in range(len(own) - n + 1)]
    return len({*grams}) / len(grams) if grams else 0.0


def choose_tokens(logits: Tensor, decoding: Decoding, generator: torch.Generator) -> Tensor:
    """Return one token per row of `logits` [sequences, vocabulary], int64 [sequences].

    Greedy at temperature 0, otherwise drawn among the `top_k` likeliest (Fan et al. 2018), of these among the fewest likeliest
    whose probability reaches `top_p` (Holtzman et al. 2020).
    """
    if decoding.temperature == 0:
        return logits.argmax(dim=-1)
    # The best logit becomes 0 first: a temperature close to 0 then ends in the greedy choice, not in infinity.
    logits = logits.double()
    scaled = (logits - logits.max(dim=-1, keepdim=True).values) / decoding.temperature
    if 0 < decoding.top_k < scaled.shape[-1]:
        threshold = scaled.topk(decoding.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < threshold, -torch.inf)
    if decoding.top_p < 1:
        ordered, places = scaled.softmax(dim=-1).sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered
        scaled = scaled.masked_fill(
            (before >= decoding.top_p).scatter(-1, places, before >= decoding.top_p), -torch.inf
        )
    return torch.multinomial(scaled.softmax(dim=-1), 1, generator=generator)[:, 0]


def next_logits(runtime: Runtime | Exported, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Return the logits after the last token of every sequence, float32 [sequences, vocabulary] on the CPU.

    Args:
        sequences: token ids; the model sees the last `max_length` of them.
    """
    examples = [Example(torch.tensor(row[-runtime.max_length :], dtype=torch.int64)) for row in sequences]
    last = [row[example.length - 1] for row, example in zip(head_outputs(runtime, examples), examples, strict=True)]
    return torch.stack(last).float()


def _before(tokens: list[int], end: int | None) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens
