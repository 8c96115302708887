"""MLflow's own server: what it shows, and a run that goes on while it is killed, hangs and comes back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from server.tracking import Target, Tracking
from shared.job.job import Job
from tests.mlflow_server import MlflowServer
from tests.server.tracking.told import EPSILONS, checkpoint, told

pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
pytest.importorskip("flask", reason="MLflow's server needs Flask, which `dev` has")

MakeJob = Callable[..., Job]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    found = MlflowServer(tmp_path_factory.mktemp("mlflow")).start()
    yield found
    found.kill()


def client(server: MlflowServer) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=server.uri)


def only_run(server: MlflowServer, experiment: str) -> Any:
    (run,) = client(server).search_runs([client(server).get_experiment_by_name(experiment).experiment_id])
    return run


def test_a_server_that_is_killed_and_started_anew_has_every_round_once(
    server: MlflowServer, classification_job: MakeJob, tmp_path: Path
) -> None:
    job, said = classification_job(), []
    started = time.monotonic()
    target, experiment = Target("mlflow", server.uri), "killed"
    with Tracking([target], said.append, seconds=8) as trackers:
        observer = trackers.observer(told(job, tmp_path / "run", experiment=experiment))
        observer.round_done(checkpoint(job, 0))
        observer.round_done(checkpoint(job, 1))
        deadline = time.monotonic() + 30
        while '"rounds": 2' not in read(tmp_path / "run" / "tracking.json"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        server.kill()
        started = time.monotonic()
        observer.round_done(checkpoint(job, 2))
        assert time.monotonic() - started < 0.5
    assert time.monotonic() - started < 12
    assert f"mlflow:{server.uri} did not get everything of run-1 (round 2 and its end)" in said[-1]
    server.start()
    with Tracking([target], pytest.fail, weights=True) as trackers:
        (tmp_path / "run" / "adapter").mkdir()
        (tmp_path / "run" / "adapter" / "adapter_config.json").write_text("{}")
        observer = trackers.observer(told(job, tmp_path / "run", experiment=experiment))
        observer.resumed(checkpoint(job, 2))
        observer.ended(checkpoint(job, 3), complete=True)
    run = only_run(server, experiment)
    history = client(server).get_metric_history(run.info.run_id, "public/accuracy")
    assert [one.step for one in history] == [0, 1, 2, 3]
    epsilons = client(server).get_metric_history(run.info.run_id, "privacy/epsilon_spent")
    for one, epsilon in zip(epsilons, EPSILONS[1:], strict=True):
        assert epsilon <= one.value < epsilon + 1.1e-4
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run-1"
    assert run.data.params["privacy.epsilon"] == "8.0"
    assert run.data.tags["silotune.job_sha256"] == job.sha256
    assert [file.path for file in client(server).list_artifacts(run.info.run_id)] == ["adapter"]


def test_a_run_that_somebody_deleted_there_is_begun_anew(
    server: MlflowServer, classification_job: MakeJob, tmp_path: Path
) -> None:
    job, target = classification_job(), Target("mlflow", server.uri)
    for _ in range(2):
        with Tracking([target], pytest.fail) as trackers:
            observer = trackers.observer(told(job, tmp_path / "run", experiment="deleted"))
            observer.round_done(checkpoint(job, 2))
        run = only_run(server, "deleted")
        assert [one.step for one in client(server).get_metric_history(run.info.run_id, "public/loss")] == [0, 1, 2]
        client(server).delete_run(run.info.run_id)


def test_a_server_that_hangs_holds_up_nothing(
    server: MlflowServer, classification_job: MakeJob, tmp_path: Path
) -> None:
    job, said = classification_job(), []
    server.stop()
    started = time.monotonic()
    with Tracking([Target("mlflow", server.uri)], said.append, seconds=0.5) as trackers:
        observer = trackers.observer(told(job, tmp_path / "run", experiment="hangs"))
        for number in range(4):
            observer.round_done(checkpoint(job, number))
        assert time.monotonic() - started < 2
    assert time.monotonic() - started < 4
    assert "did not get everything of run-1" in said[-1]


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""
