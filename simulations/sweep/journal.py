"""The results of a sweep's trials, one durable line each.

Formal guarantees (tests: tests/simulations/sweep/test_sweep_journal.py, test_sweep_kill.py)
    * When `append` returns, the line is on the disk; a sweep that is killed at any moment loses no finished trial.
    * A line that was cut by a kill or a full disk is dropped when the file is read again, and its trial counts as not run.
      Any other damage is refused, for a result that was changed cannot be told from a true one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from server.records.metrics import Metrics, in_range
from shared.errors import RunError
from shared.files.atomic import sync_folder
from shared.files.json_files import canonical_json


class TrialResult(BaseModel):
    """What one trial came to.

    Attributes:
        key: identity of setting and seed within the sweep.
        setting: value of every axis.
        seed: public seed.
        status: "failed" trials have a `reason` and no scores; they are run again when the sweep is resumed.
        budget: epsilon that was asked for; "inf" without noise, None if the noise multiplier was given instead.
        epsilon: largest epsilon of a site, computed from what was executed; None if there is no protection.
        delta: of that epsilon.
        metric, higher_is_better: what is compared, and in which direction.
        score: that metric on the evaluation records; settings are selected by it.
        metrics: all metrics on the evaluation records.
        confirmation: all metrics on records that select nothing, or None without such records.
        seconds: time of the trial.
        job_sha256: identity of the executed job.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    key: str
    setting: dict[str, Any]
    seed: int
    status: Literal["completed", "failed"]
    reason: str | None = None
    budget: float | Literal["inf"] | None = None
    epsilon: float | None = None
    delta: float
    metric: str
    higher_is_better: bool
    score: float | None = None
    metrics: Metrics = {}
    confirmation: Metrics | None = None
    seconds: float
    job_sha256: str

    @model_validator(mode="after")
    def _score_in_range(self) -> Self:
        in_range(self.metric, self.score)
        return self

    @property
    def completed(self) -> bool:
        """True if the trial has scores."""
        return self.status == "completed"

    def value(self, confirmation: bool = False) -> float:
        """Return the compared metric, on the evaluation or the confirmation records.

        Raises:
            ValueError: if the trial has none.
        """
        found = (self.confirmation or {}).get(self.metric) if confirmation else self.score
        if found is None:
            raise ValueError(f"trial {self.key} has no such score")
        return found


class Journal:
    """The file of results, open to one process at a time (the caller holds the sweep's lock).

    Attributes:
        results: the latest result of every trial, in the order in which they were first run.
    """

    def __init__(self, path: Path) -> None:
        """Read what is there; a cut last line is dropped.

        Raises:
            RunError: if the file cannot be read, or a complete line is not a result.
        """
        self._path = path
        self.results: dict[str, TrialResult] = {}
        try:
            content = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise RunError(f"{path} cannot be read ({error.strerror}); mend the permissions, then resume.") from None
        complete, _, _ = content.rpartition(b"\n")
        self._length = len(complete) + 1 if complete else 0
        for number, line in enumerate(complete.splitlines(), start=1):
            try:
                result = TrialResult.model_validate_json(line)
            except ValidationError:
                raise RunError(
                    f"{path}, line {number}, is not a trial's result; restore the file, or start anew in another folder."
                ) from None
            self.results[result.key] = result

    def finished(self, key: str) -> TrialResult | None:
        """Return the result of a completed trial, or None if it has to be run."""
        result = self.results.get(key)
        return result if result is not None and result.completed else None

    def append(self, result: TrialResult) -> None:
        """Make `result` durable.

        Raises:
            RunError: if the disk does not take it; the file then ends after the last complete line.
        """
        line = canonical_json(result.model_dump(mode="json")).encode() + b"\n"
        created = not self._path.exists()
        try:
            handle = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.ftruncate(handle, self._length)  # drops what a kill left of a line
                written = os.pwrite(handle, line, self._length)
                if written < len(line):
                    os.ftruncate(handle, self._length)
                    raise OSError(None, "no space left")
                os.fsync(handle)
            finally:
                os.close(handle)
            if created:
                sync_folder(self._path.parent)
        except OSError as error:
            raise RunError(
                f"could not write {self._path}: {error.strerror or error}. Free space or mend the permissions, then resume."
            ) from error
        self._length += len(line)
        self.results[result.key] = result
