"""What `silotune monitor` says: events for scripts, tables for people, and what monitor.json holds. Counts, never texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from shared.data.text_stream import Skipped, left_out
from shared.intervals import wilson
from shared.runtime.monitoring import MAX_WINDOWS, Monitor, Window, utc

if TYPE_CHECKING:
    from rich.table import Table

    from shared.tools.monitor.quantification import AdjustedCount

FORMAT = "silotune-monitor/1"
METHOD = (
    "each label's share in a window against the baseline: Fisher's exact test, two-sided, at alpha / (horizon x labels) "
    "(Bonferroni); intervals: Wilson, 95 %"
)
LIMITS = (
    "Nothing here is differentially private: shares and counts of private texts are private. Keep them where the texts are.",
    "A share of predictions is not a share of true labels: it moves with the model's errors.",
    "Texts that come in bunches are not independent; false alarms are then more frequent than stated.",
)
ADJUSTED_LIMIT = (
    "Adjusted shares (Forman 2008) hold if the model errs within each label as it did on the run's evaluation records."
)
MOST_ROWS, MOST_LABELS, MOST_PLACES = 40, 4, 5


def window_event(window: Window, labels: Sequence[str], adjust: AdjustedCount | None) -> dict[str, Any]:
    """Return one window as it stands in monitor.json and in a line of `--json`."""
    found = share_table(labels, window.counts, adjust)
    for label, p_value in zip(labels, window.p_values, strict=bool(window.p_values)):
        found[label]["p_value"] = p_value
    return {
        "event": "window",
        "number": window.number,
        "begin": None if window.begin is None else utc(window.begin),
        "end": None if window.end is None else utc(window.end),
        "texts": window.texts,
        "role": window.role,
        "partial": window.partial,
        "labels": found,
        "alerts": [shift.label for shift in window.alerts],
    }


def alert_events(window: Window) -> list[dict[str, Any]]:
    """Return a line of `--json` for each alert of a window."""
    begin = None if window.begin is None else utc(window.begin)
    return [
        {"event": "alert", "window": window.number, "begin": begin, "change": shift.change, **shift._asdict()}
        for shift in window.alerts
    ]


def share_table(
    labels: Sequence[str], counts: Sequence[int], adjust: AdjustedCount | None
) -> dict[str, dict[str, Any]]:
    """Return count, share, interval and adjusted share of each label; {} if nothing was counted."""
    total = sum(counts)
    if not total:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for label, count in zip(labels, counts, strict=True):
        low, high = wilson(count, total)
        found[label] = {"count": count, "share": count / total, "low": low, "high": high}
    if adjust is not None:
        for label, adjusted in zip(labels, adjust(counts), strict=True):
            found[label]["adjusted"] = adjusted._asdict()
    return found


def summary(
    monitor: Monitor, skipped: Skipped, adjust: AdjustedCount | None, *, stopped: bool, warnings: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the summary, the last line of `--json`; `warnings` are of the texts as a whole, known at the end."""
    settings = monitor.settings
    return {
        "event": "summary",
        "stopped": stopped,
        "texts": sum(monitor.totals),
        "windows": monitor.num_windows,
        "windows_tested": monitor.num_tested,
        "windows_with_alerts": monitor.num_alerts,
        "alerts_by_label": dict(zip(settings.labels, monitor.alerts_by_label, strict=True)),
        "baseline": {"texts": sum(monitor.baseline), "labels": share_table(settings.labels, monitor.baseline, adjust)},
        "all": share_table(settings.labels, monitor.totals, adjust),
        "test": {"method": METHOD, "level": settings.level, "false_alarm_bound": false_alarm_bound(monitor)},
        "skipped": dict(skipped.counts),
        "skipped_places": dict(skipped.places),
        "late": monitor.late,
        "ahead": monitor.ahead,
        "warnings": list(warnings),
    }


def document(
    monitor: Monitor,
    skipped: Skipped,
    adjust: AdjustedCount | None,
    *,
    run: dict[str, Any],
    windows: Sequence[dict[str, Any]],
    stopped: bool,
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the content of monitor.json; `windows` are the events of the windows that are kept."""
    content = summary(monitor, skipped, adjust, stopped=stopped, warnings=warnings)
    del content["event"]
    return {
        "format": FORMAT,
        "run": run,
        "settings": asdict(monitor.settings),
        "limits": [*LIMITS, *([] if adjust is None else [ADJUSTED_LIMIT])],
        **content,
        "windows_kept": list(windows),
    }


def false_alarm_bound(monitor: Monitor) -> float:
    """Return the bound on the chance of any false alarm in the windows that were tested so far."""
    return min(1.0, monitor.settings.alpha * monitor.num_tested / monitor.settings.horizon)


def shown_labels(monitor: Monitor, most: int) -> list[int]:
    """Return the labels for which there is room: those with alerts first, then the most frequent; in the model's order."""
    ranked = sorted(range(len(monitor.totals)), key=lambda i: (-monitor.alerts_by_label[i], -monitor.totals[i], i))
    return sorted(ranked[:most])


def window_line(window: Window, labels: Sequence[str], shown: Sequence[int]) -> str:
    """Return a complete window as one line, for whoever watches."""
    begin = "" if window.begin is None else f"  {_minute(window.begin)}"
    shares = "  ".join(f"{labels[i]} {100 * window.shares[i]:.1f} %" for i in shown)
    alerts = "; ".join(f"{s.label} {_points(s.change)} (p {s.p_value:.1g})" for s in window.alerts)
    end = f"  ALERT: {alerts}" if alerts else "" if window.role == "tested" else f"  ({window.role})"
    return f"window {window.number}{begin}  {window.texts:,} texts  {shares}{end}"


def window_table(monitor: Monitor) -> Table:
    """Return the last windows as a table."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    labels, shown = monitor.settings.labels, shown_labels(monitor, MOST_LABELS)
    windows = list(monitor.windows)[-MOST_ROWS:]
    dated = any(window.begin is not None for window in windows)
    earlier = monitor.num_windows - len(windows)
    title = "share of each label, 95 % interval" + (
        f"; the last {len(windows)} of {monitor.num_windows:,} windows" if earlier else ""
    )
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("window", justify="right")
    if dated:
        table.add_column("from (UTC)", no_wrap=True)
    table.add_column("texts", justify="right")
    for index in shown:
        table.add_column(escape(labels[index]), justify="right")
    table.add_column("")
    for window in windows:
        cells = [str(window.number)]
        if dated:
            cells.append("" if window.begin is None else _minute(window.begin))
        cells.append(f"{window.texts:,}" + (" (cut off)" if window.partial else ""))
        cells += [_share(window.counts[index], window.texts) for index in shown]
        alerts = ", ".join(escape(f"{shift.label} {_points(shift.change)}") for shift in window.alerts)
        cells.append(f"ALERT {alerts}" if alerts else "" if window.role == "tested" else window.role)
        table.add_row(*cells, style="bold red" if alerts else "dim" if window.role != "tested" else None)
    if len(labels) > len(shown):
        table.caption = f"{len(labels) - len(shown)} further labels: --json or --out."
    return table


def label_table(monitor: Monitor, adjust: AdjustedCount | None) -> Table:
    """Return baseline and last window of each label as a table, adjusted ones beside the predicted."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    last = monitor.windows[-1]
    table = Table(title="baseline and last window", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("label")
    for heading in ("baseline", "adjusted", "last window", "adjusted", "alerts"):
        if heading != "adjusted" or adjust is not None:
            table.add_column(heading, justify="right")
    before = None if adjust is None else adjust(monitor.baseline)
    after = None if adjust is None else adjust(last.counts)
    total = sum(monitor.baseline)
    for index, label in enumerate(monitor.settings.labels):
        cells = [escape(label), _share(monitor.baseline[index], total)]
        if before is not None:
            cells.append(_interval(*before[index]))
        cells.append(_share(last.counts[index], last.texts))
        if after is not None:
            cells.append(_interval(*after[index]))
        table.add_row(*cells, f"{monitor.alerts_by_label[index]:,} of {monitor.num_tested:,}")
    return table


def notes(monitor: Monitor, skipped: Skipped, adjust: AdjustedCount | None, ignored: int) -> list[str]:
    """Return what a reader of the tables must know."""
    settings = monitor.settings
    lines = [
        f"{sum(monitor.totals):,} texts, {monitor.num_windows:,} windows, {monitor.num_tested:,} tested, "
        f"{monitor.num_alerts:,} with an alert. By chance alone any alert has probability {false_alarm_bound(monitor):.2g} at "
        f"most (Fisher's exact test at {settings.level:.2g} each: {settings.alpha:g} for {settings.horizon} windows, Bonferroni)."
    ]
    tested = [window.texts for window in monitor.windows if window.role == "tested"]
    if tested:
        middle = sorted(tested)[len(tested) // 2]
        lines.append(
            f"A window of {middle:,} texts shows a change by {100 * monitor.detectable_shift(middle):.0f} points or more with "
            "probability 80 % (of a share of one half; of rarer labels, smaller ones)."
        )
    lines.append(ADJUSTED_LIMIT if adjust is not None else "Shares are not adjusted for the model's errors.")
    lines.append(LIMITS[0])
    lines += [f"{line}." for line in left_out(skipped, MOST_PLACES)]
    if monitor.late:
        lines.append(f"{monitor.late:,} texts came after their window was complete and are in no window.")
    if monitor.ahead:
        lines.append(f"{monitor.ahead:,} texts are dated in the future and are in no window.")
    if ignored:
        lines.append(f"{ignored:,} files with other endings were passed over.")
    if monitor.num_windows > MAX_WINDOWS:
        lines.append(f"Only the last {MAX_WINDOWS:,} windows are kept.")
    return lines


def _share(count: int, total: int) -> str:
    return _interval(count / total, *wilson(count, total))


def _interval(share: float, low: float, high: float) -> str:
    return f"{100 * share:.1f} % ({100 * low:.1f}–{100 * high:.1f})"


def _points(change: float) -> str:
    return f"{100 * change:+.1f} points".replace("-", "−")


def _minute(seconds: float) -> str:
    return utc(seconds)[:16].replace("T", " ")
