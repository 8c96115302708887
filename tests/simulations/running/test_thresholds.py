"""Thresholds from the scenario to whoever uses the model: evaluation, report, predictions, exports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cli import main
from server.records.results import read_evaluation
from shared.runtime.export.exporting import export
from shared.runtime.export.folder import ModelFolder
from shared.runtime.inference import load_model, load_tuned, predict
from simulations.scenario import load_scenario
from tests.conftest import LINES


def rows(count: int) -> list[tuple[str, str]]:
    """One text in four is good, and its words say so only at times."""
    found = []
    for number in range(count):
        good = number % 4 == 0
        words = LINES[2 if good and number % 3 else number % 6]
        found.append(
            (f"{words} {' '.join('abcdefghij'[int(digit)] for digit in str(number))}", "good" if good else "bad")
        )
    return found


def test_a_run_hands_out_a_model_that_answers_by_its_thresholds(
    scenario_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = {"text": "review", "label": "verdict"}
    path = scenario_file(
        rows=rows(400),
        data={"train": {"path": "train.csv", "columns": columns}, "num_test": 250, "kind": "public"},
        task={"thresholds": "public"},
        training={"rounds": 1},
        compute={"precision": "float32"},  # that of exports
        partition={"num_sites": 2},
    )
    folder = tmp_path / "run"
    with pytest.raises(SystemExit) as ended:
        main(["simulate", str(path), "--out", str(folder), "--json"])
    assert ended.value.code == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    record = read_evaluation(folder / "evaluation.json")
    found = record.thresholds
    assert found is not None
    parts = json.loads((folder / "run.json").read_text())["public_records"]
    assert (found.fitted_on, found.reported_on) == (parts["deciding"], parts["reported"])
    assert record.metrics["macro_f1"] == pytest.approx(found.macro_f1_after)
    assert found.macro_f1_after > found.macro_f1_before
    assert figures["macro_f1_with_thresholds"] == pytest.approx(found.macro_f1_after, abs=1e-4)
    assert "Thresholds for rare labels" in (folder / "report.html").read_text()
    before, after = (
        load_file(folder / name) for name in ("checkpoint.safetensors", "adapter/silotune_state.safetensors")
    )
    moved = after["head.linear.bias"] - next(v for n, v in before.items() if n.endswith("head.linear.bias"))
    assert moved.tolist() == pytest.approx(found.offsets, abs=1e-6)
    # What is exported answers alike, and its card tells of it.
    scenario = load_scenario(path)
    merged = tmp_path / "merged"
    export(ModelFolder.read(folder), merged, "merged")
    texts = [text for text, _ in rows(400)][:60]
    labels = [
        [answer["label"] for answer in predict(model, texts)]
        for model in (load_tuned(folder, scenario.job, scenario.compute), load_model(merged, scenario.compute))
    ]
    assert labels[0] == labels[1]
    assert len({*labels[0]}) == 2
    assert "Thresholds: the last bias holds" in (merged / "README.md").read_text()
