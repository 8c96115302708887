"""One end of a stream: messages out, one after another; messages in, one after another; bytes in flight bounded.

No network and no threads: frames go in (`receive`) and come out (`next_frame`), and whoever owns the line carries them. So one
piece of code is both ends, and is tested by cutting it at every frame (tests/shared/link/test_line.py).

A message is offered with its id, length and hash. The other end answers how much of it is there: nothing, the part that came
before a cut, or all of it. Chunks then carry their offset, and only so many bytes are under way before they are
acknowledged (`shared.link.window`).

Guarantees
    * A message is handed over whole, with the hash that was offered, or not at all.
    * What arrived is acknowledged whole only after it was handed over, so its sender may forget it then.
    * Whatever the other end sends, `receive` returns or raises `LinkError`; memory is taken as bytes arrive, not as they are
      announced.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from shared.link.frames import Ack, Chunk, Frame, LinkError, Notice, Offer, bytes_of, frame_of
from shared.link.options import CHUNK_BYTES, MOST_MESSAGE_BYTES, PROGRESS_SECONDS
from shared.link.window import Window

ID_BYTES = 16
_MOST_NOTICE = 1000
_MOST_NOTICES = 16
_NOTICES_APART_SECONDS = 5.0
"""Notices go to the other end's log, which a peer must not fill: of those that come faster, only the first is told."""


def new_id() -> bytes:
    """Return an id that nobody can guess."""
    return secrets.token_bytes(ID_BYTES)


@dataclass(frozen=True)
class Parcel:
    """A whole message.

    Attributes:
        id: of `new_id`; the same message always has the same.
        reply_to: id of the request; empty in a request.
        payload: at least one byte.
        since: when it was made here, or had arrived whole; on the monotonic clock.
    """

    id: bytes
    reply_to: bytes
    payload: bytes
    since: float = field(default_factory=time.monotonic, compare=False)

    @cached_property
    def sha256(self) -> bytes:
        """The hash of the payload."""
        return hashlib.sha256(self.payload).digest()

    @property
    def offer(self) -> Offer:
        """What is told of it before it is sent."""
        return Offer(self.id, self.reply_to, len(self.payload), self.sha256)


class Incoming:
    """A message of which a part arrived; it outlives the line, so that a later one can go on with it."""

    def __init__(self, offer: Offer) -> None:
        self.offer = offer
        self.data = bytearray()

    def add(self, chunk: Chunk) -> None:
        """Append the next chunk; `LinkError` for any other."""
        due = min(CHUNK_BYTES, self.offer.num_bytes - len(self.data))
        if (chunk.id, chunk.offset, len(chunk.data)) != (self.offer.id, len(self.data), due):
            raise LinkError(
                f"a chunk of {len(chunk.data)} bytes for {chunk.offset} came; expected {due} for {len(self.data)}."
            )
        self.data += chunk.data

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return len(self.data) == self.offer.num_bytes

    def parcel(self) -> Parcel:
        """Return the whole message; `LinkError` if it is not the one that was offered."""
        parcel = Parcel(self.offer.id, self.offer.reply_to, bytes(self.data))
        if parcel.sha256 != self.offer.sha256:
            raise LinkError("a message came that is not the one that was offered.")
        return parcel


class Mail(ABC):
    """What stands behind a line and outlives it: what is to be sent, and who takes what comes."""

    @abstractmethod
    def next_parcel(self, line: Line) -> Parcel | None:
        """Return the oldest message to send that was not offered on this line yet; from now on it was."""

    @abstractmethod
    def delivered(self, parcel_id: bytes, *, declined: bool) -> None:
        """Take note that the other end has a message whole; or `declined` it, since it has it already or wants it no more."""

    @abstractmethod
    def offered(self, offer: Offer, line: Line) -> None:
        """Answer an offer, now or later, by `line.decline` or `line.grant`; raise `LinkError` if it may not be made."""

    @abstractmethod
    def arrived(self, parcel: Parcel) -> None:
        """Take a whole message."""


@dataclass
class _Outgoing:
    parcel: Parcel
    granted: bool = False
    sent: int = 0
    acknowledged: int = 0


class Line:
    """See the module.

    Args:
        mail: what stands behind it.
        wake: called when `next_frame` may have something that it had not before.
        noticed: takes the words of notices.
    """

    def __init__(
        self,
        mail: Mail,
        *,
        wake: Callable[[], None],
        noticed: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._mail, self.wake, self._noticed, self._clock = mail, wake, noticed, clock
        self._window = Window(clock)
        self._outgoing: _Outgoing | None = None
        self._offer: Offer | None = None
        self._incoming: Incoming | None = None
        self._ack: Ack | None = None
        self._notices: deque[Notice] = deque(maxlen=_MOST_NOTICES)
        self._progress = clock()
        self._told = float("-inf")

    # --- out ---

    def next_frame(self) -> bytes | None:
        """Return the next frame to send, or None if there is nothing to say now."""
        frame = self._next()
        return None if frame is None else bytes_of(frame)

    def _next(self) -> Frame | None:
        if self._ack is not None:
            ack, self._ack = self._ack, None
            return ack
        if self._notices:
            return self._notices.popleft()
        if self._outgoing is None:
            parcel = self._mail.next_parcel(self)
            if parcel is None:
                return None
            self._outgoing = _Outgoing(parcel)
            return parcel.offer
        out = self._outgoing
        size = len(out.parcel.payload)
        if not out.granted or out.sent == size or out.sent - out.acknowledged >= self._window.num_bytes:
            return None
        chunk = Chunk(out.parcel.id, out.sent, out.parcel.payload[out.sent : out.sent + CHUNK_BYTES])
        out.sent += len(chunk.data)
        self._window.sent(out.sent)
        return chunk

    def notice(self, text: str) -> None:
        """Tell the other end's log something."""
        self._notices.append(Notice(text[:_MOST_NOTICE]))
        self.wake()

    # --- in ---

    def receive(self, data: bytes) -> None:
        """Take a frame.

        Raises:
            LinkError: it is none, or not one that may come now.
        """
        frame = frame_of(data)
        if isinstance(frame, Chunk):
            self._receive_chunk(frame)
        elif isinstance(frame, Ack):
            self._receive_ack(frame)
        elif isinstance(frame, Offer):
            self._receive_offer(frame)
        elif isinstance(frame, Notice):
            now = self._clock()
            if now - self._told >= _NOTICES_APART_SECONDS:
                self._told = now
                self._noticed("".join(c if c.isprintable() else "?" for c in frame.text[:_MOST_NOTICE]))
        else:
            raise LinkError(f"a {type(frame).__name__.lower()} came in the middle of a stream.")

    def _receive_offer(self, offer: Offer) -> None:
        if self._offer is not None:
            raise LinkError("a message was offered before the one before it was whole.")
        if len(offer.id) != ID_BYTES or len(offer.reply_to) not in (0, ID_BYTES) or len(offer.sha256) != 32:
            raise LinkError("a message was offered whose ids or hash are not of the right length.")
        if not 1 <= offer.num_bytes <= MOST_MESSAGE_BYTES:
            raise LinkError(f"a message of {offer.num_bytes} bytes was offered; expected 1 to {MOST_MESSAGE_BYTES}.")
        self._offer = offer
        self._mail.offered(offer, self)

    def decline(self) -> None:
        """Answer the open offer: that message is here already, or nobody wants it."""
        assert self._offer is not None  # noqa: S101 (`Mail` answers offers only)
        self._acknowledge(self._offer.num_bytes)
        self._offer = None

    def grant(self, incoming: Incoming) -> None:
        """Answer the open offer: go on where `incoming` ends."""
        assert incoming.offer == self._offer  # noqa: S101
        self._incoming = incoming
        self._progress = self._clock()
        self._acknowledge(len(incoming.data))

    def abandon(self) -> None:
        """Let go of what is arriving; the next chunk of it ends the stream."""
        self._offer = self._incoming = None

    def _receive_chunk(self, chunk: Chunk) -> None:
        incoming = self._incoming
        if incoming is None:
            raise LinkError("a chunk came of a message that was not asked for.")
        incoming.add(chunk)
        self._progress = self._clock()
        if incoming.complete:
            self._offer = self._incoming = None
            self._mail.arrived(incoming.parcel())
        self._acknowledge(len(incoming.data), incoming.offer)

    def _acknowledge(self, offset: int, offer: Offer | None = None) -> None:
        offer = offer or self._offer
        assert offer is not None  # noqa: S101
        self._ack = Ack(offer.id, offset)  # of one message at a time, so a later one says all that an earlier did
        self.wake()

    def _receive_ack(self, ack: Ack) -> None:
        out = self._outgoing
        if out is None or ack.id != out.parcel.id:
            raise LinkError("an acknowledgement came of a message that was not offered.")
        size = len(out.parcel.payload)
        self._window.acknowledged(ack.offset)
        if ack.offset == size and (not out.granted or out.sent == size):
            self._outgoing = None
            self._mail.delivered(ack.id, declined=not out.granted)
        elif not out.granted and ack.offset < size and ack.offset % CHUNK_BYTES == 0:
            out.granted, out.sent, out.acknowledged = True, ack.offset, ack.offset
            self._window.begin(ack.offset)
        elif out.granted and out.acknowledged <= ack.offset <= out.sent and ack.offset < size:
            out.acknowledged = ack.offset
        else:
            raise LinkError(f"byte {ack.offset} was acknowledged, and {out.sent} of {size} were sent.")
        self._progress = self._clock()
        self.wake()

    # --- time ---

    @property
    def stalled(self) -> bool:
        """Whether a transfer is under way and nothing has moved for `PROGRESS_SECONDS`."""
        sending = self._outgoing is not None and self._outgoing.granted
        return (sending or self._incoming is not None) and self._clock() - self._progress > PROGRESS_SECONDS
