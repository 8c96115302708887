"""Windows, intervals and alerts: false alarms as seldom as stated, real shifts found as often as stated, memory bounded."""

from __future__ import annotations

import itertools
import math
import random
import warnings
from typing import Any

import numpy as np
import pytest

from shared.data.text_stream import EARLIEST, LATEST
from shared.errors import ConfigError, DataError
from shared.intervals import wilson
from shared.runtime.monitoring import (
    MAX_WINDOWS,
    MOST_SECONDS,
    Monitor,
    MonitorSettings,
    Window,
    fisher_p_value,
    utc,
)
from shared.tools.monitor.figure import draw_monitor
from shared.tools.monitor.report import window_line

DAY = 86_400.0
MONDAY = 4 * DAY  # 1970-01-05


def settings(**changes: Any) -> MonitorSettings:
    return MonitorSettings(**({"labels": ("bad", "good"), "window": 4} | changes))


def run(monitor: Monitor, labels: list[int], times: list[float] | None = None) -> list[Window]:
    return monitor.add(labels, times or [None] * len(labels)) + monitor.finish()  # type: ignore[arg-type]


def stream(generator: np.random.Generator, shares: list[float], size: int, windows: int) -> list[int]:
    return generator.choice(len(shares), p=shares, size=size * windows).tolist()  # type: ignore[no-any-return]


# --- statistics ---


@pytest.mark.parametrize(("count", "total"), [(0, 10), (10, 10), (3, 10), (41, 500), (1, 1)])
def test_wilson_solves_the_score_equation(count: int, total: int) -> None:
    z = 1.959963984540054
    for bound in wilson(count, total):
        score = (count / total - bound) ** 2 * total
        assert score == pytest.approx(z * z * bound * (1 - bound), abs=1e-9)
        assert 0 <= bound <= 1


def test_wilson_s_interval_of_a_known_example() -> None:
    assert wilson(7, 20) == pytest.approx((0.1812, 0.5671), abs=1e-4)


@pytest.mark.parametrize("total", [1, 2, 3, 7, 10, 29, 100, 12_345])
def test_an_interval_at_none_and_at_all_reaches_exactly_to_the_end(total: int) -> None:
    assert wilson(0, total)[0] == 0.0
    assert wilson(total, total)[1] == 1.0
    assert all(wilson(n, total)[0] <= n / total <= wilson(n, total)[1] for n in range(0, total + 1, max(1, total // 7)))


def test_fisher_against_the_sum_over_all_tables() -> None:
    for a, n, b, m in itertools.product(range(6), [5], range(0, 9, 2), [8]):
        margin, ways = a + b, math.comb(n + m, a + b)
        chance = {k: math.comb(n, k) * math.comb(m, margin - k) / ways for k in range(n + 1) if 0 <= margin - k <= m}
        expected = sum(p for p in chance.values() if p <= chance[a] * (1 + 1e-7))
        assert fisher_p_value(a, n, b, m) == pytest.approx(expected)


@pytest.mark.parametrize(("shares", "size"), [([0.5, 0.5], 50), ([0.9, 0.1], 80), ([0.6, 0.3, 0.1], 40)])
def test_false_alarms_are_as_seldom_as_stated(shares: list[float], size: int) -> None:
    """120 streams without a shift: at most 20 % alarm. The same without Bonferroni would be caught."""
    names = tuple(f"label-{i}" for i in range(len(shares)))
    alarms, uncorrected = 0, 0
    for seed in range(120):
        generator = np.random.default_rng(seed)
        monitor = Monitor(settings(labels=names, window=size, alpha=0.2, horizon=12))
        windows = run(monitor, stream(generator, shares, size, 13))
        assert monitor.num_tested == 12
        alarms += monitor.num_alerts > 0
        uncorrected += any(p <= 0.2 for window in windows for p in window.p_values)
    # Four standard errors above 20 %.
    most = 120 * 0.2 + 4 * math.sqrt(120 * 0.2 * 0.8)
    assert alarms <= most
    assert uncorrected > most


def test_the_detectable_shift_is_detected() -> None:
    found = 0
    for seed in range(300):
        generator = np.random.default_rng(1000 + seed)
        monitor = Monitor(settings(window=400, horizon=20), reference=[600, 600])
        shift = monitor.detectable_shift(400)
        found += bool(run(monitor, stream(generator, [0.5 - shift, 0.5 + shift], 400, 1))[0].alerts)
    # 80 % by the normal approximation; an exact test finds somewhat less, and shares off one half vary less.
    assert 0.70 * 300 <= found <= 0.92 * 300
    assert 0.1 < shift < 0.15


def test_a_large_shift_is_found_at_once_and_named() -> None:
    generator = np.random.default_rng(0)
    labels = ("billing", "delivery", "other")
    monitor = Monitor(settings(labels=labels, window=300))
    calm, storm = [0.3, 0.3, 0.4], [0.3, 0.6, 0.1]
    windows = run(monitor, stream(generator, calm, 300, 4) + stream(generator, storm, 300, 2))
    assert [bool(w.alerts) for w in windows] == [False] * 4 + [True] * 2
    assert {shift.label for shift in windows[4].alerts} == {"delivery", "other"}
    assert windows[4].alerts[0].change == pytest.approx(0.3, abs=0.12)
    assert monitor.alerts_by_label == [0, 2, 2]
    assert (monitor.num_alerts, monitor.num_tested) == (2, 5)


def test_a_shift_smaller_than_min_shift_is_no_alert() -> None:
    labels = [0] * 5000 + [1] * 5000
    shifted = [0] * 4500 + [1] * 5500
    for least, alerts in ((0.0, 1), (0.049, 1), (0.051, 0)):
        monitor = Monitor(settings(window=10_000, min_shift=least))
        run(monitor, labels + shifted)
        assert monitor.num_alerts == alerts


# --- windows ---


def test_windows_by_number() -> None:
    monitor = Monitor(settings(baseline_windows=2))
    first = monitor.add([0, 0, 1], [None] * 3)
    assert first == []
    done = monitor.add([1, 1, 1, 1, 1, 0], [None] * 6)
    assert [(w.number, w.counts, w.role, w.partial) for w in done] == [
        (1, (2, 2), "baseline", False),
        (2, (0, 4), "baseline", False),
    ]
    (last,) = monitor.finish()
    assert (last.counts, last.role, last.partial) == ((1, 0), "tested", True)
    assert monitor.baseline == [2, 6]
    assert monitor.totals == [3, 6]
    assert last.p_values[0] == last.p_values[1] == fisher_p_value(1, 1, 2, 8)


def test_windows_of_time_do_not_depend_on_the_order() -> None:
    times = [MONDAY + DAY * day + 600 * i for day in (0, 1, 2, 9) for i in range(20)]
    labels = [i % 2 for i in range(80)]
    expected = run(Monitor(settings(every=7 * DAY)), labels, times)
    assert [(w.begin, w.end, w.texts) for w in expected] == [
        (MONDAY, MONDAY + 7 * DAY, 60),
        (MONDAY + 7 * DAY, MONDAY + 14 * DAY, 20),
    ], "weeks begin on Monday"
    order = random.Random(0).sample(range(80), 80)
    assert run(Monitor(settings(every=7 * DAY)), [labels[i] for i in order], [times[i] for i in order]) == expected


def test_a_stream_of_time_completes_windows_late_texts_stay_out() -> None:
    monitor = Monitor(settings(every=DAY, grace=DAY), now=lambda: MONDAY + 10 * DAY)
    assert monitor.add([0, 1, 0], [MONDAY + 1, MONDAY + DAY + 5, MONDAY + 2 * DAY - 1]) == []
    assert monitor.add([0], [MONDAY + 2]) == [], "one day late is in time"
    (done,) = monitor.add([1], [MONDAY + 2 * DAY])
    assert (done.begin, done.counts) == (MONDAY, (2, 0))
    assert monitor.add([1], [MONDAY + 3]) == []
    assert monitor.late == 1
    assert monitor.add([1], [MONDAY + 5000 * DAY]) == [], "a wrong year must not complete all windows"
    assert monitor.ahead == 1
    rest = monitor.finish()
    assert [w.counts for w in rest] == [(1, 1), (0, 1)]
    assert [w.partial for w in rest] == [False, True]
    assert sum(monitor.totals) == 7


def test_a_period_as_baseline() -> None:
    times = [MONDAY + DAY * (i // 10) + i for i in range(60)]
    monitor = Monitor(settings(every=DAY, baseline_period=(MONDAY + DAY, MONDAY + 3 * DAY)))
    windows = run(monitor, [i % 2 for i in range(60)], times)
    assert [w.role for w in windows] == ["before", "baseline", "baseline", "tested", "tested", "tested"]
    assert monitor.baseline == [10, 10]
    missed = settings(every=DAY, baseline_period=(MONDAY + 90 * DAY, MONDAY + 91 * DAY))
    for period in (missed, settings(every=DAY, baseline_period=(0.0, 1.0))):
        with pytest.raises(DataError, match="--baseline-period"):
            run(Monitor(period), [0, 1], [MONDAY, MONDAY + DAY])


def test_a_known_baseline_tests_every_window() -> None:
    monitor = Monitor(settings(), reference=[50, 50])
    windows = run(monitor, [0] * 8)
    assert [w.role for w in windows] == ["tested", "tested"]
    assert monitor.baseline == [50, 50]


def test_memory_is_bounded_in_an_endless_stream() -> None:
    by_number = Monitor(settings(window=2))
    by_time = Monitor(settings(every=60.0, grace=60.0), now=lambda: math.inf)
    count = MAX_WINDOWS + 500
    for i in range(count):
        by_number.add([0, 1], [None, None])
        by_time.add([i % 2], [60.0 * i])
        assert len(by_time._open) <= 3
        assert len(by_number._open) <= 1
    for monitor in (by_number, by_time):
        monitor.finish()
        assert len(monitor.windows) == MAX_WINDOWS
        assert monitor.num_windows == count
        assert monitor.num_tested == count - 1


@pytest.mark.parametrize("every", [1.0, MOST_SECONDS])
def test_windows_at_both_ends_of_the_calendar_are_told_and_drawn(every: float) -> None:
    monitor = Monitor(settings(every=every))
    run(monitor, [0, 1], [EARLIEST, LATEST - 1])
    lines = [window_line(window, monitor.settings.labels, (0, 1)) for window in monitor.windows]
    assert len(lines) == 2
    assert (utc(monitor.windows[0].begin or 0) < "1001", utc(monitor.windows[1].end or 0) >= "9000") == (True, True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert draw_monitor(monitor, (1,), name="ends", adjust=None).startswith(b"\x89PNG")


def test_too_many_windows_at_once_are_refused() -> None:
    monitor = Monitor(settings(every=1.0))
    with pytest.raises(ConfigError, match="give longer ones"):
        monitor.add([0] * 100_001, [float(i) for i in range(100_001)])


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"window": 0}, "at least 1"),
        ({"baseline_windows": 0}, "at least 1"),
        ({"horizon": 0}, "at least 1"),
        ({"every": 0.0}, "--every"),
        ({"every": MOST_SECONDS + 1.0}, "up to 1,000 weeks"),
        ({"every": math.nan}, "--every"),
        ({"alpha": 0.0}, "--alpha"),
        ({"alpha": 1.0}, "--alpha"),
        ({"min_shift": 1.0}, "--min-shift"),
        ({"baseline_period": (0.0, 1.0)}, "--every"),
        ({"baseline_period": (1.0, 1.0), "every": 5.0}, "ends before it begins"),
    ],
)
def test_bad_settings_are_refused(wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        settings(**wrong)
