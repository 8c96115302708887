"""The figure of a sweep: the metric against epsilon, the best setting at each budget among all that were tried. PNG.

Colours are Okabe and Ito's, which colour-blind eyes tell apart; marks and dashes differ as well.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from shared.epsilons import delta_rounded_up, rounded_up
from shared.fonts import readable_figures
from simulations.sweep.frontier import FrontierPoint, SettingResult
from simulations.sweep.spec import EPSILON, shown

BEST, CONFIRMED, OTHER = "#0072B2", "#D55E00", "#8A8A8A"
INK, MUTED, GRID = "#1b2733", "#52606d", "#e3e8ee"


def draw_frontier(
    points: Sequence[FrontierPoint], settings: Sequence[SettingResult], *, name: str, higher_is_better: bool
) -> bytes:
    """Return a PNG; `points` holds at least one point, `settings` everything that was tried."""
    with readable_figures() as readable:
        return _draw(points, settings, name=readable(name), higher_is_better=higher_is_better, readable=readable)


def _draw(
    points: Sequence[FrontierPoint],
    settings: Sequence[SettingResult],
    *,
    name: str,
    higher_is_better: bool,
    readable: Callable[[str], str],
) -> bytes:
    figure = Figure(figsize=(7.6, 5.0), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    place = _places([point.best for point in points])
    metric, seeds, delta = points[0].best.metric, points[0].best.num_seeds, points[0].best.delta
    axes.grid(visible=True, color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=10, colors=MUTED)
    _draw_others(axes, points, settings, place)
    confirmed = all(point.best.confirmation_mean is not None for point in points)
    most = max(point.num_settings for point in points)
    chosen = f"best of {most} settings, on the records that chose it" if most > 1 else "measured"
    shift = 1.03 if confirmed else 1.0
    _draw_series(axes, points, place, label=chosen, colour=BEST, marker="o", dash="solid", factor=1 / shift)
    if confirmed:
        label = "the same, on records that chose nothing"
        _draw_series(axes, points, place, label=label, colour=CONFIRMED, marker="s", dash=(0, (5, 2)), factor=shift)
    _name_settings(axes, points, place, above=higher_is_better, readable=readable)
    _scale(axes, points, place, above=higher_is_better)
    better = "higher" if higher_is_better else "lower"
    spread = f"mean and one sd over {seeds} seeds" if seeds > 1 else "one seed"
    axes.set_xlabel(
        f"Epsilon, executed, largest of the sites (delta {delta_rounded_up(delta)}; logarithmic)", color=MUTED
    )
    axes.set_ylabel(f"{metric.capitalize()}, {spread} ({better} is better)", color=MUTED)
    axes.set_title(f"{name}: {metric} against the privacy budget", loc="left", fontsize=12, color=INK, pad=12)
    axes.legend(frameon=False, fontsize=9, loc="best")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "silotune"})
    return buffer.getvalue()


def _places(results: Sequence[SettingResult]) -> dict[float | str, float]:
    """Return where each budget stands on the axis: at its epsilon; without any, right of all others."""
    # A logarithmic axis has no 0; an epsilon this small hides everything.
    finite = {result.budget: max(result.epsilon, 1e-3) for result in results if result.epsilon is not None}
    beyond = 2.2 * max(finite.values(), default=1.0)
    return {result.budget: finite.get(result.budget, beyond) for result in results}


def _draw_series(
    axes: Any,
    points: Sequence[FrontierPoint],
    place: dict[float | str, float],
    *,
    label: str,
    colour: str,
    marker: str,
    dash: Any,
    factor: float,
) -> None:
    confirmed = colour == CONFIRMED
    x, y = [], []
    spread: list[float] = []
    for point in points:
        best = point.best
        mean, sd = (best.confirmation_mean, best.confirmation_sd) if confirmed else (best.mean, best.sd)
        x.append(place[best.budget] * factor)
        y.append(mean)
        spread += [] if sd is None else [sd]
    style = {"color": colour, "marker": marker, "markersize": 6.5, "capsize": 4, "linewidth": 1.8, "zorder": 4}
    axes.errorbar(x, y, yerr=spread or None, linestyle=dash, label=label, **style)


def _draw_others(
    axes: Any, points: Sequence[FrontierPoint], settings: Sequence[SettingResult], place: dict[float | str, float]
) -> None:
    best = [point.best for point in points]
    others = [result for result in settings if result not in best]
    if others:
        x, y = [place[result.budget] for result in others], [result.mean for result in others]
        axes.plot(x, y, linestyle="none", marker="x", markersize=6, color=OTHER, label="other settings", zorder=2)


def _name_settings(
    axes: Any,
    points: Sequence[FrontierPoint],
    place: dict[float | str, float],
    *,
    above: bool,
    readable: Callable[[str], str],
) -> None:
    """Write beside each point what was best there, if the sweep varied anything but the budget."""
    for point in points:
        rest = {key: value for key, value in point.best.setting.items() if key != EPSILON}
        if not rest or len(points) > 8:
            continue
        lines = [f"{key.rpartition('.')[2].replace('_', ' ')} {shown(value)}" for key, value in rest.items()]
        text = readable("\n".join(lines))
        edge = point.best.mean + (1 if above else -1) * (point.best.sd or 0.0)
        axes.annotate(
            text,
            (place[point.best.budget], edge),
            xytext=(0, 9 if above else -9),
            textcoords="offset points",
            ha="center",
            va="bottom" if above else "top",
            fontsize=8,
            color=INK,
            zorder=5,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.0},
        )


def _scale(axes: Any, points: Sequence[FrontierPoint], place: dict[float | str, float], *, above: bool) -> None:
    axes.set_xscale("log")
    where = [place[point.best.budget] for point in points]
    names = ["inf\n(no noise)" if p.best.epsilon is None else rounded_up(p.best.epsilon, 2) for p in points]
    axes.xaxis.set_major_locator(FixedLocator(where))
    axes.xaxis.set_major_formatter(FixedFormatter(names))
    axes.xaxis.set_minor_locator(NullLocator())
    room = max(1.25, (max(where) / min(where)) ** 0.12)
    axes.set_xlim(min(where) / room, max(where) * room)
    low, high = axes.get_ylim()
    room = 0.16 * (high - low)  # for the names of the settings
    axes.set_ylim(low - (0 if above else room), high + (room if above else 0))
    if any(point.best.epsilon is None for point in points) and len(points) > 1:
        axes.axvline(where[-1] / math.sqrt(where[-1] / where[-2]), color=OTHER, linewidth=0.8, linestyle=":")
