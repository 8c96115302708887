"""A sweep as `silotune sweep` shows it: run every trial that is not finished, then tables, figure and files."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from server.tracking import Watched
from shared import terminal
from shared.data.datasets import dataset_fingerprint
from shared.errors import PrivacyError
from shared.privacy.plan import PrivacyPlan
from shared.stopping import saying
from shared.tasks import Record
from simulations.data.small_gpt2 import prepare_backbone
from simulations.running.engine import check_arm, plan_arms
from simulations.running.watching import Watching
from simulations.scenario import Scenario
from simulations.sweep import RUNS, SWEEP, TRIALS, private, results
from simulations.sweep.journal import Journal, TrialResult
from simulations.sweep.private import Selection, plan_selection, run_selection
from simulations.sweep.progress import SweepProgress
from simulations.sweep.search import num_trials, require_optuna, search
from simulations.sweep.selection import NumTrials
from simulations.sweep.spec import Setting, Sweep
from simulations.sweep.tables import frontier_table, trials_table
from simulations.sweep.trials import run_trial


def run_sweep(
    sweep: Sweep, folder: Path, *, law: NumTrials | None, resume: bool, as_json: bool, watched: Watched | None = None
) -> None:
    """Run a sweep, or continue it, and print what came out.

    Args:
        law: of the number of trials, where the tuning is accounted for.
        watched: trackers and the meter of energy; none by default.

    Raises:
        ConfigError: bad settings, found before a trial runs.
        PrivacyError: the data is private and the tuning is not accounted, or cannot be.
        RunError: see `results.check_folder`, `private.run_selection`.
    """
    started = time.monotonic()
    console = terminal.console(140, as_json=as_json)
    with saying(lambda: _how_to_continue(folder)):
        (results if law is None else private).check_place(folder)
        scenario = sweep.scenario(sweep.first(), sweep.seeds[0])
        if law is not None:
            with console.status("the settings are checked and their noise is calibrated"):
                selection = plan_selection(sweep, law)
            _select(selection, scenario, folder, resume=resume, console=console, as_json=as_json)
            return
        require_unprivate_data(scenario)
        if sweep.config.search == "optuna":
            require_optuna()
        data_sha256, confirmation = _prepare(sweep, scenario, console)
        settings = sweep.settings(data_sha256)
        results.check_folder(folder, settings, resume=resume)
        with results.locked(folder):
            results.check_folder(folder, settings, resume=resume)  # another process may have been quicker
            results.write_start(folder, sweep, settings)
            journal = Journal(folder / TRIALS)
            with Watching(watched or Watched(), folder, _warning(console), experiment=sweep.name) as watching:
                _run_trials(sweep, folder, journal, confirmation, console, watching)
            points, notes = results.write_results(folder, sweep, settings, journal)
        if as_json:
            figures = {
                "sweep_dir": str(folder),
                "frontier": [point.as_dict() for point in points],
                "trials": len(journal.results),
                "failed": sum(not result.completed for result in journal.results.values()),
                "seconds": round(time.monotonic() - started, 1),
            }
            terminal.print_json(figures)
            return
        console.print(trials_table(list(journal.results.values())))
        console.print(frontier_table(points))
        for note in notes:
            console.print(note, soft_wrap=True)
        files = [name for name in (SWEEP, results.FIGURE, results.UTILITY) if (folder / name).exists()]
        console.print(f"\nwritten to {folder}: {', '.join(files)}", soft_wrap=True)


def _how_to_continue(folder: Path) -> str:
    if not folder.exists():
        return "nothing was written; start the command again."
    return f"continue with the same command and --resume --out {folder}; finished trials are kept"


def require_unprivate_data(scenario: Scenario) -> None:
    """Refuse to tune on private records without accounting for it.

    Raises:
        PrivacyError: naming what to declare or to do.
    """
    for what, kind, key in (
        ("records that the sites train on are", scenario.data.declared_kind, "data.kind"),
        ("evaluation records are", scenario.data.evaluation_kind, "data.test_kind"),
    ):
        if kind == "private":
            raise PrivacyError(
                f"the {what} private (a file counts as private unless it is declared otherwise). Every trial of a sweep "
                "looks at them, and choosing the best setting releases something about them that no trial's epsilon counts. "
                f'Tune on public or synthetic records, declared as {key} = "public" or "synthetic"; or account for the tuning '
                "with --account-tuning, which docs/sweeps.md explains."
            )


def _prepare(sweep: Sweep, scenario: Scenario, console: Console) -> tuple[str, list[Record]]:
    """Return (fingerprint of the data, confirmation records), after the checks that a run would make before it writes."""
    prepare_backbone(scenario.job.model.backbone, console)
    with console.status("data and settings are checked and the noise is calibrated"):
        train, test = scenario.load_data()
        confirmation = scenario.load_confirmation()
        (arm,) = plan_arms(scenario, Path(), train)
        check_arm(scenario, arm, test)
        if sweep.config.search == "grid":
            for setting in sweep.grid():
                PrivacyPlan.from_job(sweep.scenario(setting, sweep.seeds[0]).job)
    parts = [dataset_fingerprint(part) for part in (train, test, confirmation)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest(), confirmation


def _warning(console: Console) -> Callable[[str], None]:
    """Return what prints a warning once, however many trials give it."""
    said: set[str] = set()

    def warn(text: str) -> None:
        if text not in said:
            said.add(text)
            console.print(f"warning: {text}", style="yellow", soft_wrap=True, markup=False)

    return warn


def _run_trials(
    sweep: Sweep, folder: Path, journal: Journal, confirmation: list[Record], console: Console, watching: Watching
) -> None:
    """Run every trial of the search that is not finished; the caller holds the folder's lock."""
    found = {key for key, result in journal.results.items() if result.completed}
    asked: set[str] = set()
    with SweepProgress(console, total=max(num_trials(sweep), len(found)), done=len(found)) as progress:

        def run_one(setting: Setting, seed: int) -> TrialResult:
            key = sweep.key(setting, seed)
            repeated, known = key in asked, journal.finished(key)
            asked.add(key)
            if repeated:
                progress.repeated()
            if repeated or known is not None:
                return journal.results[key]
            progress.started(setting, seed)
            place = folder / RUNS / key
            result = run_trial(
                sweep,
                setting,
                seed,
                place,
                confirmation=confirmation,
                round_done=progress.round_done,
                watching=watching,
            )
            watching.tracking.finish(place)
            journal.append(result)
            progress.finished(result)
            return result

        search(sweep, run_one)


def _select(
    selection: Selection, scenario: Scenario, folder: Path, *, resume: bool, console: Console, as_json: bool
) -> None:
    data_sha256, confirmation = _prepare(selection.sweep, scenario, console)

    def run_one(setting: Setting, seed: int, place: Path) -> TrialResult:
        return run_trial(selection.sweep, setting, seed, place, confirmation=confirmation)

    with (
        results.locked(folder),
        console.status("trials are running; how many is not told, for the bound needs it hidden"),
    ):
        outcome = run_selection(selection, folder, run_one=run_one, data_sha256=data_sha256, resume=resume)
    if as_json:
        terminal.print_json({"sweep_dir": str(folder), **outcome})
        return
    selected = outcome["selected"]
    if selected is None:
        console.print(
            "the drawn number of trials was 0, so nothing was selected; this is the outcome, and it has its cost."
        )
    else:
        console.print(
            f"selected: {selected['described']}: {selected['metric']} {selected['score']:.4f}", soft_wrap=True
        )
    console.print(f"\n{outcome['statement']}", soft_wrap=True)
    console.print("\nIt does not cover:")
    for text in outcome["not_covered"]:
        console.print(f"  - {text}", soft_wrap=True)
    console.print(f"\nwritten to {folder}: outcome.json" + (", selected/" if selected else ""), soft_wrap=True)
