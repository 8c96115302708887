"""A student is smaller, answers like its teacher, carries the statement unchanged, and goes where other models go."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch

from server.compression.compressing import Size, compress
from server.compression.distillation import Progress, Recipe
from server.registry.registry import Registry
from server.registry.verification import verify
from shared.data.text_stream import TextFormat
from shared.errors import ConfigError, RunError
from shared.job.job import Job
from shared.runtime.export.compression import compression_of
from shared.runtime.export.exporting import export
from shared.runtime.export.folder import ModelFolder
from shared.runtime.inference import head_outputs, load_model
from tests.conftest import Outcome
from tests.server.compression.kinds import KINDS, new_run, public_file
from tests.shared.runtime.export.alone import run_card
from tests.shared.runtime.export.runs import CPU

SHORT = Recipe(epochs=4, learning_rate=3e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_of_every_kind_of_task_learns_and_is_exported(
    kind: str, task_job: Callable[..., Job], tmp_path: Path
) -> None:
    run = new_run(tmp_path / "run", kind, task_job)
    file = public_file(tmp_path / "public.txt", kind)
    made = compress(run, file, TextFormat(), tmp_path / "small", Size(layers=2, intermediate=32), SHORT, compute=CPU)
    folder = ModelFolder.read(tmp_path / "small")
    folder.check()
    assert (folder.format, folder.lineage) == ("merged", run.lineage)
    found = compression_of(folder.record)
    assert found == made.compression
    assert found is not None
    assert (found.layers_kept, found.layers_before, found.teacher_sha256) == ((0, 2), 3, run.record.made_from_sha256)
    assert (found.intermediate, found.public_texts, found.public_texts_held_out) == (32, 140, 14)
    assert found.agreement.divergence <= found.agreement_before.divergence
    if kind in ("classification", "ratings"):  # others hardly differ from their teacher from the start
        assert found.agreement.divergence < 0.9 * found.agreement_before.divergence
    assert (found.agreement.same_answers is None) == (kind == "ratings")

    # transformers reads it, and ONNX Runtime what is exported of it: without the extra layer of merged weights.
    graph = export(folder, tmp_path / "graph", "onnx")
    assert compression_of(graph.record) == found
    assert "## Compression" in (graph.path / "README.md").read_text()
    ours, theirs = (load_model(path, CPU) for path in (folder.path, graph.path))
    examples = [ours.task.probe(torch.arange(1, 4 + length), length) for length in range(3)]
    pairs = zip(head_outputs(ours, examples), head_outputs(theirs, examples), examples, strict=True)
    for one, other, example in pairs:
        shown = slice(None) if one.dim() == 1 else slice(example.length)
        assert torch.allclose(one[shown], other[shown], atol=1e-4)
    names = [node.op_type for node in onnx.load(graph.path / "model.onnx").graph.node]
    assert names.count("Softmax") == 2
    if kind == "classification":
        run_card(folder.path, missing=("onnx", "onnxruntime"))


def test_the_same_texts_and_seed_make_the_same_student(task_job: Callable[..., Job], tmp_path: Path) -> None:
    run, file = new_run(tmp_path / "run", "classification", task_job), public_file(tmp_path / "public.txt")
    weights = []
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        told: list[Progress] = []
        recipe = Recipe(epochs=2, seed=seed)
        made = compress(run, file, TextFormat(), tmp_path / name, Size(), recipe, told=told.append, compute=CPU)
        weights.append((made.folder.path / "model.safetensors").read_bytes())
        assert [one.steps for one in told] == [*range(1, made.compression.steps + 1)]
        assert told[-1].total == made.compression.steps == 2 * 4
    assert weights[0] == weights[1] != weights[2]


def test_a_classifier_on_gpt2_becomes_a_graph(tiny_gpt2: Path, task_job: Callable[..., Job], tmp_path: Path) -> None:
    sections = {"model": {"backbone": str(tiny_gpt2)}, "lora": {"target_modules": ["c_attn"]}}
    run = new_run(tmp_path / "run", "classification", lambda section: task_job(section, **sections))
    file = public_file(tmp_path / "public.txt")
    made = compress(run, file, TextFormat(), tmp_path / "small", Size(layers=1), SHORT, compute=CPU)
    assert (made.folder.format, made.compression.layers_kept) == ("onnx", (2,))
    assert load_model(made.folder.path, CPU).encode([{"text": "a dull plot"}])


def test_a_student_can_be_a_teacher(task_job: Callable[..., Job], tmp_path: Path) -> None:
    run, file = new_run(tmp_path / "run", "ratings", task_job), public_file(tmp_path / "public.txt")
    first = compress(run, file, TextFormat(), tmp_path / "first", Size(layers=2), SHORT, compute=CPU)
    second = compress(first.folder, file, TextFormat(), tmp_path / "second", Size(layers=1), SHORT, compute=CPU)
    assert second.compression.teacher_sha256 == first.folder.record.files["model.safetensors"]
    assert second.compression.earlier is not None
    assert second.compression.earlier["layers_before"] == 3
    runtime = load_model(second.folder.path, CPU)
    assert len(head_outputs(runtime, runtime.encode([{"text": "a dull plot"}]))) == 1
    graph = export(second.folder, tmp_path / "graph", "onnx")
    with pytest.raises(ConfigError, match="is a graph"):
        compress(graph, file, TextFormat(), tmp_path / "third", Size(layers=1), SHORT, compute=CPU)


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (Size(layers=4), "--layers is 4; the model has 3, so give 1 to 3"),
        (Size(layers=0), "--layers is 0"),
        (Size(intermediate=65), "--intermediate is 65; the model has 64"),
        (Size(layers=3), "would stay as large as it is"),
    ],
)
def test_sizes_that_cannot_be_are_refused(size: Size, said: str, task_job: Callable[..., Job], tmp_path: Path) -> None:
    run, file = new_run(tmp_path / "run", "classification", task_job), public_file(tmp_path / "public.txt")
    with pytest.raises(ConfigError, match=said):
        compress(run, file, TextFormat(), tmp_path / "small", size, SHORT, compute=CPU)
    assert not (tmp_path / "small").exists()


def test_what_is_there_stays_and_what_is_broken_off_leaves_nothing(
    task_job: Callable[..., Job], tmp_path: Path
) -> None:
    run, file = new_run(tmp_path / "run", "classification", task_job), public_file(tmp_path / "public.txt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(RunError, match="left alone"):
        compress(run, file, TextFormat(), tmp_path / "full", Size(), SHORT, compute=CPU)
    before = sorted(tmp_path.iterdir())

    def interrupted(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(run, file, TextFormat(), tmp_path / "new", Size(), SHORT, told=interrupted, compute=CPU)
    assert sorted(tmp_path.iterdir()) == before


def test_from_a_version_to_a_student_to_a_version(
    silotune: Callable[..., Outcome], registry: Registry, key_files: dict[str, Path], tmp_path: Path
) -> None:
    where = ("--registry", registry.path)
    file = public_file(tmp_path / "public.txt")
    out = tmp_path / "small"
    told = silotune("compress", "films:2", "--file", file, "--out", out, "--epochs", 1, *where)
    assert told.status == 0, told.err
    assert "compressing films:2" in told.err
    assert "not here to compare with" in told.err
    assert "140 texts of public.txt" in told.out
    assert "statement holds unchanged" in told.out
    added = silotune("models", "add", out, "--name", "films", "--signer", key_files["sam"], "--json", *where)
    assert added.status == 0, added.err
    version = registry.version("films", json.loads(added.out)["version"])
    assert version.manifest.parent is not None
    assert version.manifest.parent.reference == "films:2"
    assert verify(version).summary.epsilon == registry.version("films", 2).manifest.summary.epsilon
    answered = silotune("predict", out, "a dull plot", "--json")
    assert json.loads(answered.out)["label"]


def test_without_texts_it_says_which_kind(silotune: Callable[..., Outcome], small_run: Path, tmp_path: Path) -> None:
    told = silotune("compress", small_run, "--out", tmp_path / "small")
    assert told.status == 2
    assert "a few thousand public texts of the kind that the model will read, without labels" in told.err


def test_json_says_how_it_was_made(silotune: Callable[..., Outcome], small_run: Path, tmp_path: Path) -> None:
    file = public_file(tmp_path / "public.txt")
    told = silotune("compress", small_run, "--file", file, "--out", tmp_path / "s", "--epochs", 1, "--json")
    assert told.status == 0, told.err
    found = json.loads(told.out)
    assert (found["format"], found["layers_kept"], found["steps"]) == ("merged", [2], 4)
    assert found["agreement"]["same_answers"] is not None
