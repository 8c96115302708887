"""Whether labels drift: counts of what is predicted, by windows of texts, against a baseline, by the test of `silotune monitor`.

Guarantees (tests: tests/server/serving/test_drift.py)
    * Labels are counted and nothing else is kept: no text, no order, no token (test_only_counts_are_kept).
    * The tests of a window, a millisecond and more for each label, hold up nobody else's answer.
    * Another version begins with a baseline of its own; what an older one still answers is not counted
      (test_another_version_has_its_own_baseline).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.core import Metric

from server.serving.models import Model
from shared.errors import ConfigError
from shared.files.json_files import read_object
from shared.job.kinds import TaskKind
from shared.runtime.monitoring import Monitor, MonitorSettings, Window
from shared.service.metrics import counter, gauge
from shared.tasks.base import Prediction

AUTO = "auto"
LEAST_TEXTS = 50
"""Of a window: the shares of fewer would tell too much of single texts."""
_KINDS: tuple[TaskKind, ...] = ("sequence_classification", "image_classification")


@dataclass(frozen=True)
class DriftPlan:
    """What is compared with what.

    Attributes:
        window: texts of a window.
        baseline: `auto`: a version's first window; else a file monitor.json of `silotune monitor`, for the version with which
            the service begins.
    """

    window: int
    baseline: str = AUTO

    def __post_init__(self) -> None:
        if self.window < LEAST_TEXTS:
            raise ConfigError(f"--drift-window is {self.window}; give {LEAST_TEXTS} texts or more.")


class Drift:
    """Counts the labels of one version at a time.

    Raises:
        ConfigError: if the model does not give each text one label of several, or the file is no baseline of its labels.
    """

    def __init__(self, plan: DriftPlan, model: Model) -> None:
        import scipy.stats  # noqa: F401 (takes seconds, which a request would wait)

        if model.kind not in _KINDS:
            raise ConfigError(
                f"--drift-window counts the labels of texts and images; the model's task is {model.kind}. Leave it out."
            )
        reference = None if plan.baseline == AUTO else _counts(Path(plan.baseline), _labels(model))
        self._plan, self._model = plan, model
        self._last: Window | None = None
        self._begin(model, reference)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="drift")

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    async def count(self, current: Model, model: Model, answers: Sequence[Prediction]) -> None:
        """Do what `add` does, in the thread of this."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self.add, current, model, answers)

    def add(self, current: Model, model: Model, answers: Sequence[Prediction]) -> None:
        """Count what was answered.

        Args:
            current: the model that answers now.
            model: the one that gave these answers.
        """
        if model is not current:
            return
        if model is not self._model:
            self._begin(model, None)
        for window in self._monitor.add([self._places[one["label"]] for one in answers], [None] * len(answers)):
            self._last = window

    def families(self) -> Iterable[Metric]:
        """Yield what /metrics says; labels by their places among those of the model, for names can be private."""
        monitor, last = self._monitor, self._last
        yield gauge("drift_window_texts", "Texts of a window.", [({}, self._plan.window)])
        yield gauge("drift_baseline_texts", "Texts of the baseline of this version.", [({}, sum(monitor.baseline))])
        yield gauge("drift_alert", "1: labels of the last window differ from the baseline.", [({}, self._alerts(last))])
        yield counter("drift_windows", "Windows of this version that were compared.", monitor.num_tested)
        yield counter("drift_windows_with_alerts", "Of them, those that differ.", monitor.num_alerts)
        text = "Share of a label, by its place, in the baseline."
        yield gauge("drift_baseline_share", text, _shares(monitor.baseline))
        text = "Share of a label, by its place, in the last window."
        yield gauge("drift_share", text, [] if last is None else _shares(last.counts))

    @staticmethod
    def _alerts(last: Window | None) -> bool:
        return last is not None and bool(last.alerts)

    def _begin(self, model: Model, reference: list[int] | None) -> None:
        labels = _labels(model)
        self._model = model
        self._last = None
        self._places = {label: place for place, label in enumerate(labels)}
        self._monitor = Monitor(MonitorSettings(labels=labels, window=self._plan.window), reference=reference)


def _labels(model: Model) -> tuple[str, ...]:
    labels: tuple[str, ...] = model.task.config.labels
    return labels


def _shares(counts: Sequence[int]) -> list[tuple[Mapping[str, str], float]]:
    total = sum(counts)
    return [({"label": str(place)}, count / total) for place, count in enumerate(counts)] if total else []


def _counts(path: Path, labels: Sequence[str]) -> list[int]:
    """Return the counts of a baseline in the order of the labels."""
    found = read_object(path).get("baseline")
    table = found.get("labels") if isinstance(found, dict) else None
    if not isinstance(table, dict) or set(table) != set(labels):
        raise ConfigError(
            f"{path} holds no baseline of this model's labels; expected monitor.json, as silotune monitor --out writes it for "
            "texts that this version labelled."
        )
    counts = [row.get("count") if isinstance(row, dict) else None for row in (table[label] for label in labels)]
    whole = [count for count in counts if isinstance(count, int) and not isinstance(count, bool) and count >= 0]
    if len(whole) != len(counts) or not sum(whole):
        raise ConfigError(f"{path} has no whole counts in its baseline; write it anew: silotune monitor --out FOLDER")
    return whole
