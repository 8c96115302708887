"""A model folder: what a run trained in a form that something runs, with its lineage as it stood in the run, byte for byte.

A finished run folder is one as it stands, of format `adapter`. What `silotune export` and `silotune compress` write is described
by `model.json`.

Guarantees (tests: tests/shared/runtime/export/test_folder.py)
    * `write_model_folder` leaves a whole folder or none, whatever fails or is killed, and replaces nothing that is there.
    * `ModelFolder.check` raises if a file that belongs to the model was changed or is missing, or is of another job.
    * No file outside the folder is read, whatever `model.json` says, and no link is followed.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from shared.errors import ModelError, RunError, SilotuneError, excerpt
from shared.files.atomic import sync_folder, write_json
from shared.files.json_files import read_record
from shared.files.outputs import check_folder, make_folder
from shared.job.job import Job
from shared.job.job_file import check_run_folder, load_job
from shared.job.kinds import TaskKind
from shared.models.model_files import check_model_files, check_sizes
from shared.runtime.calibration import load_temperature
from shared.runtime.export.graph_file import check_graphs
from shared.trust.signed_file import sha256_and_size
from shared.version import silotune_version

MODEL_FILE, CARD_FILE, ADAPTER_FOLDER = "model.json", "README.md", "adapter"
STATE_FILE = f"{ADAPTER_FOLDER}/silotune_state.safetensors"
LINEAGE = ("job.json", "run.json", "privacy.json", "statement.json", "evaluation.json", "site_metrics.json")
_LINEAGE_BELOW = ("sites/*/privacy.json", "audit/tier[123].json")

Format = Literal["adapter", "merged", "onnx"]
Precision = Literal["float32", "int8"]


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or path.as_posix() != name or name in ("", "."):
        raise ValueError(f"{name[:80]!r} is no place inside the folder")
    return name


FileName = Annotated[str, AfterValidator(_inside)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output of a graph.

    Attributes:
        shape: a number, or the name of an axis whose length is free.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """`model.json`: what the folder holds and what it was made from.

    Attributes:
        format: `adapter` (needs its backbone), `merged` (transformers alone) or `onnx` (a graph).
        precision: of the weights.
        task, labels, max_length, pooling: as in the job; `labels` in the order of the outputs.
        name, job_sha256: of the run.
        temperature: of the run's calibration; the outputs of `merged` and `onnx` are divided by it already.
        made_from, made_from_sha256: the file that this was made from, in its own folder, and its SHA-256.
        made_by: versions of what made it.
        opset, inputs, outputs: of a graph.
        files: SHA-256 of every other file of the folder.
        notes: what else the maker tells, such as how a model was compressed, by topic.
    """

    format: Format
    precision: Precision = "float32"
    task: TaskKind
    labels: tuple[str, ...] = ()
    max_length: Annotated[int, Field(ge=1)]
    pooling: Literal["mean", "first"] = "mean"
    name: str
    job_sha256: Sha256
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    made_from: FileName
    made_from_sha256: Sha256
    made_by: dict[str, str] = field(default_factory=dict)
    opset: int | None = None
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    files: dict[FileName, Sha256] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelFolder:
    """A model folder on the disk.

    Attributes:
        path: the folder.
        record: what it holds; of a run folder, which has no `model.json`, what one would say, without `files`.
    """

    path: Path
    record: ModelRecord

    @classmethod
    def read(cls, path: Path) -> ModelFolder:
        """Return the model folder at `path`; hashes are compared by `check` alone.

        Raises:
            RunError: if it is neither a finished run nor what `write_model_folder` wrote, saying what is missing.
        """
        if os.path.lexists(path / MODEL_FILE):
            return cls(path, read_record(path / MODEL_FILE, ModelRecord))
        check_run_folder(path)
        if not (path / STATE_FILE).is_file():
            raise RunError(
                f"{path} is a run without a tuned adapter ({STATE_FILE} is missing): it is written when a run ends. Finish the "
                "run first, or give the folder of a finished one."
            )
        return cls(path, _record_of_run(path))

    @property
    def format(self) -> Format:
        """See `ModelRecord`."""
        return self.record.format

    @property
    def precision(self) -> Precision:
        """See `ModelRecord`."""
        return self.record.precision

    @cached_property
    def job(self) -> Job:
        """The job that trained it; `RunError` if it cannot be read."""
        return load_job(self.path)

    @cached_property
    def files(self) -> tuple[str, ...]:
        """Places below the folder of all files that belong to the model, sorted; whatever else lies there is not part of it."""
        if self.record.files:
            return tuple(sorted([MODEL_FILE, *self.record.files]))
        adapter = [f"{ADAPTER_FOLDER}/{entry.name}" for entry in (self.path / ADAPTER_FOLDER).iterdir()]
        return tuple(sorted([name for name in adapter if _is_plain(self.path / name)] + lineage_files(self.path)))

    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of every file in `files`, computed now.

        Raises:
            ModelError: if one is missing, a link or a device.
        """
        found = {}
        for name in self.files:
            if not _is_plain(self.path / name):
                raise ModelError(
                    f"{self.path / name} is missing or no plain file; restore the folder, or make it anew."
                )
            found[name] = sha256_and_size(self.path / name)[0]
        return found

    def check(self) -> None:
        """Compare every file with its hash in `model.json`, and the job with the one that the model is of.

        Raises:
            ModelError: naming the first file that differs, or is larger than such a one may be, or asks for more; or that a graph
                reads outside the model.
        """
        check_sizes(self.path, self.files)
        found = self.hashes()
        for name, expected in self.record.files.items():
            if found[name] != expected:
                raise ModelError(
                    f"{self.path / name} is not as it was written (SHA-256 {found[name][:12]}…, model.json says "
                    f"{expected[:12]}…); do not use the folder, make it anew."
                )
        if self.record.files:
            check_model_files(self.path)
        check_graphs(self.path, self.files)
        self._check_job()

    def _check_job(self) -> None:
        """Raise `ModelError` unless the job is the one that the model is of, and the record says what that says."""
        if self.job.sha256 != self.record.job_sha256:
            raise ModelError(
                f"{self.path / 'job.json'} is another job ({self.job.sha256[:12]}) than the model is of "
                f"({self.record.job_sha256[:12]}); do not use the folder, make it anew."
            )
        of_job = _of_job(self.job)
        for key, value in of_job.items():
            if (said := getattr(self.record, key)) != value:
                raise ModelError(
                    f"{self.path / MODEL_FILE} says {key} {excerpt(said)}, and its job {excerpt(value)}; do not use the folder, "
                    "make it anew."
                )

    @property
    def lineage(self) -> dict[str, bytes]:
        """The run's own records, by their places there and byte for byte, those that exist."""
        return {name: (self.path / name).read_bytes() for name in lineage_files(self.path)}


def lineage_files(folder: Path) -> list[str]:
    """Return the places of a run's own records in `folder`, sorted, those that exist."""
    below = [path.relative_to(folder).as_posix() for pattern in _LINEAGE_BELOW for path in folder.glob(pattern)]
    return sorted(name for name in (*LINEAGE, *below) if _is_plain(folder / name))


def check_new_model_folder(out: Path) -> None:
    """Raise `RunError` unless `out` is new or empty; writes nothing, so a command asks before it works."""
    check_folder(out)
    if out.is_symlink() or (out.is_dir() and any(out.iterdir())):
        raise RunError(
            f"{out} is a link or holds files already, which are left alone; choose a new folder for the model."
        )


def write_model_folder(out: Path, source: ModelFolder, make: Callable[[Path], ModelRecord]) -> ModelFolder:
    """Write a model folder: what `make` puts into the folder that it is given, with the lineage of `source`.

    Args:
        out: new, or an empty folder.
        make: writes the model's files and its card; returns the record, in which `files` and our version are filled in here.

    Raises:
        RunError: if `out` is in use or cannot be written; then nothing is left of it.
    """
    check_new_model_folder(out)
    make_folder(out.absolute().parent)
    temporary = out.absolute().parent / f".{out.name}.{secrets.token_hex(4)}"
    try:
        temporary.mkdir()
        for name, content in source.lineage.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_bytes(content)
        record = make(temporary)
        record = replace(
            record, files=_files_below(temporary), made_by={"silotune": silotune_version(), **record.made_by}
        )
        write_json(temporary / MODEL_FILE, asdict(record))
        _sync_all(temporary)
        temporary.rename(out)
        sync_folder(out.absolute().parent)
    except OSError as error:
        raise RunError(
            f"the model folder {out} could not be written ({error.strerror or error}); nothing was left there. Free space or "
            "choose another folder."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return ModelFolder.read(out)


def versions(*packages: str) -> dict[str, str]:
    """Return the installed version of each package, for `ModelRecord.made_by`."""
    from importlib.metadata import version

    return {name: version(name) for name in packages}


def _record_of_run(path: Path) -> ModelRecord:
    job = load_job(path)
    return ModelRecord(
        format="adapter",
        **_of_job(job),
        job_sha256=job.sha256,
        temperature=load_temperature(path / ADAPTER_FOLDER),
        made_from=STATE_FILE,
        made_from_sha256=sha256_and_size(path / STATE_FILE)[0],
        made_by=_made_by(path),
    )


def _of_job(job: Job) -> dict[str, Any]:
    """Return what a record says that its job says as well."""
    return {
        "task": job.task.kind,
        "labels": job.task.labels,
        "max_length": job.task.num_pixels or job.model.max_length,
        "pooling": job.model.pooling,
        "name": job.name,
    }


def _made_by(run: Path) -> dict[str, str]:
    """Return the versions that a run was made with; none if it does not say."""

    @dataclass(frozen=True, kw_only=True)
    class Versions:
        versions: dict[str, str] = field(default_factory=dict)

    try:
        return read_record(run / "run.json", Versions).versions
    except SilotuneError:
        return {}


def _files_below(folder: Path) -> dict[str, str]:
    found: Mapping[str, Path] = {
        path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()
    }
    return {name: sha256_and_size(path)[0] for name, path in sorted(found.items())}


def _sync_all(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            sync_folder(path)
            continue
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _is_plain(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False
