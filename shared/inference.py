"""Use a tuned adapter: label texts, or continue them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.batches import Example
from shared.config import ComputeConfig, Job
from shared.errors import ConfigError
from shared.peft_folder import load_state
from shared.runtime import Runtime, load_runtime

Prediction = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: tokens to add at most.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: sample among the k likeliest tokens; 0 is all of them.
        num_sequences: continuations per text.
        seed: makes sampling repeatable; None does not.
    """

    max_new_tokens: int = 40
    temperature: float = 1.0
    top_k: int = 50
    num_sequences: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.num_sequences < 1 or self.top_k < 0 or self.temperature < 0:
            raise ConfigError(
                f"max_new_tokens {self.max_new_tokens} and num_sequences {self.num_sequences} must be at least 1, top_k "
                f"{self.top_k} and temperature {self.temperature:g} at least 0."
            )


def load_tuned(run_dir: Path, job: Job, compute: ComputeConfig) -> Runtime:
    """Return the runtime of a run with its final adapter loaded.

    Raises:
        AdapterError: if the run has none.
    """
    runtime = load_runtime(job, compute)
    runtime.load(load_state(run_dir / "adapter", runtime, job))
    return runtime


def predict(runtime: Runtime, job: Job, texts: Sequence[str]) -> list[Prediction]:
    """Return label and probabilities for every text, in order.

    Raises:
        ConfigError: if the run is not a classifier.
    """
    if job.task.kind != "sequence_classification":
        raise ConfigError(f"the run's task is {job.task.kind!r}, which does not label texts; use `silotune generate`.")
    examples = runtime.encode([{"text": text} for text in texts])
    predictions: dict[int, Prediction] = {}
    for index, example in enumerate(examples):
        for outputs, _ in runtime.outputs([example]):
            predictions[index] = _prediction(texts[index], outputs[0], job.task.labels)
    return [predictions[index] for index in range(len(texts))]


def generate(runtime: Runtime, job: Job, text: str, decoding: Decoding) -> list[str]:
    """Return `decoding.num_sequences` continuations of `text`, without the text itself.

    Raises:
        ConfigError: if the run is not a language model.
    """
    if job.task.kind != "causal_lm":
        raise ConfigError(
            f"the run's task is {job.task.kind!r}, which does not continue texts; use `silotune predict`."
        )
    tokenizer = runtime.tokenizer
    start = tokenizer(text, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
    generator = torch.Generator().manual_seed(decoding.seed) if decoding.seed is not None else None
    sequences = [list(start) for _ in range(decoding.num_sequences)]
    finished = [False] * decoding.num_sequences
    for _ in range(decoding.max_new_tokens):
        logits = _next_logits(runtime, sequences)
        for row, token in enumerate(choose_tokens(logits, decoding, generator)):
            if not finished[row]:
                finished[row] = token == tokenizer.eos_token_id
                sequences[row].append(token)
        if all(finished):
            break
    return [str(tokenizer.decode(s[len(start) :], skip_special_tokens=True)) for s in sequences]


def choose_tokens(logits: Tensor, decoding: Decoding, generator: torch.Generator | None) -> list[int]:
    """Return one token per row of `logits` [sequences, vocabulary] (top-k sampling, Fan et al. 2018)."""
    if decoding.temperature == 0:
        return [int(token) for token in logits.argmax(dim=-1)]
    scaled = logits / decoding.temperature
    if 0 < decoding.top_k < scaled.shape[-1]:
        threshold = scaled.topk(decoding.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < threshold, -torch.inf)
    drawn = torch.multinomial(scaled.softmax(dim=-1), 1, generator=generator)
    return [int(token) for token in drawn[:, 0]]


def _next_logits(runtime: Runtime, sequences: list[list[int]]) -> Tensor:
    """Return the logits after the last token of every sequence, float32 [sequences, vocabulary] on the CPU."""
    window = runtime.max_length
    examples = [Example(torch.tensor(sequence[-window:], dtype=torch.int64)) for sequence in sequences]
    rows: list[Tensor] = []
    # All sequences have the same length until one ends; ended ones are kept and ignored by the caller.
    for example in examples:
        for outputs, _ in runtime.outputs([example]):
            rows.append(outputs[0, example.length - 1].float().cpu())
    return torch.stack(rows)


def _prediction(text: str, logits: Tensor, labels: Sequence[str]) -> Prediction:
    probabilities = logits.float().softmax(dim=-1)
    best = int(probabilities.argmax())
    return {
        "text": text,
        "label": labels[best],
        "probability": float(probabilities[best]),
        "probabilities": {label: float(p) for label, p in zip(labels, probabilities, strict=True)},
    }
