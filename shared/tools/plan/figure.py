"""The figure of `silotune plan`, and the measured points that it may show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from shared.epsilons import delta_rounded_up, noise_rounded_down, rate_rounded_up

if TYPE_CHECKING:
    from shared.tools.plan.planning import Setting
    from shared.tools.plan.sharing import SharesPlan

INK, MUTED, GRID = "#1b2733", "#52606d", "#e3e8ee"
# Colour, dash and marker differ together, so that print in grey and colour-blind eyes tell the lines apart.
LINE_STYLES = (
    ("#0b4f8a", "solid", "o"),
    ("#a8500a", (0, (5, 2)), "s"),
    ("#0f7062", (0, (7, 2, 1.5, 2)), "^"),
)


class UtilityPoint(BaseModel):
    """One measured point; other keys of the file are left alone."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    epsilon: float = Field(gt=0)
    name: str
    metric: str | None = None
    mean: float
    sd: float = Field(default=0.0, ge=0)

    @property
    def title(self) -> str:
        """What was measured, and in which series."""
        return self.name if self.metric in (None, self.name) else f"{self.metric}, {self.name}"


class UtilityFile(BaseModel):
    """What `--utility` reads."""

    points: tuple[UtilityPoint, ...] = Field(min_length=1)


def draw(
    settings: Sequence[Setting], utility: Sequence[UtilityPoint] | None, shares: SharesPlan | None = None
) -> bytes:
    """Return a PNG: epsilon against epochs, noise multiplier against epsilon, and the measured utility if there is any.

    Where sites share the noise, the second panel is epsilon of the sum against the number of honest sites.
    """
    import io

    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = 2 if utility is None else 3
    style = {
        "font.size": 10,
        "axes.edgecolor": "#9aa5b1",
        "axes.labelcolor": MUTED,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlepad": 10,
        "grid.color": GRID,
        "text.color": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "legend.handlelength": 3.2,
        "lines.linewidth": 1.8,
        "figure.constrained_layout.w_pad": 0.12,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.0 * panels, 4.4), dpi=160, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, panels)
        for place in axes:
            place.grid(visible=True)
        if shares is None:
            _draw_epochs(axes[0], settings)
            _draw_noise(axes[1], settings)
        else:
            _draw_epochs(axes[0], [shares.together, shares.share], names=("sum", "one upload alone"))
            _draw_honest(axes[1], shares)
        if utility is not None:
            _draw_utility(axes[2], utility)
        delta = max(setting.delta for setting in settings)
        note = f"Epsilon: upper bound by PLD, one record added or removed, delta {delta_rounded_up(delta)}."
        note += " No measured utility was given." if utility is None else " Utility: as measured elsewhere."
        figure.supxlabel(note, x=0.01, ha="left", fontsize=9, color=MUTED)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": "silotune"})
    return buffer.getvalue()


def _draw_epochs(axes: Any, settings: Sequence[Setting], names: Sequence[str] = ()) -> None:
    from shared.tools.plan.planning import epsilon_by_steps

    longest = max(setting.epochs for setting in settings)
    kinds = list(dict.fromkeys((s.noise_multiplier, s.sample_rate) for s in settings))
    rates = len({rate for _, rate in kinds})
    for place, ((sigma, rate), (colour, dash, _)) in enumerate(zip(_spread(kinds), LINE_STYLES, strict=False)):
        curve = epsilon_by_steps(sigma, rate, most=max(1, round(longest / rate)), delta=settings[0].delta)
        label = f"noise {noise_rounded_down(sigma)}" + (f", rate {rate_rounded_up(rate, 4)}" if rates > 1 else "")
        if names:
            label = f"{names[place]}, {label}"
        axes.plot(
            [steps * rate for steps, _ in curve], [e for _, e in curve], color=colour, linestyle=dash, label=label
        )
    _draw_settings(axes, [(s.epochs, s.epsilon) for s in settings], "this plan" if names else None)
    axes.set(title="Epsilon against epochs", xlabel="Epochs", ylabel="Epsilon")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend()


def _draw_noise(axes: Any, settings: Sequence[Setting]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    from shared.tools.plan.planning import epsilon_by_noise

    least, most = (pick(setting.noise_multiplier for setting in settings) for pick in (min, max))
    kinds = list(dict.fromkeys((s.sample_rate, s.steps) for s in settings))
    rates = len({rate for rate, _ in kinds})
    for (rate, steps), (colour, dash, _) in zip(_spread(kinds), LINE_STYLES, strict=False):
        curve = epsilon_by_noise(rate, steps, least=least / 1.4, most=most * 1.6, delta=settings[0].delta)
        label = f"{number(steps * rate)} epochs, {steps:,} steps" + (
            f", rate {rate_rounded_up(rate, 4)}" if rates > 1 else ""
        )
        axes.plot([e for e, _ in curve], [sigma for _, sigma in curve], color=colour, linestyle=dash, label=label)
    _draw_settings(axes, [(s.epsilon, s.noise_multiplier) for s in settings])
    axes.set(title="Noise multiplier against epsilon", xlabel="Epsilon (logarithmic)", ylabel="Noise multiplier")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(bottom=0)
    axes.legend()


def _draw_honest(axes: Any, shares: SharesPlan) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    points = [(count, epsilon) for count, epsilon in shares.by_honest() if math.isfinite(epsilon)]
    colour, dash, _ = LINE_STYLES[0]
    label = f"shares of noise {noise_rounded_down(shares.share.noise_multiplier)}"
    axes.plot(
        [count for count, _ in points], [epsilon for _, epsilon in points], color=colour, linestyle=dash, label=label
    )
    _draw_settings(axes, [(shares.sharing.honest, shares.together.epsilon)])
    axes.set(title="Epsilon against honest sites", xlabel="Honest sites in a sum (logarithmic)", ylabel="Epsilon")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(bottom=0)
    axes.legend()


def _draw_utility(axes: Any, utility: Sequence[UtilityPoint]) -> None:
    series = dict.fromkeys(point.title for point in utility)
    for index, title in enumerate(series):
        colour, dash, marker = LINE_STYLES[index % len(LINE_STYLES)]
        points = sorted((p for p in utility if p.title == title), key=lambda p: p.epsilon)
        axes.errorbar(
            [p.epsilon for p in points],
            [p.mean for p in points],
            yerr=[p.sd for p in points],
            color=colour,
            linestyle=dash,
            marker=marker,
            capsize=3,
            label=title,
        )
    metrics = {point.metric or point.name for point in utility}
    what = metrics.pop() if len(metrics) == 1 else "Mean"
    axes.set(title="Measured utility against epsilon", xlabel="Epsilon", ylabel=f"{what}, mean and one sd")
    axes.set_xlim(left=0)
    axes.legend()


def _draw_settings(axes: Any, points: Sequence[tuple[float, float]], label: str | None = None) -> None:
    axes.plot(
        [x for x, _ in points],
        [y for _, y in points],
        linestyle="none",
        marker="o",
        markersize=5.5,
        markerfacecolor="white",
        markeredgecolor=INK,
        label=label or ("this plan" if len(points) == 1 else "points of the sweep"),
        zorder=5,
    )


def _spread(kinds: list[Any]) -> list[Any]:
    """Return the first, the middle and the last, or all if there are no more."""
    if len(kinds) <= len(LINE_STYLES):
        return kinds
    return [kinds[0], kinds[len(kinds) // 2], kinds[-1]]


def number(value: float | None) -> str:
    """Return four digits, more for large whole numbers."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
