"""Grid and Optuna: what is asked, and that a resumed search asks the same again."""

from __future__ import annotations

import builtins
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from shared.errors import ConfigError
from simulations.sweep.journal import TrialResult
from simulations.sweep.search import num_trials, require_optuna, search
from simulations.sweep.spec import Setting, Sweep, load_sweep

SCENARIO = {
    "name": "small",
    "task": {"kind": "sequence_classification", "labels": ["bad", "good"]},
    "training": {"rounds": 1},
    "data": {"builtin": "movie-reviews"},
    "partition": {"num_sites": 2},
}
RATE = "training.learning_rate"


def made(tmp_path: Path, axes: list[str], **options: Any) -> Sweep:
    path = tmp_path / "scenario.toml"
    path.write_text(tomli_w.dumps(SCENARIO))
    return load_sweep(path, axes=axes, **options)


class Trials:
    """Answers with scores made up from the setting, and notes what was asked; stops after `limit` new trials."""

    def __init__(self, sweep: Sweep, *, higher: bool = True, limit: int = 10_000, fails: float = math.inf) -> None:
        self.sweep, self.higher, self.limit, self.fails = sweep, higher, limit, fails
        self.asked: list[tuple[Setting, int]] = []
        self.known: dict[str, TrialResult] = {}

    def __call__(self, setting: Setting, seed: int) -> TrialResult:
        self.asked.append((setting, seed))
        key = self.sweep.key(setting, seed)
        if key not in self.known:
            if len(self.known) >= self.limit:
                raise KeyboardInterrupt
            # Best at a rate of 0.1, whatever the budget; a little better with each seed.
            good = -abs(math.log10(setting[RATE]) + 1) + 0.001 * seed
            failed = setting[RATE] >= self.fails
            self.known[key] = TrialResult(
                key=key,
                setting=setting,
                seed=seed,
                status="failed" if failed else "completed",
                delta=1e-5,
                metric="m",
                higher_is_better=self.higher,
                score=None if failed else good if self.higher else -good,
                seconds=1,
                job_sha256="",
            )
        return self.known[key]


def test_a_grid_runs_every_setting_seed_by_seed(tmp_path: Path) -> None:
    sweep = made(tmp_path, ["privacy.epsilon=1,inf", f"{RATE}=0.1,0.2"], seeds="3,5")
    trials = Trials(sweep)
    search(sweep, trials)
    assert num_trials(sweep) == len(trials.asked) == 8
    assert [seed for _, seed in trials.asked] == [3] * 4 + [5] * 4
    assert [setting for setting, _ in trials.asked[:4]] == sweep.grid()


OPTUNA: dict[str, Any] = {"search": "optuna", "trials": 14, "seeds": "0,1"}
AXES = [
    "privacy.epsilon=1,8",
    f"{RATE}=1e-4:10:log",
    "lora.rank=2,4",
    'lora.target_modules=["query"],["query","value"]',
]


def test_optuna_searches_each_budget_towards_the_better(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    sweep = made(tmp_path, AXES, **{**OPTUNA, "trials": 40})
    trials, errors = Trials(sweep), Trials(sweep, higher=False)
    search(sweep, trials)
    search(sweep, errors)
    assert errors.asked == trials.asked, "where the smaller is better, the same settings lead to it"
    assert len(trials.asked) == num_trials(sweep) == 2 * 40 * 2
    for budget in (1, 8):
        rates = [setting[RATE] for setting, seed in trials.asked if setting["privacy.epsilon"] == budget and seed == 0]
        assert len(rates) == 40
        assert all(1e-4 <= rate <= 10 for rate in rates)
        # Random rates would lie 1.3 powers of ten away from the best on average; ten are, before the sampler has learnt.
        assert statistics.fmean(abs(math.log10(rate) + 1) for rate in rates[10:]) < 1
    for setting, _ in trials.asked:
        assert list(setting) == list(sweep.config.axes)
        assert setting["lora.rank"] in (2, 4)
        assert setting["lora.target_modules"] in (["query"], ["query", "value"])


def test_a_resumed_search_by_optuna_asks_for_the_same_and_may_go_on(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    sweep = made(tmp_path, AXES, **OPTUNA)
    through = Trials(sweep)
    search(sweep, through)
    stopped = Trials(sweep, limit=31)
    with pytest.raises(KeyboardInterrupt):
        search(sweep, stopped)
    resumed = Trials(sweep)
    resumed.known = dict(stopped.known)
    search(sweep, resumed)
    assert resumed.asked == through.asked
    assert resumed.known == through.known
    more = Trials(made(tmp_path, AXES, **{**OPTUNA, "trials": 20}))
    search(more.sweep, more)
    first = [setting for setting, _ in more.asked if setting["privacy.epsilon"] == 1][:28]
    assert first == [setting for setting, _ in through.asked][:28]


def test_optuna_goes_on_after_a_failed_trial_and_takes_whole_numbers(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    sweep = made(tmp_path, [f"{RATE}=1e-4:10:log", "lora.rank=2:16:int"], search="optuna", trials=12)
    trials = Trials(sweep, fails=0.3)
    search(sweep, trials)
    assert len(trials.asked) == 12
    assert any(not result.completed for result in trials.known.values())
    ranks = {setting["lora.rank"] for setting, _ in trials.asked}
    assert all(isinstance(rank, int) and 2 <= rank <= 16 for rank in ranks)
    assert len(ranks) > 2


def test_without_optuna_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "optuna":
            raise ModuleNotFoundError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"silotune\[sweep\]"):
        require_optuna()
