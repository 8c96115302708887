"""Thousands of labels cost as much as they have records, not their square: in files, in the report and in its figures."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.errors import ConfigError
from shared.job.job import Job
from shared.job.parsing import parse
from shared.limits import MAX_LABELS, MAX_TABLE_LABELS

NUM_LABELS = 5_000


def test_a_run_with_many_labels_stays_small(
    silotune: Callable[..., Any], scenario_file: Callable[..., Path], tmp_path: Path
) -> None:
    labels = [f"label {number}" for number in range(NUM_LABELS)]
    rows = [(f"a dull plot and nobody {number}", labels[number % 40 * 100]) for number in range(120)]
    path = scenario_file(rows=rows, task={"labels": labels}, training={"rounds": 2, "local_steps": 1})
    started = time.monotonic()
    outcome = silotune("simulate", path, "--out", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    assert silotune("report", tmp_path / "run", "--format", "html").status == 0
    assert time.monotonic() - started < 120
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluation["confusion"] is None
    assert sum(count for *_, count in evaluation["confusion_cells"]) == 12
    for name in ("evaluation.json", "report.html", "compliance-report.html", "metrics.jsonl"):
        assert (tmp_path / "run" / name).stat().st_size < 1_000_000, name
    page = (tmp_path / "run" / "report.html").read_text()
    assert "The 200 labels with the most test records of 5,000; evaluation.json has all." in page
    assert all(labels[true] in page for true, _, _ in evaluation["confusion_cells"])
    assert silotune("predict", tmp_path / "run", "a dull plot").status == 0


def test_absurd_numbers_of_labels_are_refused(classification_job: Callable[..., Job]) -> None:
    raw = classification_job().model_dump(mode="json")
    many = [str(number) for number in range(MAX_LABELS + 1)]
    with pytest.raises(ConfigError, match=r"task\.labels.*at most 10000 items"):
        parse(Job, raw | {"task": {**raw["task"], "labels": many}}, source="job")
    task = {**raw["task"], "labels": many[: MAX_TABLE_LABELS + 1]}
    with pytest.raises(ConfigError, match="a noisy count for each pair of 101 labels"):
        parse(Job, raw | {"task": task, "site_metrics": {"names": ["confusion"]}}, source="job")
