"""Reports on request: made by the command line in a process of its own, which may load what a console never does.

Formal guarantees (tests: tests/server/console/test_reports.py)
    * One report is made at a time, and the process ends with the console (test_one_at_a_time).
    * Only the files that a report can be are found, and only as files of the run's own folder (test_only_reports_are_given_out).
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from server.console.runs import Run
from server.store.home import CoordinatorHome
from shared.processes import die_with_parent

log = logging.getLogger("silotune.console")

Kind = Literal["run", "html", "pdf"]
KINDS: Mapping[str, Kind] = {"run": "run", "html": "html", "pdf": "pdf"}
SIGNED: frozenset[Kind] = frozenset({"html", "pdf"})
"""What a coordinator can sign: the compliance report."""
FILES = {
    "report.html": "text/html",
    "compliance-report.html": "text/html",
    "compliance-report.html.sig.json": "application/json",
    "compliance-report.pdf": "application/pdf",
    "compliance-report.pdf.sig.json": "application/json",
}
"""Every file that a report is, with its type."""
_LONGEST_SECONDS = 900
_COMMAND = (sys.executable, "-P", "-m", "cli", "report", "write")


@dataclass(frozen=True, kw_only=True)
class Made:
    """A file of a report.

    Attributes:
        name: of the file in the run's folder.
        size: bytes.
        time: when it was written, seconds since 1970.
        is_signed: a signature lies beside it.
    """

    name: str
    size: int
    time: float
    is_signed: bool


class Reports:
    """Makes reports of runs; safe to use from several threads.

    Args:
        home: the coordinator's folder; it signs.
        command: to which a run's folder and options are added.
    """

    def __init__(self, home: CoordinatorHome, command: Sequence[str] = _COMMAND) -> None:
        self._home, self._command = home, tuple(command)
        self._lock = threading.Lock()
        self._busy: tuple[str, Kind] | None = None
        self._failed: set[tuple[str, Kind]] = set()

    def begin(self, run: Run, kind: Kind, *, signed: bool, first: Callable[[], None]) -> bool:
        """Begin to make a report, and return whether it was begun: not while another one is being made.

        Args:
            signed: by the coordinator's round key; of `SIGNED` only.
            first: what is done before, once it is sure to begin; if it raises, nothing is made.
        """
        with self._lock:
            if self._busy is not None:
                return False
            self._busy = (run.id, kind)
            self._failed.discard((run.id, kind))
        try:
            first()
            threading.Thread(target=self._make, args=(run, kind, signed), name="report", daemon=True).start()
        except BaseException:
            with self._lock:
                self._busy = None
            raise
        return True

    def making(self, run: Run) -> Kind | None:
        """Return what is being made of a run."""
        with self._lock:
            return self._busy[1] if self._busy is not None and self._busy[0] == run.id else None

    @property
    def is_busy(self) -> bool:
        """Whether one is being made, of whatever run."""
        with self._lock:
            return self._busy is not None

    def failed(self, run: Run) -> list[Kind]:
        """Return what could not be made of a run; why is in the console's log, for it may quote a site."""
        with self._lock:
            return [kind for name, kind in sorted(self._failed) if name == run.id]

    def made(self, run: Run) -> list[Made]:
        """Return the files that are there."""
        found = []
        for name in FILES:
            if (path := self.file(run, name)) is not None:
                facts = path.stat()
                signature = self.file(run, f"{name}.sig.json")
                found.append(Made(name=name, size=facts.st_size, time=facts.st_mtime, is_signed=signature is not None))
        return found

    def file(self, run: Run, name: str) -> Path | None:
        """Return where one of the files lies; None if it is not there, or none of them."""
        if name not in FILES:
            return None
        path = run.submission.run_folder / name
        return path if path.is_file() and not path.is_symlink() else None

    def _make(self, run: Run, kind: Kind, signed: bool) -> None:
        arguments = [str(run.submission.run_folder), *([] if kind == "run" else ["--format", kind])]
        arguments += ["--sign", str(self._home.path)] if signed else []
        is_made = False
        try:
            done = subprocess.run(  # noqa: S603 (our own command)
                [*self._command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=_LONGEST_SECONDS,
                check=False,
                preexec_fn=die_with_parent,
            )
            is_made = done.returncode == 0
            if not is_made:
                log.error("the report of %s was not made: %s", run.id, done.stderr[-2000:].decode(errors="replace"))
        except (OSError, subprocess.SubprocessError) as error:
            log.error("the report of %s was not made: %s", run.id, error)
        finally:
            with self._lock:
                self._busy = None
                if not is_made:
                    self._failed.add((run.id, kind))
