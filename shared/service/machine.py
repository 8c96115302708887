"""What a process knows of its machine, and what of that is wrong: descriptors, disk, clock, ends of certificates; and whether
it lives.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

STALE_SECONDS = 60.0
"""A node writes its status every five seconds, a coordinator twice a second; evaluating a model may hold it up."""
LEAST_FREE_BYTES = 2**30
CERTIFICATE_DAYS = 7
_MOST_DESCRIPTORS = 0.8
_SET_SECONDS = 2.0
_TOLD_FOR = timedelta(hours=1)
_TIMEX_BYTES = 512  # more than `struct timex` has anywhere
_TIME_ERROR = 5


class Trouble(NamedTuple):
    """Something that somebody should do something about.

    Attributes:
        kind: one word of a short list.
        text: what is wrong and what to do.
    """

    kind: str
    text: str


MACHINE_KINDS = ("disk", "descriptors", "clock", "certificate")


def is_alive(said: Mapping[str, Any]) -> bool:
    """Return whether the process that says so of itself runs, and said it lately.

    Args:
        said: its status, with its `pid`, its `state` and when it was `updated`; empty if it never said anything.

    Raises:
        KeyError, OverflowError, TypeError, ValueError: no process of ours said this.
    """
    if not said:
        return False
    pid, age = int(said["pid"]), datetime.now(UTC) - datetime.fromisoformat(said["updated"])
    if pid < 1:  # the system takes it for a group, and finds one that lives
        raise ValueError("no number of a process")
    if said["state"] == "stopped" or abs(age.total_seconds()) >= STALE_SECONDS:
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:  # it lives, and is another user's
        return True
    except ProcessLookupError:
        return False
    return True


def raise_descriptor_limit() -> None:
    """Use all descriptors that the system lets this process have: every connection takes one, a stranger's as well."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def descriptors() -> dict[str, int]:
    """Return how many file descriptors this process has open (`used`), and may have (`limit`)."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        return {"used": len(os.listdir("/proc/self/fd")) - 1, "limit": limit}
    except OSError:  # none is left to look with
        return {"used": limit, "limit": limit}


def _steady() -> float:
    """Return seconds that go on while the machine sleeps, and that nobody sets."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Clock:
    """Notices that the clock was set while the process runs; slow corrections do not count.

    Args:
        wall: the time of day.
        steady: seconds that nobody sets.
    """

    def __init__(self, wall: Callable[[], float] = time.time, steady: Callable[[], float] = _steady) -> None:
        self._wall, self._steady = wall, steady
        self._offset = wall() - steady()
        self._set_by = 0.0
        self._set_at: str | None = None

    def facts(self) -> dict[str, Any]:
        """Look, and return by how many seconds it was set last (`set_by`), when (`set_at`), and whether it is `synchronized`."""
        offset = self._wall() - self._steady()
        if abs(offset - self._offset) >= _SET_SECONDS:
            self._set_by = offset - self._offset
            self._set_at = datetime.fromtimestamp(self._wall(), UTC).isoformat(timespec="seconds")
        self._offset = offset
        return {"set_by": round(self._set_by, 3), "set_at": self._set_at, "synchronized": synchronized()}


def synchronized() -> bool | None:
    """Return whether the kernel knows of a time server that keeps its clock (adjtimex(2)); None if it does not say."""
    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    except (AttributeError, OSError):
        return None
    return None if state < 0 else state != _TIME_ERROR


@dataclass(frozen=True)
class Certificate:
    """When something ends that is signed for a time.

    Attributes:
        kind: "server", "site", "ca" or "crl".
        name: of the site; "" for others.
        until: its end.
        advice: what to do before.
    """

    kind: str
    name: str
    until: datetime
    advice: str


def machine_troubles(folder: Path, said: Mapping[str, Any], certificates: list[Certificate]) -> list[Trouble]:
    """Return what is wrong with the machine.

    Args:
        folder: whose disk is looked at.
        said: what the process says of itself, with `descriptors` and `clock` as above if it is of this version.
        certificates: whose ends are looked at.
    """
    found, now = [], datetime.now(UTC)
    # How much exactly follows at a site from its records, and a page shows these texts (decision 0024).
    if shutil.disk_usage(folder).free < LEAST_FREE_BYTES:
        found.append(Trouble("disk", f"less than {LEAST_FREE_BYTES / 2**30:.0f} GB is free at {folder}; make room."))
    used = said.get("descriptors") or {"used": 0, "limit": 1}
    if used["used"] > _MOST_DESCRIPTORS * used["limit"]:
        text = f"more than {_MOST_DESCRIPTORS:.0%} of {used['limit']} file descriptors are in use; raise LimitNOFILE."
        found.append(Trouble("descriptors", text))
    clock = said.get("clock") or {}
    if clock.get("set_at") and now - datetime.fromisoformat(clock["set_at"]) < _TOLD_FOR:
        text = f"the clock was set by {clock['set_by']:+.1f} s at {clock['set_at']}; look at the time server."
        found.append(Trouble("clock", text))
    for one in certificates:
        if one.until < now + timedelta(days=CERTIFICATE_DAYS):
            what = {
                "server": "the server's certificate",
                "site": f"the certificate of {one.name}",
                "ca": "the CA's certificate",
                "crl": "the revocation list",
            }[one.kind]
            found.append(Trouble("certificate", f"{what} ends on {one.until:%Y-%m-%d}; {one.advice}"))
    return found
