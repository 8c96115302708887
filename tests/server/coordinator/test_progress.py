"""What the status tells of the round at hand: states and codes, nothing that a site wrote."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from server.coordinator.progress import Progress
from shared.job.job import Job


def test_a_round_from_its_question_to_its_answers() -> None:
    progress = Progress()
    assert progress.told() is None
    progress.asked(1, ["a", "b", "c", "d", "e"])
    progress.answered("a", "sent")
    progress.failed("b", "PolicyError: MARKER of a site", replied=False)
    progress.failed("c", "no answer within 600 s", replied=False)
    progress.failed("d", "stale update of round 0, expected round 1", replied=True)
    assert progress.told() == {
        "round": 1,
        "sites": {"a": "sent", "b": "refused", "c": "dropped", "d": "refused", "e": "training"},
        "codes": {"b": "PolicyError", "d": "other"},
    }


def test_a_code_that_no_site_of_this_version_writes_is_not_told() -> None:
    progress = Progress()
    progress.asked(1, ["a"])
    progress.failed("a", "MARKER: MARKER", replied=False)
    assert "MARKER" not in str(progress.told())


def test_another_attempt_keeps_what_others_did_and_another_round_does_not() -> None:
    progress = Progress()
    progress.asked(1, ["a", "b"])
    progress.failed("a", "Withheld: see the site's own log", replied=False)
    progress.answered("b", "ready")
    progress.asked(1, ["b"], "ready")
    assert progress.told() == {"round": 1, "sites": {"a": "refused", "b": "ready"}, "codes": {"a": "Withheld"}}
    progress.answered("a", "sent")
    assert progress.told() == {"round": 1, "sites": {"a": "sent", "b": "ready"}, "codes": {}}
    progress.asked(2, ["b"])
    assert progress.told() == {"round": 2, "sites": {"b": "training"}, "codes": {}}


def test_under_central_dp_nothing_is_told(classification_job: Callable[..., Any]) -> None:
    central = {"mechanism": "central", "unit": "site", "noise_multiplier": 1.0, "central": {"num_sites": 200}}
    job: Job = classification_job(privacy=central, federation={"min_sites": 100})
    progress = Progress()
    progress.of(job)
    progress.asked(1, ["a"])
    assert progress.told() is None
