"""The trackers of one command, and the observers that tell them of its runs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from server.reports.run import write_report
from server.rounds.observer import Observer
from server.store.checkpoint import Checkpoint
from server.tracking.run_told import Ending, RunTold, Scalar, Status, Tracker, figures_of, settings_of
from server.tracking.sender import Outgoing, Sender
from server.tracking.target import Target
from shared.errors import SilotuneError
from shared.job.job import Job
from shared.version import silotune_version

FAREWELL_SECONDS = 10.0
_REPORT, _ADAPTER = "report.html", "adapter"


@dataclass(frozen=True, kw_only=True)
class Told:
    """What may be told of a run.

    Attributes:
        experiment: what groups it with others.
        name: its own.
        job: what it executes.
        folder: its run folder.
        metrics: whether its evaluation records are nobody's, so that figures on them may leave.
        report: whether everything in its report may.
        settings: further ones, beside the job's.
    """

    experiment: str
    name: str
    job: Job
    folder: Path
    metrics: bool = True
    report: bool = True
    settings: Mapping[str, Scalar] = field(default_factory=dict)


class Tracking:
    """The trackers of one command; as a context it ends with everything sent, or said what was not.

    Args:
        targets: where to.
        warn: tells people what did not work; called in the thread of the run.
        weights: whether the tuned adapter is sent, too.
        seconds: how long the end waits for trackers that have not answered yet, all together.

    Raises:
        ConfigError: a library is missing, or W&B has no key.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        warn: Callable[[str], None],
        *,
        weights: bool = False,
        seconds: float = FAREWELL_SECONDS,
    ) -> None:
        self._warn, self._weights, self._seconds = warn, weights, seconds
        self._senders = [Sender(target, tracker) for target in targets for tracker in [_tracker_of(target)]]
        self._runs: dict[Path, Outgoing] = {}
        self._told: dict[Path, Told] = {}
        self._states: dict[Path, Status] = {}
        self._files = tempfile.TemporaryDirectory(prefix="silotune-tracking-")

    def __enter__(self) -> Tracking:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        stopped: Status = "failed" if isinstance(error, Exception) else "stopped"
        for folder, run in self._runs.items():
            if run.ending is None:
                self.finish(folder, self._states.get(folder, stopped))
        for sender in self._senders:
            sender.close()
        deadline = time.monotonic() + self._seconds
        for sender in self._senders:
            sender.join(deadline)
        for sender in self._senders:
            if missing := sender.missing():
                self._warn(f"tracking: {missing}")
        self._files.cleanup()

    @property
    def active(self) -> bool:
        """Whether there is anybody to tell."""
        return bool(self._senders)

    def observer(self, told: Told) -> Observer:
        """Return who tells the trackers of a run."""
        tags = {
            "silotune.version": silotune_version(),
            "silotune.job_sha256": told.job.sha256,
            "silotune.evaluation": "public" if told.metrics else "private; its figures are not told",
        }
        run = RunTold(
            experiment=told.experiment,
            name=told.name,
            settings={**settings_of(told.job), **told.settings},
            tags=tags,
        )
        self._runs[told.folder], self._told[told.folder] = Outgoing(run, told.folder), told
        return _Teller(self, told)

    def changed(self, told: Told, checkpoint: Checkpoint) -> None:
        """Tell the trackers what a run recorded so far; returns at once."""
        run = self._runs[told.folder]
        found = tuple(figures_of(record, metrics=told.metrics) for record in checkpoint.history)
        # What the metrics of the sites spent comes after the last round's line went out.
        if run.figures and len(found) <= len(run.figures) and found[-1] != run.figures[-1]:
            found = (*run.figures, found[-1])
        if len(found) >= len(run.figures):
            run.figures = found
        self.wake(told.folder)

    def ended(self, told: Told, checkpoint: Checkpoint, *, complete: bool) -> None:
        """Note how a run ended; its report is sent by `finish`."""
        self._states[told.folder] = "completed" if complete else "stopped"
        self.changed(told, checkpoint)

    def finish(self, folder: Path, status: Status | None = None) -> None:
        """Send what is kept of a run: its report, if there is one, and the adapter where that was asked for."""
        run, told = self._runs.get(folder), self._told.get(folder)
        if run is None or told is None or run.ending is not None or not run.figures:  # or it never began
            return
        status = status or self._states.get(folder, "stopped")
        artifacts = {}
        if status == "completed" and told.report and (folder / _REPORT).exists():
            place = Path(self._files.name) / str(len(list(Path(self._files.name).iterdir())))
            place.mkdir()
            try:
                artifacts[_REPORT] = write_report(folder, place / _REPORT, named=False)
            except SilotuneError as error:
                self._warn(f"tracking: the report of {folder} is not sent: {error}")
        if status == "completed" and self._weights and (folder / _ADAPTER).is_dir():
            artifacts[_ADAPTER] = folder / _ADAPTER
        run.ending = Ending(status, artifacts)
        self.wake(folder)

    def wake(self, folder: Path) -> None:
        """Let the trackers look at a run again, and say what went wrong meanwhile."""
        for sender in self._senders:
            sender.wake(self._runs[folder])
            if warning := sender.warning():
                self._warn(f"tracking: {warning}")


class _Teller(Observer):
    """Tells the trackers of one run; see `Observer`."""

    def __init__(self, tracking: Tracking, told: Told) -> None:
        self._tracking, self._told = tracking, told

    def resumed(self, checkpoint: Checkpoint) -> None:
        """See `Observer`."""
        self._tracking.changed(self._told, checkpoint)

    def round_done(self, checkpoint: Checkpoint) -> None:
        """See `Observer`."""
        self._tracking.changed(self._told, checkpoint)

    def metrics_done(self, checkpoint: Checkpoint) -> None:
        """See `Observer`."""
        self._tracking.changed(self._told, checkpoint)

    def ended(self, checkpoint: Checkpoint, *, complete: bool) -> None:
        """See `Observer`."""
        self._tracking.ended(self._told, checkpoint, complete=complete)


def _tracker_of(target: Target) -> Callable[[], Tracker]:
    """Return what makes the tracker; a mistake that can be found without its library is found here.

    Raises:
        ConfigError: W&B has no key.
    """
    if target.kind == "mlflow":
        from server.tracking.mlflow_tracker import MlflowTracker

        return lambda: MlflowTracker(target.place)
    if target.kind == "tensorboard":
        from server.tracking.tensorboard_tracker import TensorBoardTracker

        return lambda: TensorBoardTracker(target.place)
    from server.tracking.wandb_tracker import WandbTracker

    ready = WandbTracker(target.place)
    return lambda: ready
