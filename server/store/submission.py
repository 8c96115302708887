"""A submitted job: its folder is the whole of it, so a coordinator that is killed and restarted finds everything there.

signed_job.json   the job with the signature of who submitted it
settings.json     what only the coordinator needs: compute, evaluation, intervals
evaluation.jsonl  public evaluation records
state.json        "submitted", "running", "completed", "failed" or "stopped", with reasons
log.txt           what the run wrote about itself
stop              appears when somebody asks to stop it
run/              the run folder
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from shared.errors import RunError
from shared.files.atomic import write_json, write_text
from shared.files.json_files import read_record
from shared.files.places import Below
from shared.trust.signed_job import SignedJob

State = Literal["submitted", "running", "completed", "failed", "stopped"]
OPEN: tuple[State, ...] = ("submitted", "running")
"""On these the coordinator still has to work."""


class _State(BaseModel):
    """What is read of `state.json`; other keys are kept as they are."""

    model_config = ConfigDict(extra="allow")

    state: State
    job_sha256: str
    started: str | None = None
    problem: str | None = None
    defect: bool = False
    waiting: str | None = None
    refused: dict[str, str] | None = None
    awaiting: list[str] | None = None
    stopped_early: int | None = None
    metrics: dict[str, float | None] | None = None


@dataclass(frozen=True)
class Submission:
    """The folder of one submitted job."""

    path: Path
    run_folder = Below("run")
    log = Below("log.txt")

    @property
    def name(self) -> str:
        """Number and name, for example 0001-demo."""
        return self.path.name

    def signed_job(self) -> SignedJob:
        """Return the job, its signature checked."""
        file = self.path / "signed_job.json"
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"{file} cannot be read ({error}); restore it, or submit the job again.") from None
        return SignedJob.from_json(text, source=str(file))

    def state(self) -> dict[str, Any]:
        """Return the content of `state.json`.

        Raises:
            RunError: if it is damaged.
        """
        return read_record(self.path / "state.json", _State).model_dump(exclude_unset=True)

    def note(self, state: State | None = None, **facts: Any) -> None:
        """Write `state.json` anew with what changed."""
        known = self.state()
        if state is not None and state != known["state"]:
            known |= {"state": state, "since": now_text()}
        write_json(self.path / "state.json", known | facts)

    @property
    def is_open(self) -> bool:
        """Whether the coordinator still has to work on it."""
        return self.state()["state"] in OPEN

    @property
    def stop_requested(self) -> bool:
        """Whether somebody asked to stop it."""
        return (self.path / "stop").exists()

    def request_stop(self) -> None:
        """Ask the coordinator to stop this job.

        Raises:
            RunError: it has ended already.
        """
        if not self.is_open:
            raise RunError(f"{self.name} has ended already ({self.state()['state']}).")
        write_text(self.path / "stop", now_text())

    def check_resumable(self) -> None:
        """Check that the job was stopped, and would go on.

        Raises:
            RunError: it was not stopped, or is just being.
            TrustError: its signature has expired.
        """
        if (state := self.state()["state"]) != "stopped":
            raise RunError(f"{self.name} is {state}; only a job that was stopped can be resumed.")
        self.signed_job().check_time(datetime.now(UTC))

    def resume(self) -> None:
        """Let a job that was stopped go on, from its last durable round.

        Raises:
            RunError, TrustError: see `check_resumable`.
        """
        self.check_resumable()
        (self.path / "stop").unlink(missing_ok=True)  # first: without it a job that waits is not stopped once more
        self.note("submitted", waiting=None, problem=None)

    def progress(self) -> int:
        """Return the number of rounds that are durable."""
        try:
            return (self.run_folder / "metrics.jsonl").read_bytes().count(b"\n") - 1
        except OSError:
            return 0


def submissions(jobs: Path) -> list[Submission]:
    """Return all submitted jobs, oldest first."""
    return [Submission(path) for path in sorted(jobs.glob("[0-9]*-*")) if (path / "state.json").exists()]


def find(jobs: Path, name: str | None) -> Submission:
    """Return the job called `name` (number, number-name or name), or the newest.

    Raises:
        RunError: if there is none.
    """
    known = submissions(jobs)
    if not known:
        raise RunError(f"{jobs} holds no job yet; submit one with: silotune coordinator submit")
    if name is None:
        return known[-1]
    for submission in reversed(known):
        number, _, rest = submission.name.partition("-")
        if name in (submission.name, rest, number, number.lstrip("0")):
            return submission
    raise RunError(f"no job {name!r}; there are: {', '.join(submission.name for submission in known)}.")


def now_text() -> str:
    """Return the time as it stands in `state.json`."""
    return datetime.now(UTC).isoformat(timespec="seconds")
