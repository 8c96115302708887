"""The job of a run folder, for whoever uses the tuned model; it needs nothing of the coordinator's code."""

from __future__ import annotations

import os
from pathlib import Path

from shared.errors import RunError, printable
from shared.files.json_files import read_object
from shared.job.job import Job
from shared.job.parsing import parse

_RUNS = ("coordinator/jobs/*/run", "jobs/*/run", "run")
"""Where the run of a submitted job is, seen from a federation's folder, a coordinator's and its own."""
_MOST_NAMED = 5


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
    below = _runs_below(run_dir)
    way_out = "Give the folder that the run printed when it started: runs/NAME-DATE, or what --out named."
    if len(below) == 1:
        way_out = f"The run is in {printable(str(below[0]))}: give that folder."
    elif below:
        shown = ", ".join(printable(str(path)) for path in below[:_MOST_NAMED])
        more = f" and {len(below) - _MOST_NAMED:,} more" if len(below) > _MOST_NAMED else ""
        way_out = f"The runs are in {shown}{more}: give one of these folders."
    raise RunError(
        f"{printable(str(run_dir))} {found}; expected the folder of a run, with job.json and run.json in it. {way_out}"
    )


def _runs_below(folder: Path) -> list[Path]:
    """Return the runs that a federation, a coordinator's home or a submitted job in `folder` has, by name."""
    try:
        found = [job.parent for place in _RUNS for job in folder.glob(f"{place}/job.json")]
    except OSError:
        return []
    return sorted(found)
