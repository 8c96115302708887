"""Use a tuned adapter: label texts, or continue them."""

from __future__ import annotations

import math
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
        if self.max_new_tokens < 1 or self.num_sequences < 1 or self.top_k < 0:
            raise ConfigError(
                f"max_new_tokens {self.max_new_tokens} and num_sequences {self.num_sequences} must be at least 1, top_k "
                f"{self.top_k} at least 0."
            )
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
    # Sorted by length as micro-batches are, so that the outputs come in this order.
    order = sorted(range(len(examples)), key=lambda index: examples[index].length)
    outputs = (row for batch, _ in runtime.outputs([examples[index] for index in order]) for row in batch.cpu())
    found = {index: _prediction(texts[index], row, job.task.labels) for index, row in zip(order, outputs, strict=True)}
    return [found[index] for index in range(len(texts))]


def generate(runtime: Runtime, job: Job, text: str, decoding: Decoding) -> list[str]:
    """Return `decoding.num_sequences` continuations of `text`, without the text itself.

    Raises:
        ConfigError: if the run is not a language model.
    """
    if job.task.kind != "causal_lm":
        raise ConfigError(
            f"the run's task is {job.task.kind!r}, which does not continue texts; use `silotune predict`."
        )
    tokenizer, end = runtime.tokenizer, runtime.tokenizer.eos_token_id
    start = tokenizer(text, add_special_tokens=False)["input_ids"] or ([] if end is None else [end])
    if not start:
        raise ConfigError("there is no text to continue, and the tokenizer has no token to start from; give a text.")
    generator = decoding.new_generator()
    # All sequences grow together, so that one forward pass serves them; what follows a row's end is cut off below.
    sequences = torch.tensor([start] * decoding.num_sequences)
    ended = torch.zeros(decoding.num_sequences, dtype=torch.bool)
    for _ in range(decoding.max_new_tokens):
        tokens = choose_tokens(next_logits(runtime, sequences), decoding, generator)
        sequences = torch.cat([sequences, tokens[:, None]], dim=1)
        if end is not None:
            ended |= tokens == end
        if bool(ended.all()):
            break
    added = [_before(row, end) for row in sequences[:, len(start) :].tolist()]
    return [str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in added]


def choose_tokens(logits: Tensor, decoding: Decoding, generator: torch.Generator) -> Tensor:
    """Return one token per row of `logits` [sequences, vocabulary], int64 [sequences].

    Greedy at temperature 0, otherwise drawn among the `top_k` likeliest (Fan et al. 2018).
    """
    if decoding.temperature == 0:
        return logits.argmax(dim=-1)
    # The best logit becomes 0 first: a temperature close to 0 then ends in the greedy choice, not in infinity.
    logits = logits.double()
    scaled = (logits - logits.max(dim=-1, keepdim=True).values) / decoding.temperature
    if 0 < decoding.top_k < scaled.shape[-1]:
        threshold = scaled.topk(decoding.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < threshold, -torch.inf)
    return torch.multinomial(scaled.softmax(dim=-1), 1, generator=generator)[:, 0]


def next_logits(runtime: Runtime, sequences: Tensor) -> Tensor:
    """Return the logits after the last token of every sequence, float32 [sequences, vocabulary] on the CPU.

    Args:
        sequences: token ids of equal length, int64 [sequences, T]; the model sees the last `max_length` of them.
    """
    examples = [Example(row) for row in sequences[:, -runtime.max_length :]]
    # Equal lengths: micro-batches keep the order.
    return torch.cat([outputs[:, -1].float().cpu() for outputs, _ in runtime.outputs(examples)])


def _before(tokens: list[int], end: int | None) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens


def _prediction(text: str, logits: Tensor, labels: Sequence[str]) -> Prediction:
    probabilities = logits.float().softmax(dim=-1)
    best = int(probabilities.argmax())
    return {
        "text": text,
        "label": labels[best],
        "probability": float(probabilities[best]),
        "probabilities": {label: float(p) for label, p in zip(labels, probabilities, strict=True)},
    }
