"""What the running node says of itself in `node.json`: for people, health checks and monitoring on this machine only."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from datetime import UTC, datetime
from typing import Any

from client.node.health import down, is_connected, troubles
from client.site.home import SiteHome
from shared.errors import SilotuneError
from shared.files.atomic import write_json
from shared.service.machine import Clock, descriptors, is_alive


class StatusFile:
    """Keeps `node.json` up to date; safe to use from several threads."""

    def __init__(self, home: SiteHome) -> None:
        self._path = home.status
        self._facts: dict[str, Any] = {"pid": os.getpid(), "started": _now()}
        self._clock = Clock()
        self._lock = threading.Lock()

    def say(self, state: str | None = None, **facts: object) -> None:
        """Note a state ("starting", "connected", "working", "waiting", "stopped") and facts that go with it."""
        with self._lock:
            was_connected = is_connected(self._facts)
            if state is not None and state != self._facts.get("state"):
                self._facts |= {"state": state, "since": _now()}
            self._facts |= facts | {"updated": _now(), "clock": self._clock.facts(), "descriptors": descriptors()}
            # By a beat of its own, which work does not change: both may be shown to others.
            beat = state is None and not facts
            if beat:
                self._facts["looked"] = _now()
            if not was_connected and is_connected(self._facts):
                self._facts["connected_since"] = _now()  # "since" is of the state, and each request is one
            if was_connected != is_connected(self._facts) or (was_connected and beat):
                self._facts["last_connected"] = _now()
            # A full disk must not end a node that only wants to say so.
            with contextlib.suppress(SilotuneError):
                write_json(self._path, self._facts)

    def facts(self) -> dict[str, Any]:
        """Return what was said, also if it could not be written."""
        with self._lock:
            return dict(self._facts)


def read_status(home: SiteHome) -> dict[str, Any]:
    """Return what the node last said, whether it is `healthy`, and if not, its `troubles`."""
    said: dict[str, Any] = {}
    try:
        said = dict(json.loads(home.status.read_text(encoding="utf-8")))
        found = troubles(home, said) if is_alive(said) else [down(home)]
    except (OSError, OverflowError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        said, found = {}, [down(home)]
    if down(home) in found:
        said["state"] = "not running"
    return said | {"healthy": not found, "troubles": [trouble.text for trouble in found]}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
