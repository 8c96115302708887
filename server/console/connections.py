"""When sites were connected, from the coordinator's audit log: read on from where it was read before, a week back at first.

The log has one entry at once for a site and a kind of event, and then at most one a minute, so what is told is right to about a
minute. A coordinator that was killed has no entry of its end: its sites count as connected until it started again.
"""

from __future__ import annotations

import re
import threading
from collections import deque
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from server.console.said import is_name
from shared.trust.audit_chain import Position, end_of, file_numbers, log_file, onwards
from shared.trust.audit_log import Event
from shared.web.entries import Line, parsed

WEEK_SECONDS = 7 * 86_400
NUM_BINS = 56
"""Of a week: three hours each."""
_MOST_CHANGES = 2000
_WANTED = (Event.SITE_CONNECTED, Event.SITE_DISCONNECTED, Event.COORDINATOR_STARTED, Event.COORDINATOR_STOPPED)
_MARKS = tuple(f'"event":"{event}"'.encode() for event in _WANTED)
_VERSION = re.compile(r"[0-9]{1,4}(\.[0-9]{1,6}){1,3}((a|b|rc|\.dev|\.post)[0-9]{1,6})?")


@dataclass
class _Site:
    changes: deque[tuple[float, bool]] = field(default_factory=lambda: deque(maxlen=_MOST_CHANGES))
    version: str = ""


@dataclass(frozen=True, kw_only=True)
class Uptime:
    """How much of the last week a site was connected.

    Attributes:
        bins: share of each part of the week, the oldest first; None before anything is known.
        share: of all that is known; None if nothing is.
    """

    bins: tuple[float | None, ...]
    share: float | None


class Connections:
    """See the module; safe to use from several threads.

    Args:
        folder: of the audit log.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._sites: dict[str, _Site] = {}
        self._read_up_to = Position()
        self._place: tuple[int, int] | None = None

    def version(self, name: str) -> str:
        """Return the version with which a site connected last; "" if it is not known, or is none."""
        with self._lock:
            self._read_on()
            site = self._sites.get(name)
            return site.version if site else ""

    def last_seen(self, name: str) -> float | None:
        """Return when a site's state changed last, seconds since 1970."""
        with self._lock:
            self._read_on()
            site = self._sites.get(name)
            return site.changes[-1][0] if site and site.changes else None

    def uptime(self, name: str, *, now: float, online: bool) -> Uptime:
        """Return how much of the week before `now` a site was connected; `online`: whether it is now."""
        with self._lock:
            self._read_on()
            site = self._sites.get(name)
            changes = list(site.changes) if site else []
        return uptime_of(changes, now=now, online=online)

    def _read_on(self) -> None:
        end = end_of(self._folder)
        if end.sequence < self._read_up_to.sequence:  # put back from a backup
            self._sites, self._place = {}, None
        elif end == self._read_up_to:
            return
        start = self._place or (self._first_file(), 0)
        for line in onwards(self._folder, start, end):
            if any(mark in line for mark in _MARKS) and (entry := parsed(line)) is not None:
                self._take(entry)
        self._read_up_to, self._place = end, (end.number, end.size)

    def _first_file(self) -> int:
        """Return the first file in which something of the last week stands."""
        numbers = file_numbers(self._folder)
        if not numbers:
            return 1
        newest = log_file(self._folder, numbers[-1]).stat().st_mtime
        recent = [n for n in numbers if log_file(self._folder, n).stat().st_mtime >= newest - WEEK_SECONDS]
        return recent[0]

    def _take(self, entry: Line) -> None:
        time = datetime.fromisoformat(entry.time).timestamp()
        if entry.event in (Event.COORDINATOR_STARTED, Event.COORDINATOR_STOPPED):
            for site in self._sites.values():
                if site.changes and site.changes[-1][1]:
                    site.changes.append((time, False))
            return
        name = entry.details.get("site")
        if not is_name(name):
            return
        site = self._sites.setdefault(str(name), _Site())
        site.changes.append((time, entry.event == Event.SITE_CONNECTED))
        if entry.event == Event.SITE_CONNECTED:
            software = str(entry.details.get("software", ""))
            site.version = software if _VERSION.fullmatch(software) else ""


def uptime_of(changes: list[tuple[float, bool]], *, now: float, online: bool) -> Uptime:
    """Return how much of the week before `now` is connected, from (time, connected from then on) in order."""
    begin = now - WEEK_SECONDS
    before = [connected for time, connected in changes if time <= begin]
    inside = [(time, connected) for time, connected in changes if begin < time <= now]
    # Nothing is known before the first entry, unless it is that of an end.
    state: bool | None = before[-1] if before else (True if inside and not inside[0][1] else None)
    spans: list[tuple[float, float, bool]] = []
    at = begin
    for time, connected in [*inside, (now, online)]:
        if state is not None:
            spans.append((at, time, state))
        at, state = time, connected
    width = WEEK_SECONDS / NUM_BINS
    bins: list[float | None] = []
    for number in range(NUM_BINS):
        low, high = begin + number * width, begin + (number + 1) * width
        parts = [(min(high, end) - max(low, first), up) for first, end, up in spans if first < high and end > low]
        known = sum(length for length, _ in parts)
        bins.append(sum(length for length, up in parts if up) / known if known > 0 else None)
    known = sum(end - first for first, end, _ in spans)
    up = sum(end - first for first, end, is_up in spans if is_up)
    return Uptime(bins=tuple(bins), share=up / known if known > 0 else None)


def spark(bins: tuple[float | None, ...]) -> str:
    """Return the path of a sparkline, one unit wide a bin and ten high; what is not known stays empty."""
    path = ""
    for number, value in enumerate(bins):
        if value is None:
            continue
        top = 10 - 10 * max(0.05, value)
        path += f"M{number} 10V{top:.2f}H{number + 1}V10Z"
    return path
