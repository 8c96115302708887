"""Numbers and names as people read them.

An epsilon or a delta is never rounded down: what is printed is at least what was spent.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from datetime import datetime

from server.records.energy import Price
from server.records.metrics import is_share
from shared.epsilons import (
    as_set,
    bound_rounded_down,
    delta_rounded_up,
    noise_rounded_down,
    rate_rounded_up,
    rounded_up_short,
)
from shared.errors import printable as printable

NOT_RECORDED = "not recorded"
"""Of a fact that the run's files do not tell."""
NOT_EVALUATED = "not evaluated"
"""Of a metric that was not measured, or not yet."""

LOWER_IS_BETTER = frozenset({"loss", "perplexity", "mae", "mae_of_mean", "rmse"})
_ABBREVIATIONS = {
    "auc": "AUC",
    "mae": "MAE",
    "mae_of_mean": "MAE of the mean",
    "rmse": "RMSE",
    "r2": "R²",
    "mrr": "MRR",
    "macro_f1": "Macro F1",
    "micro_f1": "Micro F1",
}

_TRAILING_NUMBER = re.compile(r"^(.*?)(\d{1,9})$", re.DOTALL)


def format_epsilon(value: float | None) -> str:
    """Two decimals, two significant digits below 0.1; rounded up."""
    if value is None:
        return NOT_RECORDED
    return "∞" if math.isinf(value) else rounded_up_short(value)


def format_bound(value: float | None) -> str:
    """An audit's bound: two decimals, rounded down."""
    return NOT_RECORDED if value is None else bound_rounded_down(value, 2)


def format_budget(value: float | None) -> str:
    """A budget as it was set."""
    return NOT_RECORDED if value is None else as_set(value)


def format_delta(value: float | None) -> str:
    """Three significant digits, rounded up, exponent without padding (1e-5)."""
    if value is None:
        return NOT_RECORDED
    if value <= 0:
        return "0"
    mantissa, _, exponent = delta_rounded_up(value, 3).partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def format_rate(value: float | None) -> str:
    """Four significant digits, rounded up."""
    return NOT_RECORDED if value is None else rate_rounded_up(value, 4)


def format_noise(value: float | None) -> str:
    """Four decimals, rounded down."""
    return NOT_RECORDED if value is None else noise_rounded_down(value)


def format_number(value: float | None, digits: int = 4) -> str:
    """`digits` significant digits; whole numbers with thousands separators."""
    if value is None:
        return NOT_RECORDED
    if not math.isfinite(value):
        return "not finite"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.{digits}g}"


def format_bytes(value: float | None) -> str:
    """Decimal units, as network engineers count."""
    if value is None:
        return NOT_RECORDED
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def format_seconds(value: float | None) -> str:
    if value is None:
        return NOT_RECORDED
    if value < 10:
        return f"{value:.2g} s"
    seconds = round(value)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def format_energy(kwh: float) -> str:
    """Three digits, in kWh, or below one in Wh."""
    return f"{kwh:,.3g} kWh" if kwh >= 1 else f"{1000 * kwh:.3g} Wh"


def format_money(price: Price) -> str:
    """Two decimals."""
    if 0 < price.amount < 0.01:
        return f"less than 0.01 {price.currency}"
    return f"{price.amount:,.2f} {price.currency}"


def format_time(value: datetime | None) -> str:
    if value is None:
        return NOT_RECORDED
    zone = value.tzname() or "time zone not recorded"
    return f"{value:%Y-%m-%d %H:%M} {zone}"


def metric_title(name: str) -> str:
    """`macro_f1` -> `Macro F1`; `f1 Disease` -> `F1 Disease`."""
    if name in _ABBREVIATIONS:
        return _ABBREVIATIONS[name]
    measure, space, kind = name.partition(" ")
    if space:
        return f"{metric_title(measure)} {kind}"
    return name.replace("_", " ").strip().capitalize() or "Metric"


def format_metric(name: str, value: float | None) -> str:
    if value is None:
        return NOT_EVALUATED
    if not math.isfinite(value):
        return "not finite"
    if is_share(name):
        return f"{100 * value:.1f} %"
    if abs(value) >= 1e9:
        return f"{value:.3g}"
    return f"{value:,.2f}" if abs(value) >= 10 else f"{value:.3f}"


def format_spread(name: str, deviation: float) -> str:
    """A standard deviation: percentage points for shares, the metric's own unit otherwise."""
    return f"{100 * deviation:.2f} points" if is_share(name) else f"{deviation:.3f}"


def format_gap(name: str, value: float | None, reference: float | None) -> str:
    """`value` minus `reference`: percentage points for shares, the metric's own unit otherwise."""
    if value is None or reference is None:
        return NOT_EVALUATED
    if not math.isfinite(value - reference):
        return "not finite"
    gap = value - reference
    text = f"{100 * gap:+.1f} points" if is_share(name) else f"{gap:+.2f}"
    if not any(digit in text for digit in "123456789"):
        text = text.lstrip("+-")
    return text.replace("-", "−")


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts site-2 before site-10."""
    parts = re.split(r"([0-9]{1,18})", name)
    return tuple((0, int(part), "") if index % 2 else (1, 0, part) for index, part in enumerate(parts))


def join_names(names: Iterable[str]) -> str:
    """All names, runs of consecutive numbers shortened: `site-1 to site-8, site-12`."""
    runs: list[list[str]] = []
    previous: tuple[str, int] | None = None
    for name in sorted(names, key=natural_key):
        match = _TRAILING_NUMBER.match(name)
        current = (match[1], int(match[2])) if match and not match[2].startswith("0") else None
        if current and previous and current == (previous[0], previous[1] + 1):
            runs[-1].append(name)
        else:
            runs.append([name])
        previous = current
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(run) for run in runs)


def shorten(name: str, length: int) -> str:
    """Cut the middle out of a long name: sites of one company differ at the end, companies at the start."""
    if len(name) <= length:
        return name
    tail = (length - 1) // 2
    return f"{name[: length - 1 - tail]}…{name[-tail:]}"


def short_label(name: str, width: int) -> str:
    """Name a site in a figure, in `width` Latin letters (Chinese ones take two), without the folder in brackets."""
    name = printable(re.sub(r" \([a-z0-9._-]+\)$", "", name))
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in name)
    return shorten(name, max(3, width * len(name) // (len(name) + wide)) if name else width)


def paragraphs(text: str) -> Sequence[str]:
    """The paragraphs of a text, separated by blank lines."""
    return [part.strip() for part in re.split(r"\n\s*\n", text.strip()) if part.strip()]
