"""A reference leads to one model, and says which."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.registry.promotion import promote, retire
from server.registry.references import require_version, resolve
from server.registry.registry import Registry
from shared.errors import ConfigError, RegistryError
from tests.server.registry.keys import OFFICER


def test_a_name_is_the_newest_until_there_is_a_champion(registry: Registry) -> None:
    assert resolve(registry, "films").how == "films:2, the newest; none was promoted yet"
    retire(registry, registry.version("films", 2), OFFICER)
    assert resolve(registry, "films").how == "films:1, the newest; none was promoted yet"
    promote(registry, registry.version("films", 1), "candidate", OFFICER)
    with pytest.raises(ConfigError, match="has no 'champion'; known: candidate"):
        resolve(registry, "films")
    assert resolve(registry, "films@candidate").how == "films:1, its candidate"
    promote(registry, registry.version("films", 1), "champion", OFFICER)
    found = resolve(registry, "films")
    assert (found.how, found.folder.name) == ("films:1, its champion", "model")
    assert resolve(registry, "films:1").version == found.version


def test_of_a_model_whose_versions_are_all_retired_there_is_none(registry: Registry) -> None:
    for number in (1, 2):
        retire(registry, registry.version("films", number), OFFICER)
    with pytest.raises(RegistryError, match="every version of films is retired"):
        resolve(registry, "films")


WRONG = {
    "filns": "no model 'filns' in the registry .*did you mean 'films'",
    "films:7": "has no version 7; there are: 1, 2",
    "films@champoin": "has no 'champoin'; did you mean 'champion'",
    "films@": "neither a folder nor a name",
    "films:0": "neither a folder nor a name",
    "films:01": "neither a folder nor a name",
    "../films": "neither a folder nor a name",
    "films/versions/1": "neither a folder nor a name",
    "films@a:1": "neither a folder nor a name",
    "": "neither a folder nor a name",
}


@pytest.mark.parametrize("reference", WRONG)
def test_a_wrong_reference_is_explained(
    reference: str, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path / "models" / "films" / "versions")
    promote(registry, registry.version("films", 1), "champion", OFFICER)
    if reference:
        with pytest.raises(ConfigError, match=WRONG[reference]):
            resolve(registry, reference)


def test_a_path_needs_no_registry(small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = Registry(tmp_path / "nowhere")
    assert resolve(nowhere, str(small_run)).folder == small_run
    monkeypatch.chdir(small_run.parent)
    assert resolve(nowhere, "run").version is None
    with pytest.raises(ConfigError, match="is a folder, no version"):
        require_version(nowhere, "run")
    with pytest.raises(ConfigError, match="holds none yet; add one with"):
        resolve(nowhere, "films")


def test_a_name_wins_over_a_folder(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "films").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve(registry, "films").version is not None
    assert resolve(registry, "./films").version is None
