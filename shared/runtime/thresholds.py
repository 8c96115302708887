"""Thresholds: a number for each label, added to its logit so that macro F1 is highest on public records (`task.thresholds`).

A model answers with the label of the largest logit. That makes the fewest mistakes, and where labels are rare, seldom names
them: the F1 of a label asks for another threshold (Lipton et al. 2014). With one offset for each logit, the thresholds of all
labels are one rule, and of two labels the offsets are one threshold on the probability. They are found label by label
(coordinate ascent), each over all places at which an answer changes, on public records that no figure is of
(`server.rounds.public_records`). So it is post-processing: it reads a released adapter and public records, and costs no privacy.

The offsets are added to the bias of the head that is handed out. Whoever uses the model, in whatever format, answers by them;
its probabilities are those of that head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import excerpt
from shared.files.json_files import Count, Finite, Share
from shared.models.batches import Batch
from shared.runtime.calibration import FEWEST, gathered
from shared.tasks import Task

Parts = Sequence[tuple[Tensor, Batch]]
FEWEST_OF_A_LABEL = 10
"""Deciding records below which a label keeps the offset 0, and has no say in that of others: with fewer, chance would choose."""
_MOST_SWEEPS = 10
_LEAST_GAIN = 1e-9
_CHANCE = 3
"""A gain in macro F1 of no more than this many records' share is chance, and moves nothing."""


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Fitted offsets, and what they did on records that they were not fitted on.

    Attributes:
        offsets: added to the logits, in the order of the labels; fitted on none, all are 0.
        fitted_on, reported_on: numbers of public records, disjoint.
        too_few: labels whose logit stays because too few records that decide have them, and how many have.
        macro_f1_before, macro_f1_after, accuracy_before, accuracy_after: of the reported ones.
    """

    offsets: tuple[Finite, ...]
    fitted_on: Count
    reported_on: Count
    too_few: dict[str, Count] = field(default_factory=dict)
    macro_f1_before: Share
    macro_f1_after: Share
    accuracy_before: Share
    accuracy_after: Share

    @property
    def warning(self) -> str | None:
        """What should be known of labels that nothing was fitted for, and what to do; None if there is none."""
        if not self.fitted_on:
            return (
                f"no thresholds: fewer than {FEWEST} public records may decide, so labels are answered as learned; give 200 "
                "evaluation records or more, of which a fifth decides"
            )
        if not self.too_few:
            return None
        label, count = min(self.too_few.items(), key=lambda one: one[1])
        others = f" (and {len(self.too_few) - 1:,} more labels)" if len(self.too_few) > 1 else ""
        return (
            f"thresholds: {count} of the {self.fitted_on:,} records that decide have the label {excerpt(label)}{others}; it "
            f"takes {FEWEST_OF_A_LABEL}, so it is answered as learned. A label that one record in N has needs about "
            f"{5 * FEWEST_OF_A_LABEL} N evaluation records"
        )


def choose_offsets(task: Task, deciding: Parts) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Return offsets in the order of the labels, and how many of the records that they were fitted on have each label.

    With fewer than `FEWEST` records nothing is fitted, on none.

    Args:
        deciding: (logits [B, classes], batch) of public records.
    """
    found, classes = gathered(task, deciding), len(task.config.labels)
    if found is None or len(found[1]) < FEWEST:
        return (0.0,) * classes, (0,) * classes
    logits, targets = (values.numpy() for values in found)
    return tuple(fit_offsets(logits, targets).tolist()), tuple(np.bincount(targets, minlength=classes).tolist())


def measured(
    task: Task, offsets: tuple[float, ...], fitted_on: tuple[int, ...], before: Parts, after: Parts
) -> Thresholds:
    """Return what `offsets` did.

    Args:
        fitted_on: records of each label, as `choose_offsets` returns them.
        before, after: (logits, batch) of the same reported records, by the model without and with them in its head.
    """
    (f1_before, before_right), (f1_after, after_right) = (_measured(task, parts) for parts in (before, after))
    return Thresholds(
        offsets=offsets,
        fitted_on=sum(fitted_on),
        too_few={
            label: count
            for label, count in zip(task.config.labels, fitted_on, strict=True)
            if count < FEWEST_OF_A_LABEL and any(fitted_on)
        },
        reported_on=sum(len(outputs) for outputs, _ in before),
        macro_f1_before=f1_before,
        macro_f1_after=f1_after,
        accuracy_before=before_right,
        accuracy_after=after_right,
    )


def fit_offsets(logits: NDArray[np.float64], targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the offsets [classes] with the highest macro F1 that coordinate ascent from 0 finds.

    The mean is over the labels with `FEWEST_OF_A_LABEL` records; all offsets are 0 if there are not two of them, and if the
    gain is one that a few records make.

    Args:
        logits: [records, classes].
        targets: classes, [records].
    """
    classes = logits.shape[1]
    offsets = np.zeros(classes)
    often = np.flatnonzero(np.bincount(targets, minlength=classes) >= FEWEST_OF_A_LABEL)
    if len(often) < 2:
        return offsets
    whole = 0.0
    for _ in range(_MOST_SWEEPS):
        gained = 0.0
        for label in often:
            offset, gain = _best_offset(logits + offsets, targets, int(label), often)
            offsets[label] += offset
            gained += gain
        whole += gained
        if gained <= _LEAST_GAIN:
            break
    return offsets if whole * len(targets) > _CHANCE else np.zeros(classes)


def with_offsets(state: Mapping[str, Tensor], head: Iterable[str], offsets: Iterable[float]) -> dict[str, Tensor]:
    """Return an adapter with `offsets` added to the bias of its head; `head` are the names of the head's parameters."""
    (name,) = (name for name in head if name.endswith("bias"))
    return {**state, name: state[name] + torch.tensor([*offsets]).to(state[name])}


def _best_offset(
    logits: NDArray[np.float64], targets: NDArray[np.int64], label: int, often: NDArray[np.intp]
) -> tuple[float, float]:
    """Return what to add to one label's logit, and by how much macro F1 of the labels `often` rises; 0 and 0 if it does not."""
    count, classes = logits.shape
    others = logits.copy()
    others[:, label] = -np.inf
    answers = others.argmax(axis=1)
    # A record is answered with the label once more than this is added.
    needed = others[np.arange(count), answers] - logits[:, label]
    order = needed.argsort()
    needed, answers, truth = needed[order], answers[order], targets[order]
    # Row i of each table: the first i records have the label, the others their best other one.
    own, identity = np.arange(classes) == label, np.eye(classes, dtype=np.int64)
    moves = own - identity[answers]
    gains = own * (truth == label)[:, None] - identity[answers] * (truth == answers)[:, None]
    predicted, hits = (
        np.vstack([first, step]).cumsum(axis=0)
        for first, step in (
            (np.bincount(answers, minlength=classes), moves),
            (np.bincount(answers[truth == answers], minlength=classes), gains),
        )
    )
    true = np.bincount(truth, minlength=classes)
    scores = _macro_f1(hits[:, often], predicted[:, often], true[often])
    now = scores[np.searchsorted(needed, 0.0)]
    # Only between two records that need different numbers there is a place to cut.
    cuts = np.flatnonzero(needed[1:] > needed[:-1]) + 1
    if not len(cuts) or scores[cuts].max() <= now + _LEAST_GAIN:
        return 0.0, 0.0
    best = cuts[scores[cuts] >= scores[cuts].max() - _LEAST_GAIN]
    middles = (needed[best - 1] + needed[best]) / 2
    return float(middles[np.abs(middles).argmin()]), float(scores[cuts].max() - now)


def _macro_f1(hits: NDArray[np.int64], predicted: NDArray[np.int64], true: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the mean F1 of the labels that occur, as labels or as answers, for counts [..., classes]."""
    total = predicted + true
    return np.asarray((2 * hits / np.maximum(total, 1)).sum(axis=-1) / (total > 0).sum(axis=-1))


def _measured(task: Task, parts: Parts) -> tuple[float, float]:
    """Return macro F1 and accuracy."""
    found = [task.classes(*part) for part in parts]
    answers, targets = (torch.cat([some[side] for some in found if some]).cpu().numpy() for side in (0, 1))
    classes = len(task.config.labels)
    counted = (np.bincount(some, minlength=classes) for some in (answers[answers == targets], answers, targets))
    return float(_macro_f1(*counted)), float((answers == targets).mean())
