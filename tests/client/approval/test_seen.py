"""A decision that names what its person saw holds for that and for nothing else."""

from __future__ import annotations

from datetime import timedelta

import pytest

from client.approval.requests import Changed
from shared.errors import RunError
from tests.client.approval.conftest import ONE, TWO, Desk


def test_a_decision_holds_for_what_was_seen(four_eyes: Desk) -> None:
    four_eyes.asked(four_eyes.signed())
    approvals, (request, _) = four_eyes.opened(), four_eyes.only()
    seen = request.mark(TWO, four_eyes.now)
    approvals.approve(request.id, TWO, by="ada", seen=seen)
    before = four_eyes.events()
    for decide in (approvals.approve, approvals.refuse):
        with pytest.raises(Changed, match="meanwhile"):
            decide(request.id, TWO, by="ben", reason="as I saw it", seen=seen)
    assert four_eyes.events() == before
    now_seen = four_eyes.only()[0].mark(TWO, four_eyes.now)
    assert now_seen != seen
    assert approvals.approve(request.id, TWO, by="ben", seen=now_seen)[1] == "approved"


def test_what_was_seen_ends_with_time_and_with_the_policy(desk: Desk) -> None:
    desk.asked(desk.signed())
    request, _ = desk.only()
    seen = request.mark(ONE, desk.now)
    assert request.mark(TWO, desk.now) != seen
    desk.now += timedelta(days=8)
    with pytest.raises(Changed):
        desk.opened().approve(request.id, ONE, by="ada", seen=seen)


def test_a_job_may_be_called_as_the_id_of_another(desk: Desk) -> None:
    desk.asked(desk.signed())
    request, _ = desk.only()
    desk.asked(desk.signed(request.id))
    approvals = desk.opened()
    with pytest.raises(RunError, match="could be 2 requests"):
        approvals.find(request.id, ONE)
    assert approvals.find(request.id, ONE, by_id=True)[0] == request
    assert approvals.refuse(request.id, ONE, by="ada", reason="no", seen=request.mark(ONE, desk.now)).id == request.id
    for named in (request.id[:12], request.job, request.name):
        with pytest.raises(RunError, match="no request is called"):
            approvals.find(named, ONE, by_id=True)
