"""The report of a run: the file that the run wrote, or one made now by a process of its own, never in the run's folder.

Guarantee (tests: tests/simulations/console/test_reports.py): what is shown is made from plain files of the run's folder; one
with a link in it is refused (test_no_report_is_made_over_a_link). A report is a document that somebody else may have made, so
it is served under `shared.web.guarding.SANDBOXED` (tests/simulations/console/test_browser.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from shared.errors import RunError, printable
from shared.processes import die_with_parent
from shared.web.turns import Turn
from simulations.console.files import read_plain
from simulations.console.runs import Run

NAME = "report.html"
_SECONDS = 300
_MOST_KEPT = 50
_MOST_FILES = 20_000


class Reports:
    """The reports of runs.

    Args:
        place: a folder for those that are made; its owner removes it.
    """

    def __init__(self, place: Path) -> None:
        self._place, self._alone = place, Turn()
        self._made: dict[str, Run] = {}

    def of(self, run: Run) -> bytes:
        """Return the report of a run.

        Raises:
            RunError: there is none and none can be made, with the reason.
            Busy: others wait for theirs.
        """
        if run.has_report:
            return read_plain(run.folder / NAME)
        if run.problem:
            raise RunError(f"no report is made of a run that cannot be read: {run.problem}")
        path = self._place / f"{run.id}.html"
        with self._alone:  # PyTorch and figures take half a gigabyte
            known = self._made.get(run.id)
            if known is None or known.stamps != run.stamps:
                _refuse_links(run.folder)
                _make(run.folder, path)
                self._keep(run)
            return read_plain(path)

    def _keep(self, run: Run) -> None:
        self._made.pop(run.id, None)
        self._made[run.id] = run
        while len(self._made) > _MOST_KEPT:
            oldest = next(iter(self._made))
            del self._made[oldest]
            (self._place / f"{oldest}.html").unlink(missing_ok=True)


def _make(folder: Path, path: Path) -> None:
    path.unlink(missing_ok=True)
    # Python looks for modules where it is started, and a folder of runs may hold a cli.py.
    command = [sys.executable, "-m", "cli", "report", "write", str(folder.resolve()), "--out", str(path)]
    try:
        done = subprocess.run(  # noqa: S603 - this program, and two paths
            command,
            cwd=path.parent,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
            preexec_fn=die_with_parent if os.name == "posix" else None,
        )
    except subprocess.TimeoutExpired:
        raise RunError(f"the report was not made within {_SECONDS} seconds; try: silotune report {folder}") from None
    if done.returncode or not path.exists():
        reason = printable(done.stderr.strip().removeprefix("error: ")[:1000], " ") or f"status {done.returncode}"
        raise RunError(f"the report cannot be made: {reason}")


def _refuse_links(folder: Path) -> None:
    """Raise `RunError` if a file from which a report is made could be one from elsewhere.

    Homes of sites and other runs are not read for it, but a link in the place of one could stand for what is.
    """
    num_files = 0
    for parent, inner, files in os.walk(folder):
        place = Path(parent)
        num_files += len(files)
        link = next((name for name in (*inner, *files) if (place / name).is_symlink()), None)
        if link is not None:
            raise RunError(f"no report is made, for {link} in this run is a link; replace it by what it leads to.")
        if place == folder:
            inner[:] = [name for name in inner if name not in ("repeats", "folds")]
        elif place.parent == folder / "sites":
            inner[:] = [name for name in inner if name != "home"]
        if num_files > _MOST_FILES:
            raise RunError("no report is made, for the folder holds too many files for a run.")
