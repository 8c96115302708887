"""What the running node says of itself in `node.json`: for people, health checks and monitoring on this machine only."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from datetime import UTC, datetime
from typing import Any

from client.site.home import SiteHome
from shared.errors import SilotuneError
from shared.files.atomic import write_json

STALE_AFTER_SECONDS = 60.0


class StatusFile:
    """Keeps `node.json` up to date; safe to use from several threads."""

    def __init__(self, home: SiteHome) -> None:
        self._path = home.status
        self._facts: dict[str, object] = {"pid": os.getpid(), "started": _now()}
        self._lock = threading.Lock()

    @property
    def connected(self) -> bool:
        """Whether the coordinator has welcomed the node, and the stream is open."""
        return self._facts.get("state") in ("connected", "working")

    def say(self, state: str | None = None, **facts: object) -> None:
        """Note a state ("starting", "connected", "working", "waiting", "stopped") and facts that go with it."""
        with self._lock:
            if state is not None and state != self._facts.get("state"):
                self._facts |= {"state": state, "since": _now()}
            self._facts |= facts | {"updated": _now()}
            # A full disk must not end a node that only wants to say so.
            with contextlib.suppress(SilotuneError):
                write_json(self._path, self._facts)


def read_status(home: SiteHome) -> dict[str, Any]:
    """Return what the node last said, and whether it is `healthy`: alive, and connected or working."""
    try:
        said = dict(json.loads(home.status.read_text(encoding="utf-8")))
        age = (datetime.now(UTC) - datetime.fromisoformat(said["updated"])).total_seconds()
        with contextlib.suppress(PermissionError):  # it lives, and is another user's
            os.kill(int(said["pid"]), 0)
        alive = age < STALE_AFTER_SECONDS and said["state"] != "stopped"
    except (OSError, OverflowError, ValueError, KeyError, TypeError, RecursionError):
        return {"state": "not running", "healthy": False}
    if not alive:
        said["state"] = "not running"
    return said | {"healthy": alive and said["state"] in ("connected", "working")}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
