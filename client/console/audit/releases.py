"""What left a site: read from its audit log, on from where it was read before."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from client.console.audit.packed import PackedReleases, Release
from client.site.home import SiteHome
from shared.trust.audit_chain import Position, end_of, onwards
from shared.trust.audit_log import Event
from shared.web.entries import Line, parsed

_WANTED = (
    Event.RELEASE_STORED,
    Event.RELEASE_REPEATED,
    Event.RELEASE_SENT,
    Event.REQUEST_RECEIVED,
    Event.JOB_PREPARED,
)
_MARKS = tuple(f'"event":"{event}"'.encode() for event in _WANTED)


class Releases:
    """The releases of a site, the newest first; safe to use from several threads."""

    def __init__(self, home: SiteHome) -> None:
        self._home = home
        self._lock = threading.Lock()
        self._forget()

    def all(self, search: str = "") -> Iterator[Release]:
        """Return all of them, or those in whose job or hash a text stands.

        Raises:
            TrustError: the log's head cannot be read.
        """
        with self._lock:
            self._read_on()
            found, count = self._found, len(self._found)
        return _searched(found, count, search.casefold())

    def page(self, search: str = "", *, first: int, most: int) -> tuple[list[Release], int]:
        """Return some of them, and how many there are; raises as `all`."""
        if search:
            shown, count = [], 0
            for count, one in enumerate(self.all(search), start=1):
                if first < count <= first + most:
                    shown.append(one)
            return shown, count
        with self._lock:
            self._read_on()
            count = len(self._found)
            return [self._found[count - 1 - number] for number in range(first, min(first + most, count))], count

    def name_of(self, job: str) -> str:
        """Return the name of a job by its hash; "" if the log does not tell."""
        with self._lock:
            self._read_on()
            return self._names.get(job, "")

    def latest_round(self) -> Line | None:
        """Return the entry of the latest request of the coordinator."""
        with self._lock:
            self._read_on()
            return self._latest

    def latest_prepared(self) -> Line | None:
        """Return the entry of the last job whose model and data were loaded."""
        with self._lock:
            self._read_on()
            return self._prepared

    def _forget(self) -> None:
        self._found = PackedReleases()
        self._names: dict[str, str] = {}
        self._latest: Line | None = None
        self._prepared: Line | None = None
        self._pending: list[int] = []
        self._read_up_to = Position()

    def _read_on(self) -> None:
        end = end_of(self._home.audit)
        if end.sequence < self._read_up_to.sequence:  # put back from a backup
            self._forget()
        if end == self._read_up_to:
            return
        start = (self._read_up_to.number, self._read_up_to.size)
        for line in onwards(self._home.audit, start, end):
            if any(mark in line for mark in _MARKS) and (entry := parsed(line)) is not None:
                self._take(entry)
        self._read_up_to = end

    def _take(self, entry: Line) -> None:
        details = entry.details
        if entry.event in (Event.REQUEST_RECEIVED, Event.JOB_PREPARED):
            self._names[str(details.get("job"))] = str(details.get("name", ""))
            if entry.event == Event.REQUEST_RECEIVED:
                self._latest = entry
            else:
                self._prepared = entry
        elif entry.event == Event.RELEASE_SENT and self._pending:
            # A node answers one request after the other, so what leaves next is what was made last.
            number = self._pending.pop()
            self._pending.clear()
            declined = details.get("declined") is True
            self._found[number] = replace(self._found[number], sent=entry.time, declined=declined)
        elif entry.event in (Event.RELEASE_STORED, Event.RELEASE_REPEATED):
            self._pending.append(len(self._found))
            self._found.append(_release(entry, self._names.get(str(details.get("job")), "")))


def _searched(found: PackedReleases, count: int, wanted: str) -> Iterator[Release]:
    for number in range(count - 1, -1, -1):
        one = found[number]
        if not wanted or any(wanted in text.casefold() for text in (one.name, one.job, one.sha256)):
            yield one


def _release(entry: Line, name: str) -> Release:
    details = entry.details
    return Release(
        sequence=entry.sequence,
        time=entry.time,
        sent=None,
        job=str(details.get("job", "")),
        name=name,
        round=_whole(details.get("round")),
        bytes=_whole(details.get("bytes")),
        sha256=str(details.get("sha256", "")),
        epsilon=_number(details.get("epsilon_spent")),
        repeated=entry.event == Event.RELEASE_REPEATED,
    )


def _whole(value: Any) -> int | None:
    return value if type(value) is int else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
