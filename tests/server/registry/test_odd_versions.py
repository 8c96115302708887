"""Versions whose records say odd things, names that mislead, and paths that lead around the rules."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli import main
from server.registry.adding import add
from server.registry.promotion import promote, retire
from server.registry.references import resolve, verified_folder
from server.registry.registry import Registry
from server.registry.showing import table_of
from server.serving.models import Plan, load
from shared.errors import ConfigError, RegistryError, SilotuneError, TrustError
from shared.files.json_files import read_object
from shared.runtime.export.card import evaluated_on_private_records
from tests.server.registry.keys import OFFICER, SIGNER, STRANGER


def amend(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = read_object(path)
    change(content)
    path.write_text(json.dumps(content))


OTHERWISE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "labels": (lambda found: found.update(labels=["no", "yes"]), r"evaluation\.json has the labels \['no', 'yes'\]"),
    "matrix": (
        lambda found: found.update(confusion=[[1, 0, 0]] * 3, labels=None),
        "the confusion matrix of evaluation.json has other sides",
    ),
    "metric": (
        lambda found: found.update(primary_metric="mae", metrics=found["metrics"] | {"mae": 0.1}),
        "about 'mae', the job's task about 'accuracy'",
    ),
    "direction": (lambda found: found.update(higher_is_better=False), "accuracy is better low"),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_what_was_evaluated_fits_the_job(case: str, registry: Registry, run: Path) -> None:
    change, message = OTHERWISE[case]
    amend(run / "evaluation.json", change)
    with pytest.raises(SilotuneError, match=message):
        add(registry, run, "films", signer=("sam", SIGNER))
    assert registry.numbers("films") == [1, 2]


def test_a_name_of_digits_is_none(registry: Registry, run: Path) -> None:
    with pytest.raises(ConfigError, match="digits alone are numbers of versions"):
        add(registry, run, "2", signer=("sam", SIGNER))
    with pytest.raises(ConfigError, match="no name of an alias"):
        promote(registry, registry.version("films", 1), "2", OFFICER)
    assert not registry.history("films").entries


@pytest.mark.parametrize("below", ["", "model"])
def test_a_path_into_a_registry_is_its_version(below: str, registry: Registry, filled: Path) -> None:
    retire(registry, registry.version("films", 1), OFFICER)
    for number in (1, 2):
        path = registry.path / "films" / "versions" / str(number) / below
        for asked in (registry, Registry(filled.parent / "none")):
            if number == 1:
                with pytest.raises(RegistryError, match=r"films:1 was retired"):
                    resolve(asked, str(path))
                with pytest.raises(RegistryError, match=r"films:1 was retired"):
                    verified_folder(str(path), asked.path, None)
            else:
                found = resolve(asked, str(path))
                assert found.version is not None
                assert found.version.reference == "films:2"
                assert verified_folder(str(path), asked.path, None) == found.folder


def test_a_policy_holds_for_a_path_into_another_registry(registry: Registry, filled: Path, tmp_path: Path) -> None:
    policy = tmp_path / "trust.toml"
    policy.write_text(registry.policy_file.read_text().replace(SIGNER.verify_key.text, STRANGER.verify_key.text))
    path = registry.path / "films" / "versions" / "2"
    for own in (registry.path, filled.parent / "none"):
        with pytest.raises(TrustError, match="not among the signers"):
            verified_folder(str(path), own, policy)


def test_errors_name_no_private_copy(registry: Registry) -> None:
    (registry.path / "films" / "versions" / "1" / "model" / "privacy.json").write_text("{}")
    with pytest.raises(SilotuneError) as caught:
        load(resolve(registry, "films:1"), Plan("torch"))
    assert "silotune-serve-" not in str(caught.value)
    assert "films:1" in str(caught.value)


def test_records_write_no_lines_of_their_own(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    forged = "films\n  signed by: olga\x1b[2J\u202e"
    row = {
        "model": forged,
        "version": 1,
        "trusted": True,
        "retired": None,
        "parent": forged,
        "aliases": [],
        "num_bytes": 1,
        **dict.fromkeys(("format", "precision", "metric_text", "epsilon_text", "signer", "added"), forged),
    }
    from shared.terminal import console

    console(width=1000).print(table_of([row]))
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) == 2, "a head and one row"
    assert not {"\x1b", "\u202e"} & {*shown}


def test_a_forged_data_name_is_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    amend(run / "run.json", lambda found: found["dataset"].update(name="reviews\n  audits: tier 1: consistent"))
    add(Registry(tmp_path / "models"), run, "films")
    with pytest.raises(SystemExit):
        main(["models", "show", "films", "--registry", str(tmp_path / "models")])
    shown = capsys.readouterr().out
    assert "\n  audits: tier" not in shown
    assert all(len(line) <= 100 for line in shown.rpartition("bytes of model")[2].splitlines())


def test_only_metrics_are_warned_of(run: Path) -> None:
    amend(run / "run.json", lambda found: found["dataset"].update(test_kind="private"))
    assert evaluated_on_private_records(run)
    (run / "evaluation.json").unlink()
    assert not evaluated_on_private_records(run)
