"""What a tracker is told of one run; nothing else of a run reaches the room's other files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from server.records.rounds import RoundRecord
from shared.epsilons import rounded_up
from shared.job.job import Job
from shared.job.model import told_backbone

Scalar = str | int | float | bool
Status = Literal["completed", "stopped", "failed"]
EPSILON = "privacy/epsilon_spent"
MOST_CHARACTERS = 5000  # of a setting; MLflow takes no more of a tag


@dataclass(frozen=True)
class Figures:
    """The figures of one round; an epsilon never below the recorded one."""

    round: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class Ending:
    """How a run ended, and what is kept of it.

    Attributes:
        artifacts: a file or folder by the name that the tracker shows.
    """

    status: Status
    artifacts: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RunTold:
    """A run as a tracker is told of it at its beginning.

    Attributes:
        experiment: groups runs.
        name: of the run, unique in the experiment.
        settings: the job's, by dotted key.
        tags: what identifies it.
    """

    experiment: str
    name: str
    settings: Mapping[str, Scalar]
    tags: Mapping[str, str]


class Recording(Protocol):
    """A run at one tracker; its methods raise whatever the tracker's library does."""

    id: str
    """The tracker's own name of the run."""
    is_new: bool
    """Whether the tracker did not know it."""

    def send(self, figures: Sequence[Figures]) -> None:
        """Send the figures of rounds, in their order."""

    def finish(self, ending: Ending) -> None:
        """Send what is kept of the run, and say how it ended."""


class Tracker(Protocol):
    """Where runs are told."""

    def record(self, run: RunTold, known_as: str | None) -> Recording:
        """Begin a run, or go on with the one that an earlier process began."""


def figures_of(record: RoundRecord, *, metrics: bool) -> Figures:
    """Return what is told of a round.

    Args:
        metrics: whether they are of records that are nobody's.
    """
    found = {f"public/{name}": value for name, value in record.metrics.items() if metrics and value is not None}
    if record.epsilon_max is not None:
        found[EPSILON] = float(rounded_up(record.epsilon_max, 4))
    return Figures(record.round, found)


def settings_of(job: Job) -> dict[str, Scalar]:
    """Return a job's settings by dotted key; of a backbone in a local folder only the folder's name."""
    values = job.model_dump(mode="json", exclude_none=True)
    values["model"]["backbone"] = told_backbone(job.model.backbone)
    return flat(values)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar]:
    """Return nested settings by dotted key; lists become text."""
    found: dict[str, Scalar] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            found[prefix + key] = ", ".join(map(str, value))[:MOST_CHARACTERS]
        elif value is not None:
            found[prefix + key] = value[:MOST_CHARACTERS] if isinstance(value, str) else value
    return found
