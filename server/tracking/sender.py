"""Brings one tracker up to date with the runs of a command, in a thread of its own, for which no run waits.

What waits to be sent is what the runs themselves recorded, a few numbers a round, so it cannot grow beyond that. What fails
is tried again after some seconds and with the next round, and once more at the end.
"""

from __future__ import annotations

import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

from server.records.tracking import TRACKING_FILE, Tracked, TrackingRecord
from server.tracking.run_told import Ending, Figures, Recording, RunTold, Tracker
from server.tracking.target import Target
from shared.files.atomic import write_json
from shared.files.json_files import read_if_there

_MOST_OF_A_REASON = 300
_SECONDS_TO_NEXT_TRY = 5.0


class Outgoing:
    """A run on its way to trackers: written by the run's thread, read by those that send.

    Args:
        folder: the run folder, where `tracking.json` says what arrived.
    """

    def __init__(self, told: RunTold, folder: Path) -> None:
        self.told, self.folder = told, folder
        self.figures: tuple[Figures, ...] = ()
        self.ending: Ending | None = None
        self._lock = threading.Lock()  # of the file: every tracker has its line in it

    def known(self, target: Target) -> Tracked | None:
        """Return what an earlier process noted of the run at a tracker."""
        with self._lock:
            record = read_if_there(self.folder / TRACKING_FILE, TrackingRecord)
        return record.trackers.get(target.told) if record else None

    def note(self, target: Target, tracked: Tracked) -> None:
        """Note what has arrived."""
        with self._lock:
            record = read_if_there(self.folder / TRACKING_FILE, TrackingRecord) or TrackingRecord()
            write_json(self.folder / TRACKING_FILE, TrackingRecord(trackers=record.trackers | {target.told: tracked}))


class _AtTracker:
    """How far one run has come at one tracker; None of `recording`: it is not begun."""

    def __init__(self) -> None:
        self.recording: Recording | None = None
        self.sent, self.finished = 0, False


class Sender:
    """The thread of one tracker.

    Args:
        open_tracker: makes the tracker, in that thread: its library takes seconds to load.
    """

    def __init__(self, target: Target, open_tracker: Callable[[], Tracker]) -> None:
        self._target, self._open = target, open_tracker
        self._tracker: Tracker | None = None
        self._runs: dict[Outgoing, _AtTracker] = {}
        self._due: list[Outgoing] = []
        self._changed, self._closing = threading.Condition(), False
        self._problem: str | None = None
        self._warned = False
        self._thread = threading.Thread(target=self._work, name=f"tracking {target.kind}", daemon=True)
        self._thread.start()

    def wake(self, run: Outgoing) -> None:
        """There is something new of `run`; returns at once."""
        with self._changed:
            self._runs.setdefault(run, _AtTracker())
            if run not in self._due:
                self._due.append(run)
            self._changed.notify()

    def warning(self) -> str | None:
        """Return, once, why something could not be sent."""
        with self._changed:
            if self._problem is None or self._warned:
                return None
            self._warned = True
            return f"{self._target.told} takes nothing: {self._problem}. The run goes on, and what is missing is tried again."

    def close(self) -> None:
        """Let the thread end once it has tried everything again; returns at once."""
        with self._changed:
            self._closing = True
            self._due = [run for run, at in self._runs.items() if not at.finished]
            self._changed.notify()

    def join(self, deadline: float) -> None:
        """Wait for the thread's end, at most until `deadline` of the monotonic clock."""
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def missing(self) -> str | None:
        """Return, after the end, what did not arrive; None if everything did."""
        left = {run: at for run, at in self._runs.items() if not at.finished}
        if not left:
            return None
        lost = sorted({one.round for run, at in left.items() for one in run.figures[at.sent :]})
        rounds = f"round{f's {lost[0]} to' if len(lost) > 1 else ''} {lost[-1]}" if lost else ""
        names = ", ".join(run.told.name for run in list(left)[:3]) + (", ..." if len(left) > 3 else "")
        reason = self._problem or "it did not answer in time"
        missing = f"{rounds} and its end" if rounds else "its end"
        return f"{self._target.told} did not get everything of {names} ({missing}): {reason}"

    def _work(self) -> None:
        failed: list[Outgoing] = []
        while True:
            with self._changed:
                something = self._changed.wait_for(
                    lambda: self._due or self._closing, timeout=_SECONDS_TO_NEXT_TRY if failed else None
                )
                if not something:
                    self._due, failed = failed, []
                if not self._due:
                    return
                run = self._due.pop(0)
            try:
                self._bring_up_to_date(run, self._runs[run])
            except Exception as error:  # libraries of others, in a thread that nothing else depends on
                failed = [*(one for one in failed if one is not run), run]
                text = self._target.without_secrets(str(error)).strip() or "no reason given"
                reason = textwrap.shorten(text.splitlines()[0], _MOST_OF_A_REASON, placeholder=" ...")
                with self._changed:
                    self._problem = f"{type(error).__name__}: {reason}"

    def _bring_up_to_date(self, run: Outgoing, at: _AtTracker) -> None:
        self._tracker = self._tracker or self._open()
        if at.recording is None:
            known = run.known(self._target)
            at.recording = self._tracker.record(run.told, known.id if known else None)
            at.sent = known.rounds if known and not at.recording.is_new else 0
            run.note(self._target, Tracked(id=at.recording.id, rounds=at.sent))
        figures, ending = run.figures, run.ending
        if new := figures[at.sent :]:
            at.recording.send(new)
            at.sent = len(figures)
            run.note(self._target, Tracked(id=at.recording.id, rounds=at.sent))
        if ending is not None and not at.finished:
            at.recording.finish(ending)
            at.finished = True
