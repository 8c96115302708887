"""Two lines against each other without a network: whatever is cut, whole messages arrive once."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.link.frames import Ack, Chunk, Hello, LinkError, Notice, Offer, bytes_of, frame_of
from shared.link.line import Incoming, Line, Mail, Parcel, new_id
from shared.link.options import CHUNK_BYTES, MOST_MESSAGE_BYTES, PROGRESS_SECONDS, WINDOW_BYTES


class Desk(Mail):
    """Sends what is in `out`, keeps what comes in `came`, and goes on where a cut left off."""

    def __init__(self, *out: Parcel) -> None:
        self.out = list(out)
        self.offered_on: dict[bytes, Line] = {}
        self.came: list[Parcel] = []
        self.partial: Incoming | None = None
        self.later: Line | None = None
        self.patient = False
        self.declined: list[bytes] = []

    def next_parcel(self, line: Line) -> Parcel | None:
        for parcel in self.out:
            if self.offered_on.get(parcel.id) is not line:
                self.offered_on[parcel.id] = line
                return parcel
        return None

    def delivered(self, parcel_id: bytes, *, declined: bool) -> None:
        self.declined += [parcel_id] if declined else []
        self.out = [parcel for parcel in self.out if parcel.id != parcel_id]

    def offered(self, offer: Offer, line: Line) -> None:
        if self.patient:
            self.later = line
        elif any(parcel.id == offer.id for parcel in self.came):
            line.decline()
        else:
            if self.partial is None or self.partial.offer != offer:
                self.partial = Incoming(offer)
            line.grant(self.partial)

    def arrived(self, parcel: Parcel) -> None:
        self.came.append(parcel)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def line_of(mail: Mail, **options: Any) -> Line:
    return Line(mail, wake=lambda: None, noticed=lambda text: None, **options)


def parcel(size: int, fill: bytes = b"x") -> Parcel:
    return Parcel(new_id(), b"", (fill * size)[:size])


def carry(left: Line, right: Line, most_frames: int = 10**6) -> int:
    """Carry frames both ways until nobody has anything to say, or so many were carried; return how many."""
    carried = 0
    while carried < most_frames:
        moved = 0
        for source, target in ((left, right), (right, left)):
            if carried + moved < most_frames and (frame := source.next_frame()) is not None:
                target.receive(frame)
                moved += 1
        if not moved:
            break
        carried += moved
    return carried


@pytest.mark.parametrize("size", [1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * WINDOW_BYTES + 5])
def test_messages_pass_both_ways_at_once(size: int) -> None:
    down, up = [parcel(size), parcel(7)], [parcel(size, b"y")]
    left, right = Desk(*down), Desk(*up)
    carry(line_of(left), line_of(right))
    assert (right.came, left.came) == (down, up)
    assert left.out == right.out == []


@settings(max_examples=30)
@given(cuts=st.lists(st.integers(0, 40), max_size=12), size=st.integers(1, 12 * CHUNK_BYTES))
def test_cuts_anywhere_lose_nothing_and_double_nothing(cuts: list[int], size: int) -> None:
    down, up = [parcel(size), parcel(100)], [parcel(size, b"y"), parcel(1, b"z")]
    left, right = Desk(*down), Desk(*up)
    for most in cuts:
        carry(line_of(left), line_of(right), most)
    carry(line_of(left), line_of(right))
    assert (right.came, left.came) == (down, up)
    assert left.out == right.out == []


def test_a_cut_costs_only_what_was_not_acknowledged() -> None:
    big = parcel(20 * CHUNK_BYTES)
    left, right = Desk(big), Desk()
    before = carry(line_of(left), line_of(right), 30)
    after = carry(line_of(left), line_of(right))
    whole = carry(line_of(Desk(big)), line_of(Desk()))
    assert right.came == [big]
    assert before + after <= whole + 2 + 2 * WINDOW_BYTES // CHUNK_BYTES


def test_at_most_a_window_is_in_flight() -> None:
    sender = line_of(Desk(parcel(10 * WINDOW_BYTES)))
    offer = frame_of(sender.next_frame() or b"")
    assert isinstance(offer, Offer)
    assert sender.next_frame() is None  # nothing before it was asked for
    sender.receive(bytes_of(Ack(offer.id, 0)))
    sent = []
    while (frame := sender.next_frame()) is not None:
        sent.append(frame_of(frame))
    assert all(isinstance(chunk, Chunk) and len(chunk.data) == CHUNK_BYTES for chunk in sent)
    assert len(sent) * CHUNK_BYTES == WINDOW_BYTES


def test_acknowledgements_that_could_not_be_sent_yet_become_one() -> None:
    """A peer that sends and does not read fills no queue here."""
    big = parcel(WINDOW_BYTES + 1)
    left, right = line_of(Desk(big)), line_of(Desk())
    carry(left, right, 2)
    while (frame := left.next_frame()) is not None:
        right.receive(frame)
    assert frame_of(right.next_frame() or b"") == Ack(big.id, WINDOW_BYTES)
    assert right.next_frame() is None


def offered(num_bytes: int = 100) -> Offer:
    payload = b"x" * num_bytes if num_bytes < 10**6 else b"x"
    return Offer(new_id(), b"", num_bytes, hashlib.sha256(payload).digest())


OFFER = offered()
BIG = offered(CHUNK_BYTES + 1)


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([Hello(b"i" * 16, "1")], "in the middle of a stream"),
        ([Chunk(OFFER.id, 0, b"x")], "not asked for"),
        ([Ack(OFFER.id, 0)], "not offered"),
        ([OFFER, offered()], "before the one before"),
        ([replace(OFFER, id=b"short")], "length"),
        ([replace(OFFER, reply_to=b"x")], "length"),
        ([replace(OFFER, sha256=b"x")], "length"),
        ([replace(OFFER, num_bytes=0)], "expected 1 to"),
        ([replace(OFFER, num_bytes=MOST_MESSAGE_BYTES + 1)], "expected 1 to"),
        ([replace(OFFER, num_bytes=2**64 - 1)], "expected 1 to"),
        ([OFFER, Chunk(OFFER.id, 0, b"x" * 99)], "expected 100 for 0"),
        ([OFFER, Chunk(OFFER.id, 0, b"x" * 101)], "expected 100 for 0"),
        ([OFFER, Chunk(OFFER.id, 1, b"x" * 100)], "expected 100 for 0"),
        ([OFFER, Chunk(new_id(), 0, b"x" * 100)], "expected 100 for 0"),
        ([OFFER, Chunk(OFFER.id, 0, b"y" * 100)], "not the one that was offered"),
        ([BIG, Chunk(BIG.id, 0, b"x" * CHUNK_BYTES), Chunk(BIG.id, 0, b"x" * CHUNK_BYTES)], "expected 1 for"),
        ([OFFER, Chunk(OFFER.id, 0, b"x" * 100), Chunk(OFFER.id, 100, b"x")], "not asked for"),
    ],
)
def test_what_may_not_come_ends_the_stream(frames: list[Any], words: str) -> None:
    line = line_of(Desk())
    for frame in frames[:-1]:
        line.receive(bytes_of(frame))
    with pytest.raises(LinkError, match=words):
        line.receive(bytes_of(frames[-1]))


@pytest.mark.parametrize("offset", [1, CHUNK_BYTES, 2 * CHUNK_BYTES, 3 * CHUNK_BYTES, 2**64 - 1])
def test_what_was_never_sent_cannot_be_acknowledged(offset: int) -> None:
    out = parcel(3 * CHUNK_BYTES)
    line = line_of(Desk(out))
    line.next_frame()
    line.receive(bytes_of(Ack(out.id, 0)))
    with pytest.raises(LinkError, match="was acknowledged, and 0 of"):
        line.receive(bytes_of(Ack(out.id, offset)))


def test_acknowledgements_do_not_go_back() -> None:
    out = parcel(3 * CHUNK_BYTES)
    line = line_of(Desk(out))
    line.next_frame()
    line.receive(bytes_of(Ack(out.id, 0)))
    line.next_frame()
    line.receive(bytes_of(Ack(out.id, CHUNK_BYTES)))
    with pytest.raises(LinkError, match="was acknowledged"):
        line.receive(bytes_of(Ack(out.id, 0)))


def test_a_transfer_that_does_not_move_is_noticed_and_one_that_waits_for_room_is_not() -> None:
    clock, desk = Clock(), Desk()
    desk.patient = True
    sender, receiver = line_of(Desk(parcel(WINDOW_BYTES * 2)), clock=clock), line_of(desk, clock=clock)
    carry(sender, receiver)
    clock.now += 10 * PROGRESS_SECONDS
    assert not sender.stalled
    assert not receiver.stalled
    assert desk.later is receiver
    offer = receiver._offer
    assert offer is not None
    receiver.grant(Incoming(offer))
    carry(sender, receiver, 3)
    clock.now += PROGRESS_SECONDS - 1
    assert not sender.stalled
    carry(sender, receiver, 1)
    clock.now += 2
    assert not receiver.stalled  # a chunk came in between
    clock.now += PROGRESS_SECONDS
    assert sender.stalled
    assert receiver.stalled


def test_notices_arrive_without_what_a_terminal_acts_on() -> None:
    heard: list[str] = []
    clock = Clock()
    left = line_of(Desk())
    right = Line(Desk(), wake=lambda: None, noticed=heard.append, clock=clock)
    for _ in range(100):
        left.notice("more")
    assert carry(left, right) == 16  # bounded, the newest
    clock.now += 5.0
    right.receive(bytes_of(Notice("a\x1b[2Jb\nc" + "d" * 5000)))
    assert heard[-1].startswith("a?[2Jb?cddd")
    assert len(heard[-1]) == 1000


def test_a_peer_that_says_a_lot_fills_nobody_elses_log() -> None:
    heard: list[str] = []
    clock = Clock()
    line = Line(Desk(), wake=lambda: None, noticed=heard.append, clock=clock)
    for number in range(200):
        line.receive(bytes_of(Notice(str(number))))
        clock.now += 0.0625
    assert heard == ["0", "80", "160"]


def test_a_message_that_is_declined_is_told_apart_from_one_that_came() -> None:
    """It may have come on an earlier line, or nobody wants it any more."""
    big = parcel(2 * CHUNK_BYTES)
    left, right = Desk(big), Desk()
    carry(line_of(left), line_of(right))
    assert (left.out, left.declined) == ([], [])
    left.out = [big]
    carry(line_of(left), line_of(right))
    assert (left.out, left.declined) == ([], [big.id])
