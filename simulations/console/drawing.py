"""Where the marks of a frontier stand: across in percent of its width, so that it fits any screen, down in pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from simulations.console.frontier import Point

HEIGHT, TOP, BOTTOM = 360, 14, 318
LEFT, RIGHT, NO_PRIVACY = 13.0, 84.0, 93.0
_LEAST_EPSILON = 1e-3


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One point: where it is, where its plan is (None if that is the same), and the ends of its spread."""

    point: Point
    x: float
    y: float
    planned: float | None
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A frontier to be drawn.

    Attributes:
        across, down: ticks: place and number.
        steps: of the front, from left to right: x1, y1, x2, y2.
    """

    marks: list[Mark]
    across: list[tuple[float, float]]
    down: list[tuple[float, float]]
    steps: list[tuple[float, float, float, float]]


def draw(points: Sequence[Point], *, most: float | None = None) -> Drawing | None:
    """Return where everything stands; None without points. Values from 0 to `most` are all that there can be."""
    if not points:
        return None
    across = _Log([one for point in points for one in (point.executed, point.planned) if one is not None])
    spread = [(point.value - (point.sd or 0.0), point.value + (point.sd or 0.0)) for point in points]
    down = _Linear(min(low for low, _ in spread), max(high for _, high in spread), most)
    marks = [
        Mark(
            point=point,
            x=NO_PRIVACY if point.executed is None else across.at(point.executed),
            y=down.at(point.value),
            planned=None if point.planned is None else across.at(point.planned),
            low=down.at(low),
            high=down.at(high),
        )
        for point, (low, high) in zip(points, spread, strict=True)
    ]
    front = [mark for mark in marks if mark.point.front]
    steps = []
    for one, after in pairwise(front):
        steps += [(one.x, one.y, after.x, one.y), (after.x, one.y, after.x, after.y)]
    return Drawing(
        marks=marks,
        across=[(across.at(tick), tick) for tick in across.ticks()],
        down=[(down.at(tick), tick) for tick in down.ticks()],
        steps=steps,
    )


class _Log:
    """Epsilons on a logarithmic scale of at least a factor of four."""

    def __init__(self, values: Sequence[float]) -> None:
        known = [max(value, _LEAST_EPSILON) for value in values] or [1.0]
        middle = math.sqrt(min(known) * max(known))
        self._low = math.log(min(*known, middle / 2) * 0.9)
        self._high = math.log(max(*known, middle * 2) * 1.1)

    def at(self, value: float) -> float:
        share = (math.log(max(value, _LEAST_EPSILON)) - self._low) / (self._high - self._low)
        return round(LEFT + (RIGHT - LEFT) * share, 3)

    def ticks(self) -> list[float]:
        digits = (1, 2, 5) if self._high - self._low < math.log(1000) else (1,)
        powers = range(math.floor(self._low / math.log(10)), math.ceil(self._high / math.log(10)) + 1)
        found = [digit * 10.0**power for power in powers for digit in digits]
        return [one for one in found if self._low <= math.log(one) <= self._high]


class _Linear:
    """Values of a metric, with room above and below."""

    def __init__(self, low: float, high: float, most: float | None) -> None:
        room = (high - low) * 0.08 or abs(high) * 0.05 or 0.5
        self._low, self._high = low - room, high + room
        if most is not None:
            self._low, self._high = max(self._low, 0.0), min(self._high, most)

    def at(self, value: float) -> float:
        value = min(max(value, self._low), self._high)  # a spread may go beyond what there can be
        return round(BOTTOM - (BOTTOM - TOP) * (value - self._low) / (self._high - self._low), 2)

    def ticks(self) -> list[float]:
        rough = (self._high - self._low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough)
        first = math.ceil(self._low / step)
        return [round(number * step, 12) for number in range(first, math.floor(self._high / step) + 1)]
