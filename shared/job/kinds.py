"""Which settings each kind of task takes: the rules of `[task]`, one row a kind.

What a kind learns and says stands in `shared.tasks`; a job is read and checked without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

TaskKind = Literal[
    "sequence_classification",
    "token_classification",
    "pair_matching",
    "regression",
    "causal_lm",
    "replies",
    "image_classification",
]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a kind asks of `[task]`, and of data.

    Attributes:
        roles: columns that a data source must declare.
        primary_metric: by which a model is judged; the task's `higher_is_better` says which way.
        check_labels: raises ValueError for labels that will not do; None where the kind has none.
        has_classes: whether each record has one of the labels.
        keys: further settings, which this kind needs and others refuse.
        has_head: whether there is a head that is trained; language models speak through their own embedding.
        has_views: whether a record's target holds for a slightly changed one (`shared.tasks.views`).
    """

    roles: tuple[str, ...]
    primary_metric: str
    check_labels: Callable[[TaskKind, tuple[str, ...]], None] | None = None
    has_classes: bool = False
    keys: tuple[str, ...] = ()
    has_head: bool = True
    has_views: bool = False


def _at_least_two(kind: TaskKind, labels: tuple[str, ...]) -> None:
    if len(labels) < 2:
        raise ValueError(f"{kind} has {len(labels)} labels; name at least two")


def _two(kind: TaskKind, labels: tuple[str, ...]) -> None:
    if len(labels) != 2:
        raise ValueError(f"{kind} has {len(labels)} labels; name two, the second for a match, such as other and match")


def _iob_tags(kind: TaskKind, labels: tuple[str, ...]) -> None:
    _at_least_two(kind, labels)
    if "O" not in labels:
        raise ValueError(f'task.labels of {kind} must hold "O", the tag of words outside any entity')
    for tag in labels:
        mark, _, entity = tag.partition("-")
        if tag != "O" and (mark not in ("B", "I") or not entity):
            raise ValueError(
                f'task.labels holds {tag!r}; tags of {kind} are "O", "B-NAME" for the first word of an entity and "I-NAME" '
                "for its further words"
            )
        if mark == "I" and f"B-{entity}" not in labels:
            raise ValueError(f"task.labels holds {tag!r} but not {f'B-{entity}'!r}, with which every entity begins")


RULES: Mapping[TaskKind, Rules] = {
    "sequence_classification": Rules(
        roles=("text", "label"),
        primary_metric="accuracy",
        check_labels=_at_least_two,
        has_classes=True,
        has_views=True,
    ),
    "token_classification": Rules(roles=("tokens", "tags"), primary_metric="f1", check_labels=_iob_tags),
    "pair_matching": Rules(
        roles=("text", "pair", "label"), primary_metric="mrr", check_labels=_two, has_classes=True, has_views=True
    ),
    "regression": Rules(roles=("text", "score"), primary_metric="mae", keys=("target_range",), has_views=True),
    "causal_lm": Rules(roles=("text",), primary_metric="perplexity", has_head=False),
    "replies": Rules(roles=("prompt", "response"), primary_metric="perplexity", has_head=False),
    "image_classification": Rules(
        roles=("pixels", "label"),
        primary_metric="accuracy",
        check_labels=_at_least_two,
        has_classes=True,
        keys=("image_shape", "pixel_range"),
        has_views=True,
    ),
}


def primary_metric(kind: object) -> str:
    """Return the metric by which a kind of task is judged; "" for what is none."""
    return next((rules.primary_metric for known, rules in RULES.items() if known == kind), "")
