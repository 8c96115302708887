"""Sessions at the server."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import select

from shared.web.accounts.sessions import IDLE_SECONDS, LONGEST_SECONDS, PROVEN_SECONDS, Sessions
from shared.web.state.tables import SESSIONS
from tests.shared.web.conftest import Clock, Person

ON_BOTH = ("test_a_session_ends_idle_and_ends_old", "test_a_proof_is_of_one_session_and_ends")


def test_a_session_ends_idle_and_ends_old(sessions: Sessions, person: Callable[..., Person], clock: Clock) -> None:
    amal = person().account.id
    held = sessions.begin(amal, address="a", browser="b")
    clock.wait(IDLE_SECONDS - 1)
    assert sessions.find(held) is not None
    clock.wait(IDLE_SECONDS)
    assert sessions.find(held) is None
    held, begin = sessions.begin(amal, address="a", browser="b"), clock()
    while clock() - begin < LONGEST_SECONDS - IDLE_SECONDS:
        clock.wait(IDLE_SECONDS - 60)
        assert sessions.find(held) is not None
    clock.wait(begin + LONGEST_SECONDS - clock())
    assert sessions.find(held) is None
    sessions.begin(amal, address="a", browser="b")
    with sessions.database.reading() as connection:
        assert len(connection.execute(select(SESSIONS)).all()) == 1, "those that are over do not stay"


def test_the_database_opens_no_session(sessions: Sessions, person: Callable[..., Person]) -> None:
    held = sessions.begin(person().account.id, address="a" * 500, browser="b" * 500)
    assert len(held) == 43
    with sessions.database.reading() as connection:
        row = connection.execute(select(SESSIONS)).one()
    assert held not in str(row)
    for kept in (row.id, "", "\ud800", "' OR 1=1 --"):
        assert sessions.find(kept) is None
    assert len(row.browser) == 200


def test_one_ends_and_others_go_on(sessions: Sessions, person: Callable[..., Person]) -> None:
    amal = person().account.id
    first, second = (sessions.begin(amal, address="a", browser=name) for name in "xy")
    assert first != second
    assert {one.browser for one in sessions.of(amal)} == {"x", "y"}
    sessions.end(first)
    assert sessions.find(first) is None
    assert sessions.find(second) is not None


def test_a_proof_is_of_one_session_and_ends(sessions: Sessions, person: Callable[..., Person], clock: Clock) -> None:
    amal = person().account.id
    first, second = (sessions.begin(amal, address="a", browser=name) for name in "xy")

    def proven() -> list[bool]:
        found = [sessions.find(one) for one in (first, second)]
        return [one is not None and sessions.is_proven(one) for one in found]

    assert proven() == [True, True], "signing in is a proof"
    clock.wait(PROVEN_SECONDS - 1)
    assert proven() == [True, True]
    clock.wait(1)
    assert proven() == [False, False]
    sessions.prove(first)
    sessions.prove("nothing")
    assert proven() == [True, False]
    clock.wait(-PROVEN_SECONDS - 1)
    assert proven() == [False, False], "a clock that was set back proves nothing"
    clock.wait(1 + 2 * PROVEN_SECONDS)
    assert proven() == [False, False]
