"""Aliases move under load, versions that do not verify, and retirement."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from server.registry import promotion
from server.registry.adding import add
from server.registry.references import require_version
from server.registry.registry import Registry
from server.serving import following as following_module
from server.serving.following import Following, registry_opener
from server.serving.models import Plan
from shared.errors import ConfigError
from shared.runtime.export.exporting import export
from shared.runtime.export.folder import ModelFolder
from tests.server.registry.keys import OFFICER, SIGNER, STRANGER
from tests.server.serving.live import Live, live


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following_module, "LOOK_SECONDS", 0.05)


def promote(registry: Registry, reference: str, alias: str = "champion") -> None:
    promotion.promote(registry, require_version(registry, reference), alias, OFFICER)


def wait(registry: Registry, following: Following, version: str) -> None:
    for _ in range(400):
        if following.model.version == version:
            return
        threading.Event().wait(0.05)
    raise AssertionError(f"{following.model.version} goes on: {following.trouble}")


CLIENTS = 3


@contextmanager
def load_on(found: Live, clients: int = CLIENTS) -> Iterator[list[tuple[int, str]]]:
    """Ask from several clients all the time; gives status and version of every answer."""
    seen: list[tuple[int, str]] = []
    end = threading.Event()

    def ask() -> None:
        with found.client() as client:
            while not end.is_set():
                response = client.post("/v1/predict", json={"texts": ["a quiet film", "a dull plot"]})
                seen.append((response.status_code, response.json().get("version", response.text)))

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for one in threads:
        one.start()
    try:
        yield seen
    finally:
        end.set()
        for one in threads:
            one.join(30)


@pytest.mark.parametrize("reference", ["films", "films@candidate"])
def test_an_alias_changes_under_load(registry: Registry, reference: str) -> None:
    alias = "champion" if reference == "films" else "candidate"
    promote(registry, "films:1", alias)
    with live(reference, registry.path) as found, load_on(found) as seen:
        for version in ("films:2", "films:1", "films:2"):
            promote(registry, version, alias)
            wait(registry, found.service.following, version)
            before = len(seen)
            while len(seen) < before + 10:
                threading.Event().wait(0.01)
            # The version before answers what was under way, one question of each client, however late such an answer is read.
            assert sum(one[1] != version for one in seen[before:]) <= CLIENTS
    assert {status for status, _ in seen} == {200}
    assert found.service.following.changes == 3
    assert found.service.following.name == reference


def test_what_does_not_verify_is_refused_and_the_old_one_goes_on(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    promote(registry, "films:1")
    with live("films", registry.path) as found:
        following = found.service.following
        following.close()  # looked at by hand below
        promote(registry, "films:2")
        state = require_version(registry, "films:2").model / "adapter" / "silotune_state.safetensors"
        state.write_bytes(state.read_bytes()[:-1] + b"x")
        for _ in range(3):
            following.look()
        assert following.model.version == "films:1"
        assert caplog.text.count("films:2 is not served") == 1
        assert found.post("/v1/predict", {"texts": ["a"]}).json()["version"] == "films:1"
        with found.client() as client:
            assert "silotune_model_refused 1.0" in client.get("/metrics").text
            health = client.get("/healthz")
            assert health.status_code == 200, "it can answer"
            assert (
                health.json()["warning"] == "the version to which the reference leads is not served; the log says why"
            )


def test_a_retired_version_stops(registry: Registry) -> None:
    with live("films:1", registry.path) as found:
        assert found.post("/v1/predict", {"texts": ["a"]}).status_code == 200
        promotion.retire(registry, require_version(registry, "films:1"), OFFICER)
        following = found.service.following
        for _ in range(200):
            if following.withdrawn:
                break
            threading.Event().wait(0.05)
        response = found.post("/v1/predict", {"texts": ["a"]})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "model_withdrawn")
        with found.client() as client:
            assert client.get("/healthz").status_code == 503


def test_another_engine_or_task_is_followed_or_refused(registry: Registry, small_run: Path, tmp_path: Path) -> None:
    promote(registry, "films:1")
    following = Following(lambda: Registry(registry.path), "films", Plan())
    following.close()
    made = export(ModelFolder.read(small_run), tmp_path / "int8", "onnx", "int8")
    promote(registry, add(registry, made.path, "films", signer=("sam", SIGNER)).reference)
    following.look()
    assert (following.model.version, following.model.precision) == ("films:3", "int8")


def test_a_registry_that_is_gone_for_a_moment_changes_nothing(registry: Registry) -> None:
    following = Following(lambda: Registry(registry.path), "films", Plan("torch"))
    following.close()
    registry.path.rename(registry.path.with_name("away"))
    following.look()
    assert following.trouble is not None
    assert following.withdrawn is None
    registry.path.with_name("away").rename(registry.path)
    following.look()
    assert following.trouble is None


def _by_hand(registry: Registry) -> Following:
    following = Following(lambda: Registry(registry.path), "films", Plan("torch"))
    following.close()
    return following


def _spoilt(registry: Registry, reference: str) -> tuple[Path, bytes]:
    state = require_version(registry, reference).model / "adapter" / "silotune_state.safetensors"
    whole = state.read_bytes()
    state.write_bytes(whole[:-1] + b"x")
    return state, whole


def test_a_retired_version_stops_also_where_its_successor_is_refused(registry: Registry) -> None:
    promote(registry, "films:1")
    following = _by_hand(registry)
    promote(registry, "films:2")
    _spoilt(registry, "films:2")
    following.look()
    assert following.withdrawn is None
    promotion.retire(registry, require_version(registry, "films:1"), OFFICER)
    following.look()
    assert following.withdrawn == "films:1 was retired"
    assert "films:2 is not served" in str(following.trouble)


def test_what_was_mended_is_taken(registry: Registry) -> None:
    promote(registry, "films:1")
    following = _by_hand(registry)
    promote(registry, "films:2")
    state, whole = _spoilt(registry, "films:2")
    following.look()
    state.write_bytes(whole)
    following.look()
    assert following.model.version == "films:1", "not at once"
    end = threading.Event()
    for _ in range(100):
        end.wait(0.05)
        following.look()
        if following.model.version == "films:2":
            break
    assert (following.model.version, following.trouble) == ("films:2", None)


def test_whose_key_was_taken_out_stops(registry: Registry) -> None:
    promote(registry, "films:1")
    following = _by_hand(registry)
    rules = registry.policy_file.read_text()
    registry.policy_file.write_text(rules.replace(SIGNER.verify_key.text, STRANGER.verify_key.text))
    following.look()
    assert following.withdrawn == "films:1 was signed by a key that is trusted no longer"
    registry.policy_file.write_text(rules)
    following.look()
    assert following.withdrawn is None


def test_a_history_that_was_put_back(registry: Registry) -> None:
    promote(registry, "films:1")
    file = registry.path / "films" / "aliases.json"
    before = file.read_bytes()
    promote(registry, "films:2")
    following = _by_hand(registry)
    file.write_bytes(before)
    following.look()
    assert (following.model.version, following.withdrawn) == ("films:2", None)
    assert "does not continue what was followed" in str(following.trouble)
    file.unlink()
    following.look()
    assert following.model.version == "films:2"


def test_a_bare_name_is_no_folder(registry: Registry, small_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small_run.parent)
    with pytest.raises(ConfigError, match=r"served as \./run; nobody signed it"):
        Following(lambda: Registry(registry.path), small_run.name, Plan("torch"))
    following = Following(lambda: Registry(registry.path), f"./{small_run.name}", Plan("torch"))
    assert following.model.manifest_sha256 == ""


def test_a_path_into_a_registry_is_its_version(registry: Registry, tmp_path: Path) -> None:
    path = registry.path / "films" / "versions" / "1"
    following = Following(registry_opener(tmp_path / "another", None), str(path), Plan("torch"))
    try:
        assert (following.name, following.base) == ("films:1", "films")
        promotion.retire(registry, registry.version("films", 1), OFFICER)
        following.look()
        assert following.withdrawn == "films:1 was retired"
    finally:
        following.close()


def test_a_look_reads_the_history_once(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following_module, "LOOK_SECONDS", 1000.0)
    following, reads, read = Following(lambda: registry, "films", Plan("torch")), list[str](), registry.history
    monkeypatch.setattr(registry, "history", lambda name: reads.append(name) or read(name))
    try:
        following.look()
        assert reads == ["films"]
    finally:
        following.close()
