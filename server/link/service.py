"""The gRPC service of the link: one stream a site, open for as long as both run.

Before anything here runs, TLS has checked that the other end holds a certificate of the CA. Then, in this order: the version of
TLS, the trust store and the revocation list, the first frame, and that no other process holds a stream with this key.

Guarantees (tests: tests/integration/link/)
    * A site that may not stay is refused at its next message, and its stream ends within a moment even if it says nothing.
    * One key has one stream: of two processes with one key the newer is refused, and both hear of it. Only the process that
      opened a stream may take its place (it alone knows its random instance), so that a cut need not be noticed here first.
    * Nothing that a site sends ends anything but its own stream.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import grpc

from server.link.admission import Admission, Visitor
from server.link.events import LinkEvents
from server.link.mailroom import Mailroom
from shared.errors import TrustError
from shared.link import frames
from shared.link.frames import Hello, LinkError, Welcome
from shared.link.line import ID_BYTES, Line
from shared.link.options import HELLO_SECONDS
from shared.version import silotune_version

log = logging.getLogger("silotune.coordinator")

WATCH_SECONDS = 0.2
TELL_AGAIN_SECONDS = 60.0
_MOST_SOFTWARE = 64


class Ended(Exception):
    """Why a stream ends, for both logs."""

    def __init__(self, code: grpc.StatusCode, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


@dataclass(eq=False)
class _Stream:
    visitor: Visitor
    peer: str
    instance: bytes
    line: Line
    over: asyncio.Future[None]
    gone: asyncio.Event

    def end(self, code: grpc.StatusCode, reason: str) -> None:
        if not self.over.done():
            self.over.set_exception(Ended(code, reason))


class LinkService:
    """See the module."""

    def __init__(self, admission: Admission, mailroom: Mailroom, events: LinkEvents) -> None:
        self._admission, self._mailroom, self._events = admission, mailroom, events
        self._streams: dict[int, _Stream] = {}
        self._told: dict[tuple[str, object], float] = {}

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return what a gRPC server needs; frames are passed as bytes and read by `Line`, which answers for its errors."""
        return grpc.method_handlers_generic_handler(
            frames.SERVICE, {"Connect": grpc.stream_stream_rpc_method_handler(self.connect)}
        )

    async def connect(self, _requests: object, context: Any) -> None:
        """Serve one stream until it ends."""
        name, peer = "", str(context.peer())
        try:
            visitor = self._visitor(context)
            name = visitor.name
            hello = await self._hello(context)
            await self._serve(visitor, hello, context, peer)
        except (Ended, TrustError, LinkError) as error:
            ended = error if isinstance(error, Ended) else _ended(error)
            shown = name or _common_name(context)
            if self._news(shown, ended.code):
                log.warning("%s at %s: %s", shown, peer, ended.reason, extra={"site": shown})
                self._events.refused(shown, peer, ended.reason)
            await context.abort(ended.code, ended.reason)

    def _visitor(self, context: Any) -> Visitor:
        facts = context.auth_context()
        version = _text(facts, "ssl_tls_version")
        if version != "TLSv1.3":
            raise Ended(
                grpc.StatusCode.PERMISSION_DENIED, f"the connection is {version or 'not encrypted'}; TLSv1.3 only."
            )
        return self._admission.visitor(_text(facts, "x509_pem_cert").encode())

    async def _hello(self, context: Any) -> Hello:
        try:
            data = await asyncio.wait_for(context.read(), HELLO_SECONDS)
        except TimeoutError:
            raise LinkError(f"nothing came in {HELLO_SECONDS:.0f} s.") from None
        hello = frames.frame_of(data) if isinstance(data, bytes) else None
        if not isinstance(hello, Hello) or len(hello.instance) != ID_BYTES:
            raise LinkError("the first frame was no hello.")
        return hello

    async def _serve(self, visitor: Visitor, hello: Hello, context: Any, peer: str) -> None:
        await self._take_place(visitor, hello, peer)
        box, wake, about = self._mailroom.box(visitor.node), asyncio.Event(), {"site": visitor.name}
        stream = _Stream(
            visitor=visitor,
            peer=peer,
            instance=hello.instance,
            line=Line(
                box, wake=wake.set, noticed=lambda text: log.info("site %s says: %s", visitor.name, text, extra=about)
            ),
            over=asyncio.get_running_loop().create_future(),
            gone=asyncio.Event(),
        )
        self._streams[visitor.node] = stream
        reason = "the connection ended"
        try:
            await context.write(frames.bytes_of(Welcome(visitor.node, visitor.name, silotune_version())))
            box.open(stream.line)
            self._events.connected(visitor.name, peer, _plain(hello.software))
            log.info("site %s is connected from %s", visitor.name, peer, extra=about)
            await _first_of(self._read(stream, context), _write(stream, context, wake), stream.over)
            reason = "the site closed it"
        except (Ended, LinkError, TrustError) as error:
            reason = str(error)
            raise
        finally:
            del self._streams[visitor.node]
            box.hang_up(self._mailroom.clock())
            stream.gone.set()
            log.info("the stream of site %s has ended: %s", visitor.name, reason, extra=about)
            self._events.disconnected(visitor.name, reason)

    async def _take_place(self, visitor: Visitor, hello: Hello, peer: str) -> None:
        """Make sure that this key has no other stream."""
        while (other := self._streams.get(visitor.node)) is not None:
            if other.instance != hello.instance:
                if self._news(visitor.name, "twin"):
                    other.line.notice(
                        f"another process with this site's key tried to connect from {peer}, and was refused"
                    )
                    self._events.twin(visitor.name, peer)
                raise Ended(
                    grpc.StatusCode.ALREADY_EXISTS,
                    f"a process with the key of {visitor.name} is connected already, from {other.peer}. If that is none of "
                    "yours, the key may be stolen.",
                )
            other.end(grpc.StatusCode.ABORTED, "the same process has connected again")
            await other.gone.wait()

    def _news(self, name: str, what: object) -> bool:
        """Return whether this was not told in the last minute: whoever tries again and again fills no log."""
        now = time.monotonic()
        self._told = {key: when for key, when in self._told.items() if now - when < TELL_AGAIN_SECONDS}
        if (name, what) in self._told:
            return False
        self._told[name, what] = now
        return True

    async def _read(self, stream: _Stream, context: Any) -> None:
        while isinstance(data := await context.read(), bytes):
            self._admission.check(stream.visitor)
            stream.line.receive(data)

    # --- what nobody sends a message for ---

    async def watch(self) -> None:
        """End the streams of those who may not stay, and give up what takes too long; runs for ever."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if self._admission.due:
                self._admission.use(await asyncio.to_thread(self._admission.read))
            for stream in list(self._streams.values()):
                try:
                    self._admission.check(stream.visitor)
                except TrustError as error:
                    stream.end(grpc.StatusCode.PERMISSION_DENIED, str(error))
                if stream.line.stalled:
                    stream.end(grpc.StatusCode.DEADLINE_EXCEEDED, "a transfer has not moved for too long")
            self._mailroom.expel_all_but(self._admission.names().keys())
            self._mailroom.tick()


def _ended(error: TrustError | LinkError) -> Ended:
    trusted = isinstance(error, LinkError)
    return Ended(grpc.StatusCode.INVALID_ARGUMENT if trusted else grpc.StatusCode.PERMISSION_DENIED, str(error))


async def _write(stream: _Stream, context: Any, wake: asyncio.Event) -> None:
    while True:
        wake.clear()
        while (frame := stream.line.next_frame()) is not None:
            await context.write(frame)
        await wake.wait()


async def _first_of(*steps: Coroutine[Any, Any, None] | asyncio.Future[None]) -> None:
    """Wait for the first to end, stop the others, and raise what it raised."""
    tasks = [asyncio.ensure_future(step) for step in steps]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


def _text(facts: Any, key: str) -> str:
    values = facts.get(key, [b""])
    return bytes(values[0]).decode("utf-8", errors="replace")


def _common_name(context: Any) -> str:
    return _plain(_text(context.auth_context(), "x509_common_name")) or "somebody"


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:_MOST_SOFTWARE])
