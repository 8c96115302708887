"""How the trainings of a run compare: the run itself, its baselines, seeds and folds, as rows of tables and as cards."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from server.reports.run import formats
from server.reports.run.run_data import Arm, RunData
from shared.intervals import may_be_chance, wilson

_ARM_TITLES = {
    "central-dp": "Central DP",
    "central": "Central, not private",
    "non-private": "Non-private",
    "non-private-all-layers": "Non-private, LoRA in all layers",
    "federated-non-private": "Federated, not private",
    "local-only": "Local only",
}


def title_of(arm: Arm) -> str:
    """How a training is called in a report."""
    if arm.name == "federated":
        if arm.central_sites is not None:
            return "Federated, central DP over sites"
        return "Federated DP" if arm.private else "Federated, not private"
    known = _ARM_TITLES.get(arm.name)
    return known or formats.printable(arm.name).replace("-", " ").replace("_", " ").strip().capitalize() or "Baseline"


def _num_right(metric: str, arm: Arm, num_records: int | None) -> int | None:
    """How many records the final model gets right; other metrics are not shares of counted records."""
    value = arm.final(metric)
    if metric != "accuracy" or value is None or not 0 <= value <= 1 or not num_records:
        return None
    return round(value * num_records)


def interval(metric: str, arm: Arm, num_records: int | None) -> str | None:
    """The 95 % interval of the final accuracy in words, where there is one."""
    right = _num_right(metric, arm, num_records)
    if right is None or not num_records:
        return None
    low, high = wilson(right, num_records)
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def _may_be_chance(data: RunData, arm: Arm) -> bool:
    """Whether the two shares of records do not differ by a test; other metrics have none, and nothing is said of them."""
    total = data.run.test_records
    own, theirs = (_num_right(data.primary_metric, one, total) for one in (data.federated, arm))
    return own is not None and theirs is not None and bool(total) and may_be_chance(own, theirs, total or 0)


def comparison_row(data: RunData, title: str, arm: Arm) -> dict[str, Any]:
    """One training beside the run itself."""
    metric = data.primary_metric
    own, theirs = data.federated.final(metric), arm.final(metric)
    gap = own - theirs if own is not None and theirs is not None else math.nan
    if not data.higher_is_better:
        gap = -gap
    verdict = "" if math.isnan(gap) or gap == 0 else ("better" if gap > 0 else "worse")
    return {
        "title": title,
        "diverged": arm.diverged,
        "title_in_text": title[:1].lower() + title[1:],
        "is_run": arm is data.federated,
        "private": arm.private,
        "value": _final_text(arm, metric),
        "interval": interval(metric, arm, data.run.test_records),
        "gap": formats.format_gap(metric, own, theirs),
        "verdict": verdict,
        "chance": bool(verdict) and _may_be_chance(data, arm),
        "epsilon": arm.epsilon,
        "void": arm.private and any(site.randomness == "injected" for site in arm.sites),
        "rounds_done": arm.rounds_done,
        "rounds_planned": arm.rounds_planned,
    }


def _final_text(arm: Arm, metric: str) -> str:
    return "not defined" if arm.undefined(metric) else formats.format_metric(metric, arm.final(metric))


def fitted(arm: Arm) -> bool:
    """Whether a temperature was fitted for this training."""
    found = arm.evaluation.calibration if arm.evaluation is not None else None
    return found is not None and found.fitted_on > 0


def calibration_rows(data: RunData) -> list[dict[str, str]]:
    """How sure each training is of its answers, before and after its temperature."""
    found = [(arm, arm.evaluation.calibration) for arm in data.arms if arm.evaluation and arm.evaluation.calibration]
    return [
        {
            "title": title_of(arm),
            "temperature": f"{record.temperature:.2f}" if fitted(arm) else "none fitted",
            "error_before": f"{100 * record.error_before:.1f} points",
            "error_after": f"{100 * record.error_after:.1f} points" if fitted(arm) else "–",
            "loss_before": formats.format_metric("loss", record.loss_before),
            "loss_after": formats.format_metric("loss", record.loss_after) if fitted(arm) else "–",
        }
        for arm, record in found
    ]


def threshold_rows(data: RunData) -> list[dict[str, str]]:
    """What thresholds did to each training that has them, on the reported records."""
    found = [(arm, arm.evaluation.thresholds) for arm in data.arms if arm.evaluation and arm.evaluation.thresholds]
    return [
        {
            "title": title_of(arm),
            "fitted_on": formats.format_number(record.fitted_on) if record.fitted_on else "none fitted",
            **{
                key: formats.format_metric(key.rpartition("_")[0], getattr(record, key))
                if record.fitted_on or key.endswith("before")
                else "–"
                for key in ("macro_f1_before", "macro_f1_after", "accuracy_before", "accuracy_after")
            },
        }
        for arm, record in found
    ]


def cards(data: RunData) -> list[dict[str, str]]:
    """What stands beside the run's own figure: its gap to each private baseline, and to the best training without privacy."""
    metric, cards = data.primary_metric, []
    for arm in data.baselines:
        if arm.private or arm.diverged:
            cards.append(_card(data, title_of(arm), arm))
    open_arms = [arm for arm in data.baselines if not arm.private and not arm.diverged]
    measured = [arm for arm in open_arms if arm.final(metric) is not None]
    if measured:
        sign = 1 if data.higher_is_better else -1
        best = max(measured, key=lambda arm: sign * (arm.final(metric) or 0.0))
        card = _card(data, title_of(best), best)
        several = len(measured) > 1
        cards.append(card | ({"title": "Gap to the best without privacy"} if several else {}))
        if several:
            cards[-1]["note"] += f" ({title_of(best)})"
    else:
        cards += [_card(data, title_of(arm), arm) for arm in open_arms]
    return cards


def _card(data: RunData, title: str, arm: Arm) -> dict[str, str]:
    row = comparison_row(data, title, arm)
    if arm.diverged:
        return {
            "title": title,
            "value": "Diverged",
            "note": f"no yardstick: {arm.diverged}",
            "kind": " key-words key-danger",
        }
    verdict = f"{row['verdict']} than" if row["verdict"] else "baseline:"
    kind = " key-words" if row["gap"] in (formats.NOT_EVALUATED, "not finite") else ""
    return {
        "title": f"Gap to {row['title_in_text']}",
        "value": str(row["gap"]),
        "note": f"{verdict} {row['value']}{'; may be chance' if row['chance'] else ''}",
        "kind": kind,
    }


def all_metrics(data: RunData) -> list[dict[str, Any]]:
    """Every metric of every training, the primary one first."""
    finals = [{} if arm.evaluation is None else arm.evaluation.metrics for arm in data.arms]
    names = list(dict.fromkeys([data.primary_metric, *(name for metrics in finals for name in metrics)]))
    return [
        {
            "title": formats.metric_title(name),
            "values": [_final_text(arm, name) for arm in data.arms],
        }
        for name in names
    ]


def repeat_rows(data: RunData) -> list[dict[str, Any]]:
    """Mean and spread of every arm over the seeds."""
    if data.repeats is None:
        return []
    metric, ensembles = data.primary_metric, data.repeats.ensembles
    arms = [name for name in (arm.name for arm in data.arms) if data.repeats.arms.get(name)]
    return [
        {
            **_spread_row(data, name, metric, data.repeats.arms[name]),
            "ensemble": formats.format_metric(metric, ensembles[name].metrics.get(metric))
            if name in ensembles
            else None,
            "ensemble_epsilon": ensembles[name].epsilon if name in ensembles else None,
        }
        for name in arms
    ]


def fold_rows(data: RunData) -> list[dict[str, Any]]:
    """Mean and spread over the folds of every metric, the primary one first, and every arm."""
    arms = data.folds.arms if data.folds is not None else {}
    metrics = dict.fromkeys([data.primary_metric, *(metric for found in arms.values() for metric in found)])
    return [
        {"metric": formats.metric_title(metric), **_spread_row(data, name, metric, values)}
        for metric in metrics
        for name in (arm.name for arm in data.arms)
        if (values := arms.get(name, {}).get(metric))
    ]


def _spread_row(data: RunData, name: str, metric: str, values: Sequence[float]) -> dict[str, Any]:
    titles = {"federated": title_of(data.federated), **{arm.name: title_of(arm) for arm in data.baselines}}
    return {
        "title": titles.get(name, formats.printable(name)),
        "mean": formats.format_metric(metric, statistics.mean(values)),
        "deviation": formats.format_spread(metric, statistics.stdev(values) if len(values) > 1 else 0.0),
        "lowest": formats.format_metric(metric, min(values)),
        "highest": formats.format_metric(metric, max(values)),
    }
