"""`silotune models` as people and programs use it, up to an MLflow registry in SQLite."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.registry.promotion import promote, retire
from server.registry.registry import Registry
from server.registry.verification import verify
from server.reports.run.reading import read_run
from shared.epsilons import rounded_up
from shared.errors import RegistryError
from tests.server.registry.keys import OFFICER


@pytest.fixture
def models(silotune: Callable[..., Any], registry: Registry) -> Callable[..., Any]:
    """Return a function that runs one command on the registry."""
    return lambda *arguments: silotune("models", *arguments, "--registry", registry.path)


def test_from_a_run_to_a_champion_with_no_key_at_hand(silotune: Any, small_run: Path, tmp_path: Path) -> None:
    place = ("--registry", tmp_path / "models")
    added = silotune("models", "add", small_run, "--name", "films", *place)
    assert added.status == 0, added.err
    assert "added films:1: epsilon 3.333, delta 1e-05, for one record; signed by this-registry" in added.out
    promoted = silotune("models", "promote", "films", *place)
    assert promoted.out == "films@champion is films:1 now\n"
    assert "every file is as this-registry signed it" in silotune("models", "verify", "films", *place).out
    assert silotune("models", "list", "--registry", tmp_path / "other").out.startswith(
        f"{tmp_path / 'other'} holds no model"
    )


def test_people_and_programs_see_the_same(models: Any, key_files: dict[str, Path], small_run: Path) -> None:
    champion = models("promote", "films:1", "--as", key_files["olga"], "--why", "the first", "--json")
    assert json.loads(champion.out)["version"] == 1
    models("add", small_run, "--name", "other", "--signer", key_files["sam"], "--note", "a note")
    rows = json.loads(models("list", "--json").out)
    assert [(row["model"], row["version"], row["aliases"]) for row in rows] == [
        *(("films", 1, ["champion"]), ("films", 2, []), ("other", 1, [])),
    ]
    assert {rounded_up(row["epsilon"]) for row in rows} == {"3.333"}
    table = models("list", "films").out
    assert "3.333" in table
    assert "films:1" in table
    assert "champion" in table
    assert "other" not in table
    shown = models("show", "other").out
    statement = read_run(small_run).statement
    assert statement is not None
    assert "the newest; none was promoted yet" in shown
    assert "note: a note" in shown
    assert " ".join(statement.text.split()) in " ".join(shown.split()), "its words, in lines that are read"
    assert json.loads(models("show", "films", "--json").out)["manifest"]["version"] == 1
    told = models("aliases", "films").out
    assert "films@champion is films:1" in told
    assert "olga" in told
    assert json.loads(models("aliases", "films", "--json").out)["last_sha256"] in told
    retired = models("retire", "films:2", "--as", key_files["olga"])
    assert "films:2 is retired" in retired.out
    assert "retired" in models("list").out


def test_mistakes_are_explained(models: Any, key_files: dict[str, Path], registry: Registry) -> None:
    wrong = models("promote", "films", "--as", key_files["sam"])
    assert wrong.status == 1
    assert "below [officers]" in " ".join(wrong.err.split())
    assert models("promote", "filns", "--as", key_files["olga"]).status == 2
    assert models("show", registry.path).status == 2
    (registry.path / "films" / "versions" / "1" / "model" / "run.json").write_text("{}")
    failed = models("verify", "films:1")
    assert failed.status == 1
    assert "run.json' was changed" in failed.err
    as_json = models("verify", "films:1", "--json")
    assert as_json.status == 1
    assert json.loads(as_json.out)["verified"] is False
    assert json.loads(models("verify", "films:2", "--json").out)["verified"] is True
    (registry.path / "films" / "versions" / "1" / "manifest.json").write_text("{}")
    listed = models("list")
    assert listed.status == 0
    assert "DOES NOT VERIFY" in listed.out


def test_a_version_goes_to_mlflow_with_its_claim(
    models: Any, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    promote(registry, registry.version("films", 1), "champion", OFFICER)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")  # where MLflow puts files by itself
    for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        monkeypatch.setenv(name, "true")
    for was_there in (False, True):
        done = models("push", "films", "--to", uri, "--json")
        assert done.status == 0, done.err
        assert json.loads(done.out) == {"model": "films:1", "mlflow_version": "1", "was_there": was_there}

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    found = client.get_model_version_by_alias("films", "champion")
    examined = verify(registry.version("films", 1))
    assert examined.facts.data.statement is not None
    assert found.tags["silotune.epsilon"] == "3.333"
    assert found.tags["silotune.statement"] == examined.facts.data.statement.one_site
    assert found.tags["silotune.job_sha256"] == examined.facts.job.sha256
    assert found.tags["silotune.manifest_sha256"] == registry.version("films", 1).manifest_sha256
    assert found.tags["silotune.aliases"] == "champion"
    files = {file.path for file in client.list_artifacts(found.run_id, "model/model")}
    assert "model/model/statement.json" in files


def test_a_retired_version_is_not_pushed(registry: Registry, tmp_path: Path) -> None:
    from server.registry.mlflow_push import push

    version = registry.version("films", 1)
    retire(registry, version, OFFICER)
    with pytest.raises(RegistryError, match="was retired"):
        push(version, verify(version), registry.history("films"), f"sqlite:///{tmp_path / 'mlflow.db'}")


def test_without_mlflow_it_says_what_to_install(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    failed = models("push", "films", "--to", "sqlite:///x.db")
    assert failed.status == 2
    assert 'pip install "silotune[mlflow]"' in failed.err
