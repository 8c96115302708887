"""What the link tells, as entries of the audit log.

The link's thread must not wait for a disk, so it only notes; the supervisor writes. Whoever connects and disconnects all day
fills no log: of a site and a kind of event there is one entry at once, and then at most one a minute, which says how many it
stands for.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from server.link.events import LinkEvents
from shared.trust.audit_log import AuditLog, Event

APART_SECONDS = 60.0
_MOST_KEPT = 4096


@dataclass
class _Kept:
    details: dict[str, str] = field(default_factory=dict)
    times: int = 0
    written: float = -1e9


class Journal(LinkEvents):
    """See the module; safe in any thread."""

    def __init__(self, log: AuditLog) -> None:
        self._log = log
        self._lock = threading.Lock()
        self._kept: dict[tuple[Event, str], _Kept] = {}

    def connected(self, site: str, peer: str, software: str) -> None:
        """See `LinkEvents`."""
        self._keep(Event.SITE_CONNECTED, site, peer=peer, software=software)

    def disconnected(self, site: str, reason: str) -> None:
        """See `LinkEvents`."""
        self._keep(Event.SITE_DISCONNECTED, site, reason=reason)

    def refused(self, name: str, peer: str, reason: str) -> None:
        """See `LinkEvents`."""
        self._keep(Event.CONNECTION_REFUSED, name, peer=peer, reason=reason)

    def twin(self, site: str, peer: str) -> None:
        """See `LinkEvents`."""
        self._keep(Event.TWIN_REFUSED, site, peer=peer)

    def write(self, *, everything: bool = False) -> None:
        """Write what is due, or everything.

        Raises:
            TrustError: the log cannot be written; nothing is lost, and the next call tries again.
        """
        now = time.monotonic()
        with self._lock:
            due = [(key, kept) for key, kept in self._kept.items() if kept.times]
            for key in [
                key for key, kept in self._kept.items() if not kept.times and now - kept.written >= APART_SECONDS
            ]:
                del self._kept[key]
        for (event, site), kept in due:
            if everything or now - kept.written >= APART_SECONDS:
                with self._lock:
                    times, details = kept.times, dict(kept.details)
                repeated = {"times": times} if times > 1 else {}
                self._log.append(event, site=site, **details, **repeated)
                with self._lock:
                    kept.times, kept.written = kept.times - times, now

    def _keep(self, event: Event, site: str, **details: str) -> None:
        with self._lock:
            # Only holders of a certificate get here, so there are as many names as the CA has given out.
            if len(self._kept) < _MOST_KEPT or (event, site) in self._kept:
                kept = self._kept.setdefault((event, site), _Kept())
                kept.details, kept.times = details, kept.times + 1
