"""What is wrong with a coordinator, told from its folder: for people, and for whoever watches the machine."""

from __future__ import annotations

import functools
from datetime import datetime
from pathlib import Path
from typing import Any

from cryptography import x509

from server.store.home import CoordinatorHome
from shared.errors import SilotuneError
from shared.service.machine import MACHINE_KINDS, Certificate, Trouble, is_alive, machine_troubles
from shared.trust.certificates import certificate_end

KINDS = ("down", "problem", "trust", "state", "nobody_admitted", "nobody_connected", *MACHINE_KINDS)
"""Of all troubles that there may be."""


def troubles(home: CoordinatorHome, said: dict[str, Any], *, job_waits: bool) -> list[Trouble]:
    """Return what somebody should do something about; empty if all is well.

    Args:
        said: what the coordinator last said of itself (`CoordinatorHome.read_status`).
        job_waits: whether a job is open.
    """
    machine = machine_troubles(home.path, said, certificates(home, said))
    if not is_alive(said):
        disk = [trouble for trouble in machine if trouble.kind == "disk"]
        return [Trouble("down", f"it does not run; start it with: silotune coordinator start {home.path}"), *disk]
    named = {"problem": "problem", "trust_problem": "trust", "certificate_problem": "certificate"}
    found = [Trouble(kind, str(said[key])) for key, kind in named.items() if said.get(key)]
    if said["state"] != "running" and not said.get("problem"):
        found.append(Trouble("state", f"it is {said['state']}."))
    sites = said["sites"].values()
    if not sites:
        text = f"no site is admitted; with its certificate: silotune coordinator install {home.path} --site FILE"
        found.append(Trouble("nobody_admitted", text))
    elif job_waits and not any(site["online"] for site in sites):
        text = "a job is open and no site is connected; look at their firewalls, or telephone."
        found.append(Trouble("nobody_connected", text))
    return [*found, *machine]


def certificates(home: CoordinatorHome, said: dict[str, Any]) -> list[Certificate]:
    """Return the ends of the server's certificate, the sites', the CA's and of the revocation list."""
    found = []
    if until := said.get("certificate_until"):
        advice = "send server.csr to the CA again."
        found.append(Certificate("server", "", datetime.fromisoformat(until), advice))
    for name, site in sorted(said.get("sites", {}).items()):
        if until := _time(site["until"]):
            advice = "its engineer runs: silotune site rotate HOME, and you install the new one."
            found.append(Certificate("site", name, until, advice))
    if until := _ca_end(home):
        found.append(
            Certificate("ca", "", until, "every certificate ends with it: all need a new CA and new certificates.")
        )
    if until := _list_end(home.trust / "crl.pem"):
        found.append(Certificate("crl", "", until, "ask the CA for a newer one: silotune pki publish."))
    return found


def _time(text: str) -> datetime | None:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    return found if found.tzinfo is not None else None


def _ca_end(home: CoordinatorHome) -> datetime | None:
    """Return when the CA's certificate ends; None if there is none, which is told elsewhere."""
    try:
        return certificate_end(home.ca_certificate)
    except SilotuneError:
        return None


def _list_end(path: Path) -> datetime | None:
    """The same of the revocation list."""
    try:
        return _read_list_end(path, path.stat().st_mtime_ns)
    except (OSError, ValueError):
        return None


@functools.lru_cache(maxsize=8)
def _read_list_end(path: Path, stamp: int) -> datetime | None:
    return x509.load_pem_x509_crl(path.read_bytes()).next_update_utc
