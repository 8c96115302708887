"""What the running coordinator says of itself, read again when it was written again: twice a second at most."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from server.coordinator.progress import CODES, UNKNOWN_CODE
from server.store.home import CoordinatorHome
from shared.files.json_files import canonical_json
from shared.job.values import NAME_PATTERN
from shared.service.machine import is_alive

_STATES = ("training", "ready", "sent", "dropped", "refused")


@dataclass(frozen=True, kw_only=True)
class Told:
    """One word of the coordinator.

    Attributes:
        alive: it runs, as far as anybody can tell.
        state: "running", "troubled", ...
        job: the run at hand; None if there is none.
        online: site -> whether its stream is open; of all that may connect.
        last_seen: site -> when it was connected last, UTC, ISO 8601; None: not since the start.
        round: number of the round at hand; None if none is, or if nothing is told of it.
        doing: site -> its state in that round.
        codes: site -> code of its refusal in that round.
    """

    alive: bool
    state: str
    job: str | None
    online: Mapping[str, bool] = field(default_factory=dict)
    last_seen: Mapping[str, str | None] = field(default_factory=dict)
    round: int | None = None
    doing: Mapping[str, str] = field(default_factory=dict)
    codes: Mapping[str, str] = field(default_factory=dict)

    @property
    def mark(self) -> str:
        """Stands for all that changes on pages; when sites were last seen does not, while they are connected."""
        facts = [self.alive, self.state, self.job, dict(self.online), self.round, dict(self.doing), dict(self.codes)]
        return hashlib.sha256(canonical_json(facts).encode()).hexdigest()[:16]


class Said:
    """Reads `coordinator.json`; safe to use from several threads."""

    def __init__(self, home: CoordinatorHome) -> None:
        self._home = home
        self._lock = threading.Lock()
        self._kept: tuple[object, dict[str, Any]] = (None, {})

    def now(self) -> Told:
        """Return what it says; of a coordinator that does not run only that."""
        said = self._read()
        alive = is_alive(said)
        sites = {name: site for name, site in said.get("sites", {}).items() if is_name(name)}
        at_hand = said.get("round") if alive else None
        at_hand = at_hand if isinstance(at_hand, dict) else {}
        number = at_hand.get("round")
        return Told(
            alive=alive,
            state=str(said.get("state", "")) if alive else "",
            job=str(said["job"]) if alive and said.get("job") else None,
            online={name: alive and bool(site["online"]) for name, site in sites.items()},
            last_seen={name: site.get("last_seen") for name, site in sites.items()},
            round=number if type(number) is int else None,
            doing={name: state for name, state in _texts(at_hand.get("sites")).items() if state in _STATES},
            codes={
                name: code if code in CODES else UNKNOWN_CODE for name, code in _texts(at_hand.get("codes")).items()
            },
        )

    def _read(self) -> dict[str, Any]:
        try:
            facts = self._home.status.stat()
        except OSError:
            return {}
        stamp = (facts.st_mtime_ns, facts.st_ino)
        with self._lock:
            if self._kept[0] != stamp:
                self._kept = (stamp, self._home.read_status())
            return self._kept[1]


def is_name(text: object) -> bool:
    """Return whether this can be a site's name; whatever else calls itself so is not shown."""
    return isinstance(text, str) and re.fullmatch(NAME_PATTERN, text) is not None


def _texts(raw: object) -> dict[str, str]:
    if not isinstance(raw, dict):
        return {}
    return {name: value for name, value in raw.items() if is_name(name) and isinstance(value, str)}
