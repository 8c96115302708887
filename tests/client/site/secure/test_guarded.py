"""A real site in a secure round: what the coordinator signs, what the policy caps, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from shared.job.job import Job
from shared.trust.audit_log import Event
from shared.trust.signed_job import round_fields
from shared.trust.signing import Purpose
from shared.wire.messages import Order, Refusal, TrainRequest
from simulations.federation.processes import change_toml
from tests.client.site.test_guard import World, world

__all__ = ["world"]


def ordered(world: World, request: TrainRequest) -> TrainRequest:
    """As a coordinator sends it: the attempt is signed with the round."""
    sent_at = world.now.isoformat(timespec="milliseconds")
    fields = round_fields(
        job_sha256=request.job.sha256,
        round_number=request.round_number,
        adapter=request.adapter,
        sent_at=sent_at,
        attempt=request.attempt,
    )
    signature = world.coordinator.sign(Purpose.ROUND, fields)
    return replace(request, order=Order(signed_job=world.signed(request.job), sent_at=sent_at, signature=signature))


@pytest.fixture
def asked(classification_job: Callable[..., Job], request_for: Callable[..., TrainRequest]) -> TrainRequest:
    job = classification_job(
        training={"rounds": 2, "local_steps": 1},
        privacy={"mechanism": "distributed", "max_colluding": 1, "noise_multiplier": 1.0, "sample_rate": 0.25},
        federation={"min_sites": 3},
    )
    return replace(request_for(job), attempt=1)


def reason(world: World, request: TrainRequest) -> str:
    answer = world.site.answer_ready(request)
    assert isinstance(answer, Refusal)
    assert [entry for entry in world.site.ledger().entries() if entry.kind == "reserve"] == []
    assert world.entries(Event.REQUEST_REFUSED)[-1].details["reason_sent"]
    return answer.reason


def test_the_number_of_the_attempt_is_signed(world: World, asked: TrainRequest) -> None:
    good = ordered(world, asked)
    assert "not signed by the coordinator" in reason(world, replace(good, attempt=2))
    assert "not signed by the coordinator" in reason(world, replace(good, attempt=0))
    assert "not signed by the coordinator" in reason(world, replace(good, round_number=2))


def test_a_policy_caps_what_an_upload_has_by_itself(world: World, asked: TrainRequest) -> None:
    change_toml(world.home.policy, max_epsilon_per_job=2.0)
    assert "epsilon_alone" in reason(world, ordered(world, asked))


def test_a_policy_wants_more_colluders_tolerated(world: World, asked: TrainRequest) -> None:
    change_toml(world.home.policy, min_colluding=2)
    assert "max_colluding is 1" in reason(world, ordered(world, asked))


def test_a_roster_is_no_request_to_get_ready_and_the_other_way_round(world: World, asked: TrainRequest) -> None:
    good = ordered(world, asked)
    answer = world.site.answer_masked(good)
    assert isinstance(answer, Refusal)
    assert "nothing ready" in answer.reason
    answer = world.site.answer(good)
    assert isinstance(answer, Refusal)
    assert "no update of its own" in answer.reason
