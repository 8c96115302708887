"""`predict`, `explain` and `monitor` by a name of the registry: the version answers, and none that was changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.registry.promotion import promote
from server.registry.registry import Registry
from tests.server.registry.keys import OFFICER

TEXTS = ["a quiet film", "a dull plot"]


@pytest.mark.parametrize("reference", ["films", "films:1"])
def test_predict_answers_as_the_run_does(
    reference: str, registry: Registry, small_run: Path, silotune: Callable[..., Any]
) -> None:
    named = silotune("predict", reference, *TEXTS, "--registry", registry.path, "--json")
    assert named.status == 0, named.err
    assert named.out == silotune("predict", small_run, *TEXTS, "--json").out


def test_several_models_by_their_names(registry: Registry, silotune: Callable[..., Any]) -> None:
    at = ("--registry", registry.path, "--json")
    alone = json.loads(silotune("predict", "films:1", TEXTS[0], *at).out)
    both = silotune("predict", "films:1", TEXTS[0], "--with", "films:2", *at)
    assert json.loads(both.out)["label"] == alone["label"], both.err


def test_explain_and_monitor_take_names(
    registry: Registry, silotune: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("captum")
    monkeypatch.setenv("SILOTUNE_MODELS", str(registry.path))
    explained = silotune("explain", "films", TEXTS[0], "--json")
    assert [word["word"] for word in json.loads(explained.out)["words"]] == TEXTS[0].split(), explained.err
    (tmp_path / "texts.txt").write_text("".join(f"{text}\n" for text in TEXTS * 4))
    watched = silotune("monitor", "films", tmp_path / "texts.txt", "--window", "4", "--json")
    assert (watched.status, len(watched.out.splitlines()) > 1) == (0, True), watched.err


@pytest.mark.parametrize("command", ["predict", "explain", "monitor"])
def test_what_does_not_verify_or_is_not_there_answers_nothing(
    command: str, registry: Registry, silotune: Callable[..., Any], tmp_path: Path
) -> None:
    given = tmp_path / "texts.txt" if command == "monitor" else TEXTS[0]
    (tmp_path / "texts.txt").write_text(f"{TEXTS[0]}\n")
    unknown = silotune(command, "filme", given, "--registry", registry.path)
    assert (unknown.status, unknown.out, "films" in unknown.err) == (2, "", True)
    state = next((registry.path / "films/versions/2").rglob("silotune_state.safetensors"))
    state.write_bytes(state.read_bytes()[:-1] + b"x")
    changed = silotune(command, "films", given, "--registry", registry.path)
    assert (changed.status, changed.out, "was changed" in changed.err) == (1, "", True)


def test_a_folder_is_a_folder_where_there_is_no_registry(
    small_run: Path, silotune: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small_run.parent)
    nowhere = ("--registry", tmp_path / "none")
    assert silotune("predict", small_run.name, TEXTS[0], *nowhere).status == 0
    missing = silotune("predict", "films", TEXTS[0], *nowhere)
    assert (missing.status > 0, "Traceback" in missing.err) == (True, False)


@pytest.mark.parametrize(
    ("reference", "how"),
    [
        ("films", "taking films:2, the newest; none was promoted yet, verified"),
        ("films:1", "taking films:1, verified"),
        ("films@candidate", "taking films:1, its candidate, verified"),
    ],
)
def test_which_version_was_taken_is_told(
    reference: str, how: str, registry: Registry, silotune: Callable[..., Any], small_run: Path
) -> None:
    if reference == "films@candidate":
        promote(registry, registry.version("films", 1), "candidate", OFFICER)
    assert silotune("predict", reference, TEXTS[0], "--registry", registry.path).err.strip() == how
    assert silotune("predict", small_run, TEXTS[0], "--registry", registry.path).err == ""


def test_an_exported_version_is_watched_and_not_explained(
    registry: Registry,
    key_files: dict[str, Path],
    silotune: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SILOTUNE_MODELS", str(registry.path))
    out, texts = tmp_path / "onnx", tmp_path / "texts.txt"
    texts.write_text("".join(f"{text}\n" for text in TEXTS * 10))
    assert silotune("export", "films:2", "--to", "onnx", "--out", out).status == 0
    assert silotune("models", "add", out, "--name", "films", "--signer", key_files["sam"]).status == 0
    windows = []
    for reference in ("films:2", "films:3"):
        told = silotune("monitor", reference, texts, "--window", 10, "--json")
        assert told.status == 0, told.err
        windows.append([row["labels"] for row in map(json.loads, told.out.splitlines()) if row["event"] == "window"])
    assert len(windows[0]) == 2
    assert windows[0] == windows[1]
    refused = silotune("explain", "films:3", TEXTS[0])
    assert (refused.status, "no gradients" in refused.err) == (2, True)
