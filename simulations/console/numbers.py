"""Numbers as the console writes them, without words: those stand in `texts/`."""

from __future__ import annotations

import math
from datetime import datetime

from server.records.metrics import is_share
from shared.epsilons import as_set, delta_rounded_up, rounded_up

NOTHING = "–"
_NAMES = {
    "auc": "AUC",
    "mae": "MAE",
    "mae_of_mean": "MAE of the mean",
    "rmse": "RMSE",
    "r2": "R²",
    "mrr": "MRR",
    "macro_f1": "macro F1",
    "micro_f1": "micro F1",
}


def epsilon(value: float | None) -> str:
    """Return a computed epsilon, rounded up."""
    return NOTHING if value is None else rounded_up(value)


def asked(value: float | None) -> str:
    """Return an epsilon as a job asks for it."""
    return NOTHING if value is None else as_set(value)


def delta(value: float | None) -> str:
    """Return a delta, rounded up."""
    return NOTHING if value is None else delta_rounded_up(value, 3)


def metric(value: float | None, name: str) -> str:
    """Return a metric's value: a share in percent, the others as they are."""
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return str(value)
    if is_share(name):
        return f"{100 * value:.1f} %"
    return f"{value:,.2f}" if abs(value) >= 10 else f"{value:.3f}"


def spread(value: float | None, name: str) -> str:
    """Return a standard deviation in the unit of its metric."""
    if value is None:
        return ""
    return f"{100 * value:.1f}" if is_share(name) else f"{value:,.2f}" if value >= 10 else f"{value:.3f}"


def gap(value: float | None, name: str) -> str:
    """Return a difference of two values, with its sign; of shares in percentage points."""
    if value is None:
        return NOTHING
    text = f"{100 * value:+.1f}" if is_share(name) else f"{value:+.3f}"
    return text.replace("-", "−")


def title(name: str) -> str:
    """Return how a metric is called: `macro_f1` is macro F1."""
    measure, space, rest = name.partition(" ")
    return f"{_NAMES.get(measure, measure.replace('_', ' '))}{space}{rest}"


def duration(seconds: float | None) -> str:
    """Return a time that something took, h:mm:ss."""
    if seconds is None:
        return NOTHING
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def day(time: datetime | None) -> str:
    """Return a moment, UTC where it has a zone."""
    return NOTHING if time is None else f"{time:%Y-%m-%d %H:%M}"


def setting(value: object) -> str:
    """Return a value of a job's settings."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.15g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(setting, value)) or "[]"
    return NOTHING if value is None else str(value)
