"""Who takes part: sites that come, go, exchange their key, refuse, or are not what they were admitted as."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from flwr.app import Error, Message
from flwr.clientapp import ClientApp

import server.rounds.roster as roster_module
from server.rounds.observer import Observer
from server.rounds.roster import Authority, Roster
from shared.errors import RunError
from shared.job.job import Job
from shared.job.parsing import parse
from shared.trust.signed_job import sign_job
from shared.trust.signing import SigningKey
from shared.wire.messages import Refusal, SiteDescription, pack_description, pack_refusal, unpack_describe
from simulations.running.grid import InProcessGrid


class StandInGrid(InProcessGrid):
    """Nodes that a test switches on and off; each answers `describe` with what `answers` holds, or stays silent."""

    def __init__(self) -> None:
        super().__init__(ClientApp(), 0)
        self.online: list[int] = []
        self.answers: dict[int, SiteDescription | Refusal | Error] = {}
        self.asked: list[int] = []

    def get_node_ids(self) -> Iterable[int]:
        return list(self.online)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        identifiers = []
        for message in messages:
            identifier = f"message-{len(self.asked)}"
            message.metadata.__dict__["_message_id"] = identifier
            self.asked.append(message.metadata.dst_node_id)
            self._waiting[identifier] = message
            identifiers.append(identifier)
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for identifier in message_ids:
            message = self._waiting.get(identifier)
            answer = self.answers.get(message.metadata.dst_node_id) if message else None
            if message is None or answer is None:
                continue
            del self._waiting[identifier]
            if isinstance(answer, Error):
                replies.append(Message(answer, reply_to=message))
            else:
                content = pack_description(answer) if isinstance(answer, SiteDescription) else pack_refusal(answer)
                replies.append(Message(content, reply_to=message))
        return replies


class Notes(Observer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.refused: list[tuple[str, str]] = []
        self.rosters: list[list[str]] = []
        self.waits: list[str] = []
        self.awaited: list[str] = []

    def site_awaits(self, site: str) -> None:
        self.awaited.append(site)

    def roster(self, sites: Any) -> None:
        self.rosters.append([site.site for site in sites])

    def site_refused(self, site: str, reason: str) -> None:
        self.refused.append((site, reason))

    def waiting(self, reason: str) -> None:
        self.waits.append(reason)


def described(name: str) -> SiteDescription:
    return SiteDescription(site=name, declared_records=8, version="1")


def make_job(**federation: Any) -> Job:
    raw: dict[str, Any] = {
        "name": "roster",
        "task": {"kind": "sequence_classification", "labels": ["x", "y"]},
        "training": {"rounds": 2, "local_steps": 2},
        "privacy": {"noise_multiplier": 1.0},
        "federation": {"min_sites": 1} | federation,
    }
    return parse(Job, raw, source="test")


@pytest.fixture
def grid() -> StandInGrid:
    return StandInGrid()


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def roster(grid: StandInGrid, notes: Notes) -> Callable[..., Roster]:
    """Return a maker of rosters of real sites; `names` says under which name each node's key was admitted."""

    def make(names: dict[int, str], **federation: Any) -> Roster:
        job, key, now = make_job(**federation), SigningKey.generate(), datetime.now(UTC)
        signed = sign_job(
            job,
            signer=SigningKey.generate(),
            coordinator=key.verify_key,
            issued=now,
            not_after=now + timedelta(days=1),
        )
        authority = Authority(signed_job=signed, key=key, registered=lambda: names)
        return Roster(grid, job, authority=authority, observer=notes)

    return make


def names_of(sites: dict[int, SiteDescription]) -> dict[int, str]:
    return {node: description.site for node, description in sites.items()}


def test_a_site_that_joins_late_takes_part_and_one_that_left_does_not(
    grid: StandInGrid, roster: Callable[..., Roster]
) -> None:
    made = roster({1: "a", 2: "b"})
    grid.online, grid.answers = [1], {1: described("a"), 2: described("b")}
    assert names_of(made.wait()) == {1: "a"}
    grid.online = [1, 2]
    made.update()
    assert names_of(made.present()) == {1: "a", 2: "b"}
    grid.online = [2]
    made.update()
    assert names_of(made.present()) == {2: "b"}
    grid.online = [1, 2]
    made.update()
    assert names_of(made.present()) == {1: "a", 2: "b"}
    assert grid.asked == [1, 2], "whoever comes back is known"


@pytest.mark.parametrize(("limit", "declared"), [(1_000_000, 1_000_001), (500, 4096), (1_000_000, 10**9)])
def test_a_site_that_declares_more_than_the_job_allows_takes_no_part(
    grid: StandInGrid, roster: Callable[..., Roster], notes: Notes, limit: int, declared: int
) -> None:
    made = roster({1: "a", 2: "b"}, max_declared_records=limit)
    most = replace(described("a"), declared_records=limit)
    grid.online, grid.answers = [1, 2], {1: most, 2: replace(described("b"), declared_records=declared)}
    assert names_of(made.wait()) == {1: "a"}
    [(site, reason)] = notes.refused
    assert site == "b"
    assert f"it declares {declared:,} records; federation.max_declared_records of the job is {limit:,}" in reason


def test_the_limit_of_declared_sizes_leaves_old_jobs_their_hash() -> None:
    assert make_job(max_declared_records=1_000_000).sha256 == make_job().sha256
    assert "max_declared_records" not in make_job().canonical_json()
    assert make_job(max_declared_records=500).sha256 != make_job().sha256


def test_the_newer_of_two_keys_of_one_site_counts(grid: StandInGrid, roster: Callable[..., Roster]) -> None:
    made = roster({1: "a", 2: "b", 3: "a"})
    grid.online, grid.answers = [1, 2], {1: described("a"), 2: described("b"), 3: described("a")}
    made.wait()
    grid.online = [1, 2, 3]
    made.update()
    assert names_of(made.present()) == {3: "a", 2: "b"}
    grid.online = [2, 3]
    made.update()
    assert names_of(made.present()) == {3: "a", 2: "b"}


def test_a_node_that_bears_another_name_than_its_certificate_is_refused(
    grid: StandInGrid, roster: Callable[..., Roster], notes: Notes
) -> None:
    made = roster({1: "a", 2: "b"})
    grid.online, grid.answers = [1, 2], {1: described("a"), 2: described("a")}
    assert names_of(made.wait()) == {1: "a"}
    ((site, reason),) = notes.refused
    assert site == "b"
    assert "its key was admitted for 'b', but it calls itself 'a'" in reason


def test_a_refusal_is_told_with_the_registered_name_and_asked_again_after_a_while(
    grid: StandInGrid, roster: Callable[..., Roster], notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = roster({1: "a", 2: "b"})
    grid.online = [1, 2]
    grid.answers = {1: described("a"), 2: Refusal(site="", code="PolicyError", reason="not on Sundays")}
    made.wait()
    assert notes.refused == [("b", "PolicyError: not on Sundays")]
    made.update()
    assert grid.asked == [1, 2]
    grid.answers[2] = described("b")
    monkeypatch.setattr(roster_module, "ASK_AGAIN_SECONDS", -1.0)
    made.update()
    assert names_of(made.present()) == {1: "a", 2: "b"}


def test_a_site_that_waits_for_approval_is_no_refusal_and_is_asked_again(
    grid: StandInGrid, roster: Callable[..., Roster], notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = roster({1: "a", 2: "b"}, min_sites=2)
    grid.online = [1, 2]
    more_than_wanted = Refusal(site="c", code="AwaitingApproval", reason="Dr. Keller is on holiday")
    grid.answers = {1: described("a"), 2: more_than_wanted}
    made.update()
    assert (notes.awaited, notes.refused) == (["b"], [])
    assert "(b: waiting for approval)" in made._shortage()
    made.update()
    assert grid.asked == [1, 2]
    grid.answers[2] = described("b")
    monkeypatch.setattr(roster_module, "ASK_AGAIN_SECONDS", -1.0)
    assert names_of(made.wait()) == {1: "a", 2: "b"}


@pytest.mark.parametrize("was_missed", [True, False], ids=["after a while", "within seconds"])
def test_a_site_that_refused_and_came_back_is_asked_at_once(
    grid: StandInGrid, roster: Callable[..., Roster], was_missed: bool
) -> None:
    arrivals = {1: 1, 2: 1, 3: 1}
    made = roster({1: "a", 2: "b", 3: "c"})
    made._authority = replace(made._authority, arrivals=lambda: dict(arrivals))  # type: ignore[type-var]
    refused = Error(code=5, reason="gone")
    grid.online, grid.answers = [1, 2, 3], {1: described("a"), 2: refused, 3: refused}
    made.wait()
    if was_missed:
        grid.online = [1, 3]
        made.update()
    else:
        arrivals[2] += 1
    grid.online, grid.answers[2] = [1, 2, 3], described("b")
    made.update()
    assert names_of(made.present()) == {1: "a", 2: "b"}
    assert grid.asked == [1, 2, 3, 2], "nobody else is asked again"


def test_too_few_sites_are_waited_for_and_the_reason_is_told_once(
    grid: StandInGrid, roster: Callable[..., Roster], notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = roster({1: "a", 2: "b"}, min_sites=2)
    grid.online = [1]
    grid.answers = {1: described("a"), 2: described("b")}
    turns = iter(range(20))

    def sleep(seconds: float) -> None:
        if next(turns) == 10:
            grid.online = [1, 2]

    monkeypatch.setattr(roster_module.time, "sleep", sleep)
    assert names_of(made.wait()) == {1: "a", 2: "b"}
    (reason,) = notes.waits
    assert reason.startswith("1 nodes are connected, federation.min_sites is 2")


class SlowClock:
    """The roster's clock, on which sleeping takes no time; `meanwhile` is called at every second of it."""

    def __init__(self) -> None:
        self.now, self.meanwhile = 1000.0, lambda: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds
        self.meanwhile()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SlowClock:
    made = SlowClock()
    monkeypatch.setattr(roster_module, "time", made)
    return made


REFUSED = "round 3: 1 valid updates, federation.min_sites is 2 (b: PolicyError: the message is dated {} seconds behind)"


def paused(made: Roster, clock: SlowClock, problem: str) -> float:
    started = clock.now
    made.pause(problem)
    return round(clock.now - started, 3)


def test_the_same_refusals_are_asked_for_less_and_less_often(
    grid: StandInGrid, roster: Callable[..., Roster], clock: SlowClock
) -> None:
    made = roster({1: "a", 2: "b"})
    grid.online, grid.answers = [1, 2], {1: described("a"), 2: described("b")}
    made.wait()
    waits = [paused(made, clock, REFUSED.format(f"{1_000 * n:,}")) for n in range(1, 8)]
    assert waits == [2, 4, 8, 16, 32, 60, 60], "the number of seconds is no other answer"
    for another in (REFUSED.replace("PolicyError", "BudgetExceeded"), REFUSED.replace("round 3", "round 4")):
        assert [paused(made, clock, another.format(9)) for _ in range(3)] == [2, 4, 8]


@pytest.mark.parametrize("during", ["the round", "the wait"])
@pytest.mark.parametrize("what", ["a node comes", "a node leaves", "a node comes back within seconds"])
def test_a_site_that_comes_or_comes_back_is_asked_at_once(
    grid: StandInGrid, roster: Callable[..., Roster], clock: SlowClock, during: str, what: str
) -> None:
    arrivals = {1: 1, 2: 5}
    made = roster({1: "a", 2: "b", 3: "c"})
    made._authority = replace(made._authority, arrivals=lambda: dict(arrivals))  # type: ignore[type-var]
    grid.online, grid.answers = [1, 2], {n: described(name) for n, name in ((1, "a"), (2, "b"), (3, "c"))}
    made.wait()
    while paused(made, clock, REFUSED) < 60:
        pass

    def happen() -> None:
        clock.meanwhile = lambda: None
        grid.online = {"a node comes": [1, 2, 3], "a node leaves": [1]}.get(what, [1, 2])
        arrivals[2] += what != "a node leaves"

    if during == "the round":
        happen()
        assert paused(made, clock, REFUSED) <= 2.5
    else:
        begun = clock.now
        clock.meanwhile = lambda: happen() if clock.now > begun + 20 else None
        assert 20 < paused(made, clock, REFUSED) <= 21.5
    assert paused(made, clock, REFUSED) == 2, "whoever came may need a moment"
    assert paused(made, clock, REFUSED) == 4


def test_a_run_that_is_halted_does_not_wait_to_the_end(
    grid: StandInGrid, roster: Callable[..., Roster], clock: SlowClock
) -> None:
    made = roster({1: "a"})
    grid.online, grid.answers = [1], {1: described("a")}
    made.wait()
    while paused(made, clock, REFUSED) < 60:
        pass

    def halted() -> Iterable[int]:
        raise RunError("halted")

    begun = clock.now
    grid.get_node_ids = halted  # type: ignore[method-assign]
    with pytest.raises(RunError, match="halted"):
        made.pause(REFUSED)
    assert clock.now - begun < 1


def test_a_simulation_does_not_wait_for_more(grid: StandInGrid, notes: Notes) -> None:
    grid.online, grid.answers = [1, 2], {1: described("a"), 2: Refusal(site="b", code="DataError", reason="no data")}
    with pytest.raises(RunError, match=r"1 of 2 nodes take part.*b: no data"):
        Roster(grid, make_job(min_sites=2), observer=notes).wait()
    grid.answers[2] = described("a")
    with pytest.raises(RunError, match="two nodes call themselves 'a'"):
        Roster(grid, make_job(min_sites=2), observer=notes).wait()


def test_simulated_sites_are_waited_for_as_long_as_in_a_round(
    grid: StandInGrid, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a slow machine the first process answers late: the run neither ends for that nor goes on without it."""
    monkeypatch.setattr(roster_module, "DESCRIBE_TIMEOUT_SECONDS", 0.05)
    grid.online, grid.answers = [1, 2], {1: described("a")}
    late = threading.Timer(0.5, grid.answers.__setitem__, (2, described("b")))
    late.start()
    assert names_of(Roster(grid, make_job(), observer=notes).wait()) == {1: "a", 2: "b"}
    late.join()
    assert notes.waits == ["1 of 2 nodes have not answered yet."]
    del grid.answers[2]
    impatient = make_job(round_timeout_seconds=0.3)
    assert names_of(Roster(grid, impatient, observer=notes).wait()) == {1: "a"}
    with pytest.raises(RunError, match="1 of 2 nodes take part"):
        Roster(grid, make_job(min_sites=2, round_timeout_seconds=0.3), observer=notes).wait()


def test_a_silent_node_holds_the_others_up_for_a_limited_time(
    grid: StandInGrid, roster: Callable[..., Roster], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roster_module, "DESCRIBE_TIMEOUT_SECONDS", 0.2)
    grid.online, grid.answers = [1, 2], {1: described("a")}
    assert names_of(roster({1: "a", 2: "b"}).wait()) == {1: "a"}


def test_sites_are_asked_with_the_signed_job(grid: StandInGrid, roster: Callable[..., Roster]) -> None:
    made = roster({1: "a"})
    grid.online, grid.answers = [1], {1: described("a")}
    contents = []
    push = grid.push_messages
    grid.push_messages = lambda messages: push([contents.append(m.content) or m for m in messages])  # type: ignore[func-returns-value, method-assign]
    made.wait()
    signed = unpack_describe(contents[0])
    assert signed is not None
    assert signed.job.name == "roster"
