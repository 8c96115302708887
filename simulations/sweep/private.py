"""Tuning on private data with its cost accounted: one selected trial is released, and nothing else (Papernot, Steinke 2022).

Guarantees (tests: tests/simulations/sweep/test_sweep_private.py)
    * What is left in the sweep's folder is the selected trial's setting, scores on public records and adapter, and the
      statement; no score, setting or adapter of another trial, and not how many there were.
    * Number and settings of the trials are drawn once, by the operating system's generator, and kept through a kill: to draw
      again after a look at the first trials would not be covered by the bound.
    * A trial that fails counts as the worst; it is not repeated.
"""

from __future__ import annotations

import math
import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.epsilons import delta_rounded_up, rounded_up
from shared.errors import ConfigError, PrivacyError, RunError
from shared.files.atomic import sync_folder, write_json
from shared.files.json_files import damaged, read_object
from shared.files.outputs import check_own_folder
from shared.privacy.accounting import compose_epsilon
from shared.privacy.plan import PrivacyPlan
from shared.privacy.statement import RELATION
from simulations.scenario import Scenario
from simulations.sweep import OUTCOME
from simulations.sweep.journal import Journal, TrialResult
from simulations.sweep.selection import NumTrials, draw_num_trials, selection_epsilon
from simulations.sweep.spec import EPSILON, Setting, Sweep, describe, settings_sha256

FORMAT = "silotune-selection/1"
# An adapter, its scores on public records and its job are the trial's outcome; times, ledgers and the sites' data are not.
RELEASED = ("adapter", "evaluation.json", "job.json")
_WORK, _STATE, _SELECTED = ".private", "state.json", "selected"

NOT_COVERED = (
    "How many trials were run and how long the sweep took: whoever learns either can guess the number of trials, which the "
    "bound needs hidden. Keep the times of this folder and the log of the machine to yourself.",
    "Whether a trial failed, and messages of errors.",
    "Other sweeps and runs on the same data, and a second sweep with these settings: their costs add up.",
    "An observer of the trials while they run. The bound is for one party that holds all records and runs the simulation; a "
    "coordinator of real sites would see every trial's updates.",
    "Several records of one person, at one site or at several.",
    "The evaluation records, which were declared public; names and declared sizes of the sites.",
)

RunOne = Callable[[Setting, int, Path], TrialResult]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A sweep over private data that can be accounted.

    Attributes:
        sweep: its settings; every trial chooses one of them and one of the seeds uniformly at random.
        law: distribution of the number of trials.
        delta: failure probability.
        epsilon: of the release, by `selection_epsilon`.
        epsilon_one_trial: the largest epsilon of a single trial, by PLD, for comparison.
    """

    sweep: Sweep
    law: NumTrials
    delta: float
    epsilon: float
    epsilon_one_trial: float

    @property
    def num_settings(self) -> int:
        """Settings that a trial chooses from."""
        return len(self.sweep.grid())

    def statement(self) -> str:
        """Return the guarantee in words."""
        theorem = "theorem 6" if self.law.distribution == "poisson" else "theorem 2"
        return (
            f"What this sweep released, the setting, scores and adapter of one selected trial, is ({rounded_up(self.epsilon)}, "
            f"{delta_rounded_up(self.delta)})-differentially private under {RELATION}, for a person with one record at "
            f"one site, by Rényi "
            f"accounting of a private selection (Papernot and Steinke 2022, {theorem}): a {self.law.distribution} number of "
            f"trials with mean {self.law.mean:g}, each of a setting chosen uniformly among {self.num_settings}, both drawn by "
            "the operating system's generator; one trial by itself is "
            f"({rounded_up(self.epsilon_one_trial)}, {delta_rounded_up(self.delta)})-differentially private."
        )


def plan_selection(sweep: Sweep, law: NumTrials) -> Selection:
    """Return the accounted selection.

    Raises:
        ConfigError: if the sweep cannot be accounted: it searches adaptively, or over several budgets.
        PrivacyError: if a setting adds no noise, its evaluation records are not public, or no epsilon can be stated.
    """
    if sweep.config.search != "grid":
        raise ConfigError(
            "--account-tuning chooses settings at random from a grid; search by optuna looks at earlier trials."
        )
    scenarios = [sweep.scenario(setting, sweep.seeds[0]) for setting in sweep.grid()]
    for scenario in scenarios:
        _require_public_evaluation(scenario)
        _require_fixed_sites(scenario)
    if len(sweep.config.axes.get(EPSILON, (None,))) > 1:  # type: ignore[arg-type]  # a grid has no ranges
        raise ConfigError(
            "--account-tuning takes one budget: a selection among several costs as much as the largest. Fix privacy.epsilon."
        )
    if any(scenario.job.privacy.shares_noise for scenario in scenarios):
        raise ConfigError(
            "--account-tuning accounts for one promise, and jobs of privacy.mechanism 'distributed' make two; use 'dp-sgd'."
        )
    plans = [PrivacyPlan.from_job(scenario.job) for scenario in scenarios]
    if not all(plan.private for plan in plans):
        raise PrivacyError(
            "a setting of the sweep adds no noise, so nothing can be accounted; remove inf or mechanism none."
        )
    mechanisms = {plan.mechanism(plan.planned_steps) for plan in plans}
    delta = plans[0].delta
    epsilon = selection_epsilon(mechanisms, law, delta=delta)
    if not math.isfinite(epsilon):
        raise PrivacyError(
            "no epsilon can be stated for this selection; lower privacy.epsilon or the mean number of trials."
        )
    one = max(compose_epsilon([mechanism], delta) for mechanism in mechanisms)
    return Selection(sweep=sweep, law=law, delta=delta, epsilon=epsilon, epsilon_one_trial=one)


def check_place(folder: Path) -> None:
    """Find what speaks against a selection in `folder`; writes nothing, and is quick.

    Raises:
        RunError: if it is no folder, or holds anything but a selection of ours.
    """
    if not (folder / OUTCOME).exists():
        check_own_folder(folder, marker=f"{_WORK}/{_STATE}", own=(".lock", _WORK), what="selection")
        check_own_folder(folder / _WORK, marker=_STATE, own=(), what="selection")


def run_selection(
    selection: Selection, folder: Path, *, run_one: RunOne, data_sha256: str, resume: bool
) -> dict[str, Any]:
    """Run the trials, release the best into `folder`, remove everything else, and return the content of `outcome.json`.

    Args:
        run_one: runs one trial into a folder.
        data_sha256: fingerprint of the data; kept only while the sweep runs.
        resume: continue with the number and settings that were drawn before.

    Raises:
        RunError: if the folder holds another sweep, or no trial could be completed.
    """
    work = folder / _WORK
    if (folder / OUTCOME).exists():
        if not resume:
            raise RunError(
                f"{folder} holds a finished selection; choose another folder. Mind that a second one costs again."
            )
        outcome = read_object(folder / OUTCOME)
        if outcome.get("settings_sha256") != _public_identity(selection):
            raise RunError(f"{folder} holds a selection with other settings; choose another folder.")
        shutil.rmtree(work, ignore_errors=True)
        return outcome
    check_place(folder)
    choices = _drawn(selection, work, data_sha256, resume=resume)
    results = _run_all(selection, work, choices, run_one)
    best = _best(results)
    _release(work, folder, best, results)
    outcome = _outcome(selection, None if best is None else results[best])
    write_json(folder / OUTCOME, outcome)
    shutil.rmtree(work)
    return outcome


def _require_public_evaluation(scenario: Scenario) -> None:
    if scenario.data.test is None or scenario.data.evaluation_kind == "private":
        raise PrivacyError(
            "--account-tuning selects by a score on public records: a score on private ones is a release of its own, which the "
            'bound does not count. Give data.test, a file of its own, and declare it: data.test_kind = "public" or "synthetic".'
        )


def _require_fixed_sites(scenario: Scenario) -> None:
    """Refuse partitions at random: one record more or less would move others to other sites, which the bound does not count."""
    if scenario.partition.kind != "column" and scenario.partition.num_sites != 1:
        raise PrivacyError(
            f"partition.kind {scenario.partition.kind!r} draws the sites of all records together, so one record more or less "
            "moves others; the bound is for one record at one site. Use kind 'column', or num_sites = 1."
        )


def _public_identity(selection: Selection) -> str:
    """Return the SHA-256 of everything that was asked, without the data: a fingerprint of private records is a release."""
    law = {"distribution": selection.law.distribution, "mean": selection.law.mean}
    return settings_sha256({**selection.sweep.settings(None), **law})


def _drawn(selection: Selection, work: Path, data_sha256: str, *, resume: bool) -> list[tuple[int, int]]:
    """Return (setting, seed) of every trial by place, drawn now or before the sweep was interrupted."""
    identity = settings_sha256({"asked": _public_identity(selection), "data": data_sha256})
    state = work / _STATE
    if state.exists():
        kept = read_object(state)
        if not resume:
            raise RunError(
                f"{work.parent} holds an unfinished selection; continue it with --resume, or remove the folder."
            )
        if kept.get("identity") != identity:
            raise RunError(f"{work.parent} holds a selection with other settings or other data; resume with those.")
        try:
            return [(int(setting), int(seed)) for setting, seed in kept["choices"]]
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(state, f"its choices cannot be read ({type(error).__name__})") from None
    number = draw_num_trials(selection.law)
    seeds = selection.sweep.seeds
    choices = [(secrets.randbelow(selection.num_settings), secrets.randbelow(len(seeds))) for _ in range(number)]
    work.mkdir(parents=True, exist_ok=True)
    os.chmod(work, 0o700)
    write_json(state, {"identity": identity, "choices": choices})
    return choices


def _run_all(
    selection: Selection, work: Path, choices: Sequence[tuple[int, int]], run_one: RunOne
) -> list[TrialResult]:
    """Run what is not in the journal yet; the place of a trial is its identity, for the same setting may be drawn twice."""
    journal, grid = Journal(work / "trials.jsonl"), selection.sweep.grid()
    for place, (setting, seed) in enumerate(choices):
        if str(place) not in journal.results:
            result = run_one(grid[setting], selection.sweep.seeds[seed], work / "trials" / str(place))
            journal.append(result.model_copy(update={"key": str(place)}))
    return [journal.results[str(place)] for place in range(len(choices))]


def _best(results: Sequence[TrialResult]) -> int | None:
    """Return the place of the best trial; the first of equals, which is as good as any since trials are exchangeable."""
    completed = [place for place, result in enumerate(results) if result.completed]
    if results and not completed:
        raise RunError(f"no trial of the selection could be completed; the first ended with: {results[0].reason}")
    if not completed:
        return None
    choose = max if results[completed[0]].higher_is_better else min
    return choose(completed, key=lambda place: results[place].value())


def _release(work: Path, folder: Path, best: int | None, results: Sequence[TrialResult]) -> None:
    """Copy the outcome of the best trial, without times and records, into `folder/selected`."""
    if best is None or (folder / _SELECTED).exists():
        return
    copy = work / _SELECTED
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for name in RELEASED:
        source = work / "trials" / str(best) / name
        if source.is_dir():
            shutil.copytree(source, copy / name, copy_function=shutil.copyfile)
        else:
            shutil.copyfile(source, copy / name)
    os.replace(copy, folder / _SELECTED)
    sync_folder(folder)


def _outcome(selection: Selection, best: TrialResult | None) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "name": selection.sweep.name,
        "settings_sha256": _public_identity(selection),
        "statement": selection.statement(),
        "not_covered": list(NOT_COVERED),
        "epsilon": selection.epsilon,
        "delta": selection.delta,
        "relation": RELATION,
        "epsilon_one_trial": selection.epsilon_one_trial,
        "num_trials": {"distribution": selection.law.distribution, "mean": selection.law.mean},
        "num_settings": selection.num_settings,
        "selected": None
        if best is None
        else {
            "setting": best.setting,
            "described": describe(best.setting),
            "seed": best.seed,
            "metric": best.metric,
            "score": best.score,
            "metrics": best.metrics,
            "confirmation": best.confirmation,
        },
    }
