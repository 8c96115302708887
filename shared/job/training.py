"""How a site trains: steps, optimiser, schedule, early stopping."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from shared.job.parsing import Section
from shared.limits import MAX_LEARNING_RATE, MAX_STEPS, MAX_VALUE


class EarlyStoppingConfig(Section):
    """When a run ends before its planned rounds, decided by a metric on a part of the coordinator's public records, of which no
    figure is (`server.rounds.public_records`)."""

    patience: int = Field(ge=1, le=100_000)
    """The run ends after so many evaluations in a row (one before training, then one every `evaluate_every` rounds) without
    an improvement. A number that is never reached only picks the adapter (`keep`)."""
    min_delta: float = Field(default=0.0, ge=0, le=MAX_VALUE)
    """What counts as an improvement: the metric is better than at the last one by more than this, in the metric's own unit."""
    keep: Literal["last", "best"] = "last"
    """The adapter that the run hands out: the `last` round's, or that of the evaluation with the `best` metric. Both were
    released anyway, and the records that choose are public, so neither costs privacy."""
    # Not written out where it is not set: jobs of older versions keep their hash.
    metric: Literal["primary", "loss"] = Field(default="primary", exclude_if=lambda value: value == "primary")
    """What decides: the task's `primary` metric, or the `loss`, which also tells when a model becomes too sure of itself."""


class AugmentationConfig(Section):
    """Several views of each record, whose mean gradient is clipped as the record's (augmentation multiplicity, De et al. 2022):
    epsilon is that of one view, a step takes `views` times as long."""

    views: int = Field(ge=2, le=64)
    """K: the record as it is, and K - 1 changed ones, which follow from the record itself and the job's seed."""
    token_dropout: float = Field(default=0.1, gt=0, lt=1)
    """Of a text: share of its tokens that a view leaves out; tokens of the format, such as [CLS] and [SEP], stay."""
    shift: int = Field(default=2, ge=1, le=32)
    """Of an image: a view is moved by up to so many pixels along each side; what comes in has the border's value."""


class AdversarialConfig(Section):
    """An adversarial part of each record's loss: the loss after a small move of what enters the trained part, in the direction in
    which it grows fastest (Miyato et al. 2017): epsilon stays as it is, a step takes twice as long."""

    radius: float = Field(default=0.02, gt=0, le=1)
    """How far a record is moved, as a share of the norm of what is moved: its own embeddings if all layers are adapted, else what
    frozen layers made of them. Miyato et al. take 5, for texts of about 240 words with 256 normalised values each: 0.02."""
    weight: float = Field(default=0.5, gt=0, lt=1)
    """Share of the adversarial part in the loss, the rest is the loss without a move; one half as in Goodfellow et al. (2015)."""


class TrainingConfig(Section):
    """Rounds and the local optimiser. The schedule is public: it reads only the step number."""

    rounds: int = Field(ge=1, le=100_000)
    """Times that the adapter goes out to the sites and back."""
    local_steps: int = Field(default=4, ge=1, le=100_000)
    """Logical (noisy) optimiser steps that a site takes in one round."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Of the sites. Under noise `sgd` averages better over many sites; see docs/decisions/0004."""
    learning_rate: float = Field(default=3e-3, gt=0, le=MAX_LEARNING_RATE)
    """About 1e-3 to 1e-2 for `adamw`, 0.1 to 3 for `sgd` (clipped gradients are short)."""
    head_learning_rate_factor: float = Field(default=1.0, gt=0, le=MAX_LEARNING_RATE)
    """The head's learning rate is `learning_rate` times this."""
    weight_decay: float = Field(default=0.0, ge=0, le=MAX_LEARNING_RATE)
    """Shrinks the trained weights in every step, by so much times their learning rate, together at most 1; reads no data, so it
    costs no privacy."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of `sgd`, beta1 of `adamw`."""
    schedule: Literal["constant", "linear", "cosine", "one-cycle"] = "constant"
    """Factor on the learning rate over all planned steps: 1; falling to 0 at the last step; or `one-cycle`, rising from 1/25 over
    the first three tenths and falling to 0 as a cosine after them, which bears a higher rate (super-convergence, Smith and
    Topin 2019). Momentum stays as it is."""
    # Not written out where it is not set: jobs of older versions keep their hash.
    warmup_steps: int = Field(default=0, ge=0, le=100_000, exclude_if=lambda value: value == 0)
    """The learning rate rises over so many of the planned steps, in equal parts, before it is `schedule` times its full value."""
    early_stopping: EarlyStoppingConfig | None = Field(default=None, exclude_if=lambda value: value is None)
    augmentation: AugmentationConfig | None = Field(default=None, exclude_if=lambda value: value is None)
    adversarial: AdversarialConfig | None = Field(default=None, exclude_if=lambda value: value is None)

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        if self.planned_steps > MAX_STEPS:
            raise ValueError(
                f"rounds x local_steps is {self.planned_steps:,} ({self.rounds:,} x {self.local_steps:,}); at most {MAX_STEPS:,} "
                "steps can be planned and accounted for. Lower one of the two"
            )
        return self

    @model_validator(mode="after")
    def _check_decay(self) -> Self:
        largest = self.learning_rate * max(1.0, self.head_learning_rate_factor)
        if self.weight_decay * largest > 1:
            raise ValueError(
                f"weight_decay {self.weight_decay:g} times the learning rate {largest:g} is above 1; every step would turn the "
                "weights around and soon nothing would be a number. Lower one of the two"
            )
        return self

    @model_validator(mode="after")
    def _check_warmup(self) -> Self:
        if self.warmup_steps and self.schedule == "one-cycle":
            raise ValueError("the schedule one-cycle rises by itself; remove warmup_steps")
        if self.warmup_steps >= self.planned_steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}, but only {self.planned_steps} steps are planned (rounds x local_steps); "
                "the full learning rate would never be reached"
            )
        return self

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of global step `step` (0-based, over all planned steps), but for the head's factor."""
        progress = min(step / self.planned_steps, 1.0)
        warmth = min((step + 1) / (self.warmup_steps + 1), 1.0)
        return self.learning_rate * warmth * _FACTORS[self.schedule](progress)

    @property
    def planned_steps(self) -> int:
        """Steps of a site that takes part in every round."""
        return self.rounds * self.local_steps


def _falling(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _one_cycle(progress: float) -> float:
    if progress < _RISE:
        return _FIRST + (1 - _FIRST) * progress / _RISE
    return _falling((progress - _RISE) / (1 - _RISE))


_RISE, _FIRST = 0.3, 1 / 25
_FACTORS: Mapping[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": _falling,
    "one-cycle": _one_cycle,
}
