"""A model folder: whole or not at all, lineage byte for byte, and no file that was changed unseen."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from shared.errors import ModelError, RunError
from shared.files.json_files import read_object
from shared.job.job import Job
from shared.runtime.export.folder import ModelFolder, ModelRecord, write_model_folder
from tests.shared.runtime.export.runs import finished_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, classification_job: Callable[..., Job]) -> Path:
    return finished_run(tmp_path_factory.mktemp("runs") / "run", classification_job(), temperature=1.5)


@pytest.fixture
def source(run: Path) -> ModelFolder:
    return ModelFolder.read(run)


@pytest.fixture
def made(tmp_path: Path, source: ModelFolder) -> ModelFolder:
    return write_model_folder(tmp_path / "new" / "merged", source, _making(source.record))


def _making(record: ModelRecord) -> Callable[[Path], ModelRecord]:
    def make(folder: Path) -> ModelRecord:
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "tokens").mkdir()
        (folder / "tokens" / "vocab.txt").write_bytes(b"words")
        return replace(record, format="merged", made_by={"torch": "2"}, notes={"why": "a test"})

    return make


def test_a_finished_run_is_a_model_folder_as_it_stands(source: ModelFolder, run: Path) -> None:
    record = source.record
    assert (source.format, source.precision, record.task) == ("adapter", "float32", "sequence_classification")
    assert (record.labels, record.max_length, record.temperature) == (("bad", "good"), 24, 1.5)
    assert record.job_sha256 == source.job.sha256
    assert record.made_by == {"silotune": "0.1.0"}
    assert {"job.json", "statement.json", "sites/north/privacy.json", record.made_from} < {*source.files}
    assert source.hashes()[record.made_from] == record.made_from_sha256
    source.check()


def test_what_was_written_comes_back_with_the_lineage_of_the_run(made: ModelFolder, source: ModelFolder) -> None:
    made.check()
    assert made.lineage == source.lineage
    assert "sites/north/privacy.json" in made.lineage
    assert {*made.files} == {"model.json", "model.safetensors", "tokens/vocab.txt", *source.lineage}
    assert made.record.made_by.keys() == {"silotune", "torch"}
    assert (made.format, made.record.notes, made.job.sha256) == ("merged", {"why": "a test"}, source.job.sha256)
    assert os.listdir(made.path.parent) == ["merged"]


@pytest.mark.parametrize("name", ["model.safetensors", "tokens/vocab.txt", "statement.json"])
def test_a_changed_file_is_found(made: ModelFolder, name: str) -> None:
    (made.path / name).write_bytes(b"other")
    with pytest.raises(ModelError, match="is not as it was written"):
        made.check()
    (made.path / name).unlink()
    (made.path / name).symlink_to("/dev/zero")
    with pytest.raises(ModelError, match="missing or no plain file"):
        made.check()


def test_a_job_of_another_model_is_found(made: ModelFolder) -> None:
    raw = read_object(made.path / "model.json") | {"job_sha256": "0" * 64}
    (made.path / "model.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match="another job"):
        ModelFolder.read(made.path).check()


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside", "a/../../b", ""])
def test_no_place_outside_is_named(made: ModelFolder, name: str) -> None:
    raw = read_object(made.path / "model.json")
    (made.path / "model.json").write_text(json.dumps(raw | {"files": {name: "0" * 64}}))
    with pytest.raises(RunError, match="no place inside the folder"):
        ModelFolder.read(made.path)


def test_what_is_there_is_left_alone(tmp_path: Path, source: ModelFolder) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "mine", tmp_path / "file"):
        with pytest.raises(RunError):
            write_model_folder(out, source, _making(source.record))
    assert (tmp_path / "mine" / "notes").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    write_model_folder(tmp_path / "empty", source, _making(source.record)).check()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ModelError("no")])
def test_nothing_is_left_of_what_failed(tmp_path: Path, source: ModelFolder, error: BaseException) -> None:
    def fail(folder: Path) -> ModelRecord:
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    with pytest.raises(RunError if isinstance(error, OSError) else type(error)):
        write_model_folder(tmp_path / "out", source, fail)
    assert os.listdir(tmp_path) == []


def test_what_is_no_model_is_said(tmp_path: Path, run: Path) -> None:
    with pytest.raises(RunError, match=r"holds no job\.json"):
        ModelFolder.read(tmp_path)
    (tmp_path / "job.json").write_bytes((run / "job.json").read_bytes())
    with pytest.raises(RunError, match="without a tuned adapter"):
        ModelFolder.read(tmp_path)
