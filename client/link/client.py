"""A site's connection to the coordinator: opened from here, opened again after a cut, one stream at a time.

The site listens on nothing. What arrives goes whole and once to a handler, in the thread that runs the client; the connection
has threads of its own, so that a handler that trains for an hour does not disturb it. Answers are kept until the coordinator has
them.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc

from client.link.failures import NotAdmitted, Unreachable, explained
from client.link.letterbox import Letterbox
from shared.errors import SilotuneError, TrustError, place_of, printable
from shared.link import frames, tls
from shared.link.frames import Hello, LinkError, Welcome
from shared.link.line import Line, Parcel, new_id
from shared.link.options import FIRST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS, client_options
from shared.version import silotune_version

log = logging.getLogger("silotune.node")

CONNECT_SECONDS = 20.0
"""From the first attempt to the coordinator's welcome: name, proxy, TCP, TLS and its checks."""
_TICK_SECONDS = 0.5
_FAREWELL_SECONDS = 5.0

Handler = Callable[[Parcel, Welcome], bytes | None]


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """What a site shows and expects, PEM.

    Attributes:
        ca: certificate of the consortium's CA.
        certificate: the site's.
        key: belongs to it, without a passphrase; it stays in memory.
    """

    ca: bytes
    certificate: bytes
    key: bytes


class NodeEvents:
    """What the client tells whoever keeps a log or a status; nothing happens by default. Called from several threads."""

    def connected(self, welcome: Welcome) -> None:
        """The stream is open."""

    def trouble(self, error: SilotuneError) -> None:
        """The stream has ended, or could not be opened; it is tried again."""

    def noticed(self, text: str) -> None:
        """The coordinator has something to say."""

    def answered(self) -> None:
        """An answer is ready, and on its way unless there is none; what takes long may be done here."""

    def delivered(self, reply: Parcel, declined: bool) -> None:
        """The coordinator has an answer whole; or `declined` it, since it has it already or wants it no more."""


class LinkClient:
    """See the module.

    Args:
        address: of the coordinator, host:port.
        credentials: called before every attempt, so that a certificate that was renewed is used.
        handler: makes the answer to a request, or None; what it raises is logged by kind and place, and nothing is answered.
        proxy: "http://host:port" of an HTTP proxy that is asked to CONNECT; TLS goes through it to the coordinator.
    """

    def __init__(
        self,
        address: str,
        credentials: Callable[[], Credentials],
        handler: Handler,
        *,
        proxy: str | None = None,
        events: NodeEvents | None = None,
    ) -> None:
        self._address, self._credentials, self._handler, self._proxy = address, credentials, handler, proxy
        self._events = events or NodeEvents()
        self._letterbox = Letterbox(delivered=self._events.delivered)
        self._instance = new_id()
        self._stop = threading.Event()
        self._welcome: Welcome | None = None
        self._welcomed = False
        self._open: _Session | None = None
        self._answering = False
        self._worked = self._tried = time.monotonic()

    def lives(self, within: float) -> bool:
        """Return whether both loops, of answers and of the connection, came round in the last `within` seconds.

        While a request is answered it lives: that may take hours, and whoever ends it loses what was charged for it.
        """
        connected = self._tried if (session := self._open) is None else max(self._tried, session.turned)
        return self._answering or min(self._worked, connected) > time.monotonic() - within

    def renew(self) -> None:
        """Connect anew, with the credentials that are there now; safe in any thread."""
        if (session := self._open) is not None:
            session.end(None)

    def stop(self) -> None:
        """Ask `run` to return after the request at hand; safe in a signal handler and in any thread."""
        self._stop.set()

    def run(self) -> None:
        """Serve until `stop` is called; troubles of the connection are waited out.

        Raises:
            RunError: this process would accept TLS 1.2.
        """
        tls.check()
        defects: list[BaseException] = []
        connection = threading.Thread(target=self._keep_connected, args=(defects,), name="link", daemon=True)
        connection.start()
        self._work()
        connection.join()
        if defects:
            raise defects[0]

    def _keep_connected(self, defects: list[BaseException]) -> None:
        try:
            self._connect()
        except BaseException as error:  # a defect: the thread that answers must not go on alone
            defects.append(error)
            self._stop.set()

    def _connect(self) -> None:
        wait, told = FIRST_BACKOFF_SECONDS, ""
        while not self._stop.is_set():
            self._welcomed = False
            self._tried = time.monotonic()
            try:
                self._session()
            except SilotuneError as error:
                # Once, however long the coordinator is away.
                log.log(logging.DEBUG if str(error) == told else logging.WARNING, "%s", error)
                told = str(error)
                self._events.trouble(error)
                if self._welcomed:
                    told = ""
                    wait = FIRST_BACKOFF_SECONDS  # a line that is cut again and again still makes progress
                if isinstance(error, TrustError | LinkError):
                    wait = LONGEST_BACKOFF_SECONDS
            self._stop.wait(wait * random.uniform(0.75, 1.0))
            wait = min(2 * wait, LONGEST_BACKOFF_SECONDS)

    # --- answers ---

    def _work(self) -> None:
        while not self._stop.is_set():
            self._worked, self._answering = time.monotonic(), False
            request = self._letterbox.next_request(_TICK_SECONDS)
            if request is None or self._welcome is None:
                continue
            payload, self._answering = None, True
            try:
                payload = self._handler(request, self._welcome)
            except Exception as error:
                log.error("a request was not answered: %s", place_of(error))
            self._letterbox.answer(request, payload)
            self._events.answered()

    # --- connection ---

    def _session(self) -> None:
        """Hold one stream until it ends; return only after `stop` or `renew`."""
        shown = self._credentials()
        credentials = grpc.ssl_channel_credentials(shown.ca, shown.key, shown.certificate)
        with grpc.secure_channel(self._address, credentials, client_options(self._proxy)) as channel:
            session = _Session(self._letterbox, self._instance, self._stop, self._events.noticed)
            call = channel.stream_stream(frames.METHOD)(session.frames())
            session.call, self._open = call, session
            try:
                self._receive(session, call)
            except grpc.RpcError:
                if session.problem is None and not session.stopped:
                    raise self._explained(call, session) from None
            finally:
                session.close()
                call.cancel()
            if session.problem is not None:
                raise session.problem
            if not session.stopped:
                raise Unreachable(f"the coordinator at {self._address} closed the stream.")

    def _receive(self, session: _Session, call: Any) -> None:
        for data in call:
            if not session.welcomed:
                welcome = frames.frame_of(data)
                if not isinstance(welcome, Welcome):
                    raise LinkError(f"what answers at {self._address} did not welcome this site.")
                self._welcome, self._welcomed = welcome, True
                session.begin()
                log.info("connected to %s as %s", self._address, printable(welcome.site))
                self._events.connected(welcome)
            else:
                with self._letterbox.lock:
                    session.line.receive(data)

    def _explained(self, call: Any, session: _Session) -> SilotuneError:
        code, details = call.code(), str(call.details() or "")
        return explained(code, details, address=self._address, proxy=self._proxy, welcomed=session.welcomed)


def welcome(address: str, credentials: Credentials, *, proxy: str | None = None) -> Welcome:
    """Connect once, to see that the coordinator lets this site in, and return what it said.

    Raises:
        NotAdmitted: it does not, for example because the site's node is connected now.
        TrustError, Unreachable: as for the connection of a node.
    """
    heard = _FirstWord()
    client = LinkClient(address, lambda: credentials, lambda request, welcome: None, proxy=proxy, events=heard)
    thread = threading.Thread(target=client.run, name="welcome", daemon=True)
    thread.start()
    heard.came.wait(CONNECT_SECONDS + _FAREWELL_SECONDS)
    client.stop()
    thread.join(_FAREWELL_SECONDS)
    if heard.welcome is None:
        raise heard.problem or Unreachable(f"the coordinator at {address} did not answer.")
    return heard.welcome


class _FirstWord(NodeEvents):
    def __init__(self) -> None:
        self.came = threading.Event()
        self.welcome: Welcome | None = None
        self.problem: SilotuneError | None = None

    def connected(self, welcome: Welcome) -> None:
        self.welcome = self.welcome or welcome
        self.came.set()

    def trouble(self, error: SilotuneError) -> None:
        self.problem = self.problem or error
        self.came.set()


class _Session:
    """One stream: a line, and what makes it end."""

    def __init__(
        self, letterbox: Letterbox, instance: bytes, stop: threading.Event, noticed: Callable[[str], None]
    ) -> None:
        self._letterbox, self._instance, self._stop = letterbox, instance, stop
        self.line = Line(letterbox, wake=letterbox.lock.notify_all, noticed=lambda text: _heard(text, noticed))
        self.call: Any = None
        self.welcomed = self.closed = self.stopped = False
        self.problem: SilotuneError | None = None
        self._started = self.turned = time.monotonic()
        self._leaving: float | None = None

    def begin(self) -> None:
        with self._letterbox.lock:
            self.welcomed = True
            self._letterbox.begin()

    def close(self) -> None:
        with self._letterbox.lock:
            self.closed = True
            self._letterbox.begin()

    def frames(self) -> Iterator[bytes]:
        """Yield the frames to send; gRPC asks for the next one when the network has taken the one before."""
        yield frames.bytes_of(Hello(self._instance, silotune_version()))
        while not self.closed:
            frame = None
            with self._letterbox.lock:
                if self.welcomed and not self.closed:
                    frame = self.line.next_frame()
                    if frame is None:
                        self._letterbox.lock.wait(_TICK_SECONDS)
                else:
                    self._letterbox.lock.wait(_TICK_SECONDS)
            if frame is not None:
                yield frame
            self._look_after()

    def _look_after(self) -> None:
        """End the stream if it leads to nothing, or is not wanted any more."""
        now = self.turned = time.monotonic()
        if not self.welcomed and now - self._started > CONNECT_SECONDS:
            self.end(
                Unreachable(f"the coordinator did not answer for {CONNECT_SECONDS:.0f} s; check address and firewall.")
            )
        elif self.line.stalled:
            self.end(Unreachable("a transfer has not moved for too long; the connection is opened anew."))
        elif self._stop.is_set():
            # The request at hand is answered, and its answer delivered, if that can be done soon.
            self._leaving = now if self._leaving is None or self._letterbox.working else self._leaving
            if not self._letterbox.working and (
                not self._letterbox.delivering or now - self._leaving > _FAREWELL_SECONDS
            ):
                self.end(None)

    def end(self, problem: SilotuneError | None) -> None:
        """End the stream, for a reason or because it is not wanted any more."""
        self.problem, self.stopped, self.closed = problem, problem is None, True
        if self.call is not None:
            self.call.cancel()


def _heard(text: str, noticed: Callable[[str], None]) -> None:
    log.warning("the coordinator says: %s", text)
    noticed(text)


__all__ = ["Credentials", "Handler", "LinkClient", "NodeEvents", "NotAdmitted", "Unreachable", "welcome"]
