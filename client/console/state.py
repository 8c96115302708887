"""The site's health and policy as its console shows them, without PyTorch."""

from __future__ import annotations

import hashlib
import platform
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from client.node.health import certificates, is_connected
from client.node.status import read_status
from client.policy.policy import load_policy, policy_of
from client.site.home import SiteHome
from shared.errors import ConfigError
from shared.files.bounded import read_bounded
from shared.service.machine import CERTIFICATE_DAYS, LEAST_FREE_BYTES
from shared.version import silotune_version
from shared.web.entries import Line

_SOON_DAYS = 30
_LARGE_OFFSET = 30.0  # seconds; a message takes less, and policies accept more
_MOST_POLICY_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Ending:
    """A certificate: whose, until when, in how many days, and how urgent that is."""

    kind: str
    until: datetime
    days: int
    outcome: str


@dataclass(frozen=True, kw_only=True)
class Offset:
    """How far this site's clock is from the coordinator's: seconds ahead, at a request's arrival (UTC), and how urgent that is.

    The time that the message took is part of it.
    """

    seconds: float
    at: str
    outcome: str


@dataclass(frozen=True, kw_only=True)
class Health:
    """What a person would look at first.

    Attributes:
        said: what the node says of itself, with `healthy` and `troubles`.
        endings: of certificates.
        free, total: bytes of the disk with the site's folder.
        disk: "ok", "warning" or "failed".
        versions: of what matters here, by name.
        clock: what the node's process noticed of the clock: `synchronized` by a time server (None: unknown), and by how many
            seconds it was `set_by` last, `set_at` when; empty if it said nothing.
    """

    said: Mapping[str, Any]
    endings: list[Ending]
    free: int
    total: int
    disk: str
    versions: Mapping[str, str]
    clock: Mapping[str, Any]

    @property
    def since(self) -> str | None:
        """Since when the node is connected, or not: a request that it works at is no other connection."""
        found = (self.said.get("connected_since") if is_connected(self.said) else None) or self.said.get("since")
        return None if found is None else str(found)


@dataclass(frozen=True, kw_only=True)
class PolicyText:
    """`policy.toml` as it stands.

    Attributes:
        text: the file.
        settings: its keys and values, flat.
        problem: why it cannot be read as TOML; "" if it can.
        refused: why it is no policy although it is TOML; "" if it is one. Without a policy no job is accepted.
        uneven: whether a job takes more people than the rules that it is judged by.
        changed: when it was written, in seconds since 1970.
        sha256: of its bytes.
    """

    text: str
    settings: list[tuple[str, str]]
    problem: str
    refused: str
    uneven: bool
    changed: float
    sha256: str


def health(home: SiteHome, *, now: datetime | None = None) -> Health:
    """Return the health of a site as far as its folder tells it."""
    now = now or datetime.now(UTC)
    endings = []
    for one in certificates(home):
        days = (one.until - now).days
        outcome = "failed" if days < CERTIFICATE_DAYS else "warning" if days < _SOON_DAYS else "ok"
        endings.append(Ending(kind=one.kind, until=one.until, days=days, outcome=outcome))
    said = read_status(home)
    clock = said.get("clock")
    usage = shutil.disk_usage(home.path)
    disk = "failed" if usage.free < LEAST_FREE_BYTES else "warning" if usage.free < 4 * LEAST_FREE_BYTES else "ok"
    return Health(
        said=said,
        clock=clock if isinstance(clock, dict) else {},
        endings=endings,
        free=usage.free,
        total=usage.total,
        disk=disk,
        versions={
            "Silotune": silotune_version(),
            "Python": platform.python_version(),
            **{name: _installed(name) for name in ("torch", "opacus", "cryptography", "grpcio")},
        },
    )


def clock_offset(request: Line | None) -> Offset | None:
    """Return how far the clocks are apart by the entry of a request; None where it does not tell, as in older versions."""
    details = request.details if request else {}
    try:
        sent = datetime.fromisoformat(str(details["sent_at"])).timestamp()
        came = datetime.fromisoformat(request.time if request else "").timestamp() - float(details["waited_seconds"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    seconds = round(came - sent, 1)
    outcome = "ok" if abs(seconds) <= _LARGE_OFFSET else "warning"
    return Offset(seconds=seconds, at=request.time if request else "", outcome=outcome)


def accepted_backbones(home: SiteHome) -> Mapping[str, str]:
    """Return the backbones that the policy names, and the SHA-256 of each; none if it cannot be read, which its page tells."""
    try:
        return load_policy(home.policy).backbones
    except ConfigError:
        return {}


def policy_text(home: SiteHome) -> PolicyText:
    """Return the site's policy as it stands, with what `client.policy.policy` says to it.

    Raises:
        TrustError: it cannot be read.
        ConfigError: it is no text.
    """
    content, _ = read_bounded(home.policy, "policy", _MOST_POLICY_BYTES)
    try:
        text = content.decode("utf-8-sig")  # as `load_toml` reads it
    except UnicodeDecodeError:
        raise ConfigError(f"{home.policy} is not UTF-8 text; write it anew.") from None
    problem, refused, uneven, settings = "", "", False, []
    try:
        settings = list(_flat("", tomllib.loads(text)))
        uneven = bool(policy_of(text).uneven_eyes)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        problem = str(error)
    except ConfigError as error:
        refused = str(error)
    changed = home.policy.stat().st_mtime
    sha256 = hashlib.sha256(content).hexdigest()
    return PolicyText(
        text=text, settings=settings, problem=problem, refused=refused, uneven=uneven, changed=changed, sha256=sha256
    )


def _flat(prefix: str, table: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in table.items():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(value, dict) and value:
            yield from _flat(name, value)
        elif isinstance(value, list):
            yield name, ", ".join(map(str, value)) or "–"
        elif isinstance(value, dict):
            yield name, "–"
        else:
            yield name, str(value).lower() if isinstance(value, bool) else str(value)


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "–"
