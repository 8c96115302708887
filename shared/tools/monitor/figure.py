"""The figure of `silotune monitor`: each label's share over time with its interval, the baseline, and what was alerted. PNG.

Colours are Okabe and Ito's, which colour-blind eyes tell apart; marks and dashes differ as well.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from shared.fonts import readable_figures
from shared.intervals import wilson
from shared.runtime.monitoring import Monitor, Window, utc
from shared.tools.monitor.quantification import AdjustedCount

SHARE, BASELINE, ALERT, ADJUSTED = "#0072B2", "#4b5563", "#D55E00", "#009E73"
INK, MUTED, GRID = "#1b2733", "#52606d", "#e3e8ee"


def draw_monitor(monitor: Monitor, shown: Sequence[int], *, name: str, adjust: AdjustedCount | None) -> bytes:
    """Return a PNG with a panel for each label in `shown` (at least one), of the windows that are kept (at least one)."""
    with readable_figures() as readable:
        return _draw(monitor, shown, name=readable(name), adjust=adjust, readable=readable)


def _draw(
    monitor: Monitor,
    shown: Sequence[int],
    *,
    name: str,
    adjust: AdjustedCount | None,
    readable: Callable[[str], str],
) -> bytes:
    windows = list(monitor.windows)
    dated = all(window.begin is not None for window in windows)
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(
        figsize=(9.6 if columns == 1 else 12.8, 1.0 + 3.1 * rows), dpi=150, layout="constrained", facecolor="white"
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True).flatten()
    places = [date2num(_date(window)) for window in windows] if dated else [window.number for window in windows]
    for axes, label in zip(panels, shown, strict=False):
        _draw_label(axes, monitor, windows, places, label, adjust)
        axes.set_title(
            f"{name}: share of “{readable(monitor.settings.labels[label])}”",
            loc="left",
            fontsize=10.5,
            color=INK,
            parse_math=False,
        )
        if dated:
            locator = AutoDateLocator(minticks=3, maxticks=8)
            axes.xaxis.set_major_locator(locator)
            axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(labelbottom=True)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    settings = monitor.settings
    note = (
        f"{'Begin of the window, UTC' if dated else 'Window'}. Fisher's exact test, level {settings.level:.1e} of each."
    )
    figure.supxlabel(note, x=0.01, ha="left", fontsize=9, color=MUTED)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper left", ncols=len(names), frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "silotune"})
    return buffer.getvalue()


def _date(window: Window) -> Any:
    from datetime import datetime

    assert window.begin is not None  # noqa: S101 (only called where all have one)
    return datetime.fromisoformat(utc(window.begin))


def _draw_label(
    axes: Any,
    monitor: Monitor,
    windows: Sequence[Window],
    places: Sequence[float],
    label: int,
    adjust: AdjustedCount | None,
) -> None:
    axes.grid(visible=True, color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9, colors=MUTED)
    shares = [window.shares[label] for window in windows]
    bounds = [wilson(window.counts[label], window.texts) for window in windows]
    reference, total = monitor.baseline[label], sum(monitor.baseline)
    low, high = wilson(reference, total)
    axes.axhspan(low, high, color=BASELINE, alpha=0.14, linewidth=0)
    axes.axhline(reference / total, color=BASELINE, linestyle=(0, (5, 2)), linewidth=1.4, label="baseline, 95 %")
    axes.errorbar(
        places,
        shares,
        yerr=[
            [share - a for share, (a, _) in zip(shares, bounds, strict=True)],
            [b - share for share, (_, b) in zip(shares, bounds, strict=True)],
        ],
        color=SHARE,
        linewidth=1.4,
        elinewidth=1,
        marker="o",
        markersize=3.5,
        label="predicted share, 95 %",
    )
    if adjust is not None:
        axes.plot(
            places,
            [float(adjust.shares(window.counts)[label]) for window in windows],
            color=ADJUSTED,
            linestyle=(0, (1.5, 1.5)),
            linewidth=1.5,
            label="adjusted for the model's errors",
        )
    name = monitor.settings.labels[label]
    untested = [window.role != "tested" for window in windows]
    alerted = [any(shift.label == name for shift in window.alerts) for window in windows]
    hollow = {"marker": "o", "markersize": 4.5, "markerfacecolor": "white", "markeredgecolor": SHARE}
    _mark(axes, places, shares, untested, label="not tested (baseline)", zorder=4, **hollow)
    diamond = {"marker": "D", "markersize": 8, "markerfacecolor": "none", "markeredgecolor": ALERT}
    _mark(axes, places, shares, alerted, label="alert", zorder=5, markeredgewidth=1.8, **diamond)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]), top=min(1.0, axes.get_ylim()[1]))


def _mark(axes: Any, places: Sequence[float], shares: Sequence[float], chosen: Sequence[bool], **style: Any) -> None:
    """Put a mark on the chosen points."""
    points = [point for point, wanted in zip(zip(places, shares, strict=True), chosen, strict=True) if wanted]
    axes.plot([x for x, _ in points], [y for _, y in points], linestyle="none", **style)
