"""The drift window: the monitor's own test over what is answered, as numbers in /metrics."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.registry import promotion
from server.registry.references import require_version
from server.registry.registry import Registry
from server.serving import following as following_module
from server.serving.models import Model
from server.serving.monitoring.drift import Drift, DriftPlan
from shared.errors import ConfigError, RunError
from shared.runtime.monitoring import MonitorSettings, fisher_p_value
from tests.server.registry.keys import OFFICER
from tests.server.serving.live import Live, live
from tests.server.serving.test_following import wait

N = 60


@pytest.fixture
def counted(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    monkeypatch.setattr(following_module, "LOOK_SECONDS", 0.05)
    with live("films", registry.path, drift=DriftPlan(N)) as found:
        yield found


def numbers(found: Live) -> dict[str, float]:
    """Return what /metrics says of drift."""
    text = found.ask("GET", "/metrics").text
    return {name: float(value) for name, value in re.findall(r"^silotune_(drift\S*) (\S+)$", text, re.MULTILINE)}


def ask(found: Live, texts: list[str]) -> list[str]:
    return [one["label"] for one in found.post("/v1/predict", {"texts": texts}).json()["predictions"]]


def give(drift: Drift, model: Model, labels: list[int]) -> None:
    names = model.task.config.labels
    drift.add(model, model, [{"label": names[label]} for label in labels])


def told(drift: Drift) -> dict[tuple[str, str], float]:
    return {
        (sample.name.removeprefix("silotune_drift_"), sample.labels.get("label", "")): sample.value
        for family in drift.families()
        for sample in family.samples
    }


def test_what_is_answered_is_counted(counted: Live) -> None:
    labels = ask(counted, [f"a film number {i}" for i in range(N)])
    names = counted.service.following.model.task.config.labels
    found = numbers(counted)
    assert (found["drift_window_texts"], found["drift_baseline_texts"], found["drift_alert"]) == (N, N, 0)
    for place, name in enumerate(names):
        assert found[f'drift_baseline_share{{label="{place}"}}'] == labels.count(name) / N
    counted.post("/v1/predict", {"pairs": [["a", "b"]]})
    ask(counted, ["a dull plot"] * N)
    assert numbers(counted)["drift_windows_total"] == 1
    assert all(name not in counted.ask("GET", "/metrics").text for name in names), "labels by their places"


def test_it_is_off_by_default(films: Live) -> None:
    assert numbers(films) == {}


@pytest.mark.parametrize(("then", "alert"), [(20, False), (30, False), (55, True)])
def test_an_alert_is_that_of_the_monitor(counted: Live, then: int, alert: bool) -> None:
    model = counted.service.following.model
    drift = Drift(DriftPlan(N), model)
    give(drift, model, [0] * 24 + [1] * (N - 24))
    give(drift, model, [0] * then + [1] * (N - then))
    level = MonitorSettings(labels=model.task.config.labels).level
    assert (2 * fisher_p_value(then, N, 24, N) <= level) == alert
    found = told(drift)
    assert (found["alert", ""], found["windows_total", ""]) == (alert, 1)
    assert (found["share", "0"], found["baseline_share", "0"]) == (then / N, 24 / N)
    give(drift, model, [0] * 24 + [1] * (N - 24))
    assert (told(drift)["alert", ""], told(drift)["windows_with_alerts_total", ""]) == (False, alert)


def test_another_version_has_its_own_baseline(counted: Live, registry: Registry) -> None:
    ask(counted, ["a quiet film"] * (2 * N))
    assert numbers(counted)["drift_windows_total"] == 1
    before = counted.service.following.model
    promotion.promote(registry, require_version(registry, "films:1"), "champion", OFFICER)
    wait(registry, counted.service.following, "films:1")
    ask(counted, ["a dull plot"] * 10)
    assert (numbers(counted)["drift_windows_total"], numbers(counted)["drift_baseline_texts"]) == (0, 0)
    service = counted.service
    assert service.drift is not None
    service.drift.add(service.following.model, before, [{"label": before.task.config.labels[0]}] * N)
    assert numbers(counted)["drift_baseline_texts"] == 0, "what the old one still answered"
    ask(counted, ["a dull plot"] * (N - 10))
    assert numbers(counted)["drift_baseline_texts"] == N


def test_only_counts_are_kept(counted: Live) -> None:
    ask(counted, ["Zebrafink-4711"] * N)
    drift = counted.service.drift
    assert drift is not None
    assert "Zebrafink" not in repr(vars(drift)) + repr(vars(drift._monitor))


def baseline(path: Path, labels: Any) -> str:
    path.write_text(json.dumps({"baseline": {"labels": labels}}))
    return str(path)


def test_a_baseline_of_monitor(counted: Live, tmp_path: Path) -> None:
    model = counted.service.following.model
    first, second = model.task.config.labels
    path = baseline(tmp_path / "monitor.json", {second: {"count": 400}, first: {"count": 100}})
    drift = Drift(DriftPlan(N, path), model)
    give(drift, model, [0] * N)
    assert (told(drift)["baseline_share", "0"], told(drift)["alert", ""]) == (0.2, True)
    for labels in ({first: {"count": 1}}, {first: {"count": 1.5}, second: {"count": 1}}, [], {first: 1, second: 2}):
        with pytest.raises(ConfigError):
            Drift(DriftPlan(N, baseline(tmp_path / "wrong.json", labels)), model)
    with pytest.raises(RunError):
        Drift(DriftPlan(N, str(tmp_path / "none.json")), model)
    with pytest.raises(ConfigError, match="50 texts or more"):
        DriftPlan(49)


def test_texts_that_get_no_single_label_are_refused(writer: Live) -> None:
    with pytest.raises(ConfigError, match="counts the labels of texts and images"):
        Drift(DriftPlan(N), writer.service.following.model)
