"""What a site keeps between connections: each request once, each reply until it is acknowledged."""

from __future__ import annotations

import threading
import time

import pytest

from client.link.letterbox import MOST_OPEN, Letterbox
from shared.link.frames import Ack, Chunk, LinkError, Offer, bytes_of, frame_of
from shared.link.line import Line, Parcel, new_id
from shared.link.options import CHUNK_BYTES


def line_of(box: Letterbox) -> Line:
    with box.lock:
        box.begin()
    return Line(box, wake=box.lock.notify_all, noticed=lambda text: None)


def hears(box: Letterbox, line: Line) -> object:
    with box.lock:
        data = line.next_frame()
    return None if data is None else frame_of(data)


def says(box: Letterbox, line: Line, frame: object) -> None:
    with box.lock:
        line.receive(bytes_of(frame))


def deliver(box: Letterbox, line: Line, parcel: Parcel) -> object:
    """Offer a request, send it if it is asked for, and return the last acknowledgement."""
    says(box, line, parcel.offer)
    ack = hears(box, line)
    while isinstance(ack, Ack) and ack.offset < len(parcel.payload):
        says(box, line, Chunk(parcel.id, ack.offset, parcel.payload[ack.offset : ack.offset + CHUNK_BYTES]))
        ack = hears(box, line)
    return ack


def request(size: int = 10) -> Parcel:
    return Parcel(new_id(), b"", bytes(size))


def test_a_request_is_handed_over_once_however_often_it_is_sent() -> None:
    box, asked = Letterbox(), request()
    for _ in range(3):
        line = line_of(box)
        assert deliver(box, line, asked) == Ack(asked.id, 10)
    assert box.next_request(0.0) == asked
    assert box.working
    box.answer(asked, b"yes")
    assert not box.working
    assert box.next_request(0.0) is None
    assert deliver(box, line_of(box), asked) == Ack(asked.id, 10)
    assert box.next_request(0.0) is None


def test_a_reply_is_offered_on_every_line_until_it_is_acknowledged() -> None:
    box, asked = Letterbox(), request()
    deliver(box, line_of(box), asked)
    assert box.next_request(0.0) == asked
    box.answer(asked, b"yes")
    ids = set()
    for _ in range(3):
        line = line_of(box)
        offer = hears(box, line)
        assert isinstance(offer, Offer)
        assert (offer.reply_to, offer.num_bytes) == (asked.id, 3)
        assert hears(box, line) is None
        assert box.delivering
        ids.add(offer.id)
    (reply_id,) = ids
    says(box, line, Ack(reply_id, 3))
    assert not box.delivering
    assert hears(box, line_of(box)) is None


def test_a_request_goes_on_after_a_cut() -> None:
    box, asked = Letterbox(), request(2 * CHUNK_BYTES + 5)
    line = line_of(box)
    says(box, line, asked.offer)
    assert hears(box, line) == Ack(asked.id, 0)
    says(box, line, Chunk(asked.id, 0, bytes(CHUNK_BYTES)))
    line = line_of(box)
    says(box, line, asked.offer)
    assert hears(box, line) == Ack(asked.id, CHUNK_BYTES)
    line = line_of(box)
    assert deliver(box, line, asked) == Ack(asked.id, len(asked.payload))
    assert box.next_request(0.0) == asked


def test_only_so_many_requests_are_here_at_once() -> None:
    box = Letterbox()
    line = line_of(box)
    requests = [request() for _ in range(MOST_OPEN + 1)]
    for one in requests[:-1]:
        deliver(box, line, one)
    says(box, line, requests[-1].offer)
    assert hears(box, line) is None
    first = box.next_request(0.0)
    assert first == requests[0]
    box.answer(first, None)
    assert hears(box, line) == Ack(requests[-1].id, 0)
    assert not box.delivering  # there was nothing to say


def test_whoever_waits_for_a_request_is_woken() -> None:
    box, asked, found = Letterbox(), request(), []
    thread = threading.Thread(target=lambda: found.append(box.next_request(30.0)))
    thread.start()
    time.sleep(0.05)
    deliver(box, line_of(box), asked)
    thread.join(timeout=10)
    assert found == [asked]


def test_the_coordinator_does_not_answer() -> None:
    box = Letterbox()
    with pytest.raises(LinkError, match="a site asks nothing"):
        says(box, line_of(box), Offer(new_id(), new_id(), 5, bytes(32)))
