"""The figure of an audit: what was measured, and where claim, lower bound and ceiling lie. PNG.

Colours are Okabe and Ito's, which colour-blind eyes tell apart; marks and dashes differ as well.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from shared.epsilons import bound_rounded_down, delta_rounded_up, noise_rounded_down, rounded_up
from shared.files.atomic import write_bytes
from simulations.audit.lira import FALSE_POSITIVE_RATE, roc
from simulations.audit.one_run import Training
from simulations.audit.result import AuditResult

IN, OUT, CLAIM, BOUND, CEILING = "#D55E00", "#0072B2", "#000000", "#009E73", "#8A8A8A"
INK, GRID = "#222222", "#DDDDDD"


def write_figure(path: Path, result: AuditResult, trainings: Sequence[Training] = ()) -> None:
    """Write the figure of `result`; `trainings` holds the scores of tiers 2 and 3."""
    figure = Figure(figsize=(9.6, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    if result.tier == 1:
        _noise(left, result)
    elif result.tier == 2:
        _histogram(left, trainings)
    else:
        _roc(left, result, trainings)
    _epsilons(right, result)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    figure.suptitle(f"Audit tier {result.tier}: {result.verdict} at significance {result.alpha:g}", fontsize=12)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "silotune"})
    write_bytes(path, buffer.getvalue())


def _noise(axes: Any, result: AuditResult) -> None:
    p_values: dict[str, float] = dict(result.details["p_values"])
    names = list(p_values)[::-1]
    threshold = result.alpha / len(names)
    for row, name in enumerate(names):
        shown, failed = max(p_values[name], 1e-8), p_values[name] < threshold
        axes.plot([shown, 1], [row, row], color=GRID, linewidth=3, zorder=1, solid_capstyle="round")
        axes.plot(shown, row, "X" if failed else "o", color=IN if failed else OUT, markersize=9, zorder=2)
    axes.axvline(threshold, color=INK, linestyle="--", linewidth=1.2)
    axes.text(threshold, len(names) - 0.45, "fails left of here ", ha="right", va="bottom", fontsize=9, color=INK)
    axes.set_xscale("log")
    axes.set_xlim(5e-9, 2)
    axes.set_ylim(-0.6, len(names) + 0.1)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("p-value of each test (0 is drawn at 1e-8)", fontsize=9)
    low, high = result.details["noise_multiplier_in_effect"]
    claimed = result.details["noise_multiplier"]
    axes.set_title(
        f"noise multiplier {noise_rounded_down(claimed, 3)}, in effect {noise_rounded_down(low, 3)} to {rounded_up(high)}",
        fontsize=10,
        loc="left",
    )


def _histogram(axes: Any, trainings: Sequence[Training]) -> None:
    scores = np.concatenate([training.scores for training in trainings])
    included = np.concatenate([training.included for training in trainings])
    low, high = np.quantile(scores, [0.001, 0.999])
    edges = np.linspace(low, high if high > low else low + 1, 45)
    inside, outside = np.clip(scores[included], low, high), np.clip(scores[~included], low, high)
    axes.hist(outside, edges, histtype="step", color=OUT, linewidth=1.8, linestyle="--", label="canary was out")
    axes.hist(inside, edges, histtype="stepfilled", color=IN, alpha=0.35)
    axes.hist(inside, edges, histtype="step", color=IN, linewidth=1.8, label="canary was in")
    axes.set_xlabel("score of a canary (higher speaks for in)", fontsize=9)
    axes.set_ylabel("canaries", fontsize=9)
    axes.set_title(f"{len(scores):,} canaries in {len(trainings)} trainings", fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=9)


def _roc(axes: Any, result: AuditResult, trainings: Sequence[Training]) -> None:
    scores = np.concatenate([training.scores for training in trainings])
    included = np.concatenate([training.included for training in trainings])
    false, true = roc(scores, included)
    least = min(0.5 / max(int((~included).sum()), 1), FALSE_POSITIVE_RATE / 2)
    grid = np.geomspace(least, 1, 200)
    allowed = np.minimum(np.exp(min(result.claim, 50.0)) * grid + result.delta, 1.0)
    axes.plot(
        grid,
        allowed,
        color=CLAIM,
        linestyle="--",
        linewidth=1.4,
        label=f"claim allows (epsilon {rounded_up(result.claim, 2)})",
    )
    axes.plot(grid, grid, color=CEILING, linestyle=":", linewidth=1.4, label="guessing")
    axes.step(np.maximum(false, least), true, where="post", color=OUT, linewidth=1.8, label="attack")
    share = result.details["tpr_at_0.1%_fpr"]
    axes.axvline(FALSE_POSITIVE_RATE, color=INK, linewidth=0.8)
    axes.plot(
        FALSE_POSITIVE_RATE,
        max(share, least),
        "D",
        color=IN,
        markersize=7,
        clip_on=False,
        label=f"TPR {share:.2%} at 0.1 % FPR",
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(least, 1.1)
    axes.set_ylim(least, 1.3)
    axes.set_xlabel("false positive rate", fontsize=9)
    axes.set_ylabel("true positive rate", fontsize=9)
    axes.set_title(f"{len(scores):,} guesses about {len(trainings)} models", fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=8.5, loc="lower right")


def _epsilons(axes: Any, result: AuditResult) -> None:
    values = (
        ("CEILING", result.ceiling, CEILING, "v"),
        ("CLAIM", result.claim, CLAIM, "D"),
        ("LOWER BOUND", result.lower_bound, BOUND, "^"),
    )
    for row, (name, value, colour, marker) in enumerate(values):
        shown = rounded_up(value) if name == "CLAIM" else bound_rounded_down(value)
        axes.barh(row, value, height=0.32, color=colour, alpha=0.25)
        axes.plot(value, row, marker, color=colour, markersize=10, clip_on=False, zorder=3)
        axes.text(0.0, row + 0.26, f" {name}  {shown}", ha="left", va="bottom", fontsize=10, color=INK)
    # A ceiling far above the claim would squeeze the two figures that matter.
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=0)
    axes.set_ylim(-0.5, 2.75)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(f"epsilon at delta {delta_rounded_up(result.delta)} (linear to 1, then logarithmic)", fontsize=9)
    axes.set_title("an audit can refute a claim, not prove it", fontsize=10, loc="left")
