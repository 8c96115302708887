"""The roster: who may connect, as the trust store has it, with what is known of each connection.

Formal guarantees (tests: tests/server/console/test_sites.py)
    * A site's certificates are those that the coordinator itself goes by, judged by the same code
      (test_the_roster_is_the_trust_stores).
    * A trust store that cannot be trusted is told as that, and nobody is listed (test_a_broken_trust_store_is_told).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from server.console.connections import Connections, Uptime
from server.console.said import Said, Told, is_name
from server.store.home import CoordinatorHome
from shared.errors import SilotuneError
from shared.service.machine import CERTIFICATE_DAYS
from shared.trust.certificates import SiteIdentity, fingerprint
from shared.trust.trust_store import TrustStore

SOON_DAYS = 30
_KEPT_SECONDS = 3600.0
"""Ends of certificates are judged for every page; a clock that was set is seen by then."""


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """One certificate of a site.

    Attributes:
        fingerprint: of its key, as it is read aloud; "" if it cannot be read.
        until: its end.
        days: left; negative once it has expired.
        state: "valid", or why not.
        outcome: "ok", "warning" or "failed".
    """

    fingerprint: str
    until: datetime | None
    days: int | None
    state: str
    outcome: str


@dataclass(frozen=True, kw_only=True)
class Site:
    """One site of the trust store.

    Attributes:
        name: in its certificates.
        certificates: all of them; while its key is exchanged, two are valid.
        is_online: its stream is open.
        last_seen: when it was connected last, or its connection changed, seconds since 1970.
        version: with which it connected last; "" if it is not known.
        uptime: of the last week.
    """

    name: str
    certificates: list[Admitted]
    is_online: bool
    last_seen: float | None
    version: str
    uptime: Uptime

    @property
    def may_connect(self) -> bool:
        """Whether one of its certificates counts."""
        return any(one.state == "valid" for one in self.certificates)


class Sites:
    """The roster; safe to use from several threads."""

    def __init__(
        self,
        home: CoordinatorHome,
        said: Said,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.store = TrustStore(home.trust)
        self.connections = Connections(home.audit)
        self._said, self._now = said, now
        self._lock = threading.Lock()
        self._kept: tuple[object, float, list[SiteIdentity]] | None = None
        with contextlib.suppress(
            SilotuneError
        ):  # so that the first page need not read everything; it tells what is wrong
            self.some(self.names())

    def names(self, search: str = "") -> list[str]:
        """Return the names of all sites, or of those in which a text stands.

        Raises:
            TrustError: the trust store cannot be trusted.
        """
        wanted = search.casefold()
        return sorted({one.name for one in self._identities() if wanted in one.name.casefold() and is_name(one.name)})

    def num_admitted(self, search: str = "") -> int:
        """Return how many of them may connect; raises as `names`."""
        wanted, now = search.casefold(), self._now()
        return len(
            {
                one.name
                for one in self._identities()
                if wanted in one.name.casefold() and is_name(one.name) and _counts(one, now)
            }
        )

    def some(self, names: list[str]) -> list[Site]:
        """Return what is known of some sites, in this order."""
        now, told = self._now(), self._said.now()
        found: dict[str, list[Admitted]] = {name: [] for name in names}
        for one in self._identities():
            if one.name in found:
                found[one.name].append(admitted(one, now))
        return [self._site(name, found[name], told, now.timestamp()) for name in names]

    @property
    def mark(self) -> str:
        """Stands for the list."""
        return f"{hash(self._stamp())} {self._said.now().mark}"

    def _site(self, name: str, certificates: list[Admitted], told: Told, now: float) -> Site:
        is_online = told.online.get(name, False)
        last = _seconds(told.last_seen.get(name)) or self.connections.last_seen(name)
        return Site(
            name=name,
            certificates=certificates,
            is_online=is_online,
            last_seen=now if is_online else last,
            version=self.connections.version(name),
            uptime=self.connections.uptime(name, now=now, online=is_online),
        )

    def _identities(self) -> list[SiteIdentity]:
        with self._lock:
            stamp = self._stamp()
            if self._kept is None or self._kept[0] != stamp or time.monotonic() > self._kept[1] + _KEPT_SECONDS:
                self._kept = (stamp, time.monotonic(), self.store.sites(self._now()))
            return self._kept[2]

    def _stamp(self) -> tuple[object, ...]:
        folder = self.store.folder
        return tuple(_changed(folder / name) for name in ("ca.crt", "crl.pem", "crl.number", "sites"))


def admitted(one: SiteIdentity, now: datetime) -> Admitted:
    """Return what is shown of a certificate."""
    state, days = str(one.state), None
    if one.not_after is not None:
        days = (one.not_after - now).days
        state = "expired" if state == "valid" and now > one.not_after else state
    failed = state != "valid" or (days is not None and days < CERTIFICATE_DAYS)
    outcome = "failed" if failed else "warning" if days is not None and days < SOON_DAYS else "ok"
    printed = "" if one.public_key is None else fingerprint(one.public_key)
    return Admitted(fingerprint=printed, until=one.not_after, days=days, state=state, outcome=outcome)


def _counts(one: SiteIdentity, now: datetime) -> bool:
    return admitted(one, now).state == "valid"


def _seconds(time: str | None) -> float | None:
    try:
        return None if time is None else datetime.fromisoformat(time).timestamp()
    except ValueError:
        return None


def _changed(path: os.PathLike[str]) -> tuple[int, int] | None:
    try:
        facts = os.stat(path)
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_ino
