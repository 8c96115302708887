"""A model that is no better than one answer to every record is called that, in the report and in the terminal's figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from server.records.results import EvaluationRecord
from server.reports.run.trivial import never_answered, trivial
from simulations.simulating import _beside_trivial
from tests.server.reports.test_report import Page, build_run, render, write

SCORES = {"metrics": {"loss": 0.2, "mae": 0.893, "mae_of_mean": 0.7, "r2": -0.615}, "primary_metric": "mae"}
LABELS = {"metrics": {"loss": 0.7, "accuracy": 0.6}, "primary_metric": "accuracy", "labels": ["no", "yes"]}
WORSE = "this model predicts worse than the mean of the scores alone"
NO_BETTER = "this model is no better than always saying 'no'"


def scores(**metrics: float) -> dict[str, Any]:
    return SCORES | {"metrics": SCORES["metrics"] | metrics}


@pytest.mark.parametrize(
    ("evaluation", "value", "warning"),
    [
        (SCORES, 0.7, WORSE),
        (scores(mae=0.7), 0.7, None),
        (scores(mae_of_mean=0.0), None, None),  # all scores are equal
        ({"metrics": {"loss": 0.2, "mae": 0.9}, "primary_metric": "mae"}, None, None),  # of a version before
        (LABELS | {"confusion": [[6, 0], [4, 0]]}, 0.6, NO_BETTER),
        (LABELS | {"confusion_cells": [[0, 0, 6], [1, 0, 4]]}, 0.6, NO_BETTER),
        (LABELS | {"confusion": [[3, 2], [2, 3]]}, 0.5, None),
        (LABELS | {"confusion": [[6, 4], [0, 0]]}, None, None),  # all records have one label
        (LABELS, None, None),
        ({"metrics": {"loss": 0.7, "accuracy": 0.1, "f1": 0.1}, "primary_metric": "f1"}, None, None),
    ],
)
def test_what_one_answer_reaches(evaluation: dict[str, Any], value: float | None, warning: str | None) -> None:
    found = trivial(EvaluationRecord(**evaluation))
    assert (found and found.value, found and found.warning) == (value, warning)


def test_report_and_terminal_warn_of_scores_worse_than_their_mean(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    write(run / "evaluation.json", {"metrics": {"loss": 0.2, "mae": 0.893}, "primary_metric": "mae"})
    assert "One answer to every record" not in Page(render(run)).text
    write(run / "evaluation.json", SCORES)
    write(run / "baselines" / "non-private" / "evaluation.json", scores(mae=0.5))
    text = Page(render(run)).text
    assert "the mean alone: 0.700" in text
    assert f"Federated DP: {WORSE} (0.893; the mean alone: 0.700)." in text
    assert text.count(WORSE) == 1
    arms = {"federated_dp": run, "non_private": run / "baselines" / "non-private"}
    assert _beside_trivial(arms) == {
        "mae_of_mean": 0.7,
        "no_better_than_trivial": {"federated_dp": WORSE},
        "never_answered": {},
    }


def test_report_and_terminal_warn_of_a_classifier_that_always_says_one_label(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run", baselines=False)
    write(run / "evaluation.json", LABELS | {"confusion": [[6, 0], [4, 0]]})
    assert f"Federated DP: {NO_BETTER} (60.0 %; always saying 'no': 60.0 %)." in Page(render(run)).text
    assert _beside_trivial({"federated_dp": run}) == {
        "accuracy_of_most_frequent_label": 0.6,
        "no_better_than_trivial": {"federated_dp": NO_BETTER},
        "never_answered": {},
    }


THREE = LABELS | {"labels": ["no", "yes", "rare"]}


@pytest.mark.parametrize(
    ("evaluation", "said"),
    [
        (THREE | {"confusion": [[5, 1, 0], [0, 6, 0], [1, 1, 0]]}, "this model never answers 'rare' (2 of 14 records)"),
        (
            THREE | {"confusion_cells": [[0, 0, 5], [1, 1, 6], [2, 1, 2]]},
            "this model never answers 'rare' (2 of 13 records)",
        ),
        (THREE | {"confusion": [[5, 1, 0], [0, 6, 0], [0, 0, 0]]}, None),  # no record has it
        (THREE | {"confusion": [[5, 1, 0], [0, 6, 0], [1, 1, 1]]}, None),
        (LABELS | {"confusion": [[6, 0], [4, 0]]}, None),  # no better than always saying 'no', which is told
        (SCORES, None),
    ],
)
def test_a_label_that_is_never_answered_is_told(evaluation: dict[str, Any], said: str | None, tmp_path: Path) -> None:
    assert never_answered(EvaluationRecord(**evaluation)) == said
    run = build_run(tmp_path / "run", baselines=False)
    write(run / "evaluation.json", evaluation)
    assert (f"Federated DP: {said}." in Page(render(run)).text) == (said is not None)
    assert _beside_trivial({"federated_dp": run})["never_answered"] == ({"federated_dp": said} if said else {})


def test_of_many_labels_the_most_frequent_that_is_never_answered_is_named() -> None:
    evaluation = THREE | {"confusion": [[9, 0, 0], [3, 0, 0], [2, 0, 0]], "metrics": {"loss": 0.7, "accuracy": 0.9}}
    found = never_answered(EvaluationRecord(**evaluation))
    assert found == "this model never answers 'yes' (3 of 14 records) and 1 other"
