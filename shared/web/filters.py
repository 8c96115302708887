"""What templates of all consoles call to write numbers and times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from shared.epsilons import (
    as_set,
    bound_rounded_down,
    delta_rounded_up,
    noise_rounded_down,
    rate_rounded_up,
    rounded_up,
)


def in_bytes(value: int | None) -> str:
    """Return a number of bytes for people."""
    if value is None:
        return "–"
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if value >= size:
            return f"{value / size:,.1f} {unit}"
    return f"{value} B"


def clock(time: str | datetime | float | None) -> str:
    """Return a time of a log, a certificate or a file for people; what is none, or in no year of four digits, stands as it is."""
    if time is None:
        return "–"
    try:
        moment = datetime.fromtimestamp(time, UTC) if isinstance(time, int | float) else time
        moment = datetime.fromisoformat(moment) if isinstance(moment, str) else moment
    except (ValueError, OverflowError, OSError):
        return str(time)
    return f"{moment:%Y-%m-%d %H:%M:%S}"


def minute(time: str | datetime | float | None) -> str:
    """Return the minute of a time, for tables whose page says that all times are UTC."""
    return clock(time)[:16]


def share(spent: float, cap: float) -> float:
    """Return how much of a cap is spent, as a part of 100; what is no number fills it."""
    return min(100.0, max(0.0, 100 * spent / cap)) if spent == spent else 100.0


FILTERS: Mapping[str, Callable[..., Any]] = {
    "epsilon": lambda value: "–" if value is None else rounded_up(value, 4),
    "exact": repr,
    "cap": as_set,
    "delta": delta_rounded_up,
    "bytes": in_bytes,
    "clock": clock,
    "minute": minute,
    "share": share,
    "left": lambda value: bound_rounded_down(value, 4),
    "noise": noise_rounded_down,
    "rate": rate_rounded_up,
    "metric": lambda value: "–" if value is None else f"{value:.4g}",
}
