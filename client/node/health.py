"""What is wrong with a node, told from what it says of itself: for people, and for whoever watches the machine."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from client.site.home import SiteHome
from shared.errors import SilotuneError
from shared.service.machine import MACHINE_KINDS, Certificate, Trouble, machine_troubles
from shared.trust.certificates import certificate_end

KINDS = ("down", "disconnected", *MACHINE_KINDS)
"""Of all troubles that there may be."""


def is_connected(said: Mapping[str, Any]) -> bool:
    """Return whether the coordinator has let the node in, and the stream is open; the node may be at work."""
    return said.get("state") in ("connected", "working")


def troubles(home: SiteHome, said: Mapping[str, Any]) -> list[Trouble]:
    """Return what somebody should do something about; empty if all is well.

    Args:
        said: what the node last said of itself; not a node that runs if `shared.service.machine.is_alive` says no.

    Raises:
        OSError, OverflowError, ValueError, KeyError, TypeError: no node said this.
    """
    machine = machine_troubles(home.path, said, certificates(home))
    if is_connected(said):
        return machine
    problem = said.get("problem") or f"it is {said['state']}."
    return [Trouble("disconnected", str(problem)), *machine]


def down(home: SiteHome) -> Trouble:
    """Return that no node runs."""
    return Trouble("down", f"it does not run; start it with: silotune site start {home.path}")


def certificates(home: SiteHome, name: str = "this site") -> list[Certificate]:
    """Return the ends of the site's certificate and the CA's."""
    found = []
    if until := _end(home.certificate):
        found.append(Certificate("site", name, until, f"run: silotune site rotate {home.path}"))
    if until := _end(home.ca_certificate):
        found.append(Certificate("ca", "", until, "whoever runs the CA has to make new ones for everybody."))
    return found


def _end(path: Path) -> datetime | None:
    """Return when a certificate ends; None if there is none, which `site check` and the connection tell."""
    try:
        return certificate_end(path)
    except SilotuneError:
        return None
