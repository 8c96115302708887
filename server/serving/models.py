"""A model from a reference to one that answers: copied where nobody else writes, verified there, loaded from there.

Formal guarantees (tests: tests/server/serving/test_models.py)
    * A version of a registry answers only after `server.registry.verification.verify` passed on the very bytes that are loaded:
      both work on a private copy (test_what_is_loaded_is_what_was_verified, test_a_changed_version_is_not_served).
    * A retired version is not loaded (test_a_retired_version_is_not_served).
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from server.registry.references import Resolved
from server.registry.verification import verify
from server.serving.growing import Cached, Growing, Recomputed
from shared.errors import ConfigError, ModelError, SilotuneError, model_errors
from shared.job.compute import ComputeConfig
from shared.job.kinds import TaskKind
from shared.models.batches import Example, collate
from shared.runtime.calibration import load_temperature
from shared.runtime.export.exported import Exported, load_exported
from shared.runtime.export.exporting import export
from shared.runtime.export.folder import ADAPTER_FOLDER, ModelFolder, Precision
from shared.runtime.export.peft import load_state
from shared.runtime.inference import head_outputs, require_answers, require_logits
from shared.runtime.runtime import Runtime, load_own_runtime
from shared.tasks import Task, task_of
from shared.tasks.predicting import Predicting

EngineName = Literal["auto", "onnx", "torch"]
_MOST_AT_ONCE = 4
"""Batches; on many cores each gets several, lest a single long text take long."""


@dataclass(frozen=True)
class Plan:
    """How models are to be run.

    Attributes:
        engine: `auto` is ONNX Runtime where it is installed, else PyTorch.
        precision: None: as the model is; float32 of an adapter.
        threads: that compute; 0 is one for each core.
        explain: whether answers can be explained, which takes the adapter in PyTorch beside the engine.
    """

    engine: EngineName = "auto"
    precision: Precision | None = None
    threads: int = 0
    explain: bool = False

    @property
    def at_once(self) -> int:
        """Batches of texts that are computed at the same time, by as many threads each."""
        return min(_MOST_AT_ONCE, self.threads_of_one)

    @property
    def threads_of_each(self) -> int:
        """Threads of one such batch."""
        return self.threads_of_one // self.at_once

    @property
    def threads_of_one(self) -> int:
        """Threads where one batch at a time is computed.

        By their number, not as 0: ONNX Runtime then pins no thread to a core that others need as well.
        """
        return self.threads or len(os.sched_getaffinity(0))


@dataclass(frozen=True, eq=False)
class Model:
    """A loaded model, ready to answer; it is used by the engine's threads alone, but for `question` and `answer`.

    Attributes:
        version: NAME:N, or of a folder its name.
        engine: `onnx` or `torch`.
        manifest_sha256: of the version; "" of a folder.
        at_once: batches that it can compute at the same time; PyTorch's models are not made for more than one.
        caches: of a graph that continues texts, see `Cached`; else none.
        explaining: the same model in PyTorch, for the thread that explains; None without `Plan.explain`.
    """

    version: str
    engine: Literal["onnx", "torch"]
    precision: Precision
    manifest_sha256: str
    runtime: Runtime | Exported
    at_once: int = 1
    caches: tuple[tuple[str, int, int], ...] = ()
    explaining: Runtime | None = None

    @property
    def task(self) -> Task:
        """What it answers."""
        return self.runtime.task

    @property
    def kind(self) -> TaskKind:
        """Of its task."""
        return self.runtime.task.kind

    @property
    def max_length(self) -> int:
        """Tokens that it reads at once."""
        return self.runtime.max_length

    def outputs(self, examples: Sequence[Example]) -> list[Tensor]:
        """Return the head's output of every example of one batch, in order; called for up to `at_once` at the same time."""
        if isinstance(self.runtime, Exported):
            return list(self.runtime.compute(collate(examples)).unbind())
        return head_outputs(self.runtime, examples)

    def growing(self) -> Growing:
        """Return an empty group of texts that are continued together."""
        if isinstance(self.runtime, Exported) and self.caches:
            return Cached(self.runtime.session, self.caches)
        return Recomputed(self.runtime)


def load(resolved: Resolved, plan: Plan) -> Model:
    """Copy, verify and load the model that a reference led to, and let it answer once.

    Raises:
        TrustError, ModelError, RunError: if it does not verify, or cannot be loaded.
        ConfigError: if it cannot be had as planned, or what runs it is not installed.
    """
    version = resolved.version
    with tempfile.TemporaryDirectory(prefix="silotune-serve-") as temporary, _named(temporary, resolved):
        private = Path(temporary)
        if version is None:
            folder = ModelFolder.read(_copied(ModelFolder.read(resolved.folder), private / "model"))
            folder.check()
            name, manifest = resolved.folder.resolve().name, ""
        else:
            with _readable(version.path):
                shutil.copytree(version.path, private / "version", symlinks=True)
            folder = verify(replace(version, path=private / "version")).folder
            name, manifest = version.reference, version.manifest_sha256
        with model_errors(f"{name} cannot be loaded"):
            model = _loaded(folder, private, plan, name, manifest)
            if plan.explain:
                model = replace(model, explaining=_explaining(folder, plan, name))
            _warm(model)
    return model


@contextmanager
def _named(private: str, resolved: Resolved) -> Iterator[None]:
    """Let errors name what the reference led to, in the place of the private copy of it."""
    shown = resolved.folder if resolved.version is None else resolved.version.reference
    try:
        yield
    except SilotuneError as error:
        told = re.sub(
            rf"{re.escape(private)}(/version/model|/version|/model|/exported)?", lambda found: str(shown), str(error)
        )
        raise type(error)(told) from None


def _loaded(folder: ModelFolder, private: Path, plan: Plan, name: str, manifest: str) -> Model:
    engine = _engine(folder, plan)
    if engine == "onnx" and folder.format != "onnx":
        folder = export(folder, private / "exported", "onnx", plan.precision or "float32")
    if plan.precision is not None and folder.precision != plan.precision:
        raise ConfigError(
            f"{name} is {folder.precision}; --precision {plan.precision} is made from a run, or from a version that holds its "
            "adapter, with --engine onnx."
        )
    if folder.format == "adapter":
        runtime = _adapted(folder, plan)
        return Model(name, engine, "float32", manifest, runtime)
    at_once = plan.at_once if engine == "onnx" and isinstance(task_of(folder.job), Predicting) else 1
    exported = load_exported(folder, threads=plan.threads_of_each if at_once > 1 else plan.threads_of_one)
    names = tuple(
        (one.name, int(one.shape[1]), int(one.shape[3]))
        for one in folder.record.inputs
        if one.name.startswith("past_key_values")
    )
    return Model(name, engine, folder.precision, manifest, exported, at_once, names)


def _engine(folder: ModelFolder, plan: Plan) -> Literal["onnx", "torch"]:
    """Return what runs the model; ONNX Runtime computes on the processor alone, so with a GPU `auto` is PyTorch."""
    if plan.engine == "auto":
        if folder.format == "onnx":
            return "onnx"
        known = find_spec("onnxruntime") is not None and find_spec("onnx") is not None
        return "onnx" if known and (plan.precision == "int8" or not torch.cuda.is_available()) else "torch"
    if plan.engine == "torch" and folder.format == "onnx":
        raise ConfigError(f"{folder.path.name} is an ONNX graph, which PyTorch does not run; leave --engine out.")
    if plan.engine == "torch" and plan.precision == "int8":
        raise ConfigError("--precision int8 goes with --engine onnx.")
    return plan.engine


def _adapted(folder: ModelFolder, plan: Plan) -> Runtime:
    if plan.threads:
        torch.set_num_threads(plan.threads)
    adapter = folder.path / ADAPTER_FOLDER
    runtime = load_own_runtime(folder.job, ComputeConfig(precision="float32", cache_frozen_layers=False))
    runtime.load(load_state(adapter, runtime, folder.job), temperature=load_temperature(adapter))
    return runtime


def _explaining(folder: ModelFolder, plan: Plan, name: str) -> Runtime:
    """Return the model with gradients, apart from the one that the engine's thread uses."""
    if folder.format != "adapter" or folder.job.task.kind in ("causal_lm", "replies", "image_classification"):
        raise ConfigError(
            f"{name} is {folder.format} and its task {folder.job.task.kind}; --explain is for versions that hold their adapter "
            "and read texts. Serve such a one, or leave --explain out."
        )
    if find_spec("captum") is None:
        raise ConfigError("--explain needs the package captum: pip install 'silotune[explain]'")
    return _adapted(folder, plan)


def _warm(model: Model) -> None:
    """Let the model compute something, which also proves that it can.

    Raises:
        ModelError: if what comes out are no numbers, or others than the task has.
    """
    if isinstance(model.task, Predicting):
        require_answers(model.task, model.max_length, model.outputs, model.version)
    else:
        require_logits(model.growing().join([[1, 2]]), name=model.version)


def _copied(folder: ModelFolder, to: Path) -> Path:
    """Copy the files that belong to a model, and no others that lie there."""
    with _readable(folder.path):
        for name in folder.files:
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder.path / name, to / name, follow_symlinks=False)
    return to


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, shutil.Error) as error:
        reason = getattr(error, "strerror", None) or "a file of it cannot be read"
        raise ModelError(
            f"{path} could not be copied to be verified ({reason}); free space, or mend the folder."
        ) from None
