"""What is wrong with a coordinator, told from its folder: for people, and for whoever watches the machine."""

from __future__ import annotations

import os
import shutil
from datetime import UTC, datetime, timedelta
from typing import Any

from server.store.home import CoordinatorHome

STALE_SECONDS = 60.0
"""A coordinator writes its status twice a second; evaluating a model may hold it up."""
LEAST_FREE_BYTES = 2**30
_CERTIFICATE_DAYS = 7


def is_alive(said: dict[str, Any]) -> bool:
    """Return whether the process that wrote a status runs, and wrote it lately."""
    try:
        os.kill(int(said["pid"]), 0)
        age = datetime.now(UTC) - datetime.fromisoformat(said["updated"])
    except (KeyError, OSError, TypeError, ValueError):
        return False
    return said.get("state") != "stopped" and abs(age.total_seconds()) < STALE_SECONDS


def troubles(home: CoordinatorHome, said: dict[str, Any], *, job_waits: bool) -> list[str]:
    """Return what somebody should do something about; empty if all is well.

    Args:
        said: what the coordinator last said of itself (`CoordinatorHome.read_status`).
        job_waits: whether a job is open.
    """
    free = shutil.disk_usage(home.path).free
    found = [] if free >= LEAST_FREE_BYTES else [f"{free / 2**20:,.0f} MB are free at {home.path}; make room."]
    if not is_alive(said):
        return [f"it does not run; start it with: silotune coordinator start {home.path}", *found]
    found += [str(said[key]) for key in ("problem", "trust_problem", "certificate_problem") if said.get(key)]
    if said["state"] != "running" and not said.get("problem"):
        found.append(f"it is {said['state']}.")
    sites = said["sites"].values()
    if not sites:
        found.append(f"no site is admitted; with its certificate: silotune coordinator install {home.path} --site FILE")
    elif job_waits and not any(site["online"] for site in sites):
        found.append("a job is open and no site is connected; look at their firewalls, or telephone.")
    until = said.get("certificate_until")
    if until and datetime.fromisoformat(until) < datetime.now(UTC) + timedelta(days=_CERTIFICATE_DAYS):
        found.append(f"the server's certificate ends on {until[:10]}; send server.csr to the CA again.")
    return found
