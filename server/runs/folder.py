"""A run folder that stands alone: job, checkpoint, metrics, adapter in PEFT's format, privacy records, statement.

Guarantees (tests/server/runs/test_folder.py)
    * One process writes to a folder at a time; a second one is refused.
    * A folder that holds anything but a run is refused before any work, and nothing in it is touched. In a run's own
      folder only the names in `OWN_FILES` and `OWN_FOLDERS` are written; whatever else lies there stays.
    * `metrics.jsonl` and the privacy records are derived from the checkpoint, so they cannot disagree with it for
      longer than it takes to write them again on resume.
"""

from __future__ import annotations

import fcntl
import os
import platform
import resource
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from server.records.energy import ENERGY_FILE
from server.records.privacy import CoordinatorRecord, SiteRecord
from server.records.results import DIVERGED_FILE, DROPOUTS_FILE, FOLDS_FILE, REPEATS_FILE, EvaluationRecord
from server.records.rounds import write_rounds
from server.records.run import RunRecord
from server.records.tracking import TRACKING_FILE
from server.rounds.early_stopping import best_round, stopped_early
from server.rounds.secure.attempts import ATTEMPTS_FILE
from server.rounds.site_metrics import site_metrics_record
from server.store.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from shared.errors import RunError
from shared.files.atomic import write_json, write_text
from shared.files.json_files import read_if_there, read_object
from shared.files.outputs import check_own_folder
from shared.job.job import Job
from shared.job.job_file import load_job as load_job
from shared.privacy.central_statement import CentralRelease, central_statement
from shared.privacy.statement import run_statement
from shared.runtime.calibration import Calibration
from shared.runtime.export.peft import save_peft_folder
from shared.runtime.runtime import Runtime
from shared.runtime.thresholds import Thresholds
from shared.tasks import Evaluation

_PACKAGES = (
    "silotune",
    "torch",
    "transformers",
    "peft",
    "opacus",
    "flwr",
    "dp-accounting",
    "cryptography",
    "numpy",
)


OWN_FILES = frozenset(
    {
        ".lock",
        "job.json",
        "run.json",
        "checkpoint.safetensors",
        "metrics.jsonl",
        "privacy.json",
        "statement.json",
        "site_metrics.json",
        "evaluation.json",
        REPEATS_FILE,
        FOLDS_FILE,
        "report.html",
        "compliance-report.html",
        "compliance-report.html.sig.json",
        "compliance-report.pdf",
        "compliance-report.pdf.sig.json",
        "central_ledger.json",
        DIVERGED_FILE,
        ATTEMPTS_FILE,
        DROPOUTS_FILE,
        TRACKING_FILE,
        ENERGY_FILE,
    }
)
OWN_FOLDERS = frozenset({"adapter", "sites", "baselines", "audit", "repeats", "folds"})


class RunFolder:
    """A run folder, locked while open.

    Attributes:
        path: the folder.
        job: the job of this run.
    """

    def __init__(self, path: Path, job: Job, *, resume: bool) -> None:
        """Create the folder, or open it to resume.

        Raises:
            RunError: if it holds a run already and `resume` is False, belongs to another job, or is in use.
        """
        self.path, self.job = path, job
        self._started = time.monotonic()
        check_run_folder(path, job, resume=resume)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path / ".lock", os.O_CREAT | os.O_RDWR, 0o600)
        except OSError as error:
            raise RunError(
                f"the run folder {path} cannot be created: {error.strerror}. Choose another, or mend the permissions."
            ) from None
        try:
            _take_lock(self._lock, path)
            # Once more: another process may have run here between the check and the lock.
            check_run_folder(path, job, resume=resume)
            if not (path / "job.json").exists():
                write_text(path / "job.json", job.canonical_json())
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._lock)

    def load_checkpoint(self) -> Checkpoint | None:
        """Return the last durable state, or None before the first round."""
        return load_checkpoint(self.path / "checkpoint.safetensors", job_sha256=self.job.sha256)

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Make `checkpoint` durable, then write what is derived from it."""
        save_checkpoint(self.path / "checkpoint.safetensors", checkpoint)
        write_rounds(self.path / "metrics.jsonl", checkpoint.history)

    def write_run_info(self, status: str, details: Mapping[str, Any]) -> None:
        """Write `run.json`: status ("running", "completed", "stopped"), times, versions, machine and `details`.

        What `details` tell of the machine stands beside what is found out here.
        Under central DP no time but that of the beginning: how long a run took tells how many sites were drawn.
        """
        path = self.path / "run.json"
        previous = read_if_there(path, RunRecord) or RunRecord(status="running")
        seconds = previous.seconds_before + time.monotonic() - self._started
        now = datetime.now(UTC)
        info = {
            "name": self.job.name,
            "job_sha256": self.job.sha256,
            "created": (previous.created or now).isoformat(timespec="seconds"),
            "finished": None if status == "running" else now.isoformat(timespec="seconds"),
            "status": status,
            "seconds": round(seconds, 3),
            "seconds_before": (previous.seconds or 0.0) if status == "running" else previous.seconds_before,
            "peak_rss_mb": round(peak_rss_mb(), 1),
            "versions": _versions(),
            "machine": {"system": platform.platform(), "cpu_count": os.cpu_count(), **details.get("machine", {})},
        }
        if self.job.privacy.central:
            info |= {"finished": None, "seconds": None, "seconds_before": 0.0, "peak_rss_mb": None}
        write_json(path, info | {key: value for key, value in details.items() if key != "machine"})

    def mark_stopped(self) -> None:
        """Say in `run.json` of a run whose process ended without a word that it does not run; nothing else in it changes."""
        path = self.path / "run.json"
        if path.exists() and (content := read_object(path)).get("status") == "running":
            write_json(path, content | {"status": "stopped"})

    def write_privacy(self, checkpoint: Checkpoint, central: CentralRelease | None = None) -> None:
        """Write every site's `privacy.json` and the run's `statement.json` from the executed mechanisms.

        Under central DP only the coordinator released anything under a guarantee: one `privacy.json` beside the statement.
        """
        how = {
            "stopped_early": stopped_early(checkpoint, self.job),
            "pretrained": not self.job.model.is_image_network,
        }
        if central is not None:
            write_json(self.path / "privacy.json", CoordinatorRecord.of(central, self.job.name, **how))
            write_json(self.path / "statement.json", central_statement(central, self.job.name, **how))
            return
        for name, release in checkpoint.releases.items():
            write_json(
                self.path / "sites" / name / "privacy.json", SiteRecord.of(release, self.job.name, **how).fields()
            )
        write_json(
            self.path / "statement.json", run_statement(list(checkpoint.releases.values()), self.job.name, **how)
        )

    def write_site_metrics(self, checkpoint: Checkpoint) -> None:
        """Write `site_metrics.json` if the job asked for some and the run is over."""
        if checkpoint.site_metrics is not None:
            write_json(self.path / "site_metrics.json", site_metrics_record(checkpoint, self.job))

    def write_result(
        self,
        checkpoint: Checkpoint,
        runtime: Runtime,
        adapter: Mapping[str, Tensor],
        evaluation: Evaluation,
        calibration: Calibration | None = None,
        thresholds: Thresholds | None = None,
    ) -> None:
        """Write the `adapter` that is handed out, in PEFT's own format, and `evaluation.json`, which names the round it is of."""
        temperature = calibration.temperature if calibration else 1.0
        save_peft_folder(self.path / "adapter", runtime, self.job, adapter, temperature=temperature)
        best = best_round(checkpoint.history, self.job) if checkpoint.best_adapter else checkpoint.round_number
        record = EvaluationRecord(
            **vars(evaluation),
            primary_metric=runtime.task.primary_metric,
            higher_is_better=runtime.task.higher_is_better,
            round=best,
            calibration=calibration,
            thresholds=thresholds,
        )
        write_json(self.path / "evaluation.json", record)


def peak_rss_mb() -> float:
    """Return the largest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def check_place(path: Path) -> None:
    """Find what speaks against a run of whatever job in `path`; writes nothing, and is quick.

    Raises:
        RunError: if it is no folder, cannot be written, or holds anything but a run of ours.
    """
    check_own_folder(path, marker="job.json", own=(".lock",), what="run of Silotune")
    if not (path / "job.json").exists():
        return
    for names, kind, fits in ((OWN_FILES, "file", Path.is_file), (OWN_FOLDERS, "folder", Path.is_dir)):
        for place in (path / name for name in sorted(names)):
            if place.is_symlink() or (place.exists() and not fits(place)):
                raise RunError(f"{place} is not a {kind}, as a run has it; move it away or choose another folder.")


def foreign_entries(path: Path) -> list[str]:
    """Return the names in a run folder that no run has, sorted; half-written files of ours are none."""
    known = OWN_FILES | OWN_FOLDERS
    half_written = tuple(f".{name}." for name in known)
    return sorted(
        entry.name for entry in path.iterdir() if entry.name not in known and not entry.name.startswith(half_written)
    )


def check_run_folder(path: Path, job: Job, *, resume: bool) -> None:
    """Find what speaks against running `job` in `path`; writes nothing.

    Raises:
        RunError: see `check_place`; or if it holds a run already and `resume` is False, or belongs to another job.
    """
    check_place(path)
    if not (path / "job.json").exists():
        return
    read_if_there(path / "run.json", RunRecord)
    known = load_job(path)
    if known.sha256 != job.sha256:
        raise RunError(
            f"{path} holds a run with another configuration (job {known.sha256[:12]}, now {job.sha256[:12]}). Choose "
            "another folder, or resume with the configuration it was started with."
        )
    if not resume:
        raise RunError(f"{path} holds a run already; resume it with --resume, or choose another folder.")


def _take_lock(handle: int, path: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise RunError(f"another process is running in {path}; wait for it or choose another folder.") from None


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
