"""The job of a run folder, for whoever uses the tuned model; it needs nothing of the coordinator's code."""

from __future__ import annotations

import os
from pathlib import Path

from shared.errors import RunError, printable
from shared.files.json_files import read_object
from shared.job.job import Job
from shared.job.parsing import parse


def load_job(run_dir: Path) -> Job:
    """Return the job of a run folder.

    Raises:
        RunError: if it is no run folder, or its job cannot be read.
    """
    check_run_folder(run_dir)
    return parse(Job, read_object(run_dir / "job.json"), source=str(run_dir / "job.json"))


def check_run_folder(run_dir: Path) -> None:
    """Raise `RunError`, saying what a run folder is, if `run_dir` is none."""
    if run_dir.is_dir() and os.path.lexists(run_dir / "job.json"):
        return
    found = "holds no job.json" if run_dir.is_dir() else "is a file" if run_dir.exists() else "is not there"
    raise RunError(
        f"{printable(str(run_dir))} {found}; expected the folder of a run, with job.json and run.json in it. Give the folder "
        "that the run printed when it started: runs/NAME-DATE, or what --out named."
    )
