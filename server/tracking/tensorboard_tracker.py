"""Runs as event files of TensorBoard, by its own writer: one folder a run, with the report beside the events."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from server.tracking.run_told import EPSILON, Ending, Figures, RunTold


class TensorBoardTracker:
    """See the module."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def record(self, run: RunTold, known_as: str | None) -> TensorBoardRecording:
        """See `Tracker`; the run's name is its folder."""
        name = f"{run.experiment}/{run.name}"
        is_new = known_as is None or not (self._folder / name).is_dir()
        recording = TensorBoardRecording(self._folder / name, name, is_new=is_new)
        if is_new:
            recording.describe(run)
        return recording


class TensorBoardRecording:
    """See `Recording`."""

    def __init__(self, folder: Path, name: str, *, is_new: bool) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.id, self.is_new, self._folder = name, is_new, folder
        self._writer = EventFileWriter(str(folder))

    def describe(self, run: RunTold) -> None:
        """Write the settings for the tab of hyperparameters, and as text with what identifies the run."""
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.util.tensor_util import make_tensor_proto

        # Seconds since the epoch are asked for by a TensorFlow function where none are given.
        self._add(0, hparams_pb(dict(run.settings), trial_id=self.id, start_time_secs=time.time()))
        rows = [f"| {key} | {value} |" for key, value in {**run.tags, **run.settings}.items()]
        text = "\n".join(["| setting | value |", "| --- | --- |", *rows])
        plugin = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        value = Summary.Value(tag="settings", metadata=plugin, tensor=make_tensor_proto([text.encode()]))
        self._add(0, Summary(value=[value]))
        self._writer.flush()

    def send(self, figures: Sequence[Figures]) -> None:
        """See `Recording`."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        for one in figures:
            values = [
                Summary.Value(tag=name, simple_value=at_least(value) if name == EPSILON else value)
                for name, value in one.values.items()
            ]
            self._add(one.round, Summary(value=values))
        self._writer.flush()

    def finish(self, ending: Ending) -> None:
        """See `Recording`."""
        for name, path in ending.artifacts.items():
            if path.is_dir():
                shutil.copytree(path, self._folder / name, dirs_exist_ok=True)
            else:
                shutil.copyfile(path, self._folder / name)
        self._writer.close()

    def _add(self, step: int, summary: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))


def at_least(value: float) -> float:
    """Return the least 32-bit number that is not below `value`: TensorBoard keeps no others, and an epsilon may not shrink."""
    nearest = np.float32(value)
    return float(nearest if float(nearest) >= value else np.nextafter(nearest, np.float32(np.inf)))
