"""All runs and sweeps beneath a folder: found once, then read again only where something changed.

Formal guarantees (tests: tests/simulations/console/test_index.py)
    * Looking again at a folder in which nothing changed reads no file (test_nothing_is_read_twice).
    * Links are not followed, hidden folders and homes of sites, which hold records, are not entered, and depth and number are
      bounded (test_no_link_is_followed, test_homes_of_sites_are_not_entered, test_depth_and_number_are_bounded).
    * What an unfinished selection tried stays hidden, which its epsilon needs (test_trials_of_a_selection_stay_hidden).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from simulations.console.files import entries, unchanged
from simulations.console.runs import Run, id_of, read_run
from simulations.console.sweeps import Sweep, read_selection, read_sweep
from simulations.sweep import OUTCOME, RUNS, SWEEP

MOST_DEPTH, MOST_FOLDERS, MOST_RUNS = 8, 50_000, 10_000
_OF_A_RUN = frozenset({"run.json", "checkpoint.safetensors", "evaluation.json", "metrics.jsonl"})
_AGAIN_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Found:
    """What lies beneath the folder.

    Attributes:
        runs, sweeps: by id, in the order of their paths.
        cut: there are more than are shown.
    """

    runs: Mapping[str, Run] = field(default_factory=dict)
    sweeps: Mapping[str, Sweep] = field(default_factory=dict)
    cut: bool = False


class Index:
    """The runs and sweeps beneath `root`; safe to use from several threads.

    Args:
        told: is called with the number of runs read so far, while they are read.
    """

    def __init__(self, root: Path, *, told: Callable[[int], None] = lambda number: None) -> None:
        self.root, self._told = root, told
        self._lock = threading.Lock()
        self._found, self._looked = Found(), -_AGAIN_SECONDS

    def now(self) -> Found:
        """Return what lies there now, or did a second ago."""
        with self._lock:
            if time.monotonic() - self._looked >= _AGAIN_SECONDS:
                self._found = self._look()
                self._looked = time.monotonic()
            return self._found

    def _look(self) -> Found:
        runs, sweeps, cut = dict[str, Run](), dict[str, Sweep](), False
        for place in _walk(self.root):
            if place is None or len(runs) >= MOST_RUNS:
                cut = True
                break
            if place.kind == "sweep":
                known = self._found.sweeps.get(place.id)
                fits = known is not None and unchanged(known.stamps)
                sweeps[place.id] = known if known and fits else read_sweep(place.folder, place.path)
                continue
            run = self._found.runs.get(place.id)
            if run is None or not unchanged(run.stamps):
                run = place.read()
                self._told(len(runs) + 1)
            runs[place.id] = run
        return Found(runs=runs, sweeps=sweeps, cut=cut)


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A folder that is a run, a selection or a sweep; `sweep` is the id of the one that it is a trial of."""

    kind: str
    folder: Path
    path: str
    sweep: str

    @property
    def id(self) -> str:
        return id_of(self.path)

    def read(self) -> Run:
        if self.kind == "selection":
            return read_selection(self.folder, self.path)
        return read_run(self.folder, self.path, sweep=self.sweep)


def _walk(root: Path) -> Iterator[_Place | None]:
    """Yield every place beneath `root` by path; None at last if there is more than may be looked at."""
    waiting, num_folders = [(root, "", "", 0)], 0
    while waiting:
        folder, path, sweep, depth = waiting.pop()
        num_folders += 1
        if num_folders > MOST_FOLDERS:
            yield None
            return
        found = entries(folder)
        if "site.toml" in found:  # the home of a site holds records
            continue
        kind = _kind(found)
        if kind:
            yield _Place(kind=kind, folder=folder, path=path, sweep=sweep)
        if kind in ("run", "selection") or depth == MOST_DEPTH:
            continue
        inner = [name for name, is_folder in found.items() if is_folder and (kind != "sweep" or name == RUNS)]
        within = id_of(path) if kind == "sweep" else sweep
        waiting += [
            (folder / name, f"{path}/{name}" if path else name, within, depth + 1)
            for name in sorted(inner, reverse=True)
        ]


def _kind(found: Mapping[str, bool]) -> str:
    if "job.json" in found and _OF_A_RUN & found.keys():
        return "run"
    return "sweep" if SWEEP in found else "selection" if OUTCOME in found else ""
