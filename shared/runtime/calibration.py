"""How far probabilities can be believed: one temperature, fitted on public records, and what it mends.

A classifier's logits are divided by one number, the temperature (Guo et al. 2017), before they become probabilities. It
changes no answer, only how sure of it the model is. It is fitted on public records that no figure is of
(`server.rounds.public_records`), so it is post-processing: it reads a released adapter and public records, and costs no privacy.

The expected calibration error is the mean distance between confidence and accuracy over `BINS` bins of equal width, weighted by
the records in them (Naeini et al. 2015).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from shared.errors import AdapterError
from shared.files.bounded import read_named_text
from shared.files.json_files import Count, Finite, Share
from shared.models.batches import Batch
from shared.tasks import Task

CALIBRATION_FILE = "calibration.json"
"""In the adapter's folder."""
BINS = 15
FEWEST = 20
"""Records below which no temperature is fitted."""
_LEAST, _MOST = 0.05, 100.0
"""Temperatures that are considered: beyond the ends it makes no difference that anybody could see."""


@dataclass(frozen=True, kw_only=True)
class Bin:
    """One bin of a reliability diagram.

    Attributes:
        count: records whose confidence, the probability of the answer, is in this bin.
        confidence, accuracy: their means; 0 if there are none.
    """

    count: Count
    confidence: Share
    accuracy: Share


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A fitted temperature, and what it did on records that it was not fitted on.

    Attributes:
        temperature: logits are divided by it; above 1 the model was too sure of itself.
        fitted_on, reported_on: numbers of public records, disjoint; fitted on none, it is 1.
        loss_before, loss_after: mean cross-entropy of the reported ones.
        error_before, error_after: expected calibration error of the reported ones, in [0, 1].
        bins_before, bins_after: reliability of the reported ones, from confidence 0 to 1.
    """

    temperature: Annotated[float, Field(gt=0)]
    fitted_on: Count
    reported_on: Count
    loss_before: Finite
    loss_after: Finite
    error_before: Share
    error_after: Share
    bins_before: tuple[Bin, ...]
    bins_after: tuple[Bin, ...]


def calibrate(
    task: Task, deciding: Iterable[tuple[Tensor, Batch]], reported: Iterable[tuple[Tensor, Batch]]
) -> Calibration | None:
    """Fit a temperature on `deciding` and measure it on `reported`; None if the task has no classes.

    With fewer than `FEWEST` deciding records nothing is fitted: the temperature is 1.

    Args:
        deciding, reported: (logits [B, classes], batch) of public records, see `Runtime.outputs`.
    """
    fit, test = gathered(task, deciding), gathered(task, reported)
    if test is None:
        return None
    if fit is not None and len(fit[1]) < FEWEST:
        fit = None
    temperature = 1.0 if fit is None else fit_temperature(*fit)
    logits, targets = test
    before, after = reliability(logits, targets), reliability(logits / temperature, targets)
    return Calibration(
        temperature=temperature,
        fitted_on=0 if fit is None else len(fit[1]),
        reported_on=len(targets),
        loss_before=_loss(logits, targets),
        loss_after=_loss(logits / temperature, targets),
        error_before=calibration_error(before),
        error_after=calibration_error(after),
        bins_before=before,
        bins_after=after,
    )


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """Return the temperature under which cross-entropy against smoothed targets is least.

    It is convex in the inverse b of the temperature, and its derivative, the mean of E_p[z] - z_y with p = softmax(b z),
    rises with b: bisection finds where it crosses zero. n answers that are all right support a confidence of (n + 1) / (n + 2),
    not of 1: targets are smoothed by that much (Platt 1999, section 2.2), or a few easy records would make a model as sure of
    itself as numbers go.

    Args:
        logits: float64 [records, classes].
        targets: classes, int64 [records].
    """
    records, classes = logits.shape
    smoothing = min(1.0, classes / max(classes - 1, 1) / (records + 2))
    own = (1 - smoothing) * logits.gather(1, targets[:, None])[:, 0] + smoothing * logits.mean(dim=1)

    def slope(inverse: float) -> float:
        expected = ((logits * inverse).softmax(dim=1) * logits).sum(dim=1)
        return float((expected - own).mean())

    low, high = 1 / _MOST, 1 / _LEAST
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return 1 / math.sqrt(low * high)


def reliability(logits: Tensor, targets: Tensor) -> tuple[Bin, ...]:
    """Return `BINS` bins of equal width over the probability of the most probable class."""
    confidence, answers = logits.softmax(dim=1).max(dim=1)
    right = (answers == targets).double()
    place = (confidence * BINS).long().clamp(max=BINS - 1)
    bins = []
    for number in range(BINS):
        own = place == number
        count = int(own.sum())
        mean = [float(values[own].mean()) if count else 0.0 for values in (confidence, right)]
        bins.append(Bin(count=count, confidence=mean[0], accuracy=mean[1]))
    return tuple(bins)


def calibration_error(bins: Iterable[Bin]) -> float:
    """Return the expected calibration error."""
    found = list(bins)
    total = sum(one.count for one in found)
    return sum(one.count * abs(one.confidence - one.accuracy) for one in found) / total if total else 0.0


def save_temperature(folder: Path, temperature: float) -> None:
    """Write the temperature beside the adapter in `folder`."""
    (folder / CALIBRATION_FILE).write_text(json.dumps({"temperature": temperature}) + "\n", encoding="utf-8")


def load_temperature(folder: Path) -> float:
    """Return the temperature of the adapter in `folder`; 1 if there is none.

    Raises:
        AdapterError: if the file is damaged.
    """
    path = folder / CALIBRATION_FILE
    if not path.exists():
        return 1.0
    try:
        temperature = json.loads(read_named_text(path))["temperature"]
        if not isinstance(temperature, int | float) or not _LEAST * 0.99 <= temperature <= _MOST * 1.01:
            raise ValueError(temperature)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterError(
            f"{path} holds no temperature from {_LEAST:g} to {_MOST:g} ({type(error).__name__}); restore the adapter's folder."
        ) from None
    return float(temperature)


def gathered(task: Task, parts: Iterable[tuple[Tensor, Batch]]) -> tuple[Tensor, Tensor] | None:
    """Return logits, float64 [records, classes], and classes, int64 [records]; None if there are none, or no classes."""
    logits, targets = [], []
    for outputs, batch in parts:
        classes = task.classes(outputs, batch)
        if classes is None:
            return None
        logits.append(outputs.double().cpu())
        targets.append(classes[1].long().cpu())
    return (torch.cat(logits), torch.cat(targets)) if logits else None


def _loss(logits: Tensor, targets: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits, targets))
