"""MLflow's client, loaded where an option asks for it: with its calls home switched off, and patient for seconds only."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from shared.errors import ConfigError

if TYPE_CHECKING:
    from mlflow import MlflowClient

# MLflow by itself tries seven times over two minutes. A user's own choice stands.
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # which may be for JSON alone
}


def mlflow_library() -> tuple[type[MlflowClient], type[Exception]]:
    """Return the class of MLflow's clients, and of its errors.

    Raises:
        ConfigError: if it is not installed.
    """
    for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ[name] = "true"
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ImportError:
        raise ConfigError('MLflow is not installed; run: pip install "silotune[mlflow]"') from None
    for name in ("mlflow", "urllib3.connectionpool"):  # the second says each try that failed
        logging.getLogger(name).setLevel(logging.ERROR)
    return MlflowClient, MlflowException


def experiment_id(client: MlflowClient, name: str) -> str:
    """Return the number of an experiment, which is made if it is not there."""
    found = client.get_experiment_by_name(name)
    return str(found.experiment_id if found else client.create_experiment(name))
