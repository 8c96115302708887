"""Whose reply counts, how much of it is in memory, and that every request is answered in the end."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from flwr.app import Metadata

from server.link import mailroom
from server.link.mailroom import (
    AWAY_SECONDS,
    EXPIRED,
    KEPT_SECONDS,
    LOST,
    LOST_SECONDS,
    REPLY_SLACK_BYTES,
    UNREADABLE,
    UNWANTED_SECONDS,
    Mailroom,
)
from shared.link.frames import Ack, Chunk, LinkError, Offer, bytes_of, frame_of
from shared.link.line import Line, Parcel, new_id
from shared.link.options import CHUNK_BYTES, UPLOAD_SLOTS


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Site:
    """A site's end by hand: it says exactly what a test wants."""

    def __init__(self, room: Mailroom, node: int) -> None:
        self.room, self.node = room, node
        self.woken = 0
        self.connect()

    def connect(self) -> None:
        self.line = Line(self.room.box(self.node), wake=self._wake, noticed=lambda text: None, clock=self.room.clock)
        self.room.box(self.node).open(self.line)

    def _wake(self) -> None:
        self.woken += 1

    def cut(self) -> None:
        self.room.box(self.node).hang_up(self.room.clock())

    def says(self, frame: Any) -> None:
        self.line.receive(bytes_of(frame))

    def hears(self) -> Any:
        data = self.line.next_frame()
        return None if data is None else frame_of(data)

    def fetch(self) -> Offer:
        """Take a request that is offered."""
        offer = self.hears()
        assert isinstance(offer, Offer)
        self.says(Ack(offer.id, offer.num_bytes))
        return offer

    def offer(self, reply_to: bytes, num_bytes: int = 3 * CHUNK_BYTES) -> Offer:
        offer = Offer(new_id(), reply_to, num_bytes, hashlib.sha256(bytes(num_bytes)).digest())
        self.says(offer)
        return offer

    def send(self, offer: Offer, first: int = 0, last: int | None = None) -> None:
        """Send the chunks from `first` to before `last`."""
        for number in list(range(-(-offer.num_bytes // CHUNK_BYTES)))[first:last]:
            start = number * CHUNK_BYTES
            self.says(Chunk(offer.id, start, bytes(min(CHUNK_BYTES, offer.num_bytes - start))))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def room(clock: Clock) -> Mailroom:
    return Mailroom(clock)


def ask(room: Mailroom, node: int, size: int = 10, ttl: float = 3600.0) -> bytes:
    parcel = Parcel(new_id(), b"", bytes(size))
    room.send(node, parcel, Metadata(1, parcel.id.hex(), 1, node, "", "1", 0.0, ttl, "train"))
    return parcel.id


def test_a_request_is_offered_and_its_reply_is_fetched_once(room: Mailroom) -> None:
    site = Site(room, 5)
    asked = ask(room, 5)
    assert site.woken > 0
    assert site.fetch().id == asked
    assert site.hears() is None
    offer = site.offer(asked)
    assert site.hears() == Ack(offer.id, 0)
    site.send(offer)
    assert site.hears() == Ack(offer.id, offer.num_bytes)
    (answer,) = room.fetch([asked, new_id()])
    assert (answer.payload, answer.code, answer.request.metadata.dst_node_id) == (bytes(offer.num_bytes), 0, 5)
    assert room.fetch([asked]) == []


def test_a_request_is_offered_again_after_a_cut_until_it_is_answered(room: Mailroom) -> None:
    site = Site(room, 5)
    asked = ask(room, 5)
    assert room.arrivals() == {5: 1}
    for _ in range(3):
        assert site.fetch().id == asked
        assert site.hears() is None
        site.cut()
        site.connect()
    assert room.arrivals() == {5: 4}, "also one that was never missing in between"
    site.fetch()
    offer = site.offer(asked, 1)
    site.hears()
    site.send(offer)
    site.cut()
    site.connect()
    assert site.hears() is None


def test_a_reply_goes_on_after_a_cut_where_it_was(room: Mailroom) -> None:
    site = Site(room, 5)
    asked = ask(room, 5)
    site.fetch()
    offer = site.offer(asked)
    site.hears()
    site.send(offer, 0, 2)
    site.cut()
    site.connect()
    site.fetch()
    site.says(offer)
    assert site.hears() == Ack(offer.id, 2 * CHUNK_BYTES)
    site.send(offer, 2)
    assert len(room.fetch([asked])) == 1


@pytest.mark.parametrize("whose", ["nobody's", "another site's"])
def test_a_reply_to_what_this_site_was_not_asked_is_not_fetched(room: Mailroom, whose: str) -> None:
    thief, victim = Site(room, 5), Site(room, 6)
    asked = ask(room, 6)
    offer = thief.offer(asked if whose == "another site's" else new_id())
    assert thief.hears() == Ack(offer.id, offer.num_bytes)
    assert room.fetch([asked]) == []
    assert victim.fetch().id == asked


def test_a_site_sends_nothing_that_it_was_not_asked_for(room: Mailroom) -> None:
    with pytest.raises(LinkError, match="answers none"):
        Site(room, 5).offer(b"")


def test_the_length_of_a_reply_follows_from_what_was_asked(room: Mailroom) -> None:
    site = Site(room, 5)
    for size, num_bytes, fits in ((10, REPLY_SLACK_BYTES + 20, True), (10, REPLY_SLACK_BYTES + 21, False)):
        asked = ask(room, 5, size)
        site.fetch()
        offer = site.offer(asked, num_bytes)
        if fits:
            assert site.hears() == Ack(offer.id, 0)
            site.send(offer)
            site.hears()
            assert room.fetch([asked])[0].code == 0
        else:
            assert site.hears() == Ack(offer.id, num_bytes)
            assert room.fetch([asked])[0].code == UNREADABLE


def test_uploads_wait_for_a_slot_and_go_on_when_one_is_free(room: Mailroom) -> None:
    big = 6 * 2**20
    sites = [Site(room, node) for node in range(UPLOAD_SLOTS + 2)]
    asked = [ask(room, site.node) for site in sites]
    for site in sites:
        site.fetch()
    offers = [site.offer(request, big) for site, request in zip(sites, asked, strict=True)]
    granted = [site.hears() is not None for site in sites]
    assert granted == [True] * UPLOAD_SLOTS + [False] * 2
    sites[0].send(offers[0])
    assert sites[UPLOAD_SLOTS].hears() == Ack(offers[UPLOAD_SLOTS].id, 0)
    assert sites[UPLOAD_SLOTS + 1].hears() is None
    sites[1].cut()  # what came of its reply gives way
    assert sites[UPLOAD_SLOTS + 1].hears() == Ack(offers[UPLOAD_SLOTS + 1].id, 0)
    sites[1].connect()
    sites[1].fetch()
    sites[1].says(offers[1])
    assert sites[1].hears() is None
    sites[2].send(offers[2])
    assert sites[1].hears() == Ack(offers[1].id, 0)


def test_who_sends_slowly_holds_a_slot_no_longer_than_the_request_lives(room: Mailroom, clock: Clock) -> None:
    big = 6 * 2**20
    slow = [Site(room, node) for node in range(UPLOAD_SLOTS)]
    asked = [ask(room, site.node, ttl=300.0) for site in slow]
    for site in slow:
        site.fetch()
    offers = [site.offer(request, big) for site, request in zip(slow, asked, strict=True)]
    honest = Site(room, UPLOAD_SLOTS)
    wanted = ask(room, honest.node)
    honest.fetch()
    offer = honest.offer(wanted, big)
    for number in range(10):
        for site, offered in zip(slow, offers, strict=True):
            site.hears()
            site.send(offered, number, number + 1)
        clock.now += 29.0
        room.tick()
        assert honest.hears() is None
    clock.now += 29.0
    room.tick()
    assert honest.hears() == Ack(offer.id, 0)
    with pytest.raises(LinkError, match="a chunk came of a message that was not asked for"):
        slow[0].send(offers[0], 10, 11)
    assert [answer.code for answer in room.fetch(asked)] == [EXPIRED] * UPLOAD_SLOTS


def test_small_uploads_do_not_wait_for_each_other(room: Mailroom) -> None:
    sites = [Site(room, node) for node in range(500)]
    for site in sites:
        asked = ask(room, site.node)
        site.fetch()
        offer = site.offer(asked, 30_000)
        assert site.hears() == Ack(offer.id, 0)


def test_no_upload_begins_while_too_much_waits_to_be_fetched(
    room: Mailroom, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mailroom, "HELD_BYTES", 100_000)
    sites = [Site(room, node) for node in range(4)]
    asked = [ask(room, site.node) for site in sites]
    for site in sites:
        site.fetch()
    for site, request in list(zip(sites, asked, strict=True))[:2]:
        offer = site.offer(request, 60_000)
        site.hears()
        site.send(offer)
    third = sites[2].offer(asked[2])
    assert sites[2].hears() is None
    assert len(room.fetch([asked[0]])) == 1
    assert sites[2].hears() == Ack(third.id, 0)
    sites[2].send(third)
    # What nobody has asked for in a while makes room.
    fourth = sites[3].offer(asked[3])
    assert sites[3].hears() is None
    clock.now += UNWANTED_SECONDS + 1
    room.tick()
    assert sites[3].hears() == Ack(fourth.id, 0)
    assert room.fetch(asked[1:3]) == []


def test_few_bytes_are_fetched_at_once(room: Mailroom, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailroom, "FETCH_BYTES", 100_000)
    sites = [Site(room, node) for node in range(5)]
    asked = [ask(room, site.node) for site in sites]
    for site, request in zip(sites, asked, strict=True):
        site.fetch()
        offer = site.offer(request, 60_000)
        site.hears()
        site.send(offer)
    found = [room.fetch(asked) for _ in range(4)]
    assert [len(some) for some in found] == [2, 2, 1, 0]
    assert {answer.request.parcel.id for some in found for answer in some} == set(asked)


def test_what_nobody_waits_for_any_more_is_not_sent(room: Mailroom, clock: Clock) -> None:
    """A site that comes back late is not made to train, and charge, for a round that is over."""
    asked = ask(room, 5)
    clock.now += UNWANTED_SECONDS - 1
    room.fetch([asked])
    clock.now += UNWANTED_SECONDS - 1
    site = Site(room, 5)
    room.box(5).hang_up(clock.now)
    site.connect()
    clock.now += 2
    assert site.hears() is None
    woken = site.woken
    room.fetch([asked])  # somebody does
    assert site.woken > woken
    assert site.fetch().id == asked


def test_a_site_that_is_away_for_long_is_given_up_and_one_that_works_for_long_is_not(
    room: Mailroom, clock: Clock
) -> None:
    site = Site(room, 5)
    asked = ask(room, 5, ttl=10**6)
    site.fetch()
    for _ in range(100):
        clock.now += 60
        room.tick()
        assert room.fetch([asked]) == []
    site.cut()
    assert room.connected() == [5]
    clock.now += AWAY_SECONDS + 1
    assert room.connected() == []
    room.tick()
    assert room.fetch([asked]) == []
    clock.now += LOST_SECONDS
    room.tick()
    (answer,) = room.fetch([asked])
    assert (answer.code, answer.payload) == (LOST, b"")


def test_an_expired_request_is_answered_and_the_answer_kept_for_a_while(room: Mailroom, clock: Clock) -> None:
    Site(room, 5)
    asked, other = ask(room, 5, ttl=5.0), ask(room, 5, ttl=5.0)
    clock.now += 6
    room.tick()
    room.tick()
    assert room.fetch([asked])[0].code == EXPIRED
    clock.now += KEPT_SECONDS + 1
    room.tick()
    assert room.fetch([other]) == []


def test_the_expelled_are_given_up_at_once(room: Mailroom) -> None:
    Site(room, 5)
    Site(room, 6)
    asked, kept = ask(room, 5), ask(room, 6)
    room.expel_all_but({6})
    assert [answer.code for answer in room.fetch([asked, kept])] == [LOST]


def test_a_reply_whose_request_expired_meanwhile_harms_nothing(room: Mailroom, clock: Clock) -> None:
    site = Site(room, 5)
    asked = ask(room, 5, ttl=5.0)
    site.fetch()
    offer = site.offer(asked)
    site.hears()
    site.send(offer, 0, 1)
    clock.now += 6
    room.tick()
    site.send(offer, 1)
    assert site.hears() == Ack(offer.id, offer.num_bytes)
    assert [answer.code for answer in room.fetch([asked])] == [EXPIRED]
