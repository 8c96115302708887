"""What a site has received and not answered, and the answers that the coordinator has not acknowledged; it outlives connections.

Guarantees (tests: tests/client/link/test_letterbox.py)
    * A request is handed over whole, once, however often it is sent: its id says that it is the same.
    * A reply is kept until the coordinator has it whole, or says that it wants it no more.
    * At most `MOST_OPEN` requests are here.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from shared.link.frames import LinkError, Offer
from shared.link.line import Incoming, Line, Mail, Parcel, new_id

MOST_OPEN = 4
_REMEMBERED = 4096


class Letterbox(Mail):
    """See the module.

    Args:
        delivered: is told of every reply that is not kept any more, and whether it was declined; with the lock held, so it
            calls nothing here.

    Attributes:
        lock: to be held by whoever calls a method that says so, or uses a line of this letterbox.
    """

    def __init__(self, *, delivered: Callable[[Parcel, bool], None] = lambda reply, declined: None) -> None:
        self._tell_delivered = delivered
        self.lock = threading.Condition()
        self._taken: OrderedDict[bytes, None] = OrderedDict()
        self._open: OrderedDict[bytes, Parcel] = OrderedDict()
        self._replies: OrderedDict[bytes, Parcel] = OrderedDict()
        self._offered: dict[bytes, Line] = {}
        self._partial: Incoming | None = None
        self._waiting: tuple[Offer, Line] | None = None
        self._working = False

    def begin(self) -> None:
        """Forget what was said on an earlier line; with the lock held."""
        self._waiting = None
        self._offered.clear()
        self.lock.notify_all()

    # --- for whoever answers ---

    def next_request(self, timeout: float) -> Parcel | None:
        """Return the oldest request that is not answered, or None if none comes in time."""
        with self.lock:
            if not self._open:
                self.lock.wait(timeout)
            request = next(iter(self._open.values()), None)
            self._working = request is not None
            return request

    def answer(self, request: Parcel, payload: bytes | None) -> None:
        """Send the answer to a request; None if there is nothing to say."""
        with self.lock:
            del self._open[request.id]
            self._working = False
            if payload is not None:
                reply = Parcel(new_id(), request.id, payload)
                self._replies[reply.id] = reply
            if self._waiting is not None:
                offer, line = self._waiting
                self._waiting = None
                self.offered(offer, line)
            self.lock.notify_all()

    @property
    def working(self) -> bool:
        """Whether an answer is being made."""
        return self._working

    @property
    def delivering(self) -> bool:
        """Whether an answer is not acknowledged yet."""
        return bool(self._replies)

    # --- for the line; with the lock held ---

    def next_parcel(self, line: Line) -> Parcel | None:
        """See `Mail`."""
        for reply in self._replies.values():
            if self._offered.get(reply.id) is not line:
                self._offered[reply.id] = line
                return reply
        return None

    def delivered(self, parcel_id: bytes, *, declined: bool) -> None:
        """See `Mail`."""
        reply = self._replies.pop(parcel_id, None)
        if reply is not None:
            self._tell_delivered(reply, declined)
        self.lock.notify_all()

    def offered(self, offer: Offer, line: Line) -> None:
        """See `Mail`."""
        if offer.reply_to:
            raise LinkError("the coordinator offered a reply; a site asks nothing.")
        if offer.id in self._taken:
            line.decline()
        elif len(self._open) >= MOST_OPEN:
            self._waiting = (offer, line)
        else:
            if self._partial is None or self._partial.offer != offer:
                self._partial = Incoming(offer)
            line.grant(self._partial)

    def arrived(self, parcel: Parcel) -> None:
        """See `Mail`."""
        self._partial = None
        self._taken[parcel.id] = None
        while len(self._taken) > _REMEMBERED:
            self._taken.popitem(last=False)
        self._open[parcel.id] = parcel
        self.lock.notify_all()
