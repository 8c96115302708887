"""The coordinator's pages for monitoring: the facts and troubles of `coordinator status`, as numbers.

Labels are the names of admitted sites and of the job at hand, and words of short lists; whoever is not admitted adds none.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, get_args

from prometheus_client.core import Metric

from server.coordinator.health import KINDS, certificates, troubles
from server.store.home import CoordinatorHome
from server.store.submission import OPEN, State, Submission, submissions
from shared.errors import SilotuneError
from shared.service.machine import Trouble
from shared.service.metrics import common, counter, gauge, moment, routes
from shared.service.page import Page


def pages(home: CoordinatorHome, said: Callable[[], dict[str, Any]]) -> dict[str, Callable[[], Page]]:
    """Return the pages of a coordinator.

    Args:
        home: its folder.
        said: returns what it says of itself now.
    """

    def found(told: dict[str, Any]) -> list[Trouble]:
        waits = any(state["state"] in OPEN for _, state in _readable(home))
        return troubles(home, told, job_waits=waits)

    def all_metrics() -> Iterator[Metric]:
        told = said()
        yield from common(told, found(told), KINDS, certificates(home, told))
        yield from _sites(told)
        yield from _jobs(_readable(home), told.get("job"))
        yield counter("link_restarts", "How often the port was opened anew.", told.get("link_restarts", 0))
        used = (told.get("descriptors") or {}).get("used")
        yield gauge("descriptors_used", "File descriptors that are open.", [({}, used)])
        yield gauge("disk_free_bytes", "Free where its folder lies.", [({}, shutil.disk_usage(home.path).free)])

    return routes(all_metrics, lambda: found(said()))


def _readable(home: CoordinatorHome) -> list[tuple[Submission, dict[str, Any]]]:
    """Return all jobs with their states; one that is damaged is a problem that the coordinator itself tells."""
    known = []
    for submission in submissions(home.jobs):
        with contextlib.suppress(SilotuneError):
            known.append((submission, submission.state()))
    return known


def _sites(told: dict[str, Any]) -> Iterator[Metric]:
    sites = sorted(told.get("sites", {}).items())
    yield gauge("sites_admitted", "Sites that may connect.", [({}, len(sites))])
    yield gauge("sites_connected", "Sites that are connected.", [({}, sum(site["online"] for _, site in sites))])
    online = [({"site": name}, site["online"]) for name, site in sites]
    yield gauge("site_connected", "1: the site is connected.", online)
    seen = [({"site": name}, moment(site.get("last_seen"))) for name, site in sites]
    yield gauge("site_last_seen_time_seconds", "When the site was connected last; absent: not since the start.", seen)


def _jobs(known: list[tuple[Submission, dict[str, Any]]], at_hand: str | None) -> Iterator[Metric]:
    counts = Counter(state["state"] for _, state in known)
    yield gauge("jobs", "Jobs by their state.", [({"state": state}, counts[state]) for state in get_args(State)])
    rounds = sum(max(submission.progress(), 0) for submission, _ in known)
    yield counter("rounds", "Rounds that are durable, of all jobs.", rounds)
    now = [(submission, state) for submission, state in known if submission.name == at_hand]
    labels = [{"job": submission.name} for submission, _ in now]
    done = [max(submission.progress(), 0) for submission, _ in now]
    yield gauge("job_rounds", "Rounds of the job at hand that are durable.", zip(labels, done, strict=True))
    planned = [_planned(submission) for submission, _ in now]
    yield gauge("job_rounds_planned", "Rounds of the job at hand.", zip(labels, planned, strict=True))
    waits = [bool(state.get("waiting")) for _, state in now]
    yield gauge("job_waiting", "1: the job at hand waits for sites.", zip(labels, waits, strict=True))


@functools.lru_cache(maxsize=4)
def _planned(submission: Submission) -> int:
    return submission.signed_job().job.training.rounds
