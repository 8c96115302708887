"""Runs in MLflow: settings as parameters, figures as metrics with the round as step, the report as an artifact."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from server.tracking.mlflow_library import experiment_id, mlflow_library
from server.tracking.run_told import Ending, Figures, RunTold

_AT_ONCE = 100  # parameters or tags in one request
_STATUS = {"completed": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MlflowTracker:
    """See the module.

    Raises:
        ConfigError: if MLflow is not installed.
    """

    def __init__(self, uri: str) -> None:
        client, _ = mlflow_library()
        self._client, self._uri = client, uri

    def record(self, run: RunTold, known_as: str | None) -> MlflowRecording:
        """See `Tracker`; a run that somebody deleted there is begun anew."""
        from mlflow.exceptions import MlflowException

        client = self._client(tracking_uri=self._uri)  # here: the address may already be out of reach
        if known_as is not None:
            try:
                if client.get_run(known_as).info.lifecycle_stage == "active":
                    client.update_run(known_as, status="RUNNING")
                    return MlflowRecording(client, known_as, is_new=False)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        made = client.create_run(experiment_id(client, run.experiment), run_name=run.name, tags=dict(run.tags))
        recording = MlflowRecording(client, made.info.run_id, is_new=True)
        recording.describe(run)
        return recording


class MlflowRecording:
    """See `Recording`."""

    def __init__(self, client: Any, run_id: str, *, is_new: bool) -> None:
        self._client, self.id, self.is_new = client, run_id, is_new

    def describe(self, run: RunTold) -> None:
        """Send the settings."""
        from mlflow.entities import Param

        parameters = [Param(key, str(value)) for key, value in run.settings.items()]
        for first in range(0, len(parameters), _AT_ONCE):
            self._client.log_batch(self.id, params=parameters[first : first + _AT_ONCE])

    def send(self, figures: Sequence[Figures]) -> None:
        """See `Recording`."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        for one in figures:
            self._client.log_batch(self.id, [Metric(name, value, now, one.round) for name, value in one.values.items()])

    def finish(self, ending: Ending) -> None:
        """See `Recording`."""
        for name, path in ending.artifacts.items():
            if path.is_dir():
                self._client.log_artifacts(self.id, str(path), name)
            else:
                self._client.log_artifact(self.id, str(path))
        self._client.set_terminated(self.id, status=_STATUS[ending.status])
