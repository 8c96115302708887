"""Turns a run folder into `report.html`.

Formal guarantees:
- Every text of the run folder is escaped; the page runs no script and loads nothing (test_report.py,
  `test_names_are_escaped`, `test_page_is_self_contained`).
- No epsilon is shown for a run that is not private, and none is shown as a guarantee where a site drew its
  randomness from a test generator (`test_not_private_shows_no_epsilon`, `test_injected_randomness_warns`).
- The file is there in full or not at all, and the same folder gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from server.records.rounds import RoundRecord
from server.reports.run import formats
from server.reports.run.comparison import (
    all_metrics,
    calibration_rows,
    cards,
    comparison_row,
    fitted,
    fold_rows,
    interval,
    repeat_rows,
    threshold_rows,
    title_of,
)
from server.reports.run.noise import arm_shares, of_shares
from server.reports.run.promises import alone_in_job, promise_beside
from server.reports.run.reading import read_run
from server.reports.run.run_data import RunData, with_real_names, without_names
from server.reports.run.tables import (
    MAX_LABEL_ROWS,
    MAX_MATRIX_LABELS,
    composed,
    confusion,
    round_row,
    settings,
    share_cells,
    site_metric_rows,
    site_statements,
    total,
)
from server.reports.run.trivial import never_answered, trivial
from shared.files.atomic import write_bytes
from shared.files.outputs import HTML_MARK, check_file
from shared.pages import render_page
from shared.privacy.statement import without_uncovered

REPORT_NAME = "report.html"
_TEMPLATE = Path(__file__).with_name("report.html")
_FILTERS: dict[str, Callable[..., Any]] = {
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
    "energy": formats.format_energy,
    "money": formats.format_money,
    "recorded": lambda value: formats.NOT_RECORDED if value is None or value == "" else value,
    "names": formats.join_names,
    "name": formats.printable,
    "paragraphs": formats.paragraphs,
}
MAX_PRINTED_STATEMENTS = 12


def write_report(run_dir: Path, out: Path | None = None, *, named: bool = True) -> Path:
    """Write a run's report to `out`, by default `report.html` in its folder, and return where it is.

    The run may still be going on; what is not there yet is shown as such.

    Args:
        named: False numbers the sites, for readers elsewhere; see `without_names`.

    Raises:
        RunError: if a required file is missing or any file is malformed; an older report is left as it was.
    """
    data = (with_real_names if named else without_names)(read_run(run_dir))
    path = out or run_dir / REPORT_NAME
    check_file(path, HTML_MARK, way_out="move it away")
    write_bytes(path, render_page(_TEMPLATE, filters=_FILTERS, data=data, arm=data.federated, view=_view(data)))
    return path


def _view(data: RunData) -> dict[str, Any]:
    """What the template shows beside the run and its federated arm, computed; it holds words and order only."""
    from server.reports.run.figures import figures  # matplotlib is slow to import, and a report comes last

    arm, job_name = data.federated, data.federated.job.get("name")
    titles = [title_of(one) for one in data.arms]
    return {
        "name": formats.printable(
            data.run.name or (job_name if isinstance(job_name, str) else "") or "Run without a name"
        ),
        "figures": figures(data, titles),
        "settings": settings(arm),
        "max_matrix_labels": MAX_MATRIX_LABELS,
        "max_label_rows": MAX_LABEL_ROWS,
        "max_printed_statements": MAX_PRINTED_STATEMENTS,
        **_quality(data, titles),
        **_privacy(data),
        **_rounds(data),
    }


def _quality(data: RunData, titles: Sequence[str]) -> dict[str, Any]:
    """How good the model is, beside the baselines."""
    arm, metric, repeats = data.federated, data.primary_metric, data.repeats
    return {
        "metric_title": formats.metric_title(metric),
        "value": formats.format_metric(metric, arm.final(metric)),
        "interval": interval(metric, arm, data.run.test_records),
        "comparison": [comparison_row(data, title, one) for title, one in zip(titles, data.arms, strict=True)],
        "trivial": _trivial(data, titles),
        "never_answered": [
            (title, said)
            for title, one in zip(titles, data.arms, strict=True)
            if (said := never_answered(one.evaluation)) is not None
        ],
        "cards": cards(data),
        "repeats": repeat_rows(data),
        "folds": fold_rows(data),
        "ensembles": bool(repeats and repeats.ensembles),
        "site_metrics": site_metric_rows(data),
        "calibration": calibration_rows(data),
        "thresholds": threshold_rows(data),
        "fitted": [title_of(one) for one in data.arms if fitted(one)],
        "confusion": confusion(arm),
        "all_metrics": all_metrics(data),
    }


def _trivial(data: RunData, titles: Sequence[str]) -> dict[str, Any] | None:
    """What one answer to every record reaches, and the trainings that are no better; None where it is not known."""
    found = trivial(data.federated.evaluation)
    if found is None:
        return None
    each = [(title, arm, trivial(arm.evaluation)) for title, arm in zip(titles, data.arms, strict=True)]
    return {
        "title": found.title,
        "value": formats.format_metric(found.metric, found.value),
        "no_better": [
            {
                "title": title,
                "warning": one.warning,
                "value": formats.format_metric(found.metric, arm.final(found.metric)),
            }
            for title, arm, one in each
            if one is not None and one.warning
        ],
    }


def _privacy(data: RunData) -> dict[str, Any]:
    """What is promised, and what each site spent."""
    arm, statement, shares = data.federated, data.statement, arm_shares(data.federated)
    injected = [site.site for site in arm.sites if arm.private and site.randomness == "injected"]
    return {
        "void": bool(injected),
        "injected": injected,
        "over_budget": [site.site for site in arm.sites if arm.private and site.over_budget],
        "same_delta": len({site.delta for site in arm.sites}) == 1,
        "central": arm.central_sites is not None,
        "summed": of_shares(arm),
        "fewer_than_planned": any(
            site.epsilon_planned is not None and (site.steps_executed or 0) < site.steps_planned for site in arm.sites
        ),
        "beside": promise_beside(arm),
        "alone_in_job": alone_in_job(arm),
        "num_sites": arm.central_sites or len(data.site_names),
        "statement_text": without_uncovered(statement.text, statement.not_covered) if statement else "",
        "composed": composed(data),
        "sites": sorted(arm.sites, key=lambda site: formats.natural_key(site.site)),
        "statements": site_statements(data),
        "all_from_os": all(site.randomness == "os" for site in arm.sites),
        "shares": share_cells(shares),
        "loud_sites": [share.site for share in shares if share.far_above],
    }


def _rounds(data: RunData) -> dict[str, Any]:
    """What happened round by round."""
    arm, metric, rounds = data.federated, data.primary_metric, data.federated.rounds
    by_loss = (arm.early_stopping or {}).get("metric") == "loss"
    return {
        "decided_by": "Loss" if by_loss else formats.metric_title(metric),
        "num_failures": sum(len(record.failed) for record in rounds),
        "doubted_sites": sorted({site for record in rounds for site in record.doubted}, key=formats.natural_key),
        "bytes_up": total(rounds, "bytes_up"),
        "bytes_down": total(rounds, "bytes_down"),
        "bytes_up_each": _bytes_up_each(rounds),
        "rounds": [round_row(record, metric, data.site_names) for record in rounds],
        "show_loss": metric != "loss" and any(record.metrics.get("loss") is not None for record in rounds),
    }


def _bytes_up_each(rounds: Sequence[RoundRecord]) -> float | None:
    """The mean bytes of one update; None where it is not told which sites answered."""
    told = [record for record in rounds if record.bytes_up and record.sites]
    if not told:
        return None
    return sum(record.bytes_up or 0 for record in told) / sum(len(record.sites) for record in told)
