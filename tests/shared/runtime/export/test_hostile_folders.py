"""A model folder of a stranger: no code of its own runs, and nothing outside the folder is read."""

from __future__ import annotations

import ast
import io
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from server.registry.intake import copy_files
from shared.errors import ModelError
from shared.files.json_files import read_object
from shared.job.job import Job
from shared.runtime.export.exporting import export
from shared.runtime.export.folder import MODEL_FILE, ModelFolder
from shared.runtime.inference import load_model
from shared.trust.signed_file import sha256_and_size
from tests.shared.runtime.export.runs import CPU, finished_run

ROOT = Path(__file__).parents[4]


@pytest.fixture
def merged(tmp_path: Path, classification_job: Callable[..., Job]) -> Path:
    run = finished_run(tmp_path / "run", classification_job())
    return export(ModelFolder.read(run), tmp_path / "merged", "merged").path


def _hash_again(folder: Path) -> None:
    """Let model.json name what is there."""
    record = read_object(folder / MODEL_FILE)
    there = [path for path in folder.rglob("*") if path.is_file() and path.name != MODEL_FILE]
    record["files"] = {path.relative_to(folder).as_posix(): sha256_and_size(path)[0] for path in there}
    (folder / MODEL_FILE).write_text(json.dumps(record))


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_code_that_comes_with_it_does_not_run_and_nobody_is_asked(
    file: str, merged: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    (merged / "evil.py").write_text(f"from pathlib import Path\nPath({str(ran)!r}).touch()\nclass Evil: pass\n")
    content = read_object(merged / file)
    if file == "config.json":
        content["auto_map"] = {content["architectures"][0]: "evil.Evil", "AutoConfig": "evil.Evil"}
        content["auto_map"] |= {"AutoModelForSequenceClassification": "evil.Evil"}
        content["model_type"] = "evil"
    else:
        content |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (merged / file).write_text(json.dumps(content))
    _hash_again(merged)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 10))
    monkeypatch.setattr("builtins.input", lambda *asked: pytest.fail(f"asked {asked}"))
    # A tokenizer that is whole without that code is taken; nothing else is.
    with nullcontext() if file == "tokenizer_config.json" else pytest.raises(ModelError, match="cannot be loaded"):
        load_model(merged, CPU)
    assert not ran.exists()


def test_an_index_of_weights_names_no_file_outside(merged: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    (merged / "model.safetensors").rename(outside)
    index = {"metadata": {}, "weight_map": {"classifier.weight": "../outside.safetensors"}}
    (merged / "model.safetensors.index.json").write_text(json.dumps(index))
    _hash_again(merged)
    with pytest.raises(ModelError, match=r"lists no model\.safetensors"):
        load_model(merged, CPU)
    (tmp_path / "copy").mkdir()
    with pytest.raises(ModelError, match="names other files to be read as weights"):
        copy_files(merged, ["model.safetensors.index.json"], tmp_path / "copy")


def test_nothing_is_loaded_that_could_bring_code() -> None:
    calls = 0
    for package in ("shared", "server", "client", "simulations", "cli"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained":
                    given = {one.arg: one.value for one in node.keywords}
                    trust = given.get("trust_remote_code")
                    assert isinstance(trust, ast.Constant), f"{path.name}, line {node.lineno}"
                    assert trust.value is False
                    calls += 1
    assert calls >= 6
