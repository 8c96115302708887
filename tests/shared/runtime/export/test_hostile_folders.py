"""A model folder of a stranger: no code of its own runs, and nothing outside the folder is read."""

from __future__ import annotations

import ast
import io
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest

from server.registry.intake import copy_files
from shared.errors import ModelError, SilotuneError
from shared.files.json_files import read_object
from shared.job.job import Job
from shared.runtime.export.exporting import export
from shared.runtime.export.folder import MODEL_FILE, ModelFolder
from shared.runtime.inference import load_model, predict
from shared.trust.signed_file import sha256_and_size
from tests.shared.runtime.export.runs import CPU, finished_run

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, classification_job: Callable[..., Job]) -> dict[str, Path]:
    """A run, and its model in every form; tests must not change them."""
    pytest.importorskip("onnx")
    place = tmp_path_factory.mktemp("made")
    run = finished_run(place / "run", classification_job())
    source = ModelFolder.read(run)
    return {"run": run} | {to: export(source, place / to, to).path for to in ("merged", "onnx")}


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


def _put(name: str, **values: object) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(json.dumps(read_object(folder / name) | values))


def _graph(change: Callable[[Any], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        import onnx

        model = onnx.load(folder / "model.onnx")
        change(model)
        (folder / "model.onnx").write_bytes(model.SerializeToString())

    return spoil


def _elsewhere(model: Any) -> None:
    weight = model.graph.initializer[0]
    weight.data_location = 1
    weight.external_data.add(key="location", value="../outside.bin")


def _fill_with_nan(model: Any) -> None:
    for one in model.graph.initializer:
        if one.data_type == 1 and len(one.dims):
            one.raw_data = b"\xff" * len(one.raw_data)


BROKEN: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no tokenizer": ("merged", lambda folder: (folder / "tokenizer.json").write_text("{}"), "no usable tokenizer"),
    "half a tokenizer": ("onnx", lambda folder: (folder / "tokenizer.json").write_text('{"model":'), "read as JSON"),
    "a list as a tokenizer": (
        "onnx",
        lambda folder: (folder / "tokenizer.json").write_text("[]"),
        "no usable tokenizer",
    ),
    "another kind of tokenizer": (
        "onnx",
        _put("tokenizer.json", model={"type": "WordLevel", "vocab": {"a": 900_000}, "unk_token": "a"}),
        "no usable tokenizer",
    ),
    "no network": ("merged", _put("config.json", num_hidden_layers=0), "another model than the weights"),
    "words as sizes": ("merged", _put("config.json", hidden_size="wide"), "cannot be loaded"),
    "another family": ("merged", _put("config.json", model_type="mamba"), "of type 'mamba'"),
    "many labels": (
        "merged",
        _put("config.json", id2label={str(n): str(n) for n in range(9)}),
        "another model than the weights|cannot be loaded",
    ),
    "half a graph": (
        "onnx",
        lambda folder: (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:999]),
        "no ONNX file",
    ),
    "an empty graph": ("onnx", _graph(lambda model: model.graph.node.__delitem__(slice(None))), "cannot be loaded"),
    "another input": ("onnx", _graph(lambda model: setattr(model.graph.input[0], "name", "words")), "cannot be"),
    "no numbers": ("onnx", _graph(_fill_with_nan), "computes what is no number"),
    "another output": ("onnx", _graph(lambda model: setattr(model.graph.output[0], "name", "nothing")), "cannot be"),
    "weights elsewhere": ("onnx", _graph(_elsewhere), r"keeps weights in '\.\./outside\.bin'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_ends_in_one_error(case: str, made: dict[str, Path], tmp_path: Path) -> None:
    form, spoil, message = BROKEN[case]
    folder = Path(shutil.copytree(made[form], tmp_path / "model"))
    spoil(folder)
    _hash_again(folder)
    with pytest.raises(ModelError, match=message) as caught:
        predict(load_model(folder, CPU), ["good"])
    assert "\n" not in str(caught.value)
    with suppress(SilotuneError):  # some of it is made anew by an export; nothing else is raised
        export(ModelFolder.read(folder), tmp_path / "again", "onnx")


def test_a_job_that_asks_for_more_is_told(made: dict[str, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(made["run"], tmp_path / "run"))
    content = read_object(run / "job.json")
    content["model"]["max_length"] = 1 << 20
    (run / "job.json").write_text(json.dumps(content))
    with pytest.raises(SilotuneError, match="max_length"):
        predict(load_model(run, CPU), ["good"])


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
    assert calls >= 5
