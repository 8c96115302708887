"""The job of a run folder, for whoever uses the tuned model; it needs nothing of the coordinator's code."""

from __future__ import annotations

from pathlib import Path

from shared.errors import RunError
from shared.files.json_files import parse_object
from shared.job.job import Job
from shared.job.parsing import parse


def load_job(run_dir: Path) -> Job:
    """Return the job of a run folder.

    Raises:
        RunError: if there is none.
    """
    file = run_dir / "job.json"
    try:
        raw = parse_object(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{run_dir} holds no readable job.json ({type(error).__name__}); is it a run folder?") from None
    return parse(Job, raw, source=str(file))
