"""Which settings a sweep tries, and in which order: every combination, or those that Optuna asks for.

Both searches ask for the same settings again when a sweep is resumed, so finished trials are found and not run again: the grid
is fixed, and Optuna's sampler is seeded anew before each question, by the sweep's name, the budget and the question's number.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from shared.errors import ConfigError
from simulations.sweep.journal import TrialResult
from simulations.sweep.spec import EPSILON, Range, Setting, Sweep

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

RunOne = Callable[[Setting, int], TrialResult]
"""Returns the result of one trial: the one that is there, or that of running it."""


def num_trials(sweep: Sweep) -> int:
    """Return how many trials the search asks for at most."""
    settings = len(sweep.grid()) if sweep.config.search == "grid" else (sweep.config.trials or 0) * len(_budgets(sweep))
    return settings * len(sweep.seeds)


def search(sweep: Sweep, run_one: RunOne) -> None:
    """Ask `run_one` for every trial of the search."""
    if sweep.config.search == "grid":
        # Seed by seed: a loaded model serves all settings of a seed, and a stopped sweep has seen every setting once.
        for seed in sweep.seeds:
            for setting in sweep.grid():
                run_one(setting, seed)
        return
    for budget in _budgets(sweep):
        _search_by_optuna(sweep, budget, run_one)


def require_optuna() -> Any:
    """Return the module, silenced.

    Raises:
        ConfigError: if it is not installed.
    """
    try:
        import optuna
    except ModuleNotFoundError:
        raise ConfigError("search = 'optuna' needs Optuna: pip install 'silotune[sweep]', or search a grid.") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _budgets(sweep: Sweep) -> Sequence[Any]:
    axis = sweep.config.axes.get(EPSILON, (None,))
    return () if isinstance(axis, Range) else axis


def _search_by_optuna(sweep: Sweep, budget: Any, run_one: RunOne) -> None:
    """Search the other axes at one budget by TPE (Bergstra et al. 2011); the score is the mean over all seeds."""
    optuna = require_optuna()
    axes = {key: axis for key, axis in sweep.config.axes.items() if key != EPSILON}
    distributions = {key: _distribution(axis) for key, axis in axes.items()}
    study: Any = None
    for number in range(sweep.config.trials or 0):
        sampler = optuna.samplers.TPESampler(seed=_seed(sweep.name, budget, number))
        if study is None:
            study = optuna.create_study(sampler=sampler)
        study.sampler = sampler
        asked = study.ask(distributions)
        setting: Setting = {} if budget is None else {EPSILON: budget}
        setting |= {key: _value(axis, asked.params[key]) for key, axis in axes.items()}
        setting = {key: setting[key] for key in sweep.config.axes}
        results = [run_one(setting, seed) for seed in sweep.seeds]
        if all(result.completed for result in results):
            # The study minimises, whatever the direction of the metric.
            sign = -1.0 if results[0].higher_is_better else 1.0
            study.tell(asked, sign * statistics.fmean(result.value() for result in results))
        else:
            study.tell(asked, state=optuna.trial.TrialState.FAIL)


def _distribution(axis: Sequence[Any] | Range) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(axis, Range) and axis.integer:
        return IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    if isinstance(axis, Range):
        return FloatDistribution(axis.low, axis.high, log=axis.log)
    return CategoricalDistribution(tuple(range(len(axis))))  # by place: a value may be a list


def _value(axis: Sequence[Any] | Range, parameter: Any) -> Any:
    return axis.number(parameter) if isinstance(axis, Range) else axis[int(parameter)]


def _seed(name: str, budget: Any, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{name}/{budget}/{number}".encode()).digest()[:4], "big")
