"""What counts as a training that diverged."""

from __future__ import annotations

import math
from typing import Any

import pytest

from server.rounds.convergence import constant_loss, why_diverged


def why(**changes: Any) -> str | None:
    plain = {"started": 0.7, "final": 0.5, "losses": [0.6, 0.5], "kept_round": 2, "private": False}
    return why_diverged(**(plain | changes))


def test_a_training_that_learned_did_not_diverge() -> None:
    assert why() is None
    assert why(private=True, final=0.84) is None, "noise makes a model too sure of itself; a temperature mends that"
    assert why(kept_round=0, losses=[]) is None, "nothing was trained yet"
    assert why(started=None) is None
    assert why(final=None) is None


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"final": 99.0}, "its loss, 99, is above the 0.7 from before training"),
        ({"final": 0.71}, "is above the 0.7"),
        ({"final": 1.5, "private": True}, "is above the 0.7"),
        ({"final": math.nan}, "not a finite number"),
        ({"final": math.inf, "private": True}, "not a finite number"),
        ({"final": 0.7, "kept_round": 0, "losses": [3.0, 4.0]}, "never fell below the 0.7"),
    ],
)
def test_a_training_that_diverged_is_called_that(changes: dict[str, Any], part: str) -> None:
    assert part in str(why(**changes))


def test_the_best_constant_answer_has_the_entropy_of_the_labels() -> None:
    assert constant_loss([50, 50]) == pytest.approx(math.log(2))
    assert constant_loss([90, 10, 0]) == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))
    assert constant_loss([]) is None
