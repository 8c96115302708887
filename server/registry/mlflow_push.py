"""Hands a version on to an MLflow registry: its files as artifacts, where it comes from and what it claims as tags.

Whoever reads them there checks nothing; `silotune models verify` checks the original. MLflow's own calls home are switched off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from server.registry.history import History
from server.registry.registry import Version
from server.registry.verification import Examined
from server.tracking.mlflow_library import experiment_id, mlflow_library
from shared.epsilons import delta_rounded_up, rounded_up
from shared.errors import RunError

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "silotune-models"
_MOST_TAG = 5000  # characters that MLflow takes
_ARTIFACTS = "model"


@dataclass(frozen=True)
class Pushed:
    """Where a version is now: the version's number in MLflow, and whether it was there before."""

    version: str
    was_there: bool


def push(version: Version, examined: Examined, history: History, uri: str) -> Pushed:
    """Register a verified version in the MLflow registry at `uri`, under the same name, with its aliases.

    Raises:
        ConfigError: if MLflow is not installed.
        RegistryError: if the version is retired.
        RunError: if MLflow refuses, or cannot be reached.
    """
    history.require_in_use(version.number)
    client_of, failure = mlflow_library()
    tags = tags_of(version, examined, history)
    try:
        client = client_of(tracking_uri=uri, registry_uri=uri)
        pushed = _existing(client, version) or _upload(client, version, tags)
        for alias in history.aliases_of(version.number):
            client.set_registered_model_alias(version.manifest.name, alias, pushed.version)
    except (failure, OSError) as error:
        text = str(error).splitlines()[0][:300]
        raise RunError(
            f"MLflow at {uri} did not take {version.reference}: {text}. Check the address and try again."
        ) from None
    return pushed


def tags_of(version: Version, examined: Examined, history: History) -> dict[str, str]:
    """Return what MLflow shows of a version, all of it under `silotune.`."""
    manifest, summary = version.manifest, version.manifest.summary
    statement = examined.facts.data.statement
    found = {
        "version": version.reference,
        "manifest_sha256": version.manifest_sha256,
        "signer": manifest.signer,
        "job": summary.job,
        "job_sha256": summary.job_sha256,
        "format": summary.format,
        "precision": summary.precision,
        "task": summary.task,
        "epsilon": "none" if summary.epsilon is None else rounded_up(summary.epsilon),
        "delta": "none" if summary.delta is None else delta_rounded_up(summary.delta),
        "unit": summary.unit or "none",
        "statement": statement.one_site if statement else "none: the run was not private",
        "aliases": ", ".join(history.aliases_of(version.number)) or "none",
        "parent": (manifest.parent.reference or "a run") if manifest.parent else "none",
    }
    if summary.metric is not None:
        found[f"metric.{summary.metric}"] = "not defined" if summary.value is None else f"{summary.value:.6g}"
    return {f"silotune.{key}": value[:_MOST_TAG] for key, value in found.items()}


def _existing(client: MlflowClient, version: Version) -> Pushed | None:
    """Return the version of MLflow that is this one already, found by the hash of its manifest."""
    found: list[Any] = client.search_model_versions(f"name = '{version.manifest.name}'")
    for one in found:
        if one.tags.get("silotune.manifest_sha256") == version.manifest_sha256:
            return Pushed(str(one.version), was_there=True)
    return None


def _upload(client: MlflowClient, version: Version, tags: dict[str, str]) -> Pushed:
    name = version.manifest.name
    run = client.create_run(experiment_id(client, EXPERIMENT), run_name=version.reference, tags=tags)
    client.log_artifacts(run.info.run_id, str(version.path), _ARTIFACTS)
    client.set_terminated(run.info.run_id)
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    source = f"{run.info.artifact_uri}/{_ARTIFACTS}"
    made = client.create_model_version(name, source, run_id=run.info.run_id, tags=tags)
    return Pushed(str(made.version), was_there=False)
