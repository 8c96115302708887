"""`job.json` of a run folder, as far as reports compute with it; `shared.job` reads a job that is to be run.

A job of another version may hold keys that this one does not know, so its other settings are shown as they stand.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.errors import excerpt
from shared.files.json_files import Count, Positive, Share, damaged, parse_record, read_object, read_text


@dataclass(frozen=True, kw_only=True)
class _Central:
    num_sites: Count | None = None


@dataclass(frozen=True, kw_only=True)
class _Privacy:
    mechanism: str
    epsilon: Positive | None = None
    delta: Share | None = None
    unit: str | None = None
    central: _Central | None = None


@dataclass(frozen=True, kw_only=True)
class _Training:
    rounds: Count | None = None
    early_stopping: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class _Job:
    privacy: _Privacy
    training: _Training = field(default_factory=_Training)


def read_job(path: Path) -> dict[str, Any]:
    """Return every setting of the job in `path`, those that reports compute with checked.

    Raises:
        RunError: if it is missing or malformed.
    """
    job, text = read_object(path), read_text(path)
    privacy = job.get("privacy")
    mechanism = privacy.get("mechanism") if isinstance(privacy, dict) else None
    if mechanism not in ("dp-sgd", "distributed", "central", "none"):
        raise damaged(
            path, f"privacy.mechanism is {excerpt(mechanism)}, expected 'dp-sgd', 'distributed', 'central' or 'none'"
        )
    parse_record(text, _Job, path)
    return job
