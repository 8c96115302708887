"""What the tables of a run report say of sites, rounds, labels and settings, as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.records.rounds import RoundRecord
from server.reports.run import formats
from server.reports.run.run_data import Arm, RunData
from shared.privacy.statement import without_uncovered
from shared.site_weights import SiteShare

MAX_MATRIX_LABELS = 12
MAX_LABEL_ROWS = 200
MAX_COMPOSED_ROWS = 12
_WEIGHING = ("weights", "largest_share")


def confusion(arm: Arm) -> dict[str, Any] | None:
    """What the counts of true and predicted labels say about each label, and the full table of few labels."""
    evaluation = arm.evaluation
    if evaluation is None or (evaluation.confusion is None and evaluation.confusion_cells is None):
        return None
    table = evaluation.confusion or ()
    cells = evaluation.confusion_cells or [
        [true, predicted, count] for true, row in enumerate(table) for predicted, count in enumerate(row) if count
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


def round_row(record: RoundRecord, metric: str, all_sites: Sequence[str]) -> dict[str, Any]:
    """One round in the table of rounds."""
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
        "doubted": [{"site": formats.printable(site), "reason": doubt} for site, doubt in record.doubted.items()],
        "bytes_up": record.bytes_up,
        "bytes_down": record.bytes_down,
        "seconds": record.seconds,
    }


def _measured(record: RoundRecord, metric: str) -> str:
    undefined = record.metrics.get(metric, 0.0) is None
    return "not defined" if undefined else formats.format_metric(metric, record.metrics.get(metric))


@dataclass(frozen=True, kw_only=True)
class SettingsSection:
    name: str
    rows: Sequence[tuple[str, str]]


def settings(arm: Arm) -> list[SettingsSection]:
    """Every setting of the job, known or not, but for those that its mechanism has no use for: of privacy, or sites' weights."""
    plain, sections = [], []
    summed = arm.job_privacy.get("mechanism") == "distributed"  # sums of sites are added as they are
    for name, value in arm.job.items():
        if name == "privacy" and not arm.private:
            sections.append(SettingsSection(name=name, rows=[("mechanism", "none")]))
        elif isinstance(value, Mapping):
            rows = [row for row in _flat(value) if not (name == "aggregation" and summed and row[0] in _WEIGHING)]
            sections.append(SettingsSection(name=name, rows=rows))
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


def share_cells(shares: Sequence[SiteShare]) -> dict[str, dict[str, str]]:
    """What each site counts in a round and what share of the noise it brings, by its name, as text."""
    return {
        share.site: {
            "weight": f"{100 * share.weight:.1f} %",
            "noise": f"{100 * share.noise:.1f} %",
            "far_above": "bad" if share.far_above else "",
        }
        for share in shares
    }


def site_metric_rows(data: RunData) -> list[dict[str, Any]]:
    """Every site metric with its margin."""
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


def site_statements(data: RunData) -> list[dict[str, Any]]:
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


def composed(data: RunData) -> list[Any]:
    """Epsilon by the number of sites that hold the same person; a long list is thinned, ends kept."""
    rows = sorted(data.statement.up_to_m_sites, key=lambda row: row.sites) if data.statement is not None else []
    if len(rows) <= MAX_COMPOSED_ROWS:
        return rows
    wanted = {1, 2, 3, 4, 5, 8, 10, 20, 50, 100, 200, 500, rows[0].sites, rows[-1].sites}
    return [row for row in rows if row.sites in wanted]


def total(rounds: Sequence[RoundRecord], key: str) -> int | None:
    """The sum of a number over the rounds that tell it; None if none does."""
    values = [value for record in rounds if (value := getattr(record, key)) is not None]
    return sum(values) if values else None
