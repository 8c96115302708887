"""The trivial predictor: one answer to every record, which a model has to beat before its figures mean anything."""

from __future__ import annotations

from dataclasses import dataclass

from server.records.results import EvaluationRecord
from server.reports.run.formats import printable, shorten

_LONGEST = 40
"""Letters of a label that are shown."""


@dataclass(frozen=True, kw_only=True)
class Trivial:
    """The best that one answer does on the evaluation records, by the primary metric.

    Attributes:
        metric: the primary metric.
        value: of that answer.
        title: what it answers, for people.
        key: of `value` in the JSON line of a simulation.
        warning: what is said of a model that is no better; None of one that is.
    """

    metric: str
    value: float
    title: str
    key: str
    warning: str | None


def trivial(found: EvaluationRecord | None) -> Trivial | None:
    """Return how the trivial predictor does on the records of an evaluation.

    None where the file does not tell (of versions before, or of a metric without such a predictor), and where all records
    have one and the same label or score, so that nothing could be better.
    """
    if found is None or found.primary is None:
        return None
    if found.primary_metric == "mae":
        return _mean(found, found.primary)
    return _most_frequent(found, found.primary) if found.primary_metric == "accuracy" else None


def never_answered(found: EvaluationRecord | None) -> str | None:
    """Return what is said of a model that never answers a label that some of the evaluation records have, or None.

    None too of one that is no better than the trivial predictor, of which it goes without saying.
    """
    if found is None or ((one := trivial(found)) is not None and one.warning):
        return None
    counts, answered = _records_by_label(found), _answers_by_label(found)
    missed = sorted((label for label in counts if counts[label] and not answered.get(label)), key=lambda n: -counts[n])
    if not missed:
        return None
    first, total = missed[0], sum(counts.values())
    others = f" and {len(missed) - 1:,} other{'s' if len(missed) > 2 else ''}" if len(missed) > 1 else ""
    return f"this model never answers {_named(found, first)} ({counts[first]:,} of {total:,} records){others}"


def _mean(found: EvaluationRecord, mae: float) -> Trivial | None:
    value = found.metrics.get("mae_of_mean")
    if not value:
        return None
    return Trivial(
        metric="mae",
        value=value,
        title="the mean alone",
        key="mae_of_mean",
        warning="this model predicts worse than the mean of the scores alone" if mae > value else None,
    )


def _most_frequent(found: EvaluationRecord, accuracy: float) -> Trivial | None:
    counts = _records_by_label(found)
    total, most = sum(counts.values()), max(counts, key=lambda label: counts[label], default=0)
    if not total or counts[most] == total:
        return None
    value = counts[most] / total
    label = _named(found, most)
    return Trivial(
        metric="accuracy",
        value=value,
        title=f"always saying {label}",
        key="accuracy_of_most_frequent_label",
        warning=f"this model is no better than always saying {label}" if accuracy <= value else None,
    )


def _named(found: EvaluationRecord, label: int) -> str:
    return f"{shorten(printable(found.labels[label]), _LONGEST)!r}" if found.labels else f"label {label + 1}"


def _answers_by_label(found: EvaluationRecord) -> dict[int, int]:
    """Return how many of the evaluation records are answered with each label, by its number."""
    if found.confusion is not None:
        return {label: sum(column) for label, column in enumerate(zip(*found.confusion, strict=True))}
    counts: dict[int, int] = {}
    for _, label, count in found.confusion_cells or ():
        counts[label] = counts.get(label, 0) + count
    return counts


def _records_by_label(found: EvaluationRecord) -> dict[int, int]:
    """Return how many of the evaluation records have each label, by its number."""
    if found.confusion is not None:
        return {label: sum(row) for label, row in enumerate(found.confusion)}
    counts: dict[int, int] = {}
    for label, _, count in found.confusion_cells or ():
        counts[label] = counts.get(label, 0) + count
    return counts
