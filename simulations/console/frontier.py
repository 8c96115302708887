"""What accuracy each privacy budget buys: one point a run, or a setting of a sweep, and the front that no other point beats.

Epsilons at different deltas, or for different units, say different things, so the points of one frontier share both
(`Promise`). A run that states no epsilon is left out; one without noise stands at the right edge, where nothing is promised.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from simulations.console.numbers import delta as delta_text
from simulations.console.runs import Run
from simulations.console.sweeps import Sweep


@dataclass(frozen=True, kw_only=True)
class Promise:
    """What an epsilon is of: each of these, with this delta."""

    unit: str
    delta: float

    @property
    def key(self) -> str:
        """Names it in addresses."""
        return f"{self.unit} {delta_text(self.delta)}"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One point.

    Attributes:
        label: what it is called.
        runs: ids of the runs behind it.
        executed: epsilon of what was executed; None without noise.
        planned: epsilon of the plan, where that is another one.
        value, sd: of the metric; None with one seed.
        num: seeds.
        front: no point is better with as small an epsilon, or as good with a smaller one.
    """

    label: str
    runs: tuple[str, ...]
    executed: float | None
    planned: float | None
    value: float
    sd: float | None = None
    num: int = 1
    front: bool = False


def promises(runs: Iterable[Run]) -> list[Promise]:
    """Return what the epsilons of runs are of, the most frequent first."""
    found = Counter(
        Promise(unit=run.unit, delta=run.delta)
        for run in runs
        if run.private and run.executed is not None and run.delta is not None
    )
    return [promise for promise, _ in found.most_common()]


def metrics(runs: Iterable[Run]) -> list[str]:
    """Return the primary metrics of runs, the most frequent first."""
    return [name for name, _ in Counter(run.metric for run in runs if run.value is not None).most_common()]


def of_runs(runs: Iterable[Run], *, metric: str, promise: Promise | None) -> tuple[list[Point], int]:
    """Return a point for each run with this metric and promise, with the front; and how many private ones state no epsilon."""
    points, num_without, higher = [], 0, True
    for run in runs:
        if run.metric != metric or run.value is None:
            continue
        if run.private:
            if run.executed is None:
                num_without += 1
                continue
            if promise is None or (run.unit, run.delta) != (promise.unit, promise.delta):
                continue
        higher = run.higher
        points.append(
            Point(
                label=run.name,
                runs=(run.id,),
                executed=run.executed if run.private else None,
                planned=_if_other(run.planned, run.executed) if run.private else None,
                value=run.value,
                sd=run.spread.sd if run.spread else None,
                num=run.spread.num if run.spread else 1,
            )
        )
    return with_front(points, higher=higher), num_without


def of_sweep(sweep: Sweep, known: Iterable[Run]) -> list[Point]:
    """Return a point for each setting of a sweep, with the front."""
    by_path = {run.path: run.id for run in known if run.sweep == sweep.id}
    points = [
        Point(
            label=", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in tried.setting.items()),
            runs=tuple(by_path[place] for key in tried.trials if (place := sweep.folder_of(key)) in by_path),
            executed=tried.executed,
            planned=_if_other(tried.budget, tried.executed),
            value=tried.mean,
            sd=tried.sd,
            num=max(1, len(tried.trials)),
        )
        for tried in sweep.tried
    ]
    return with_front(points, higher=sweep.higher)


def with_front(points: Sequence[Point], *, higher: bool) -> list[Point]:
    """Return points by epsilon, those on the Pareto front marked: of equal values those of the smallest epsilon."""
    sign, best, at = (1 if higher else -1), -math.inf, None
    found = []
    for point in sorted(
        points, key=lambda one: (math.inf if one.executed is None else one.executed, -sign * one.value)
    ):
        value = sign * point.value
        front = value > best or (value == best and point.executed == at)
        if value > best:
            best, at = value, point.executed
        found.append(replace(point, front=front))
    return found


def _if_other(planned: float | None, executed: float | None) -> float | None:
    """Return the plan's epsilon where it is not, up to rounding, what was executed: noise is calibrated a little below it."""
    if planned is None or executed is None or math.isclose(planned, executed, rel_tol=0.02):
        return None
    return planned
