"""Records what a checkout of the project does, with injected randomness and a clock that stands still.

All cases of one checkout run in one process tree, one after the other, with one thread. Numbers are of
this machine: only records of the same machine are comparable, and none is committed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.golden.recorder.cases import CASES

CHECKOUT = Path(__file__).parents[2]
_INSIDE = Path(__file__).with_name("inside.py")
_KEPT = ("PATH", "HOME", "LD_LIBRARY_PATH")
_ENVIRONMENT = {
    "COLUMNS": "100",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",
    "LANG": "C.UTF-8",
    "MKL_NUM_THREADS": "1",
    "NO_COLOR": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONHASHSEED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TERM": "dumb",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TZ": "UTC",
}


def record(out: Path, *, project: Path = CHECKOUT, cases: Sequence[str] = (), keep: Path | None = None) -> None:
    """Record `cases` (all by default) of the checkout `project` into the new folder `out`.

    Args:
        keep: a new folder for the files of the cases as the product left them.

    Raises:
        FileExistsError: if `out` is there already.
        subprocess.CalledProcessError: if a case could not be recorded; what was is in `out`.
    """
    out.mkdir(parents=True)
    environment = {name: os.environ[name] for name in _KEPT if name in os.environ} | _ENVIRONMENT
    with _work_folder() as (work, lock):
        paths = [str(path) for path in (_INSIDE, project.resolve(), work, out.resolve())]
        subprocess.run(
            [sys.executable, *paths, *(cases or CASES)],
            env=environment | {"PYTHONPATH": str(project.resolve())},
            cwd=work,
            pass_fds=[lock],  # should this process be killed, that one still keeps the folder for itself until it ends
            check=True,
        )
        if keep is not None:
            shutil.copytree(work, keep)


@contextlib.contextmanager
def _work_folder() -> Iterator[tuple[Path, int]]:
    """Give an empty folder of the same path for every record, since it becomes part of jobs and their hashes; and its lock."""
    place = Path(tempfile.gettempdir()) / f"silotune-golden-{os.getuid()}"
    with place.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two records at once take turns
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        try:
            yield place, lock.fileno()
        finally:
            shutil.rmtree(place, ignore_errors=True)
