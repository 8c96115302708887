"""TensorBoard's event files and W&B's offline files, read back by their own readers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.tracking import Target, Tracking, wandb_tracker
from shared.job.job import Job
from tests.server.tracking.told import EPSILONS, checkpoint, told

MakeJob = Callable[..., Job]


def run_twice(target: Target, job: Job, folder: Path) -> None:
    """Two rounds, and after a resume the third."""
    with Tracking([target], pytest.fail, seconds=90) as trackers:
        trackers.observer(told(job, folder)).round_done(checkpoint(job, 2))
    with Tracking([target], pytest.fail, seconds=90) as trackers:
        observer = trackers.observer(told(job, folder))
        observer.resumed(checkpoint(job, 2))
        observer.ended(checkpoint(job, 3), complete=True)


def test_tensorboards_reader_finds_every_round_once(classification_job: MakeJob, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    job = classification_job()
    run_twice(Target("tensorboard", str(tmp_path / "tb")), job, tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "tb" / "clinics" / "run-1")).Reload()
    assert events.Tags()["scalars"] == ["public/loss", "public/accuracy", "privacy/epsilon_spent"]
    assert [event.step for event in events.Scalars("public/loss")] == [0, 1, 2, 3]
    for event, epsilon in zip(events.Scalars("privacy/epsilon_spent"), EPSILONS[1:], strict=True):
        assert epsilon <= event.value < epsilon + 1e-3
    (text,) = events.Tensors("settings")
    assert "| privacy.epsilon | 8.0 |" in text.tensor_proto.string_val[0].decode()
    summary = events.summary_metadata["_hparams_/session_start_info"]
    data = plugin_data_pb2.HParamsPluginData.FromString(summary.plugin_data.content)
    assert data.session_start_info.hparams["privacy.epsilon"].number_value == 8.0


def test_wandbs_reader_finds_every_round_and_nothing_of_the_machine(
    classification_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    # A busy machine is no reason to give up here.
    monkeypatch.setattr(wandb_tracker, "_PATIENCE", {"init_timeout": 60.0, "summary_timeout": 60})
    job = classification_job()
    run_twice(Target("wandb", "offline"), job, tmp_path / "run")
    found = [record for path in sorted(tmp_path.glob("wandb/offline-*/*.wandb")) for record in records_of(path)]
    history = [record.history for record in found if record.WhichOneof("record_type") == "history"]
    assert [one.step.num for one in history] == [0, 1, 2, 3]
    values = {item.key or "/".join(item.nested_key): item.value_json for item in history[-1].item}
    assert float(values["privacy/epsilon_spent"]) >= EPSILONS[3]
    runs = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    assert len({run.run_id for run in runs}) == 1
    assert {(run.project, run.display_name, run.host) for run in runs} == {("clinics", "run-1", "")}
    assert any(item.key == "privacy.epsilon" for item in runs[0].config.update)
    kinds = {record.WhichOneof("record_type") for record in found}
    assert not kinds & {"output", "output_raw", "stats", "environment"}
    data = b"".join(path.read_bytes() for path in tmp_path.glob("wandb/offline-*/*.wandb"))
    assert os.uname().nodename.encode() not in data or len(os.uname().nodename) < 4
    assert str(Path.cwd()).encode() not in data
    # A later run of the same process goes where it is wanted then.
    monkeypatch.setenv("WANDB_DIR", str(elsewhere := tmp_path / "elsewhere"))
    elsewhere.mkdir()
    with Tracking([Target("wandb", "offline")], pytest.fail, seconds=90) as trackers:
        trackers.observer(told(job, tmp_path / "another")).ended(checkpoint(job, 1), complete=True)
    assert list(elsewhere.glob("wandb/offline-*/*.wandb"))


def records_of(path: Path) -> list[Any]:
    """Return what W&B's reader finds in a file."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    store, found = DataStore(), []
    store.open_for_scan(str(path))
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        found.append(record)
    return found
