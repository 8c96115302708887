"""What a head knows from its labels' names, where the job says so: where it starts, and what all texts have in common.

The names of labels are public: they stand in the job. A backbone that was trained to compare texts puts a name near the texts
that it names, so a head that starts there (`task.head_start`) knows something before a record was asked (zero-shot
classification, Yin, Hay and Roth 2019). The mean of the names is close to what all texts have in common; a head that takes it
off (`task.head_centre`) learns from what differs. For where each helps, see docs/decisions/0026-one-step-a-round.md.

Guarantee: both follow from job and backbone alone, computed in float32 on the processor, so that a site that computes the start
anew finds what the coordinator sent (tests: tests/shared/runtime/test_label_names.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shared.models.batches import collate
from shared.models.heads import PooledClassifier
from shared.models.tunable import TunableModel
from shared.tasks import Task

LENGTH = 1.0
"""Of a label's row: about half of what the noise of a run adds to it by the rule of `silotune new`."""
_NAMES_AT_ONCE = 64
_LEAST = 0.1  # of a vector of length sqrt(hidden size): below it rounding would decide on the direction


def learn_from_names(model: TunableModel, task: Task, tokenizer: Any) -> None:
    """Do to the head what the job says: start from its labels' names, take off their mean, both or neither.

    A start is one row a label, `LENGTH` times the direction from the mean of all names to its own, and biases of 0.

    Args:
        model: on the processor and in float32, with adapters that change nothing yet; its head is a `PooledClassifier` if the
            job says anything of names.
        task: the job's, with labels.
        tokenizer: the backbone's.
    """
    asked = task.config
    if "label-names" not in (asked.head_start, asked.head_centre):
        return
    head = _head(model)
    vectors = _vectors(model, task, tokenizer, [_readable(label) for label in asked.labels])
    centre = vectors.mean(dim=0)
    vectors = vectors - centre
    if asked.head_start == "label-names":
        with torch.no_grad():
            head.linear.weight.copy_(LENGTH * vectors / vectors.norm(dim=1, keepdim=True).clamp(min=_LEAST))
            head.linear.bias.zero_()
    if asked.head_centre == "label-names":
        head.centre = centre


def _vectors(model: TunableModel, task: Task, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Return what the head's linear layer sees of each text, float32 [texts, hidden size]."""
    examples = task.encode([{"text": text} for text in texts], tokenizer, task.model.max_length)
    parts = (collate(examples[begin : begin + _NAMES_AT_ONCE]) for begin in range(0, len(examples), _NAMES_AT_ONCE))
    with torch.no_grad():
        return torch.cat([model.pooled(part.input_ids, part.attention_mask) for part in parts])


def _head(model: TunableModel) -> PooledClassifier:
    if not isinstance(model.head, PooledClassifier):  # the job's own check comes first
        raise TypeError(f"expected a PooledClassifier, not {type(model.head).__name__}")
    return model.head


def _readable(label: str) -> str:
    """Return a label as one would write it in a text: `card_arrival` is "card arrival"."""
    return " ".join(label.replace("_", " ").replace("-", " ").replace("/", " ").split()) or label
