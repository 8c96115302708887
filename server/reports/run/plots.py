"""The figures of a report, as SVG elements that can stand inside an HTML page.

matplotlib draws with its SVG backend. The result carries no script, no style sheet, no XML namespace and no
reference outside itself, so that it shows under a policy that forbids all of them. Text stays text: it can be
searched, copied and read aloud. The same data gives the same bytes.
"""

from __future__ import annotations

import io
import math
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from server.records.metrics import is_share
from server.records.privacy import AnyRecord, SiteRecord
from server.records.rounds import RoundRecord
from server.reports.run.formats import (
    format_budget,
    format_bytes,
    format_epsilon,
    format_metric,
    metric_title,
    natural_key,
    printable,
    short_label,
    shorten,
)
from server.reports.run.run_data import Arm
from shared.runtime.calibration import Bin
from shared.site_weights import SiteShare

INK, MUTED, GRID, TRACK = "#1b2733", "#52606d", "#e3e8ee", "#dde4ec"
MAIN, DANGER = "#0b4f8a", "#b3261e"
# Colour, dash and marker differ together, so that print in grey and colour-blind eyes tell the lines apart.
BASELINE_STYLES = (
    ("#a8500a", (0, (5, 2)), "s"),
    ("#4b5563", (0, (1.5, 1.5)), "D"),
    ("#0f7062", (0, (7, 2, 1.5, 2)), "^"),
    ("#7a3b8f", (0, (3, 1)), "v"),
)
SITES_PER_PANEL, PANELS_PER_FIGURE = 34, 3
WIDTH = 9.0  # inches

_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "silotune",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
_NAMESPACE = re.compile(r"^\{[^}]*\}")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One training in a plot of a metric; `points` are (x, metric), possibly only the last one is known."""

    title: str
    points: tuple[tuple[float, float], ...]
    final: float | None


def metric_by_round(
    *, metric: str, federated: Arm, titles: Sequence[str], baselines: Sequence[Arm], alt: str
) -> Markup:
    """The metric against the rounds of the federated run.

    Baselines are stretched over the same width, so that equal shares of training stand above each other; one
    with fewer than two measured rounds is a horizontal line at its final value.
    """
    planned = max(federated.rounds_planned, 1)
    lines = [
        Line(
            title=title,
            points=_finite((r.round * planned / max(arm.rounds_planned, 1), r.metrics.get(metric)) for r in arm.rounds),
            final=arm.final(metric),
        )
        for title, arm in zip(titles, (federated, *baselines), strict=True)
    ]
    with _figure(3.5) as figure:
        axes = figure.add_axes((0.075, 0.145, 0.735, 0.77))
        _draw_lines(axes, metric, lines)
        axes.set_xlim(0, planned)
        axes.set_xlabel("Round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
        _label_ends(axes, metric, lines)
        return _svg(figure, prefix="rounds", alt=alt)


def metric_by_epsilon(
    *, metric: str, titles: Sequence[str], arms: Sequence[Arm], budget: float | None, label: str, alt: str
) -> Markup:
    """The metric against the epsilon spent so far, for private trainings; `arms[0]` is the federated one."""
    lines = [
        Line(
            title=title,
            points=_finite(
                (r.epsilon_max, r.metrics.get(metric))
                for r in arm.rounds
                if arm.private and r.epsilon_max is not None and math.isfinite(r.epsilon_max)
            ),
            final=None if arm.private else arm.final(metric),
        )
        for title, arm in zip(titles, arms, strict=True)
    ]
    with _figure(3.5) as figure:
        axes = figure.add_axes((0.075, 0.145, 0.735, 0.77))
        spent = max((x for line in lines for x, _ in line.points), default=1.0)
        _draw_lines(axes, metric, lines)
        axes.set_xlim(0, max(spent, budget or 0.0) * 1.02 or 1.0)
        axes.set_xlabel(label)
        if budget is not None:
            axes.axvline(budget, color=DANGER, linewidth=1, linestyle=(0, (2, 2)))
            axes.annotate(
                f"budget {format_budget(budget)}",
                (budget, 0.02),
                xycoords=("data", "axes fraction"),
                xytext=(-4, 0),
                textcoords="offset points",
                ha="right",
                va="bottom",
                color=DANGER,
                fontsize=8.5,
            )
        _label_ends(axes, metric, lines)
        return _svg(figure, prefix="spent", alt=alt)


def site_spend(sites: Sequence[AnyRecord], *, prefix: str, alt: str) -> Markup:
    """Epsilon spent against the budget, one bar for each site, in up to three panels; a line is what was promised of shares."""
    num_panels = min(math.ceil(len(sites) / SITES_PER_PANEL), PANELS_PER_FIGURE)
    rows = math.ceil(len(sites) / num_panels)
    reach = max((v for s in sites for v in (s.epsilon_stated, s.epsilon_budget) if v and math.isfinite(v)), default=1)
    row_height = 0.27 if num_panels == 1 else 0.2
    height = rows * row_height + 0.5
    with _figure(height) as figure:
        for panel in range(num_panels):
            shown = sites[panel * rows : (panel + 1) * rows]
            width = 1 / num_panels
            label, value = (0.165, 0.115) if num_panels == 1 else (0.30 * width, 0.24 * width)
            axes = figure.add_axes(
                (panel * width + label, 0.42 / height, width - label - value, rows * row_height / height)
            )
            _draw_site_bars(axes, shown, rows=rows, reach=reach, compact=num_panels > 1)
        return _svg(figure, prefix=prefix, alt=alt)


def site_pages(sites: Sequence[AnyRecord]) -> Iterator[Sequence[AnyRecord]]:
    """Cut many sites into figures that each fit on a printed page."""
    ordered = sorted(sites, key=lambda site: natural_key(site.site))
    size = SITES_PER_PANEL * PANELS_PER_FIGURE
    num_pages = math.ceil(len(ordered) / size)
    each = math.ceil(len(ordered) / max(num_pages, 1))
    for page in range(num_pages):
        yield ordered[page * each : (page + 1) * each]


def noise_shares(shares: Sequence[SiteShare], *, units: str, alt: str) -> Markup:
    """Each site's share of the noise beside its share of the declared records; of many sites, those with most noise."""
    loudest = sorted(shares, key=lambda share: -share.noise)[:SITES_PER_PANEL]
    shown = [share for share in shares if share in loudest]
    height = len(shown) * 0.34 + 0.75
    with _figure(height) as figure:
        # The longest bar has its label to the right of the axes.
        axes = figure.add_axes((0.165, 0.42 / height, 0.63, (height - 0.75) / height))
        rows = range(len(shown))
        noise = [share.noise for share in shown]
        colors = [DANGER if share.far_above else MAIN for share in shown]
        axes.barh([row - 0.19 for row in rows], [share.records for share in shown], height=0.34, color="#b9c4cf")
        bars = axes.barh([row + 0.19 for row in rows], noise, height=0.34, color=colors)
        axes.bar_label(bars, [f"{100 * value:.1f} % of the noise" for value in noise], padding=4, fontsize=8.5)
        axes.set_yticks(list(rows), [short_label(share.site, 19) for share in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlim(0, max(*noise, *(share.records for share in shown)) * 1.02)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))
        axes.set_title(f"Share of all sites: declared {units} (grey), noise", loc="left", fontsize=9.5, color=MUTED)
        return _svg(figure, prefix="shares", alt=alt)


def traffic(rounds: Sequence[RoundRecord], *, alt: str) -> Markup:
    """Bytes from the sites (up) and to them (down) in every round."""
    numbers = [record.round for record in rounds]
    ways = (
        ("up, from the sites", "bytes_up", -0.2, MAIN),
        ("down, to the sites", "bytes_down", 0.2, "#8fb4d6"),
    )
    with _figure(2.5) as figure:
        axes = figure.add_axes((0.085, 0.2, 0.895, 0.66))
        for title, key, shift, color in ways:
            values = [getattr(record, key) or 0 for record in rounds]
            if len(rounds) <= 60:
                axes.bar([n + shift for n in numbers], values, width=0.4, color=color, label=title)
            else:
                axes.step(numbers, values, where="mid", color=color, linewidth=1.6, label=title)
        axes.margins(x=0.02, y=0.12)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        axes.spines["left"].set_visible(False)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value)))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
        axes.set_xlabel("Round")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 0.99), ncols=2, frameon=False, borderaxespad=0)
        return _svg(figure, prefix="traffic", alt=alt)


def roc_curve(points: Sequence[Sequence[float]], *, positive: str, alt: str) -> Markup:
    """True against false positive rate of a classifier of two classes."""
    with _figure(3.5) as figure:
        axes = figure.add_axes((0.085, 0.145, 0.42, 0.8))
        axes.plot([0, 1], [0, 1], color=GRID, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.plot(*zip(*points, strict=True), color=MAIN, linewidth=1.8)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.01)
        axes.grid()
        axes.set_xlabel(f"Other records called {shorten(printable(positive), 24)}")
        axes.set_ylabel(f"{shorten(printable(positive), 24)} found")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=5))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
        return _svg(figure, prefix="roc", alt=alt)


def reliability(before: Sequence[Bin], after: Sequence[Bin] | None, *, alt: str) -> Markup:
    """How often answers are right against how sure the model is of them; on the diagonal it is as good as it says."""
    lines: list[tuple[Sequence[Bin], str, str, Any]] = [
        (before, "without a temperature" if after else "as it is", MUTED, (0, (4, 2)))
    ]
    if after:
        lines.append((after, "with it", MAIN, "-"))
    with _figure(3.6) as figure:
        axes = figure.add_axes((0.085, 0.145, 0.42, 0.8))
        axes.plot([0, 1], [0, 1], color=GRID, linewidth=1.2)
        total = max(sum(one.count for one in before), 1)
        for bins, title, color, dash in lines:
            shown = [one for one in bins if one.count]
            x, y = [one.confidence for one in shown], [one.accuracy for one in shown]
            axes.plot(x, y, color=color, linestyle=dash, linewidth=1.6, label=title)
            axes.scatter(
                x,
                y,
                s=[8 + 220 * one.count / total for one in shown],
                color=color,
                alpha=0.55,
                linewidths=0,
                clip_on=False,
            )
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.grid()
        axes.set_xlabel("Probability that the model gives its answer")
        axes.set_ylabel("Answers that are right")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=5))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
        axes.legend(loc="upper left", bbox_to_anchor=(1.03, 1), frameon=False)
        return _svg(figure, prefix="reliability", alt=alt)


def true_and_predicted(pairs: Sequence[Sequence[float]], *, alt: str) -> Markup:
    """Predicted numbers against true ones, with the line on which they would be equal."""
    true, predicted = zip(*pairs, strict=True)
    low, high = min(*true, *predicted), max(*true, *predicted)
    with _figure(3.8) as figure:
        axes = figure.add_axes((0.085, 0.135, 0.46, 0.83))
        axes.plot([low, high], [low, high], color=DANGER, linewidth=1, linestyle=(0, (4, 3)))
        axes.scatter(true, predicted, s=9, color=MAIN, alpha=0.35, linewidths=0)
        axes.grid()
        axes.set_xlabel("True")
        axes.set_ylabel("Predicted")
        return _svg(figure, prefix="pairs", alt=alt)


def _draw_lines(axes: Any, metric: str, lines: Sequence[Line]) -> None:
    """Draw from the last line to the first, so that the federated run lies on top."""
    for index in reversed(range(len(lines))):
        line = lines[index]
        color, dash, marker = _style(index)
        if len(line.points) > 1:
            x, y = zip(*line.points, strict=True)
            every = max(1, len(x) // 12)
            size = 5 if index == 0 else 3.6
            axes.plot(
                x,
                y,
                color=color,
                linestyle=dash,
                linewidth=2.4 if index == 0 else 1.5,
                marker=marker,
                markersize=size,
                markevery=every,
                clip_on=False,
            )
        elif (level := _level(line)) is not None:
            axes.axhline(level, color=color, linestyle=dash, linewidth=1.5)
    values = [y for line in lines for _, y in line.points]
    # A share that begins near nothing, as with many labels, is still read from nothing to all.
    if not is_share(metric) and values and min(values) > 0 and max(values) / min(values) > 20:
        axes.set_yscale("log")
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    if is_share(metric):
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))
    axes.margins(y=0.1)
    axes.grid(axis="y")
    axes.set_title(metric_title(printable(metric)), loc="left", fontsize=9.5, color=MUTED, pad=6)


def _label_ends(axes: Any, metric: str, lines: Sequence[Line]) -> None:
    """Name every line at its end, right of the axes, moved apart where two would overlap."""
    labels = []
    for index, line in enumerate(lines):
        level = line.points[-1][1] if len(line.points) > 1 else _level(line)
        if level is not None:
            height = axes.transAxes.inverted().transform(axes.transData.transform((axes.get_xlim()[0], level)))[1]
            labels.append((float(height), index, level))
    labels.sort()
    gap, position = 0.115, -math.inf
    heights = []
    for height, _, _ in labels:
        position = max(height, position + gap)
        heights.append(position)
    overflow = max(0.0, (heights[-1] - 1.0) if heights else 0.0)
    for (_, index, level), height in zip(labels, heights, strict=True):
        axes.annotate(
            f"{shorten(lines[index].title, 24)}\n{format_metric(metric, level)}",
            (1.015, height - overflow),
            xycoords="axes fraction",
            ha="left",
            va="center",
            linespacing=1.15,
            color=_style(index)[0],
            fontsize=9,
            fontweight="bold" if index == 0 else "normal",
            annotation_clip=False,
        )


def promised(site: AnyRecord) -> float | None:
    """The first promise of a site that adds a share of the noise: of all planned attempts, whatever was spent of it."""
    return site.epsilon_planned if isinstance(site, SiteRecord) and site.shared is not None else None


def spent(site: AnyRecord) -> float | None:
    """What the bar of a site shows as spent."""
    return site.epsilon_stated if promised(site) is None else site.recorded


def _draw_site_bars(axes: Any, sites: Sequence[AnyRecord], *, rows: int, reach: float, compact: bool) -> None:
    font = 8 if compact else 9
    for row, site in enumerate(sites):
        stated, planned = spent(site), promised(site)
        if site.epsilon_budget is not None:
            axes.barh(row, min(site.epsilon_budget, reach), height=0.62, color=TRACK)
        void = site.randomness == "injected"
        color = DANGER if void or site.over_budget else MAIN
        axes.barh(
            row,
            min(stated or 0.0, reach),
            height=0.62,
            color="#ffffff" if void else color,
            edgecolor=color,
            linewidth=0.8 if void else 0,
            hatch="////" if void else None,
        )
        if planned is not None:
            axes.plot([min(planned, reach)] * 2, [row - 0.31, row + 0.31], color=INK, linewidth=1.6, clip_on=False)
        axes.annotate(
            short_label(site.site, 14 if compact else 19),
            (0, row),
            xycoords=("axes fraction", "data"),
            xytext=(-5, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=font,
        )
        budget = "" if site.epsilon_budget is None else f" of {format_budget(site.epsilon_budget)}"
        axes.annotate(
            f"{format_epsilon(stated)}{budget}",
            (1, row),
            xycoords=("axes fraction", "data"),
            xytext=(5, 0),
            textcoords="offset points",
            ha="left",
            va="center",
            fontsize=font,
            color=color,
        )
    axes.set_xlim(0, reach)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=3 if compact else 8))
    axes.set_xlabel("Epsilon", fontsize=font)
    axes.tick_params(axis="x", labelsize=font)


def _style(index: int) -> tuple[str, Any, str]:
    return (MAIN, "-", "o") if index == 0 else BASELINE_STYLES[(index - 1) % len(BASELINE_STYLES)]


def _level(line: Line) -> float | None:
    """Where a line without a curve lies: its final value, or its only point."""
    level = line.final if line.final is not None else (line.points[0][1] if line.points else None)
    return level if level is not None and math.isfinite(level) else None


def _finite(points: Any) -> tuple[tuple[float, float], ...]:
    return tuple((float(x), y) for x, y in points if y is not None and math.isfinite(y))


@contextmanager
def _figure(height: float) -> Iterator[Figure]:
    """A figure without global state; a missing glyph does not matter where text stays text."""
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing", category=UserWarning)
        figure = Figure(figsize=(WIDTH, height))
        FigureCanvasSVG(figure)
        yield figure


def _svg(figure: Figure, *, prefix: str, alt: str) -> Markup:
    """Serialise a figure for inlining: no namespaces, no style attributes, ids unique in the page."""
    buffer = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", metadata=nothing)
    root = ElementTree.fromstring(buffer.getvalue())  # noqa: S314 - written by matplotlib a line above
    for parent in root.iter():
        for child in list(parent):
            if child.tag.endswith(("}style", "}metadata")):
                parent.remove(child)
    for element in root.iter():
        element.tag = _NAMESPACE.sub("", element.tag)
        element.attrib = dict(_presentation(element.attrib, prefix))
    view_box = root.attrib["viewBox"]
    root.attrib = {"viewBox": view_box, "role": "img", "aria-label": alt}
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # noqa: S704 - ElementTree escaped all text


def _presentation(attributes: dict[str, str], prefix: str) -> Iterator[tuple[str, str]]:
    """Turn style declarations into SVG attributes and keep references inside the figure."""
    for name, value in attributes.items():
        name = _NAMESPACE.sub("", name)
        if name == "style":
            for declaration in value.split(";"):
                key, _, setting = declaration.partition(":")
                if setting and key.strip() != "font-family":
                    yield key.strip(), setting.strip().replace("url(#", f"url(#{prefix}-")
        elif name == "id":
            yield name, f"{prefix}-{value}"
        elif name == "href":
            yield name, f"#{prefix}-{value.removeprefix('#')}"
        else:
            yield name, value.replace("url(#", f"url(#{prefix}-")
