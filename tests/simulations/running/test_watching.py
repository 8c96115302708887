"""A simulation and a sweep as trackers see them: what is public, every round, nothing of a site."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import LINES
from tests.mlflow_server import MlflowServer
from tests.server.tracking.test_files import records_of

pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")

MARKER = "zebrakadabra"
MakeScenario = Callable[..., Path]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    for library in ("mlflow", "flask"):
        pytest.importorskip(library, reason=f"MLflow's own server needs {library}, which `dev` has")
    found = MlflowServer(tmp_path_factory.mktemp("mlflow")).start()
    yield found
    found.kill()


@pytest.fixture
def marked(scenario_file: MakeScenario, tmp_path: Path) -> Callable[..., Path]:
    """Return a maker of scenarios in which texts and names of sites hold the marker."""

    def make(**sections: Any) -> Path:
        columns = {"text": "review", "label": "verdict", "ward": "ward"}
        train = {"path": "train.csv", "columns": columns}
        path = scenario_file(
            data={"train": train, "kind": "public", **sections.pop("data", {})},
            partition={"kind": "column", "column": "ward", "num_sites": 2},
            **sections,
        )
        rows = [(f"{LINES[i % 6]} {MARKER} {LINES[i // 6 % 6]}", ["good", "bad"][i % 2]) for i in range(60)]
        with (tmp_path / "train.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("review", "verdict", "ward"))
            writer.writerows((*row, f"{MARKER}-{i // 2 % 2}") for i, row in enumerate(rows))
        return path

    return make


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard's reader finds."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {name: [(one.step, one.value) for one in events.Scalars(name)] for name in events.Tags()["scalars"]}


def everything_in(*folders: Path) -> bytes:
    return b"".join(path.read_bytes() for folder in folders for path in sorted(folder.rglob("*")) if path.is_file())


def test_three_trackers_read_back_a_run_and_nothing_of_a_site(
    silotune: Callable[..., Any],
    marked: MakeScenario,
    server: MlflowServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    from mlflow import MlflowClient

    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    out, board = tmp_path / "run", tmp_path / "board"
    trackers = [f"mlflow:{server.uri}", f"tensorboard:{board}", "wandb:offline"]
    tracked = [word for tracker in trackers for word in ("--track", tracker)]
    energy = ("--energy", "--price-per-kwh", "0.30 EUR")
    scenario = marked(baselines={"arms": ["non-private"], "non_private": {"training": {"rounds": 1}}})
    assert MARKER in scenario.with_name("train.csv").read_text()
    stopped = silotune("simulate", scenario, "--out", out, *tracked, *energy, "--stop-after", 1, "--json")
    assert stopped.status == 0, stopped.err
    done = silotune("simulate", scenario, "--out", out, "--resume", *tracked, *energy, "--json")
    assert done.status == 0, done.err
    assert "not get everything" not in done.err
    figures = json.loads(done.out)
    rounds = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert MARKER in str(rounds[1]["sites"])  # a fault is planted

    client = MlflowClient(tracking_uri=server.uri)
    experiment = client.get_experiment_by_name("small").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert set(runs) == {"run", "run/baselines/non-private"}
    number = runs["run"].info.run_id
    accuracy = client.get_metric_history(number, "public/accuracy")
    assert [(one.step, one.value) for one in accuracy] == [(r["round"], r["metrics"]["accuracy"]) for r in rounds]
    epsilons = client.get_metric_history(number, "privacy/epsilon_spent")
    for one, record in zip(epsilons, rounds[1:], strict=True):
        assert record["epsilon_max"] <= one.value < record["epsilon_max"] + 1.1e-4
    assert runs["run"].info.status == "FINISHED"
    assert runs["run"].data.params["partition.kind"] == "column"
    assert [file.path for file in client.list_artifacts(number)] == ["report.html"]

    assert scalars(board / "small" / "run")["public/accuracy"] == [
        (r["round"], pytest.approx(r["metrics"]["accuracy"])) for r in rounds
    ]
    report = (board / "small" / "run" / "report.html").read_text()
    assert "site-1" in report
    assert "Privacy statement" in report
    assert MARKER in (out / "report.html").read_text()

    offline = [record for path in sorted(tmp_path.glob("wandb/offline-*/*.wandb")) for record in records_of(path)]
    steps = [record.history.step.num for record in offline if record.WhichOneof("record_type") == "history"]
    assert sorted(steps) == [0, 0, 1, 1, 2, 3]
    kept = tmp_path / "wandb"
    assert MARKER.encode() not in everything_in(board, kept, server.folder)
    assert not [path for folder in (board, kept, server.folder) for path in folder.rglob("*.safetensors")]

    assert figures["energy"]["kwh"] > 0
    assert figures["energy"]["cost"]["currency"] == "EUR"
    assert all(part["method"] and part["error"] for part in figures["energy"]["parts"])
    assert len(json.loads((out / "energy.json").read_text())["sessions"]) == 2
    page = re.sub(r"<[^>]+>|\s+", " ", (out / "report.html").read_text())
    assert "0.30 EUR for a kWh" in page
    assert "thermal design power" in page or "RAPL" in page


def test_figures_without_noise_of_private_records_stay_here(
    silotune: Callable[..., Any], marked: MakeScenario, tmp_path: Path
) -> None:
    board = tmp_path / "board"
    baselines = {"arms": ["non-private"], "non_private": {"training": {"rounds": 1}}}
    scenario = marked(data={"kind": "private"}, training={"rounds": 1}, baselines=baselines)
    done = silotune("simulate", scenario, "--out", tmp_path / "run", "--track", f"tensorboard:{board}")
    assert done.status == 0, done.err
    assert "trackers get settings and epsilons only" in done.out
    assert "non-private is not tracked" in done.out
    assert sorted(path.name for path in (board / "small").rglob("*") if path.is_dir()) == ["run"]
    assert set(scalars(board / "small" / "run")) == {"privacy/epsilon_spent"}
    assert not list(board.rglob("report.html"))


def test_each_trial_of_a_sweep_is_a_run(silotune: Callable[..., Any], marked: MakeScenario, tmp_path: Path) -> None:
    board, out = tmp_path / "board", tmp_path / "sweep"
    scenario = marked(training={"rounds": 1})
    axis = ("--axis", "training.learning_rate=0.01,0.05")
    done = silotune("sweep", scenario, *axis, "--out", out, "--track", f"tensorboard:{board}", "--json")
    assert done.status == 0, done.err
    runs = sorted(path.parent for path in board.rglob("events.*"))
    assert [run.relative_to(board).parent.as_posix() for run in runs] == ["small/sweep/trials"] * 2
    for run in runs:
        assert [step for step, _ in scalars(run)["public/accuracy"]] == [0, 1]
        assert (run / "report.html").exists()
    refused = silotune(
        "sweep", scenario, *axis, "--account-tuning", "--mean-trials", 2, "--track", f"tensorboard:{board}"
    )
    assert refused.status == 2
    assert "--track is not for --account-tuning" in refused.err
