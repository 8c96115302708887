"""What the pages of the research console are made from, and which runs somebody asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shared.web.asked import Asked
from simulations.console.index import Found, Index
from simulations.console.reports import Reports
from simulations.console.runs import Run


@dataclass(frozen=True, kw_only=True)
class Research:
    """A folder of runs, opened for its console."""

    index: Index
    reports: Reports


def content_of(asked: Asked) -> Research:
    """Return what the console that was asked shows."""
    content: Research = asked.console.content
    return content


SORTS: Mapping[str, Callable[[Run], Any]] = {
    "name": lambda run: run.name.casefold(),
    "task": lambda run: run.task,
    "data": lambda run: (run.data, run.partition),
    "sites": lambda run: run.num_sites,
    "epsilon": lambda run: run.executed if run.private else math.inf,
    "value": lambda run: run.value,
    "central": lambda run: run.central,
    "open": lambda run: run.open,
    "gap": lambda run: run.gap,
    "created": lambda run: None if run.created is None else run.created.timestamp(),
    "seconds": lambda run: run.seconds,
}
STATES = ("completed", "running", "stopped", "selected", "broken")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which runs are asked for, and in which order.

    Attributes:
        search: words that all stand in a run's name, path, task, model, data or partition.
        task, data, state: empty for any.
        sweep: id of the sweep whose trials are asked for, "none" for runs that are no trials, empty for any.
        least, most: of the executed epsilon; runs without noise have none that is small enough for a `most`.
        sort: a key of `SORTS`.
        down: the largest first.
    """

    search: str = ""
    task: str = ""
    data: str = ""
    sweep: str = ""
    state: str = ""
    least: float | None = None
    most: float | None = None
    sort: str = "created"
    down: bool = True

    def fits(self, run: Run) -> bool:
        """Return whether a run is one of them."""
        text = " ".join((run.name, run.path, run.task, run.backbone, run.data, run.partition)).casefold()
        exact = (
            (self.task, run.task),
            (self.data, run.data),
            (self.sweep, run.sweep or "none"),
            (self.state, state_of(run)),
        )
        return (
            all(word in text for word in self.search.casefold().split())
            and all(not wanted or wanted == found for wanted, found in exact)
            and self._in_range(run)
        )

    def of(self, runs: Iterable[Run]) -> list[Run]:
        """Return those that fit, in order; what cannot be compared comes last."""
        found = [run for run in runs if self.fits(run)]
        key = SORTS.get(self.sort, SORTS["created"])
        known = [run for run in found if key(run) is not None]
        return [*sorted(known, key=key, reverse=self.down), *(run for run in found if key(run) is None)]

    def query(self, **changes: Any) -> dict[str, Any]:
        """Return what an address has to hold to ask for the same, with changes."""
        told = {
            "q": self.search,
            "task": self.task,
            "data": self.data,
            "sweep": self.sweep,
            "state": self.state,
            "least": self.least,
            "most": self.most,
            "sort": self.sort,
            "down": int(self.down),
        }
        return {key: value for key, value in {**told, **changes}.items() if value not in ("", None)}

    def _in_range(self, run: Run) -> bool:
        if self.least is None and self.most is None:
            return True
        if run.problem or (run.private and run.executed is None):
            return False
        epsilon = run.executed if run.private and run.executed is not None else math.inf
        return (self.least or 0.0) <= epsilon <= (math.inf if self.most is None else self.most)


def state_of(run: Run) -> str:
    """Return how a run stands: one of `STATES`."""
    return "broken" if run.problem else run.status


def labels(runs: Sequence[Run]) -> list[str]:
    """Return what tells runs apart beside each other: their names, with their paths where several have one name."""
    names = [run.name for run in runs]
    return [run.name if names.count(run.name) == 1 else f"{run.name} ({run.path or '.'})" for run in runs]


def chosen(found: Found, ids: Sequence[str], *, most: int) -> list[Run]:
    """Return the runs of these ids that are there, in the order in which they were asked for."""
    return [found.runs[one] for one in dict.fromkeys(ids) if one in found.runs][:most]
