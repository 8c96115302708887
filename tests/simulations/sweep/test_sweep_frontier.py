"""The frontier: the best mean at each budget, honest about how it was chosen."""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from simulations.sweep.frontier import by_setting, caution, frontier, utility_points
from simulations.sweep.journal import TrialResult


def trial(asked: Any, rate: float, seed: int, score: float | None, **changes: Any) -> TrialResult:
    return TrialResult.model_validate(
        {
            "key": f"{asked}/{rate}/{seed}",
            "setting": {"privacy.epsilon": asked, "training.learning_rate": rate},
            "seed": seed,
            "status": "failed" if score is None else "completed",
            "budget": asked,
            "epsilon": None if asked == "inf" else asked - 0.01,
            "delta": 1e-5,
            "metric": "accuracy",
            "higher_is_better": True,
            "score": score,
            "metrics": {},
            "seconds": 1.0,
            "job_sha256": "",
            **changes,
        }
    )


TRIALS = [
    trial("inf", 0.1, 0, 0.95), trial("inf", 0.1, 1, 0.91),
    trial(1, 0.1, 0, 0.70), trial(1, 0.1, 1, 0.60),
    trial(1, 0.5, 0, 0.69), trial(1, 0.5, 1, 0.67),
    trial(8, 0.1, 0, 0.80), trial(8, 0.1, 1, 0.90),
    trial(8, 0.5, 0, 0.99), trial(8, 0.5, 1, None),
]  # fmt: skip


def test_the_best_mean_is_chosen_and_not_the_best_seed() -> None:
    points = frontier(by_setting(TRIALS, seeds=(0, 1)), higher_is_better=True)
    assert [point.best.epsilon for point in points] == [0.99, 7.99, None]
    small, large, free = points
    assert small.best.setting["training.learning_rate"] == 0.5
    assert small.best.mean == pytest.approx(0.68)
    assert small.best.sd == pytest.approx(statistics.stdev([0.69, 0.67]))
    assert (small.num_settings, small.optimistic) == (2, True)
    # A setting without all its seeds is not compared, however good its one score.
    assert large.best.setting["training.learning_rate"] == 0.1
    assert (large.num_settings, large.optimistic) == (1, False)
    assert free.best.mean == pytest.approx(0.93)


def test_a_smaller_metric_can_be_the_better_one() -> None:
    (point,) = frontier(by_setting(TRIALS[2:6], seeds=(0, 1)), higher_is_better=False)
    assert point.best.mean == pytest.approx(0.65)


def test_confirmation_is_reported_and_never_chooses() -> None:
    worse = {"confirmation": {"accuracy": 0.5}}
    better = {"confirmation": {"accuracy": 0.9}}
    trials = [trial(1, 0.1, 0, 0.8, **worse), trial(1, 0.5, 0, 0.7, **better)]
    (point,) = frontier(by_setting(trials, seeds=(0,)), higher_is_better=True)
    assert (point.best.mean, point.best.confirmation_mean) == (0.8, 0.5)
    assert not point.optimistic
    content = utility_points([point], name="x")
    assert content is not None
    assert content["points"][0]["mean"] == 0.5, "a plan gets the figure that chose nothing"
    assert any("chose nothing" in note for note in caution([point], num_seeds=1))


def test_a_choice_among_several_is_called_optimistic() -> None:
    points = frontier(by_setting(TRIALS, seeds=(0, 1)), higher_is_better=True)
    notes = " ".join(caution(points, num_seeds=2))
    assert "best of up to 2 settings" in notes
    assert "optimistic" in notes
    assert "nothing is protected" in notes
    single = frontier(by_setting(TRIALS[2:3], seeds=(0,)), higher_is_better=True)
    alone = " ".join(caution(single, num_seeds=1))
    assert "optimistic" not in alone
    assert "One seed" in alone


def test_points_without_epsilon_are_no_utility_of_a_plan() -> None:
    points = frontier(by_setting(TRIALS, seeds=(0, 1)), higher_is_better=True)
    content = utility_points(points, name="x")
    assert content is not None
    assert [row["epsilon"] for row in content["points"]] == [0.99, 7.99]
    assert utility_points(points[2:], name="x") is None


def test_given_noise_is_compared_at_the_epsilon_that_it_spent() -> None:
    trials = [
        trial(3, 0.1, 0, 0.7, budget=None, epsilon=2.3456),
        trial(3, 0.5, 0, 0.8, budget=None, epsilon=2.3456),
        trial(3, 0.9, 0, 0.9, budget=None, epsilon=4.0),
    ]
    points = frontier(by_setting(trials, seeds=(0,)), higher_is_better=True)
    assert [(point.best.budget, point.best.mean) for point in points] == [(2.346, 0.8), (4.0, 0.9)]
