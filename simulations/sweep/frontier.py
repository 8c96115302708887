"""The privacy-utility frontier: at each budget, the setting with the best mean over all seeds.

What its numbers mean
    * The epsilon of a point is the largest one that a trial of its setting executed, rounded by nobody.
    * The best of several settings, judged on the records that chose it, is optimistic. Where a sweep has confirmation records,
      each point also states its score on these; no choice ever reads them.
    * The standard deviation is that of the seeds: other partition, initial weights, noise and sampling, same test records.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from shared.epsilons import rounded_up
from simulations.sweep.journal import TrialResult
from simulations.sweep.spec import NO_BUDGET, Setting


@dataclass(frozen=True, kw_only=True)
class SettingResult:
    """One setting over all seeds.

    Attributes:
        setting: value of every axis.
        budget: what it was calibrated to: epsilon, "inf", or the executed epsilon if its noise multiplier was given.
        epsilon: largest executed epsilon of its trials; None without protection.
        delta: of that epsilon.
        metric: name of the compared metric.
        mean, sd: of the scores on the evaluation records; sd is None with one seed.
        confirmation_mean, confirmation_sd: the same on confirmation records, or None.
        num_seeds: trials behind these numbers.
    """

    setting: Setting
    budget: float | str
    epsilon: float | None
    delta: float
    metric: str
    mean: float
    sd: float | None
    confirmation_mean: float | None
    confirmation_sd: float | None
    num_seeds: int


@dataclass(frozen=True, kw_only=True)
class FrontierPoint:
    """The best setting at one budget.

    Attributes:
        best: its result.
        num_settings: settings that it was chosen from.
    """

    best: SettingResult
    num_settings: int

    @property
    def optimistic(self) -> bool:
        """True if the mean was stated on the records that chose the setting among others."""
        return self.num_settings > 1 and self.best.confirmation_mean is None

    def as_dict(self) -> dict[str, Any]:
        """Return the point as plain JSON."""
        return {**asdict(self.best), "num_settings": self.num_settings, "optimistic": self.optimistic}


def by_setting(trials: Iterable[TrialResult], *, seeds: Sequence[int]) -> list[SettingResult]:
    """Return every setting that was completed under all `seeds`, in the order in which they were tried."""
    groups: dict[str, dict[int, TrialResult]] = {}
    for trial in trials:
        if trial.completed and trial.seed in seeds:
            groups.setdefault(repr(trial.setting), {})[trial.seed] = trial
    return [_over_seeds([group[seed] for seed in seeds]) for group in groups.values() if len(group) == len(seeds)]


def frontier(settings: Iterable[SettingResult], *, higher_is_better: bool) -> list[FrontierPoint]:
    """Return the best setting at each budget, the smallest budget first and no budget last; the first one of equals."""
    budgets: dict[float | str, list[SettingResult]] = {}
    for result in settings:
        budgets.setdefault(result.budget, []).append(result)
    choose = max if higher_is_better else min
    points = [
        FrontierPoint(best=choose(group, key=lambda result: result.mean), num_settings=len(group))
        for group in budgets.values()
    ]
    return sorted(points, key=lambda point: math.inf if point.best.epsilon is None else point.best.epsilon)


def utility_points(points: Iterable[FrontierPoint], *, name: str) -> dict[str, Any] | None:
    """Return what `silotune plan --utility` reads, or None if no point has an epsilon.

    Confirmed scores stand there instead of optimistic ones where there are any; points without noise are left out, for a plan
    has no place for them.
    """
    rows = []
    for point in points:
        best = point.best
        if best.epsilon is None or best.epsilon <= 0:
            continue
        confirmed = best.confirmation_mean is not None
        mean, sd = (best.confirmation_mean, best.confirmation_sd) if confirmed else (best.mean, best.sd)
        row: dict[str, Any] = {"epsilon": best.epsilon, "metric": best.metric, "name": name, "mean": mean}
        rows.append(row | ({} if sd is None else {"sd": sd}) | {"setting": best.setting, "confirmed": confirmed})
    return {"points": rows} if rows else None


def caution(points: Sequence[FrontierPoint], *, num_seeds: int) -> list[str]:
    """Return what a reader has to know about the frontier, in sentences."""
    notes = []
    if any(point.optimistic for point in points):
        most = max(point.num_settings for point in points)
        notes.append(
            f"Each point is the best of up to {most} settings, stated on the very records that chose it, so it is optimistic. "
            "Set data.num_confirm to state it on records that choose nothing."
        )
    elif any(point.best.confirmation_mean is not None for point in points):
        notes.append(
            "Settings were chosen on the evaluation records and are also stated on confirmation records, which chose nothing: "
            "these are the figures to quote."
        )
    if num_seeds == 1:
        notes.append("One seed: how much of a difference is chance is not known. Add --seeds 0,1,2.")
    else:
        notes.append(f"Standard deviations are over {num_seeds} seeds, on the same test records.")
    if any(point.best.epsilon is None for point in points):
        notes.append("Epsilon inf: without noise and clipping, so nothing is protected; it is where the frontier ends.")
    return notes


def _over_seeds(trials: Sequence[TrialResult]) -> SettingResult:
    scores = [trial.value() for trial in trials]
    confirmed = [trial.value(confirmation=True) for trial in trials] if all(t.confirmation for t in trials) else []
    epsilons = [trial.epsilon for trial in trials]
    epsilon = None if None in epsilons else max(value for value in epsilons if value is not None)
    first = trials[0]
    # If the noise was given, what it spent is what it can be compared at.
    spent: float | str = NO_BUDGET if epsilon is None else float(rounded_up(epsilon))
    return SettingResult(
        setting=first.setting,
        budget=spent if first.budget is None else first.budget,
        epsilon=epsilon,
        delta=first.delta,
        metric=first.metric,
        mean=statistics.fmean(scores),
        sd=statistics.stdev(scores) if len(scores) > 1 else None,
        confirmation_mean=statistics.fmean(confirmed) if confirmed else None,
        confirmation_sd=statistics.stdev(confirmed) if len(confirmed) > 1 else None,
        num_seeds=len(scores),
    )
