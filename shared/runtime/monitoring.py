"""Shares of labels over time, and alerts when they differ from a baseline: counts only, no text is kept.

Formal guarantees (tests: tests/shared/runtime/test_monitoring.py)
    * *False alarms*: if texts are independent and their labels as likely as in the baseline, any `horizon` windows together raise
      a false alarm with probability at most `alpha`. Each label of each window is compared with the baseline by Fisher's exact
      test, two-sided, at level alpha / (horizon x labels): Bonferroni over windows and labels (Dunn 1961). That bound needs no
      independence of the tests, which all share one baseline; and an exact test (Fisher 1935) keeps its level however few texts
      there are. Of two labels one test is made, for the other one's share is the rest.
    * *Intervals*: each share has Wilson's score interval (Wilson 1927) at 95 %, one share at a time.
    * *Memory*: bounded however long the stream is: counts of open windows, and the last `MAX_WINDOWS` that are complete.

Texts that come in bunches (copies, one person writing ten) are not independent, and then alarms are more frequent than stated.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

from shared.errors import ConfigError, DataError, excerpt

MAX_WINDOWS = 2000
"""Complete windows that are kept; earlier ones stay in the totals."""
MAX_OPEN = 100_000
"""Windows of time that may be open at once."""
_MONDAY = 4 * 86_400
"""Seconds of the first Monday after 1970 began: weeks begin on one."""
MOST = 10**9
"""Of windows, and of texts in one."""
MOST_SECONDS = 1000 * 7 * 86_400
"""Of a window of time, 1,000 weeks: it ends in a year that a date can have, whenever its texts are from."""


@dataclass(frozen=True, kw_only=True)
class MonitorSettings:
    """What is compared with what.

    Attributes:
        labels: of the model, in the order of its outputs.
        window: texts of a window; without `every`.
        every: seconds of a window; None for windows of a number of texts.
        baseline_windows: so many windows at the start are the baseline.
        baseline_period: instead, the windows that begin from the first to before the second time, in seconds since 1970.
        alpha: chance of a false alarm in any `horizon` windows.
        horizon: see `alpha`.
        min_shift: a smaller change of a share is no alert, however sure it is.
        grace: a window of time is complete when a text is this many seconds later than its end; None waits for the end.
    """

    labels: tuple[str, ...]
    window: int = 500
    every: float | None = None
    baseline_windows: int = 1
    baseline_period: tuple[float, float] | None = None
    alpha: float = 0.05
    horizon: int = 100
    min_shift: float = 0.0
    grace: float | None = None

    def __post_init__(self) -> None:
        if self.window < 1 or self.baseline_windows < 1 or self.horizon < 1:
            raise ConfigError(
                f"--window {self.window}, --baseline-windows {self.baseline_windows} and --horizon {self.horizon} must be at "
                "least 1."
            )
        if (largest := max(self.window, self.baseline_windows, self.horizon)) > MOST:
            raise ConfigError(
                f"--window, --baseline-windows and --horizon go up to {MOST:,}; found {excerpt(largest)}."
            )
        if self.every is not None and not 1 <= self.every <= MOST_SECONDS:
            raise ConfigError(f"--every is {self.every:g} seconds; give one second or more, up to 1,000 weeks.")
        if not 0 < self.alpha < 1:
            raise ConfigError(f"--alpha is {self.alpha:g}; give a probability, such as 0.05.")
        if not 0 <= self.min_shift < 1:
            raise ConfigError(f"--min-shift is {self.min_shift:g}; give a difference of shares, such as 0.05.")
        if self.baseline_period is not None:
            if self.every is None:
                raise ConfigError("--baseline-period needs windows of time; add --every and --time.")
            if not self.baseline_period[0] < self.baseline_period[1]:
                raise ConfigError("--baseline-period ends before it begins; write FROM/TO.")

    @property
    def num_tests(self) -> int:
        """Tests for each window."""
        return 1 if len(self.labels) == 2 else len(self.labels)

    @property
    def level(self) -> float:
        """Level of one test."""
        return self.alpha / (self.horizon * self.num_tests)


class Shift(NamedTuple):
    """A label's share in a window against the baseline: what an alert says."""

    label: str
    share: float
    baseline: float
    p_value: float

    @property
    def change(self) -> float:
        """Difference of the shares."""
        return self.share - self.baseline


@dataclass(frozen=True, kw_only=True)
class Window:
    """A complete window.

    Attributes:
        number: from 1, in the order in which they were complete.
        begin, end: seconds since 1970, of a window of time; or of the earliest and latest text, where texts have times; or None.
        counts: texts by label.
        role: "baseline"; "tested"; or "before": it precedes the baseline and was not tested.
        partial: whether it was cut off by the end.
        p_values: of each label; () if not tested.
        alerts: what differs.
    """

    number: int
    begin: float | None
    end: float | None
    counts: tuple[int, ...]
    role: str
    partial: bool = False
    p_values: tuple[float, ...] = ()
    alerts: tuple[Shift, ...] = ()

    @property
    def texts(self) -> int:
        """Number of texts."""
        return sum(self.counts)

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of each label."""
        return tuple(count / self.texts for count in self.counts)


@dataclass
class _Open:
    counts: list[int]
    begin: float | None = None
    end: float | None = None


class Monitor:
    """Counts labels into windows and compares each with the baseline.

    Attributes:
        settings: as given.
        baseline: counts of the baseline.
        totals: counts of everything.
        windows: the last complete windows.
        num_windows, num_tested, num_alerts: of all, also of those no longer in `windows`.
        alerts_by_label: windows that raised one, for each label.
        late, ahead: texts that came after their window was complete, or are dated in the future; they are in `totals` only.
    """

    def __init__(
        self,
        settings: MonitorSettings,
        *,
        reference: Sequence[int] | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Start.

        Args:
            settings: what is compared.
            reference: counts of a baseline that is known before; then every window is tested.
            now: the clock. In a stream of windows of time, one text of a wrong year would else complete all windows.
        """
        self.settings = settings
        size = len(settings.labels)
        self.baseline = list(reference) if reference is not None else [0] * size
        self.totals = [0] * size
        self.windows: deque[Window] = deque(maxlen=MAX_WINDOWS)
        self.num_windows = self.num_tested = self.num_alerts = self.num_baseline = self.late = self.ahead = 0
        self.alerts_by_label = [0] * size
        self._given = reference is not None
        self._now = now
        self._open: dict[int, _Open] = {}
        self._latest = -math.inf
        self._closed = -math.inf  # windows of time up to this index are complete

    def add(self, labels: Sequence[int], times: Sequence[float | None]) -> list[Window]:
        """Count texts, and return the windows that they complete.

        Args:
            labels: predicted class of each text, in the order of the stream.
            times: of each; all there if windows are of time.
        """
        done: list[Window] = []
        for label, when in zip(labels, times, strict=True):
            self.totals[label] += 1
            if self.settings.every is None:
                done += self._add_by_number(label, when)
            elif when is not None:
                done += self._add_by_time(label, when, self.settings.every)
        return done

    def finish(self) -> list[Window]:
        """Return the windows that were open; the last one is partial.

        Raises:
            DataError: if there is no baseline.
        """
        rest = sorted(self._open)
        partial = self.settings.every is None or self.settings.grace is not None
        done = [self._complete(index, partial=partial and index == rest[-1]) for index in rest]
        if self.num_windows:
            self._require_baseline()
        return done

    def detectable_shift(self, texts: int) -> float:
        """Return the change of a share of 1/2 that a window of `texts` shows with probability 80 % (normal approximation)."""
        from scipy.stats import norm

        reference = sum(self.baseline)
        z = float(norm.isf(self.settings.level / 2) + norm.isf(0.2))
        return min(1.0, z * math.sqrt(0.25 / texts + 0.25 / reference)) if texts and reference else 1.0

    def _add_by_number(self, label: int, when: float | None) -> Iterator[Window]:
        window = self._open.setdefault(0, _Open([0] * len(self.totals)))
        window.counts[label] += 1
        if when is not None:
            window.begin = when if window.begin is None else min(window.begin, when)
            window.end = when if window.end is None else max(window.end, when)
        if sum(window.counts) == self.settings.window:
            yield self._complete(0)

    def _add_by_time(self, label: int, when: float, every: float) -> Iterator[Window]:
        index = math.floor((when - _MONDAY) / every)
        if index <= self._closed:
            self.late += 1
            return
        if self.settings.grace is not None and when > self._now() + every:
            self.ahead += 1
            return
        begin = _MONDAY + index * every
        self._open.setdefault(index, _Open([0] * len(self.totals), begin, begin + every)).counts[label] += 1
        if len(self._open) > MAX_OPEN:
            raise ConfigError(f"the texts span more than {MAX_OPEN:,} windows of --every; give longer ones.")
        if self.settings.grace is not None and when > self._latest:
            self._latest = when
            # Complete are the windows whose end lies `grace` before this text.
            last = math.floor((when - self.settings.grace - _MONDAY) / every) - 1
            for complete in sorted(i for i in self._open if i <= last):
                yield self._complete(complete)
            self._closed = max(self._closed, last)

    def _complete(self, index: int, *, partial: bool = False) -> Window:
        found = self._open.pop(index)
        self.num_windows += 1
        role = self._role(found)
        p_values: tuple[float, ...] = ()
        alerts: tuple[Shift, ...] = ()
        if role == "baseline":
            self.num_baseline += 1
            self.baseline = [a + b for a, b in zip(self.baseline, found.counts, strict=True)]
        elif role == "tested":
            self.num_tested += 1
            p_values = self._p_values(found.counts)
            alerts = self._alerts(found.counts, p_values)
            self.num_alerts += bool(alerts)
            for shift in alerts:
                self.alerts_by_label[self.settings.labels.index(shift.label)] += 1
        window = Window(
            number=self.num_windows,
            begin=found.begin,
            end=found.end,
            counts=tuple(found.counts),
            role=role,
            partial=partial,
            p_values=p_values,
            alerts=alerts,
        )
        self.windows.append(window)
        return window

    def _role(self, found: _Open) -> str:
        if self._given:
            return "tested"
        period = self.settings.baseline_period
        if period is None:
            return "baseline" if self.num_baseline < self.settings.baseline_windows else "tested"
        assert found.begin is not None  # noqa: S101 (windows of time)
        if found.begin < period[0]:
            return "before"
        if found.begin < period[1]:
            return "baseline"
        self._require_baseline()
        return "tested"

    def _require_baseline(self) -> None:
        if not sum(self.baseline):
            raise DataError(
                "no window begins in --baseline-period, so there is nothing to compare with; check its dates."
            )

    def _p_values(self, counts: Sequence[int]) -> tuple[float, ...]:
        total, reference = sum(counts), sum(self.baseline)
        pairs = list(zip(counts, self.baseline, strict=True))
        found = [fisher_p_value(a, total, b, reference) for a, b in pairs[: self.settings.num_tests]]
        return tuple(found * 2 if len(counts) == 2 else found)

    def _alerts(self, counts: Sequence[int], p_values: Sequence[float]) -> tuple[Shift, ...]:
        total, reference = sum(counts), sum(self.baseline)
        shifts = (
            Shift(label, count / total, base / reference, p)
            for label, count, base, p in zip(self.settings.labels, counts, self.baseline, p_values, strict=True)
        )
        return tuple(s for s in shifts if s.p_value <= self.settings.level and abs(s.change) >= self.settings.min_shift)


def fisher_p_value(count: int, total: int, reference_count: int, reference_total: int) -> float:
    """Return the two-sided p-value of Fisher's exact test that both shares are one and the same."""
    from scipy.stats import fisher_exact

    table = [[count, total - count], [reference_count, reference_total - reference_count]]
    return float(fisher_exact(table)[1])


def utc(seconds: float) -> str:
    """Return a time as ISO 8601 in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
