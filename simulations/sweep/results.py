"""The folder of a sweep: who may write to it, what it was started with, and what came out.

Formal guarantees (tests: tests/simulations/sweep/test_sweep.py)
    * One process writes to a folder at a time.
    * A sweep is not resumed with other settings or other data; nothing is written then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shared.errors import RunError
from shared.files.atomic import exclusive_lock, write_bytes, write_json
from shared.files.json_files import read_object
from shared.files.outputs import check_own_folder, make_folder
from simulations.sweep import FORMAT, SWEEP
from simulations.sweep.figure import draw_frontier
from simulations.sweep.frontier import FrontierPoint, SettingResult, by_setting, caution, frontier, utility_points
from simulations.sweep.journal import Journal, TrialResult
from simulations.sweep.spec import Sweep, settings_sha256

FIGURE, UTILITY = "frontier.png", "utility.json"


def check_place(folder: Path) -> None:
    """Find what speaks against a sweep of whatever settings in `folder`; writes nothing, and is quick.

    Raises:
        RunError: if it is no folder, or holds anything but a sweep of ours.
    """
    check_own_folder(folder, marker=SWEEP, own=(".lock",), what="sweep")


def check_folder(folder: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
    """Find what speaks against running a sweep in `folder`; writes nothing.

    Raises:
        RunError: if it is a file, holds something else, a sweep already and `resume` is False, or one with other settings.
    """
    check_place(folder)
    path = folder / SWEEP
    if not path.exists():
        return
    try:
        known = read_object(path)
        kept, digest = dict(known["settings"]), str(known["settings_sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path} cannot be read ({type(error).__name__}); restore it or choose another folder."
        ) from None
    if digest != settings_sha256(kept):
        raise RunError(f"the settings in {path} were changed (their SHA-256 does not match); restore the file.")
    if digest != settings_sha256(settings):
        other = sorted(key for key in {*kept, *settings} if kept.get(key) != settings.get(key))
        raise RunError(
            f"{folder} holds a sweep with other settings (different: {', '.join(other)}). Choose another folder, or resume with "
            "the settings it was started with."
        )
    if not resume:
        raise RunError(f"{folder} holds a sweep already; continue it with --resume, or choose another folder.")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder of a sweep, made if it is not there.

    Raises:
        RunError: if another process holds it, or it cannot be made.
    """
    make_folder(folder)
    with exclusive_lock(folder / ".lock", f"another process is running a sweep in {folder}; wait for it."):
        yield


def write_start(folder: Path, sweep: Sweep, settings: Mapping[str, Any]) -> None:
    """Write `sweep.json` before the first trial."""
    write_json(folder / SWEEP, _head(sweep, settings, "running"))


def write_results(
    folder: Path, sweep: Sweep, settings: Mapping[str, Any], journal: Journal
) -> tuple[list[FrontierPoint], list[str]]:
    """Write frontier, figure, utility file and `sweep.json`, and return the frontier and what to mind about it.

    Raises:
        RunError: if no setting was completed under all seeds.
    """
    results = list(journal.results.values())
    settled = by_setting(results, seeds=sweep.seeds)
    failed = [result for result in results if not result.completed]
    if not settled:
        reason = f"; the first failure: {failed[0].reason}" if failed else ""
        raise RunError(f"no setting was completed under all seeds{reason}")
    higher = results[0].higher_is_better
    points = frontier(settled, higher_is_better=higher)
    notes = caution(points, num_seeds=len(sweep.seeds))
    if failed:
        notes.append(f"{len(failed)} trials failed; their settings are not compared. --resume runs them again.")
    write_bytes(folder / FIGURE, draw_frontier(points, settled, name=sweep.name, higher_is_better=higher))
    _write_utility(folder, points, sweep.name)
    write_json(
        folder / SWEEP,
        {
            **_head(sweep, settings, "completed" if not failed else "completed, with failures"),
            "metric": results[0].metric,
            "higher_is_better": higher,
            "num_trials": len(results),
            "failed": [_failure(result) for result in failed],
            "frontier": [point.as_dict() for point in points],
            "settings_tried": [_row(result) for result in settled],
            "notes": notes,
        },
    )
    return points, notes


def _head(sweep: Sweep, settings: Mapping[str, Any], status: str) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "name": sweep.name,
        "status": status,
        "trials_per_budget": sweep.config.trials,
        "settings": dict(settings),
        "settings_sha256": settings_sha256(settings),
    }


def _write_utility(folder: Path, points: Sequence[FrontierPoint], name: str) -> None:
    content = utility_points(points, name=name)
    if content is None:
        (folder / UTILITY).unlink(missing_ok=True)
    else:
        write_json(folder / UTILITY, content)


def _failure(result: TrialResult) -> dict[str, Any]:
    return {"setting": result.setting, "seed": result.seed, "reason": result.reason}


def _row(result: SettingResult) -> dict[str, Any]:
    return {"setting": result.setting, "epsilon": result.epsilon, "mean": result.mean, "sd": result.sd}
