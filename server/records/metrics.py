"""Metrics by name: which of them are shares of one, and the range in which each can lie."""

from __future__ import annotations

import math
import re
from typing import Annotated

from pydantic import AfterValidator

from shared.files.json_files import Finite

# Shares of one that read better in percent, whose gaps are in points.
_SHARES = frozenset({"accuracy", "balanced_accuracy", "f1", "macro_f1", "micro_f1", "precision", "recall", "auc"})
_RANGES = {
    **dict.fromkeys((*_SHARES, "mrr"), (0.0, 1.0)),
    **dict.fromkeys(("loss", "perplexity", "mae", "mae_of_mean", "rmse"), (0.0, math.inf)),
    "r2": (-math.inf, 1.0),
}
_ROUNDING = 1e-6


def is_share(name: str) -> bool:
    """True for `f1`, and also for `f1 Disease` and `recall@3`."""
    return _measure(name) in _SHARES


def in_range(name: str, value: float | None) -> float | None:
    """Return a metric's value; ValueError for one that it cannot have, such as an accuracy of 7.5.

    A metric of a later version, whose range is not known here, may be any number.
    """
    least, most = _RANGES.get(_measure(name), (-math.inf, math.inf))
    if value is not None and not least - _ROUNDING <= value <= most + _ROUNDING:
        expected = f"at most {most:g}" if least == -math.inf else f"{least:g} or more"
        expected = f"from {least:g} to {most:g}" if math.isfinite(most - least) else expected
        raise ValueError(f"{name} is {value:g}; it can only be {expected}")
    return value


def _all_in_range(metrics: dict[str, float | None]) -> dict[str, float | None]:
    return {name: in_range(name, value) for name, value in metrics.items()}


def _measure(name: str) -> str:
    return re.split("[ @]", name, maxsplit=1)[0]


Metrics = Annotated[dict[str, Finite | None], AfterValidator(_all_in_range)]
