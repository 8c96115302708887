"""Requests that sites have not answered yet, and answers that nobody has fetched yet; everything of it in bounded memory.

A request stays here until it is answered, so a site that was cut off, or was killed and came back, is offered it again.
Everything runs in one thread, the one of the link's event loop.

Guarantees (tests: tests/server/link/test_mailroom.py)
    * A reply counts only if it came on the stream of the site that was asked.
    * A reply is no longer than twice what was asked, and `REPLY_SLACK_BYTES`.
    * At most `UPLOAD_SLOTS` replies are on their way, or as many as fit, with those that wait to be fetched, into `UPLOAD_BYTES`;
      parts that a cut left behind count as well. While `HELD_BYTES` wait to be fetched, no other begins.
    * A reply whose request has expired gives its slot to one that is waited for, however slowly its site sends it.
    * For every request there is an answer in the end: the reply, or why there is none.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from flwr.app import Metadata

from shared.link.envelope import EXPIRED, LOST, UNREADABLE
from shared.link.frames import LinkError, Offer
from shared.link.line import Incoming, Line, Mail, Parcel
from shared.link.options import FETCH_BYTES, HELD_BYTES, UPLOAD_BYTES, UPLOAD_SLOTS

log = logging.getLogger("silotune.coordinator")

REPLY_SLACK_BYTES = 8 * 2**20
"""Metrics are up to 4 MB of text, whatever was asked."""
AWAY_SECONDS = 10.0
"""A site whose stream ended counts as connected to a round for so long: most come back within a second."""
LOST_SECONDS = 40.0
"""A site that has been away for so long does not answer; the round goes on without it."""
UNWANTED_SECONDS = 60.0
"""A request whose answer nobody has asked for in so long is not sent any more, and its answer may be dropped for room."""
KEPT_SECONDS = 600.0
"""An answer is kept until its request expires, and at least for so long."""


@dataclass
class Request:
    """A request until it is answered.

    Attributes:
        parcel: as it is sent.
        metadata: Flower's, to which the reply is made.
        expires: on the clock.
        wanted: when somebody last asked for the answer.
        line: on which it was offered last.
        times_offered: on how many lines; after more than one, its site may have answered it before.
    """

    parcel: Parcel
    metadata: Metadata
    expires: float
    wanted: float
    line: Line | None = None
    times_offered: int = 0


@dataclass(frozen=True)
class Answer:
    """What came of a request: a payload, or a code and a reason; kept until then if nobody fetches it."""

    request: Request
    until: float
    payload: bytes
    code: int = 0
    reason: str = ""


class Mailbox(Mail):
    """One site's part of the mailroom; it outlives the site's streams."""

    def __init__(self, room: Mailroom, node: int, away_since: float) -> None:
        self.node = node
        self.line: Line | None = None
        self.away_since = away_since
        self.arrivals = 0
        self.requests: dict[bytes, Request] = {}
        self._room = room

    def next_parcel(self, line: Line) -> Parcel | None:
        """See `Mail`; what nobody waits for any more is left out: it would be trained, and charged, for nothing."""
        recently = self._room.clock() - UNWANTED_SECONDS
        for request in self.requests.values():
            if request.line is not line and request.wanted >= recently:
                request.line = line
                request.times_offered += 1
                return request.parcel
        return None

    def delivered(self, parcel_id: bytes, *, declined: bool) -> None:
        """See `Mail`; a request is kept until it is answered."""

    def offered(self, offer: Offer, line: Line) -> None:
        """See `Mail`."""
        if not offer.reply_to:
            raise LinkError("a site offered a message that answers none.")
        request = self.requests.get(offer.reply_to)
        most = 2 * len(request.parcel.payload) + REPLY_SLACK_BYTES if request else 0
        if request is None:
            line.decline()  # answered, expired, or asked by a coordinator that is no more
        elif offer.num_bytes > most:
            self._room.close(
                self, request, code=UNREADABLE, reason=f"a reply of {offer.num_bytes} bytes, at most {most}"
            )
            line.decline()
        else:
            self._room.want_upload(self, offer, line)

    def arrived(self, parcel: Parcel) -> None:
        """See `Mail`."""
        self._room.uploaded(self)
        request = self.requests.get(parcel.reply_to)
        if request is not None:
            self._room.close(self, request, payload=parcel.payload)

    def open(self, line: Line) -> None:
        """Take the one line of this site."""
        self.line, self.arrivals = line, self.arrivals + 1

    def hang_up(self, now: float) -> None:
        """Let go of the line; what has arrived of a reply is kept for the next one."""
        self.line, self.away_since = None, now
        self._room.park(self)


class Mailroom:
    """See the module."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._boxes: dict[int, Mailbox] = {}
        self._answers: dict[bytes, Answer] = {}
        self._held = 0
        self._asked: dict[bytes, Mailbox] = {}
        self._waiting: deque[tuple[Mailbox, Offer, Line]] = deque()
        self._uploads: dict[Mailbox, Incoming] = {}
        self._parked: dict[Mailbox, Incoming] = {}
        self._promised = 0  # bytes of both

    def box(self, node: int) -> Mailbox:
        """Return a site's mailbox."""
        if node not in self._boxes:
            self._boxes[node] = Mailbox(self, node, self.clock())
        return self._boxes[node]

    def connected(self) -> list[int]:
        """Return the sites whose stream is open, or was a moment ago."""
        recently = self.clock() - AWAY_SECONDS
        return [n for n, box in self._boxes.items() if box.line is not None or box.away_since > recently]

    def arrivals(self) -> dict[int, int]:
        """Return how many streams each site has opened; one that ends and comes back within seconds is never missing."""
        return {node: box.arrivals for node, box in self._boxes.items() if box.arrivals}

    def seen_before(self, node: int) -> float | None:
        """Return how many seconds ago a site was connected: 0 if it is now, None if it never was."""
        box = self._boxes.get(node)
        if box is None or not box.arrivals:
            return None
        return 0.0 if box.line is not None else self.clock() - box.away_since

    # --- requests and answers ---

    def send(self, node: int, parcel: Parcel, metadata: Metadata) -> None:
        """Send a request, now or when the site is there."""
        box, now = self.box(node), self.clock()
        self._asked[parcel.id] = box
        box.requests[parcel.id] = Request(parcel, metadata, expires=now + metadata.ttl, wanted=now)
        if box.line is not None:
            box.line.wake()

    def fetch(self, wanted: Iterable[bytes]) -> list[Answer]:
        """Return the answers that are here, and forget them; not many bytes at once, for whoever reads them copies them."""
        found: list[Answer] = []
        now, room = self.clock(), FETCH_BYTES
        for parcel_id in wanted:
            if found and parcel_id in self._answers and (room := room - len(self._answers[parcel_id].payload)) < 0:
                break
            if (answer := self._answers.pop(parcel_id, None)) is not None:
                self._held -= len(answer.payload)
                found.append(answer)
            elif (box := self._asked.get(parcel_id)) is not None:
                request = box.requests[parcel_id]
                was, request.wanted = request.wanted, now
                if was < now - UNWANTED_SECONDS and box.line is not None:
                    box.line.wake()
        self.serve()
        return found

    def close(self, box: Mailbox, request: Request, *, payload: bytes = b"", code: int = 0, reason: str = "") -> None:
        """Note what came of a request."""
        del box.requests[request.parcel.id], self._asked[request.parcel.id]
        until = max(request.expires, self.clock() + KEPT_SECONDS)
        self._answers[request.parcel.id] = Answer(request, until, payload, code, reason)
        self._held += len(payload)

    def withdraw(self, wanted: Iterable[bytes]) -> None:
        """Forget requests whose answers nobody will fetch, and answers that are here."""
        for parcel_id in wanted:
            if (box := self._asked.pop(parcel_id, None)) is not None:
                del box.requests[parcel_id]
            elif (answer := self._answers.pop(parcel_id, None)) is not None:
                self._held -= len(answer.payload)
        self.serve()

    def expel_all_but(self, admitted: Collection[int]) -> None:
        """Give up all requests to sites that may not connect any more."""
        for box in self._boxes.values():
            if box.node not in admitted:
                for request in list(box.requests.values()):
                    self.close(box, request, code=LOST, reason="the site may not connect any more")

    def tick(self) -> None:
        """Give up what takes too long; to be called every second or so."""
        now = self.clock()
        for box in self._boxes.values():
            lost = box.line is None and now - box.away_since > LOST_SECONDS
            for request in list(box.requests.values()):
                if lost:
                    away = f"the site has not been connected for {now - box.away_since:.0f} s"
                    self.close(box, request, code=LOST, reason=away)
                elif now > request.expires:
                    self.close(box, request, code=EXPIRED, reason="the request has expired")
        for parcel_id, answer in list(self._answers.items()):
            if now > answer.until:
                self._drop(parcel_id)
        self.serve()

    # --- room for replies ---

    def want_upload(self, box: Mailbox, offer: Offer, line: Line) -> None:
        """Let a site send a reply, now or when there is room."""
        self._waiting.append((box, offer, line))
        self.serve()

    def uploaded(self, box: Mailbox) -> None:
        """Take note that a site's reply is whole."""
        self._remove(box)
        self.serve()

    def park(self, box: Mailbox) -> None:
        """Keep what came of a site's reply for its next line; it gives way when others need the room."""
        self._waiting = deque(entry for entry in self._waiting if entry[0] is not box)
        if (part := self._uploads.pop(box, None)) is not None:
            self._parked[box] = part
        self.serve()

    def serve(self) -> None:
        """Grant uploads while there is room."""
        while self._waiting:
            box, offer, line = self._waiting[0]
            if offer.reply_to not in box.requests:
                line.decline()
            elif self._make_room(box, offer):
                part = self._remove(box) or Incoming(offer)
                self._uploads[box] = part
                self._promised += offer.num_bytes
                line.grant(part)
            else:
                return
            self._waiting.popleft()

    def _make_room(self, box: Mailbox, offer: Offer) -> bool:
        if self._held >= HELD_BYTES:
            self._drop_unwanted()
        if self._held >= HELD_BYTES:
            return False
        if box in self._parked:
            if self._parked[box].offer == offer:
                return True
            self._remove(box)
        while (
            len(self._uploads) + len(self._parked) >= UPLOAD_SLOTS
            and self._promised + self._held + offer.num_bytes > UPLOAD_BYTES
        ):
            late = [other for other, part in self._uploads.items() if part.offer.reply_to not in other.requests]
            if not self._parked and not late:
                return False
            gives_way = next(iter(self._parked)) if self._parked else late[0]  # the oldest
            if gives_way.line is not None and gives_way in self._uploads:
                gives_way.line.abandon()
            self._remove(gives_way)
        return True

    def _remove(self, box: Mailbox) -> Incoming | None:
        part = self._uploads.pop(box, None) or self._parked.pop(box, None)
        self._promised -= part.offer.num_bytes if part else 0
        return part

    def _drop_unwanted(self) -> None:
        before = self.clock() - UNWANTED_SECONDS
        for parcel_id, answer in list(self._answers.items()):
            if answer.request.wanted < before:
                self._drop(parcel_id)

    def _drop(self, parcel_id: bytes) -> None:
        answer = self._answers.pop(parcel_id)
        self._held -= len(answer.payload)
        if answer.payload:
            log.warning("a reply that nobody fetched was dropped; the site sends it again when it is asked again")
