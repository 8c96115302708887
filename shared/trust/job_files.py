"""A job from whatever file a user has of it: run file, scenario, job or signed job."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.errors import ConfigError
from shared.files.bounded import read_named_text
from shared.files.json_files import parse_object
from shared.job.job import Job
from shared.job.parsing import apply_overrides, load_toml, nearest, parse
from shared.trust.signed_job import SignedJob

# What stands in a scenario or a run file beside the job's own sections; a test compares it with both.
BESIDE_A_JOB = frozenset(
    {
        *("data", "partition", "simulation", "baselines", "compute"),
        *("evaluation", "evaluate_every", "valid_days"),
    }
)


def read_job(path: Path, overrides: Sequence[str]) -> Job:
    """Return the job in a run file or scenario (TOML), or in a job or signed job (JSON).

    Raises:
        ConfigError, TrustError: as their texts say.
    """
    raw = read_json(path, "a job") if path.suffix == ".json" else load_toml(path)
    if "signature" in raw:
        signed = SignedJob.from_json(read_named_text(path), source=str(path))
        raw = signed.job.model_dump(mode="json")
    raw = apply_overrides(raw, overrides)
    for key in raw:
        if key not in Job.model_fields and key not in BESIDE_A_JOB:
            raise ConfigError(f"{path} is not valid:\n  - unknown key {key!r}; {nearest(key, list(Job.model_fields))}")
    return parse(Job, {key: value for key, value in raw.items() if key in Job.model_fields}, source=str(path))


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Return the JSON object in a file that a user named.

    Args:
        what: what was expected there, for the error.

    Raises:
        ConfigError: if it is missing, unreadable or no object.
    """
    try:
        return parse_object(read_named_text(path))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; check the path.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as {what} (JSON): {error}.") from None
