"""`tracking.json`: as what a tracker knows the run and how much arrived there, so that a resumed run goes on as the same one."""

from __future__ import annotations

from dataclasses import dataclass, field

from shared.files.json_files import Count

TRACKING_FILE = "tracking.json"


@dataclass(frozen=True, kw_only=True)
class Tracked:
    """A run at one tracker.

    Attributes:
        id: the tracker's own name of the run.
        rounds: how many lines of figures arrived, the one from before training included.
    """

    id: str
    rounds: Count = 0


@dataclass(frozen=True, kw_only=True)
class TrackingRecord:
    """`tracking.json`; trackers by their address, without a password."""

    trackers: dict[str, Tracked] = field(default_factory=dict)
