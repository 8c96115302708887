"""Turns a run folder into `report.html`.

Formal guarantees:
- Every text of the run folder is escaped; the page runs no script and loads nothing (test_report.py,
  `test_names_are_escaped`, `test_page_is_self_contained`).
- No epsilon is shown for a run that is not private, and none is shown as a guarantee where a site drew its
  randomness from a test generator (`test_not_private_shows_no_epsilon`, `test_injected_randomness_warns`).
- The file is there in full or not at all, and the same folder gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from server.reports.run import formats, plots
from server.reports.run.noise import arm_shares
from server.reports.run.run_data import Arm, RoundRecord, RunData, read_run, with_real_names
from shared.files.atomic import write_bytes
from shared.files.outputs import HTML_MARK, check_file
from shared.intervals import wilson
from shared.job.values import PERSON_UNITS
from shared.privacy.statement import without_uncovered
from shared.site_weights import SiteShare

REPORT_NAME = "report.html"
MAX_MATRIX_LABELS = 12
MAX_LABEL_ROWS = 200
MAX_COMPOSED_ROWS = 12
MAX_PRINTED_STATEMENTS = 12
_ARM_TITLES = {
    "central-dp": "Central DP",
    "central": "Central, not private",
    "non-private": "Non-private",
    "non-private-all-layers": "Non-private, LoRA in all layers",
    "federated-non-private": "Federated, not private",
    "local-only": "Local only",
}


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run folder and return its path.

    The run may still be going on; what is not there yet is shown as such.

    Raises:
        RunError: if a required file is missing or any file is malformed; an older report is left as it was.
    """
    data = with_real_names(read_run(run_dir))
    check_file(run_dir / REPORT_NAME, HTML_MARK, way_out="move it away")
    html = _environment().get_template(REPORT_NAME).render(view=_view(data))
    path = run_dir / REPORT_NAME
    write_bytes(path, html.encode("utf-8", errors="replace"))
    return path


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "epsilon": formats.format_epsilon,
        "bound": formats.format_bound,
        "budget": formats.format_budget,
        "delta": formats.format_delta,
        "number": formats.format_number,
        "rate": formats.format_rate,
        "noise": formats.format_noise,
        "bytes": formats.format_bytes,
        "seconds": formats.format_seconds,
        "time": formats.format_time,
        "recorded": lambda value: formats.NOT_RECORDED if value is None or value == "" else value,
        "names": formats.join_names,
        "name": formats.printable,
        "paragraphs": formats.paragraphs,
        "csp_hash": _csp_hash,
    }
    return environment


def _csp_hash(style: str) -> Markup:
    """The source expression under which a Content-Security-Policy admits exactly this style sheet."""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return Markup(f"'sha256-{digest}'")  # noqa: S704 - base64


def _view(data: RunData) -> dict[str, Any]:
    """Everything that the template shows, computed; the template holds words and order only."""
    run, federated, metric = data.run, data.federated, data.primary_metric
    titles = [_title(federated), *(_title(arm) for arm in data.baselines)]
    injected = [site.site for site in federated.sites if site.randomness == "injected"]
    rounds, shares = federated.rounds, arm_shares(federated)
    job_name = federated.job.get("name")
    return {
        "name": formats.printable(run.name or (job_name if isinstance(job_name, str) else "") or "Run without a name"),
        "run": run,
        "complete": data.complete,
        "private": federated.private,
        "void": federated.private and bool(injected),
        "injected": injected if federated.private else [],
        "over_budget": [site.site for site in federated.sites if federated.private and site.over_budget],
        "job_sha256_matches": data.job_sha256_matches,
        "metric": metric,
        "metric_title": formats.metric_title(metric),
        "higher_is_better": data.higher_is_better,
        "value": formats.format_metric(metric, federated.final(metric)),
        "interval": _interval(metric, federated, run.test_records),
        "comparison": [_comparison_row(data, title, arm) for title, arm in zip(titles, _arms(data), strict=True)],
        "cards": _cards(data),
        "repeats": _repeat_rows(data),
        "folds": _fold_rows(data),
        "num_folds": data.folds.folds if data.folds else 0,
        "seeds": data.repeats.seeds if data.repeats else (),
        "ensembles": bool(data.repeats and data.repeats.ensembles),
        "epsilon": federated.epsilon,
        "budget": _budget(federated),
        "delta": _delta(federated),
        "same_delta": len({site.delta for site in federated.sites}) == 1,
        "unit": _unit(federated),
        "declared": _declared(federated),
        "rounds_done": federated.rounds_done,
        "rounds_planned": federated.rounds_planned,
        "stopped_early": data.stopped_early,
        "early_stopping": federated.early_stopping,
        "decided_by": "Loss"
        if (federated.early_stopping or {}).get("metric") == "loss"
        else formats.metric_title(metric),
        "kept_round": federated.kept_round,
        "central": federated.central_sites is not None,
        "num_sites": federated.central_sites or len(data.site_names),
        "num_failures": sum(len(record.failed) for record in rounds),
        "bytes_up": _total(rounds, "bytes_up"),
        "bytes_down": _total(rounds, "bytes_down"),
        "bytes_up_each": _bytes_up_each(rounds),
        "statement": data.statement,
        "statement_text": without_uncovered(data.statement.text, data.statement.not_covered) if data.statement else "",
        "composed": _composed(data),
        "audits": data.audits,
        "site_metrics": _site_metric_rows(data),
        "figures": _figures(data, titles),
        "evaluation": federated.evaluation,
        "calibration": _calibration_rows(data),
        "fitted": [_title(arm) for arm in _arms(data) if _fitted(arm)],
        "confusion": _confusion(federated),
        "all_metrics": _all_metrics(data),
        "metrics_note": federated.evaluation.note if federated.evaluation is not None else None,
        "max_matrix_labels": MAX_MATRIX_LABELS,
        "max_label_rows": MAX_LABEL_ROWS,
        "max_printed_statements": MAX_PRINTED_STATEMENTS,
        "sites": sorted(federated.sites, key=lambda site: formats.natural_key(site.site)),
        "statements": _site_statements(data),
        "all_from_os": all(site.randomness == "os" for site in federated.sites),
        "shares": _share_cells(shares),
        "loud_sites": [share.site for share in shares if share.far_above],
        "rounds": [_round_row(record, metric, data.site_names) for record in rounds],
        "show_loss": metric != "loss" and any(record.metric("loss") is not None for record in rounds),
        "settings": _settings(federated),
        "adapter": data.adapter,
    }


def _site_statements(data: RunData) -> list[dict[str, Any]]:
    """What every site says itself; what none of the statements covers is listed once, with the run's."""
    listed = data.statement.not_covered if data.statement is not None else ()
    return [
        {
            "site": site.site,
            "void": site.randomness == "injected",
            "text": without_uncovered(site.statement, listed),
        }
        for site in sorted(data.federated.sites, key=lambda site: formats.natural_key(site.site))
        if site.statement
    ]


def _share_cells(shares: Sequence[SiteShare]) -> dict[str, dict[str, str]]:
    """What each site counts in a round and what share of the noise it brings, by its name, as text."""
    return {
        share.site: {
            "weight": f"{100 * share.weight:.1f} %",
            "noise": f"{100 * share.noise:.1f} %",
            "far_above": "bad" if share.far_above else "",
        }
        for share in shares
    }


def _site_metric_rows(data: RunData) -> list[dict[str, Any]]:
    if data.site_metrics is None:
        return []
    return [
        {
            "title": formats.metric_title(found.metric),
            "value": "not defined" if found.value is None else formats.format_metric(found.metric, found.value),
            "margin": None
            if found.standard_error is None
            else formats.format_metric(found.metric, 1.96 * found.standard_error),
            "sites": found.sites,
        }
        for found in data.site_metrics.estimates
    ]


def _arms(data: RunData) -> tuple[Arm, ...]:
    return (data.federated, *data.baselines)


def _title(arm: Arm) -> str:
    if arm.name == "federated":
        if arm.central_sites is not None:
            return "Federated, central DP over sites"
        return "Federated DP" if arm.private else "Federated, not private"
    known = _ARM_TITLES.get(arm.name)
    return known or formats.printable(arm.name).replace("-", " ").replace("_", " ").strip().capitalize() or "Baseline"


def _budget(arm: Arm) -> float | None:
    """The budget that the job asked for; without one, the largest of the sites' own."""
    wanted = _job_privacy(arm).get("epsilon")
    if isinstance(wanted, int | float) and not isinstance(wanted, bool):
        return float(wanted)
    return max((site.epsilon_budget for site in arm.sites if site.epsilon_budget is not None), default=None)


def _delta(arm: Arm) -> float | None:
    """The largest delta of any site; before there is one, the job's."""
    deltas = [site.delta for site in arm.sites if site.delta is not None]
    wanted = _job_privacy(arm).get("delta")
    if not deltas and isinstance(wanted, float):
        deltas = [wanted]
    return max(deltas, default=None)


def _declared(arm: Arm) -> str:
    """What sites declare a number of."""
    unit = _unit(arm)
    return f"{unit}s" if unit in PERSON_UNITS else "records"


def _unit(arm: Arm) -> str | None:
    """The unit of privacy; every one, where sites differ."""
    units = sorted({site.unit for site in arm.sites if site.unit is not None})
    wanted = _job_privacy(arm).get("unit")
    return ", ".join(units) or (wanted if isinstance(wanted, str) else None)


def _job_privacy(arm: Arm) -> Mapping[str, Any]:
    privacy: Mapping[str, Any] = arm.job["privacy"]
    return privacy


def _total(rounds: Sequence[RoundRecord], key: str) -> int | None:
    values = [value for record in rounds if (value := getattr(record, key)) is not None]
    return sum(values) if values else None


def _bytes_up_each(rounds: Sequence[RoundRecord]) -> float | None:
    """The mean bytes of one update; None where it is not told which sites answered."""
    told = [record for record in rounds if record.bytes_up and record.sites]
    if not told:
        return None
    return sum(record.bytes_up or 0 for record in told) / sum(len(record.sites) for record in told)


def _bounds(metric: str, arm: Arm, num_records: int | None) -> tuple[float, float] | None:
    """The 95 % interval of the final accuracy; other metrics are not shares of counted records."""
    value = arm.final(metric)
    if metric != "accuracy" or value is None or not 0 <= value <= 1 or not num_records:
        return None
    return wilson(round(value * num_records), num_records)


def _interval(metric: str, arm: Arm, num_records: int | None) -> str | None:
    bounds = _bounds(metric, arm, num_records)
    return None if bounds is None else f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f} %"


def _may_be_chance(data: RunData, arm: Arm, gap: float) -> bool:
    """Whether the gap is smaller than one of the two intervals is wide, where there are intervals."""
    arms = (data.federated, arm)
    found = [_bounds(data.primary_metric, one, data.run.test_records) for one in arms]
    return any(bounds is not None and abs(gap) < bounds[1] - bounds[0] for bounds in found)


def _comparison_row(data: RunData, title: str, arm: Arm) -> dict[str, Any]:
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
        "interval": _interval(metric, arm, data.run.test_records),
        "gap": formats.format_gap(metric, own, theirs),
        "verdict": verdict,
        "chance": bool(verdict) and _may_be_chance(data, arm, gap),
        "epsilon": arm.epsilon,
        "void": arm.private and any(site.randomness == "injected" for site in arm.sites),
        "rounds_done": arm.rounds_done,
        "rounds_planned": arm.rounds_planned,
    }


def _final_text(arm: Arm, metric: str) -> str:
    return "not defined" if arm.undefined(metric) else formats.format_metric(metric, arm.final(metric))


def _fitted(arm: Arm) -> bool:
    """Whether a temperature was fitted for this training."""
    found = arm.evaluation.calibration if arm.evaluation is not None else None
    return found is not None and found.fitted_on > 0


def _calibration_rows(data: RunData) -> list[dict[str, str]]:
    """How sure each training is of its answers, before and after its temperature."""
    found = [(arm, arm.evaluation.calibration) for arm in _arms(data) if arm.evaluation and arm.evaluation.calibration]
    return [
        {
            "title": _title(arm),
            "temperature": f"{record.temperature:.2f}" if _fitted(arm) else "none fitted",
            "error_before": f"{100 * record.error_before:.1f} points",
            "error_after": f"{100 * record.error_after:.1f} points" if _fitted(arm) else "–",
            "loss_before": formats.format_metric("loss", record.loss_before),
            "loss_after": formats.format_metric("loss", record.loss_after) if _fitted(arm) else "–",
        }
        for arm, record in found
    ]


def _cards(data: RunData) -> list[dict[str, str]]:
    """What stands beside the run's own figure: its gap to each private baseline, and to the best training without privacy."""
    metric, cards = data.primary_metric, []
    for arm in data.baselines:
        if arm.private or arm.diverged:
            cards.append(_card(data, _title(arm), arm))
    open_arms = [arm for arm in data.baselines if not arm.private and not arm.diverged]
    measured = [arm for arm in open_arms if arm.final(metric) is not None]
    if measured:
        sign = 1 if data.higher_is_better else -1
        best = max(measured, key=lambda arm: sign * (arm.final(metric) or 0.0))
        card = _card(data, _title(best), best)
        several = len(measured) > 1
        cards.append(card | ({"title": "Gap to the best without privacy"} if several else {}))
        if several:
            cards[-1]["note"] += f" ({_title(best)})"
    else:
        cards += [_card(data, _title(arm), arm) for arm in open_arms]
    return cards


def _card(data: RunData, title: str, arm: Arm) -> dict[str, str]:
    row = _comparison_row(data, title, arm)
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


def _all_metrics(data: RunData) -> list[dict[str, Any]]:
    """Every metric of every training, the primary one first."""
    finals = [{} if arm.evaluation is None else arm.evaluation.metrics for arm in _arms(data)]
    names = list(dict.fromkeys([data.primary_metric, *(name for metrics in finals for name in metrics)]))
    return [
        {
            "title": formats.metric_title(name),
            "values": [_final_text(arm, name) for arm in _arms(data)],
        }
        for name in names
    ]


def _repeat_rows(data: RunData) -> list[dict[str, Any]]:
    """Mean and spread of every arm over the seeds."""
    if data.repeats is None:
        return []
    metric, ensembles = data.primary_metric, data.repeats.ensembles
    arms = [name for name in (arm.name for arm in _arms(data)) if data.repeats.arms.get(name)]
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


def _fold_rows(data: RunData) -> list[dict[str, Any]]:
    """Mean and spread over the folds of every metric, the primary one first, and every arm."""
    arms = data.folds.arms if data.folds is not None else {}
    metrics = dict.fromkeys([data.primary_metric, *(metric for found in arms.values() for metric in found)])
    return [
        {"metric": formats.metric_title(metric), **_spread_row(data, name, metric, values)}
        for metric in metrics
        for name in (arm.name for arm in _arms(data))
        if (values := arms.get(name, {}).get(metric))
    ]


def _spread_row(data: RunData, name: str, metric: str, values: Sequence[float]) -> dict[str, Any]:
    titles = {"federated": _title(data.federated), **{arm.name: _title(arm) for arm in data.baselines}}
    return {
        "title": titles.get(name, formats.printable(name)),
        "mean": formats.format_metric(metric, statistics.mean(values)),
        "deviation": formats.format_spread(metric, statistics.stdev(values) if len(values) > 1 else 0.0),
        "lowest": formats.format_metric(metric, min(values)),
        "highest": formats.format_metric(metric, max(values)),
    }


def _composed(data: RunData) -> list[Any]:
    """Epsilon by the number of sites that hold the same person; a long list is thinned, ends kept."""
    rows = sorted(data.statement.up_to_m_sites, key=lambda row: row.sites) if data.statement is not None else []
    if len(rows) <= MAX_COMPOSED_ROWS:
        return rows
    wanted = {1, 2, 3, 4, 5, 8, 10, 20, 50, 100, 200, 500, rows[0].sites, rows[-1].sites}
    return [row for row in rows if row.sites in wanted]


def _figures(data: RunData, titles: Sequence[str]) -> dict[str, Any]:
    """All figures that have something to show, each with a description in words."""
    federated, metric = data.federated, data.primary_metric
    figures: dict[str, Any] = dict.fromkeys(("rounds", "spent", "roc", "reliability", "pairs", "shares", "traffic")) | {
        "sites": []
    }
    name = formats.metric_title(metric)
    finals = "; ".join(
        f"{title} {formats.format_metric(metric, arm.final(metric))}"
        for title, arm in zip(titles, _arms(data), strict=True)
    )
    if any(record.metric(metric) is not None for record in federated.rounds):
        figures["rounds"] = plots.metric_by_round(
            metric=metric,
            federated=federated,
            baselines=data.baselines,
            titles=titles,
            alt=f"Line plot of {name} against the round. Final values: {finals}.",
        )
    if federated.private and any(record.epsilon_max is not None for record in federated.rounds):
        spent = "Epsilon spent, unit site" if federated.central_sites else "Epsilon spent, largest of all sites"
        figures["spent"] = plots.metric_by_epsilon(
            metric=metric,
            titles=titles,
            arms=_arms(data),
            budget=_budget(federated),
            label=spent,
            alt=f"Line plot of {name} against epsilon spent. {spent.replace(' spent', '')}, so far: "
            f"{formats.format_epsilon(federated.epsilon)}, "
            f"budget {formats.format_budget(_budget(federated))}.",
        )
    if (evaluation := federated.evaluation) is not None:
        if evaluation.roc is not None and evaluation.labels is not None:
            figures["roc"] = plots.roc_curve(
                evaluation.roc,
                positive=evaluation.labels[-1],
                alt=f"ROC curve. {formats.metric_title('auc')} {formats.format_metric('auc', federated.final('auc'))}.",
            )
        if (found := evaluation.calibration) is not None:
            figures["reliability"] = plots.reliability(
                found.bins_before,
                found.bins_after if found.fitted_on else None,
                alt="Reliability diagram: how often answers are right against how sure the model is of them. Expected "
                f"calibration error {found.error_before:.1%}"
                + (f" before, {found.error_after:.1%} after the temperature." if found.fitted_on else "."),
            )
        if evaluation.pairs is not None:
            figures["pairs"] = plots.true_and_predicted(
                evaluation.pairs,
                alt=f"Scatter plot of {len(evaluation.pairs):,} predicted numbers against the true ones.",
            )
    if federated.private:
        figures["sites"] = [
            plots.site_spend(page, prefix=f"sites{number}", alt=_site_alt(page))
            for number, page in enumerate(plots.site_pages(federated.sites))
        ]
    if shares := arm_shares(federated):
        figures["shares"] = plots.noise_shares(shares, units=_declared(federated), alt=_shares_alt(shares))
    measured = [r for r in federated.rounds if r.bytes_up is not None or r.bytes_down is not None]
    if measured:
        up, down = (formats.format_bytes(_total(measured, key)) for key in ("bytes_up", "bytes_down"))
        figures["traffic"] = plots.traffic(
            measured,
            alt=f"Bar plot of bytes in every round. In total {up} from the sites and {down} to the sites.",
        )
    return figures


def _site_alt(sites: Sequence[Any]) -> str:
    names = f"{sites[0].site} to {sites[-1].site}" if len(sites) > 1 else sites[0].site
    shown = formats.printable(names)
    return f"Bar plot of epsilon spent against the budget, {shown}. Every value is in the table below."


def _shares_alt(shares: Sequence[SiteShare]) -> str:
    loudest = max(shares, key=lambda share: share.noise)
    return (
        "Bar plot of each site's share of the declared records and of the noise. The largest share of the noise, "
        f"{loudest.noise:.1%}, comes from {formats.printable(loudest.site)} with {loudest.records:.1%} of the records."
    )


def _confusion(arm: Arm) -> dict[str, Any] | None:
    """What the counts of true and predicted labels say about each label, and the full table of few labels."""
    evaluation = arm.evaluation
    if evaluation is None or (evaluation.confusion is None and evaluation.confusion_cells is None):
        return None
    table = evaluation.confusion or ()
    cells = evaluation.confusion_cells or [
        (true, predicted, count) for true, row in enumerate(table) for predicted, count in enumerate(row) if count
    ]
    labels = evaluation.labels or tuple(str(index) for index in range(len(table)))
    by_row: dict[int, dict[int, int]] = {}
    columns: Counter[int] = Counter()
    for true, predicted, count in cells:
        by_row.setdefault(true, {})[predicted] = count
        columns[predicted] += count
    order: Sequence[int] = range(len(labels))
    if len(labels) > MAX_LABEL_ROWS:  # those with the most records, in the labels' own order
        most = sorted(order, key=lambda index: (-sum(by_row.get(index, {}).values()), -columns[index], index))
        order = sorted(most[:MAX_LABEL_ROWS])
    rows = [_label_row(index, by_row.get(index, {}), columns[index], labels) for index in order]
    if len(labels) <= MAX_MATRIX_LABELS:
        for index, row in zip(order, rows, strict=True):
            row["cells"] = _matrix_row([by_row.get(index, {}).get(other, 0) for other in range(len(labels))])
    return {"labels": labels, "rows": rows}


def _label_row(index: int, counts: Mapping[int, int], column: int, labels: Sequence[str]) -> dict[str, Any]:
    """What one row of the table, the sum of the label's column and the names say about label number `index`."""
    total, right = sum(counts.values()), counts.get(index, 0)
    others = sorted((-count, labels[other]) for other, count in counts.items() if other != index and count)
    return {
        "label": labels[index],
        "total": total,
        "recall": f"{100 * right / total:.1f} %" if total else "no records",
        "precision": f"{100 * right / column:.1f} %" if column else "never predicted",
        "f1": f"{200 * right / (total + column):.1f} %" if total + column else "no records",
        "mistaken": f"{others[0][1]} ({-others[0][0]:,})" if others else "none",
    }


def _matrix_row(counts: Sequence[int]) -> list[dict[str, Any]]:
    total = sum(counts)
    shares = [count / total if total else 0.0 for count in counts]
    return [
        {"count": count, "percent": f"{100 * share:.0f} %", "shade": round(share * 9)}
        for count, share in zip(counts, shares, strict=True)
    ]


def _round_row(record: RoundRecord, metric: str, all_sites: Sequence[str]) -> dict[str, Any]:
    everyone = len(record.sites) > 1 and set(record.sites) == set(all_sites)
    reasons: dict[str, list[str]] = {}
    for site, reason in record.failed.items():
        reasons.setdefault(reason or "no reason recorded", []).append(formats.printable(site))
    return {
        "round": record.round,
        "value": _measured(record, metric),
        "loss": _measured(record, "loss"),
        "epsilon": record.epsilon_max,
        "num_replied": len(record.sites),
        "replied": "all" if everyone else formats.join_names(map(formats.printable, record.sites)),
        "failed": [{"sites": formats.join_names(sites), "reason": reason} for reason, sites in reasons.items()],
        "bytes_up": record.bytes_up,
        "bytes_down": record.bytes_down,
        "seconds": record.seconds,
    }


def _measured(record: RoundRecord, metric: str) -> str:
    undefined = record.metrics.get(metric, 0.0) is None
    return "not defined" if undefined else formats.format_metric(metric, record.metric(metric))


@dataclass(frozen=True, kw_only=True)
class SettingsSection:
    name: str
    rows: Sequence[tuple[str, str]]


def _settings(arm: Arm) -> list[SettingsSection]:
    """Every setting of the job, known or not; privacy settings only where a mechanism uses them."""
    plain, sections = [], []
    for name, value in arm.job.items():
        if name == "privacy" and not arm.private:
            sections.append(SettingsSection(name=name, rows=[("mechanism", "none")]))
        elif isinstance(value, Mapping):
            sections.append(SettingsSection(name=name, rows=list(_flat(value))))
        else:
            plain.append((name, _setting(value)))
    return ([SettingsSection(name="job", rows=plain)] if plain else []) + sections


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            rows.extend(_flat(value, f"{prefix}{key}."))
        else:
            rows.append((prefix + key, _setting(value)))
    return rows


def _setting(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(_setting(item) for item in value) or "empty"
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value)
