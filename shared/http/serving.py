"""The process that serves consoles, and tuned models: on loopback by plain HTTP, on any other address over TLS or not at all.

Formal guarantees (tests: tests/client/console/test_start.py)
    * Without a certificate no other address than loopback is listened on (test_another_address_needs_tls).
    * The names by which a console beyond loopback may be called are those of its certificate
      (test_over_tls_the_certificate_names_the_console).
    * A connection on which no whole request comes ends within seconds, however slowly something comes, and one address has a
      bounded number of them (tests/client/console/test_connections.py).
    * So does one on which nobody reads what is answered (tests/server/serving/test_readers.py).
    * The head of a request is bounded, and what two readers could read as two different requests is refused
      (tests/client/console/test_heads.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from cryptography import x509
from uvicorn.protocols.http.h11_impl import H11Protocol

from shared.errors import ConfigError
from shared.files.bounded import read_bounded
from shared.http.asgi import App, Message, Receive, Send
from shared.http.problems import framed, malformed
from shared.service.logs import sparing
from shared.service.machine import raise_descriptor_limit
from shared.stopping import orderly
from shared.trust.certificates import MALFORMED
from shared.trust.keystore import check_private

log = logging.getLogger("silotune.http")

_MOST_BYTES = 1 << 20
REQUEST_SECONDS, HANDSHAKE_SECONDS = 20.0, 10.0
_LEAST_READ = 16 << 10
"""Bytes that whoever reads an answer takes in `request_seconds`, at least; the kernel's own buffer, of MB, hides less."""
MOST_OF_AN_ADDRESS = 256
"""Open connections; a browser has six, and many people may come through one gateway, or one ssh -L."""


@dataclass(frozen=True, kw_only=True)
class Connections:
    """How many connections there may be, and how long.

    Attributes:
        of_an_address, together: open at a time, at most.
        request_seconds: in which a whole request must come, and some of an answer be read.
    """

    of_an_address: int
    together: int
    request_seconds: float


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where something is served.

    Attributes:
        host, port: to listen on; port 0 is any that is free.
        certificate, key: PEM files of TLS; None: plain HTTP.
        names: by which it may be called, beside the machine's own names on loopback.
        valid: from when to when the certificate is; None: plain HTTP.
    """

    host: str
    port: int
    certificate: Path | None
    key: Path | None
    names: frozenset[str]
    valid: tuple[datetime, datetime] | None = None

    def trouble(self, now: datetime) -> str | None:
        """Return why clients refuse the certificate at this moment; None where its dates are no reason."""
        if self.valid is None or self.valid[0] <= now <= self.valid[1]:
            return None
        past = now > self.valid[1]
        date = f"{self.valid[past]:%Y-%m-%d %H:%M} UTC"
        return (
            f"the certificate {self.certificate} {'was valid until' if past else 'is not valid before'} {date}, so clients "
            "refuse it; give one that is valid, and start anew"
        )

    @property
    def secure(self) -> bool:
        """Whether TLS is used."""
        return self.certificate is not None

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return ipaddress.ip_address(self.host).is_loopback


def place_at(host: str, port: int, certificate: Path | None, key: Path | None) -> Place:
    """Return where to serve, checked.

    Raises:
        ConfigError: the address is none, or is no loopback address and there is no certificate.
        TrustError: the certificate cannot be read, or others may read or write the key.
    """
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host.strip("[]"))
    except ValueError:
        raise ConfigError(
            f"--host {host!r} is no address; expected one of this machine's, such as 127.0.0.1 or 10.0.0.5."
        ) from None
    if (certificate is None) != (key is None):
        raise ConfigError("--certificate and --key belong together; give both, or none.")
    if certificate is None and not address.is_loopback:
        raise ConfigError(
            f"{address} can be reached from other machines, and without TLS they could read on the way what is sent. Give "
            "--certificate and --key, or leave --host out: then it is reached from this machine only, for example through ssh -L."
        )
    if certificate is None or key is None:
        return Place(host=str(address), port=port, certificate=None, key=None, names=frozenset())
    own = _loaded(certificate)
    content, mode = read_bounded(key, "key of the certificate", _MOST_BYTES)
    if b"PRIVATE KEY" in content:
        check_private(key, mode, "holds the key of TLS", group=True)
    return Place(
        host=str(address),
        port=port,
        certificate=certificate,
        key=key,
        names=names_of(own) | {str(address)},
        valid=(own.not_valid_before_utc, own.not_valid_after_utc),
    )


def names_of(certificate: x509.Certificate) -> frozenset[str]:
    """Return the hosts that a certificate names."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return frozenset()
    names = found.get_values_for_type(x509.DNSName)
    return frozenset({name.lower() for name in names} | {str(ip) for ip in found.get_values_for_type(x509.IPAddress)})


def listen(place: Place) -> socket.socket:
    """Return a socket that listens.

    Raises:
        ConfigError: the address is another's, or its port is taken.
    """
    family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
    try:
        return socket.create_server((place.host, place.port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{place.host} port {place.port} cannot be listened on ({reason}); give another --port."
        ) from None


def address_of(place: Place, port: int) -> str:
    """Return the address of what is served, as typed into a browser."""
    host = f"[{place.host}]" if ":" in place.host else place.host
    if place.secure and not place.loopback:
        host = min((name for name in place.names if "*" not in name and not _is_address(name)), default=host)
    return f"{'https' if place.secure else 'http'}://{host}:{port}/"


def make_server(
    app: App, place: Place, *, connections: Connections | None = None, grace_seconds: int = 3
) -> uvicorn.Server:
    """Return the server, which `serve` runs; it believes no header that a proxy adds.

    Args:
        connections: None: those of a console.
        grace_seconds: for answers at hand once the process is told to end.

    Raises:
        ConfigError: certificate and key do not belong together or cannot be read.
    """
    config = uvicorn.Config(
        framed(app),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        http=partial(_Connection, connections),  # type: ignore[arg-type]
        ws="none",
        timeout_keep_alive=15,
        timeout_graceful_shutdown=grace_seconds,
        h11_max_incomplete_event_size=16 << 10,
        ssl_certfile=place.certificate,
        ssl_keyfile=None if place.key is None else str(place.key),
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"--certificate {place.certificate} and --key {place.key} cannot be used together ({error}). Give the certificate of "
            "this key, both as PEM, the key without a passphrase."
        ) from None
    if config.ssl is not None:
        config.ssl.minimum_version = ssl.TLSVersion.TLSv1_2
    if (trouble := place.trouble(datetime.now(UTC))) is not None:
        log.warning("%s", trouble)
    errors = logging.getLogger("uvicorn.error")
    errors.setLevel(logging.ERROR)  # its warnings are of what strangers send
    sparing(errors)
    return _Server(config)


class _Connection(H11Protocol):
    """A connection that ends unless a whole request comes in time after its begin, or after the answer before, and unless answers
    are read.

    To close one is not enough: that waits until everything that was written is read.
    """

    def __init__(self, bounds: Connections | None, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._bounds = bounds or Connections(
            of_an_address=MOST_OF_AN_ADDRESS, together=1 << 20, request_seconds=REQUEST_SECONDS
        )
        self.app = self._ended(self.app)
        self._request, self._reading = _Deadline(self), _Deadline(self)

    @property
    def seconds(self) -> float:
        """In which a whole request must come, and some of an answer be read."""
        return self._bounds.request_seconds

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, unless there are too many all together; of too many of one address one gives way.

        It is the one that has waited longest without having asked for anything, so that idle ones shut nobody out; else this one.
        """
        super().connection_made(transport)
        self.made = self.loop.time()
        self._await_request()
        host = self.client and self.client[0]
        every = [one for one in self.connections if isinstance(one, _Connection) and not one.transport.is_closing()]
        own = [one for one in every if (one.client and one.client[0]) == host]
        if len(self.connections) > self._bounds.together:
            transport.abort()
        elif len(own) > self._bounds.of_an_address:
            idle = [one for one in own if one.cycle is None]
            min(idle, key=lambda one: one.made).transport.abort()

    def data_received(self, data: bytes) -> None:
        """Take what came; only the end of a request puts the deadline off."""
        super().data_received(data)
        if not self._is_waiting:
            self._request.cancel()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no request, in the shape of all errors; an answer that is on its way is cut off instead."""
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            self.transport.write(malformed(msg))
        self.transport.close()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._await_request()

    def pause_writing(self) -> None:
        """Wait no longer than `request_seconds` for whoever reads nothing."""
        super().pause_writing()
        self._reading.begin()

    def resume_writing(self) -> None:
        """Go on."""
        super().resume_writing()
        self._reading.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the deadlines."""
        super().connection_lost(exc)
        self._request.cancel()
        self._reading.cancel()

    def _ended(self, app: Any) -> Any:
        """Return the application; uvicorn closes a connection whose answer it does not complete."""

        async def ending(scope: Message, receive: Receive, send: Send) -> None:
            try:
                await app(scope, receive, send)
            finally:
                if not self.cycle.response_complete:
                    self._request.begin()

        return ending

    @property
    def _is_waiting(self) -> bool:
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def _await_request(self) -> None:
        self._request.cancel()
        if self._is_waiting:
            self._request.begin()


class _Deadline:
    """Ends a connection, unless it is cancelled in time, or somebody goes on reading what was written."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Wait from now on."""
        self.cancel()
        unread = self._connection.transport.get_write_buffer_size()
        self._timer = self._connection.loop.call_later(self._connection.seconds, self._over, unread)

    def cancel(self) -> None:
        """Wait no longer."""
        if self._timer is not None:
            self._timer.cancel()

    def _over(self, unread: int) -> None:
        left = self._connection.transport.get_write_buffer_size()
        if 0 < left <= unread - _LEAST_READ:
            self.begin()
        else:
            self._connection.transport.abort()


class _Server(uvicorn.Server):
    """A server that leaves signals to `shared.stopping`, as all of Silotune's processes do."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen; who begins TLS has to go on soon, which uvicorn has no option for."""
        if self.config.ssl is not None:
            loop = asyncio.get_running_loop()
            listening = partial(loop.create_server, ssl_handshake_timeout=HANDSHAKE_SECONDS)
            loop.create_server = listening  # type: ignore[method-assign]
        await super().startup(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take none."""
        yield


def serve(server: uvicorn.Server, listener: socket.socket, *, ready: Callable[[], None], again: str) -> None:
    """Serve until the process is told to end.

    Args:
        ready: called once connections are taken.
        again: the command that serves again.

    Raises:
        Stopped: after Ctrl-C; SIGTERM is how a service is stopped, and a success.
    """

    def stop() -> None:
        server.should_exit = True

    raise_descriptor_limit()
    with listener, orderly(stop, f"serve it again with: {again}"):
        ready()
        server.run(sockets=[listener])


def _loaded(path: Path) -> x509.Certificate:
    """Return the first certificate of a file, which is the server's own."""
    content, _ = read_bounded(path, "certificate", _MOST_BYTES)
    try:
        return x509.load_pem_x509_certificates(content)[0]
    except MALFORMED:
        raise ConfigError(f"--certificate {path} holds no certificate; expected PEM, the server's own first.") from None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
