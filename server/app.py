"""The ServerApp: one job, one run folder, one Grid; the same object in every transport."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import ServerApp
from flwr.serverapp.grid import Grid
from torch import Tensor

from server.records.run import RunRecord
from server.reports.run import write_report_if_possible
from server.rounds.central import CentralPrivacy
from server.rounds.earlier_requests import Asked, EarlierRequests
from server.rounds.early_stopping import is_over, require_public_records
from server.rounds.local import LocalPrivacy
from server.rounds.loop import Coordinator, Privacy, run_rounds
from server.rounds.observer import Observer
from server.rounds.public_records import PublicRecords, hold_back
from server.rounds.roster import Authority
from server.rounds.secure.round import SecurePrivacy
from server.runs.folder import RunFolder
from server.store.checkpoint import Checkpoint
from shared.data.known_texts import ContentSum
from shared.files.json_files import read_if_there
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.models.batches import Batch, Example
from shared.privacy.randomness import SiteRandomness
from shared.runtime.calibration import Calibration, calibrate
from shared.runtime.runtime import Runtime, load_runtime, on_cpu
from shared.runtime.thresholds import Thresholds, choose_offsets, measured, with_offsets
from shared.tasks import Evaluation, Record, task_of
from shared.tensors import adapters

log = logging.getLogger("silotune.coordinator")


@dataclass
class Run:
    """One run as the coordinator sees it.

    Attributes:
        job: the job.
        folder: where everything about the run is kept.
        public_records: labelled public evaluation data.
        compute: the coordinator's own speed settings.
        details: further facts for `run.json` (mode, data set).
        resume: continue a run that is there.
        evaluate_every: rounds between evaluations.
        stop_after: stop after this round; the run can be resumed.
        report: write `report.html` at the end.
        observer: is told about progress.
        authority: signs requests to real sites; None in a simulation.
        new_randomness: of the coordinator under central DP; replaced only by tests.
        prepare: called once everything was checked and the folder is locked, before the first message; a simulation
            makes its sites here.
        may_fit: whether the public records may decide how sure the handed-out model is. They must be nobody's: records of the
            sites would need a budget for it.
        finished: the last checkpoint, once the run has ended.
    """

    job: Job
    folder: Path
    public_records: Sequence[Record]
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    details: Mapping[str, Any] = field(default_factory=dict)
    resume: bool = False
    evaluate_every: int = 1
    stop_after: int | None = None
    report: bool = True
    observer: Observer = field(default_factory=Observer)
    authority: Authority | None = None
    new_randomness: Callable[[], SiteRandomness] = SiteRandomness.from_os
    prepare: Callable[[], None] = lambda: None
    may_fit: bool = True
    finished: Checkpoint | None = None


def make_server_app(run: Run, *, wrap_grid: Callable[[Grid], Grid] = lambda grid: grid) -> ServerApp:
    """Return a ServerApp that executes `run`; when it returns, `run.finished` holds the last checkpoint.

    Args:
        wrap_grid: puts something between the coordinator and Flower's Grid, such as simulated drop-outs.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        execute(wrap_grid(grid), run)

    return app


def execute(grid: Grid, run: Run) -> Checkpoint:
    """Run the job's remaining rounds over `grid` and write everything that a finished run folder holds."""
    # Model and data first: what is wrong with them is found before anything is written.
    require_public_records(run.job, len(run.public_records))
    runtime = load_runtime(run.job, run.compute)
    parts = _public_parts(run)
    examples = runtime.encode(parts.reported)
    deciding = runtime.encode(parts.deciding) if parts.deciding else []
    details = {
        **_with_lengths(run.details, runtime, examples),
        "public_records": parts.counts,
        "machine": runtime.machine,
        **_evaluation_texts(run),
    }
    with RunFolder(run.folder, run.job, resume=run.resume) as folder:
        privacy = privacy_of(run.job, run.folder, new_randomness=run.new_randomness)
        run.prepare()
        folder.write_run_info("running", details)
        runtime.warm_cache([*examples, *deciding], run.observer.preparing)
        checkpoint = folder.load_checkpoint()
        if checkpoint is not None:
            privacy.check(checkpoint)  # before anything is stated from an account that was lost
            folder.save_checkpoint(checkpoint)
        classes = run.job.task.has_classes
        evaluator, decider = (_Evaluator(runtime, some, classes=classes) for some in (examples, deciding))
        coordinator = _coordinator(run, folder, runtime, evaluator, decider if deciding else None, privacy)
        try:
            checkpoint = run_rounds(grid, coordinator, checkpoint, stop_after=run.stop_after)
        except BaseException:
            # What went wrong first is what matters, for example a full disk.
            with contextlib.suppress(Exception):
                write_spent(folder, privacy, run.authority.asked_since if run.authority else None)
            with contextlib.suppress(Exception):
                folder.write_run_info("stopped", details)
            raise
        folder.write_privacy(checkpoint, privacy.release())
        folder.write_site_metrics(checkpoint)
        fit_by = decider if deciding and run.may_fit else None
        folder.write_result(checkpoint, runtime, *_judged(runtime, checkpoint.result, evaluator, fit_by))
        complete = is_over(checkpoint, run.job)
        folder.write_run_info("completed" if complete else "stopped", details)
        run.observer.ended(checkpoint, complete=complete)
        run.finished = checkpoint
        if run.report:
            write_report_if_possible(run.folder)
        return checkpoint


def privacy_of(
    job: Job, folder: Path, *, new_randomness: Callable[[], SiteRandomness] = SiteRandomness.from_os
) -> Privacy:
    """Return who adds a run's noise and keeps its account; the only place where that is asked."""
    if job.privacy.mechanism == "central":
        return CentralPrivacy(job, folder, new_randomness=new_randomness)
    if job.privacy.shares_noise:
        return SecurePrivacy(job, folder)
    return LocalPrivacy(job)


class _Evaluator:
    """Evaluates adapters on public data; the last answer is kept, for the end asks for it again, and so are logits of classes."""

    def __init__(self, runtime: Runtime, examples: Sequence[Example], *, classes: bool) -> None:
        self._runtime, self._examples, self._classes = runtime, examples, classes
        self._last: tuple[Mapping[str, Tensor], Evaluation] | None = None
        self._parts: list[tuple[Tensor, Batch]] = []

    def __call__(self, adapter: Mapping[str, Tensor]) -> Evaluation:
        if self._last is None or self._last[0] is not adapter:
            self._runtime.load(adapter)
            self._last = (adapter, self._evaluate())
        return self._last[1]

    def parts(self, adapter: Mapping[str, Tensor]) -> Sequence[tuple[Tensor, Batch]]:
        """Return (logits, batch) of all examples, on the CPU; of a task with classes."""
        self(adapter)
        return self._parts

    def _evaluate(self) -> Evaluation:
        if not self._classes:
            return self._runtime.evaluate(self._examples)
        self._parts = list(on_cpu(self._runtime.outputs(self._examples)))
        return self._runtime.task.evaluate(self._parts)


def _judged(
    runtime: Runtime, adapter: Mapping[str, Tensor], evaluator: _Evaluator, decider: _Evaluator | None
) -> tuple[Mapping[str, Tensor], Evaluation, Calibration | None, Thresholds | None]:
    """Return what is handed out of the final adapter, how it does on the reported records, and what deciding ones chose for it.

    Thresholds come first: the temperature, and every figure, is of the model that answers with them.
    """
    task, thresholds = runtime.task, None
    if not task.config.has_classes:
        return adapter, evaluator(adapter), None, None
    if task.config.thresholds == "public":
        before = evaluator.parts(adapter)
        offsets, fitted_on = choose_offsets(task, decider.parts(adapter) if decider else [])
        if any(offsets):
            adapter = with_offsets(adapter, runtime.model.head_parameters(), offsets)
        thresholds = measured(task, offsets, fitted_on, before, evaluator.parts(adapter))
        if thresholds.warning:
            log.warning("%s", thresholds.warning)
    calibration = calibrate(task, decider.parts(adapter) if decider else [], evaluator.parts(adapter))
    return adapter, evaluator(adapter), calibration, thresholds


def _public_parts(run: Run) -> PublicRecords:
    """Return the public records that are reported and those that decide; a resumed run keeps the parts it was started with."""
    started = read_if_there(run.folder / "run.json", RunRecord) if run.resume else None
    # Older versions held none back and did not say.
    if started is not None and not (started.public_records and started.public_records.deciding):
        return PublicRecords(reported=run.public_records, deciding=())
    return hold_back(run.public_records, task_of(run.job).roles[0])


def write_spent(folder: RunFolder, privacy: Privacy, asked_since: Callable[[int], Sequence[Asked]] | None) -> None:
    """Write what the sites may have released so far, the round that was given up too: a run that never goes on has spent it.

    Args:
        asked_since: see `Authority`; None of a simulation, which signs requests to nobody.

    Raises:
        SilotuneError: what was asked cannot be read; what is complete is written.
    """
    checkpoint = folder.load_checkpoint()
    if checkpoint is None:
        return
    try:
        asked = EarlierRequests(asked_since(checkpoint.round_number) if asked_since else ())
        checkpoint = privacy.with_open_requests(checkpoint, asked)
    except Exception:
        log.exception("what was asked after round %d is not in the statement", checkpoint.round_number)
        raise
    finally:
        folder.write_privacy(checkpoint, privacy.release())


def _evaluation_texts(run: Run) -> dict[str, Any]:
    """Return by what `silotune monitor` knows the public evaluation texts again; nothing of records that count as private."""
    dataset = run.details.get("dataset")
    if task_of(run.job).roles[0] != "text" or (isinstance(dataset, Mapping) and dataset.get("test_kind") == "private"):
        return {}
    return {"evaluation_texts": ContentSum(record["text"] for record in run.public_records).as_dict()}


def _with_lengths(details: Mapping[str, Any], runtime: Runtime, examples: Sequence[Example]) -> Mapping[str, Any]:
    """Return the details with how many public texts fill `model.max_length`: what they have beyond it is cut off."""
    if runtime.tokenizer is None or not isinstance(details.get("dataset"), Mapping):
        return details
    full = sum(example.length >= runtime.max_length for example in examples)
    return {**details, "dataset": {**details["dataset"], "test_records_at_max_length": full}}


def _coordinator(
    run: Run,
    folder: RunFolder,
    runtime: Runtime,
    evaluator: _Evaluator,
    decider: _Evaluator | None,
    privacy: Privacy,
) -> Coordinator:
    return Coordinator(
        job=run.job,
        initial_adapter=runtime.initial_global(run.job.averages_products),
        update_shapes=adapters.shapes_of(runtime.initial),
        privacy=privacy,
        evaluate=lambda adapter: evaluator(adapter).metrics,
        evaluate_every=run.evaluate_every,
        save=folder.save_checkpoint,
        observer=run.observer,
        authority=run.authority,
        decide=(lambda adapter: decider(adapter).metrics) if decider and run.job.training.early_stopping else None,
    )
