"""Checkpoints as a run of three rounds has them, without a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from server.records.rounds import RoundRecord
from server.store.checkpoint import Checkpoint
from server.tracking import Told
from shared.job.job import Job

EPSILONS = (None, 0.123456789, 0.2, 0.300000001)


def checkpoint(job: Job, rounds: int) -> Checkpoint:
    """Return the state after so many rounds."""
    history = [
        RoundRecord(
            round=number,
            metrics={"loss": 0.7 - 0.1 * number, "accuracy": 0.5 + 0.1 * number, "undefined": None},
            epsilon_max=EPSILONS[number],
            sites=["north-clinic"] if number else [],
            failed={"south-clinic": "Withheld: it was told"} if number else {},
        )
        for number in range(rounds + 1)
    ]
    return Checkpoint(job_sha256=job.sha256, round_number=rounds, adapter={}, history=history)


def told(job: Job, folder: Path, **changes: Any) -> Told:
    """Return what may be told of a run in `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    return Told(**{"experiment": "clinics", "name": "run-1", "job": job, "folder": folder, **changes})
