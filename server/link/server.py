"""The coordinator's port: a `grpc.aio` server in a thread of its own, and the way in for everybody else in the process.

Guarantees (tests: tests/integration/link/)
    * The port speaks TLS 1.3 to holders of a certificate of the CA; no Python runs for anybody else.
    * Another server certificate or CA that is put in place serves the next connection, without a restart.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from server.link.admission import Admission, SiteFacts
from server.link.events import LinkEvents
from server.link.mailroom import Mailroom
from server.link.service import LinkService
from shared.errors import RunError, TrustError
from shared.link import tls
from shared.link.frames import SERVICE
from shared.link.options import SERVER
from shared.service.machine import raise_descriptor_limit
from shared.trust.node_keys import load_server_key, plain_pem

log = logging.getLogger("silotune.coordinator")

_START_SECONDS = 30.0
_CALL_SECONDS = 60.0
_GRACE_SECONDS = 0.5

ResultT = TypeVar("ResultT")


class _Health(health.aio.HealthServicer):  # type: ignore[misc]  # has no types
    """The standard service without its streams: the admission does not see them, and an idle connection must end."""

    async def Watch(self, request: object, context: Any) -> None:  # noqa: N802 (its name in the protocol)
        """Refuse to be watched."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "ask by Check.")


@dataclass(frozen=True, kw_only=True)
class LinkFiles:
    """Where the server's part of TLS lies.

    Attributes:
        certificate: of the server, PEM.
        key: belongs to it, as `shared.trust.node_keys.save_server_key` writes it.
        trust: the trust store's folder, with the CA's certificate.
        passphrase: opens the key; what it opens stays in memory.
    """

    certificate: Path
    key: Path
    trust: Path
    passphrase: str | None = field(default=None, repr=False)

    def read(self) -> tuple[bytes, bytes, bytes]:
        """Return key, certificate, CA, as they lie there."""
        paths = (self.key, self.certificate, self.trust / "ca.crt")
        try:
            key, certificate, ca = (path.read_bytes() for path in paths)
        except OSError as error:
            raise TrustError(f"{error.filename} cannot be read ({error.strerror}).") from None
        return key, certificate, ca


@dataclass(frozen=True, kw_only=True)
class SiteState:
    """A site that lies in the trust store, as the link sees it.

    Attributes:
        online: whether its stream is open. A round waits for a site that was there a moment ago; who looks is told at once.
        seen_before: seconds since it was connected last; None if it never was while this process runs.
        facts: of its certificates.
    """

    online: bool
    seen_before: float | None
    facts: SiteFacts


class LinkServer:
    """The link's port.

    Args:
        address: to listen on, host:port; port 0 takes any.
        files: of TLS.
        events: hears what happens.

    Attributes:
        port: it listens on, once started.
    """

    def __init__(self, address: str, files: LinkFiles, *, events: LinkEvents | None = None) -> None:
        self.port = 0
        self.mailroom = Mailroom()
        self.admission = Admission(files.trust)
        self._address, self._files = address, files
        self._service = LinkService(self.admission, self.mailroom, events or LinkEvents())
        self._certificates: tuple[bytes, bytes, bytes] = (b"", b"", b"")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Listen; returns when sites can connect.

        Raises:
            RunError: the port is taken, or this process would accept TLS 1.2.
            TrustError: certificate, key or CA cannot be used.
        """
        tls.check()
        self._certificates = self._files.read()
        started: Future[int] = Future()
        self._thread = threading.Thread(target=self._run, args=(started,), name="link", daemon=True)
        self._thread.start()
        self.port = started.result(timeout=_START_SECONDS)

    def stop(self) -> None:
        """End all streams and close the port."""
        if self._loop is not None and self._stop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
        if self._thread is not None:
            self._thread.join(timeout=_START_SECONDS)

    @property
    def alive(self) -> bool:
        """Whether it runs; a defect in it ends it, and is in the log."""
        return self._thread is not None and self._thread.is_alive()

    def __enter__(self) -> LinkServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def call(self, function: Callable[..., ResultT], *arguments: Any) -> ResultT:
        """Return what `function` returns in the link's own thread, where everything of the mailroom happens.

        Raises:
            RunError: the link does not run, or not well.
        """
        result: Future[ResultT] = Future()

        def run() -> None:
            try:
                result.set_result(function(*arguments))
            except BaseException as error:
                result.set_exception(error)

        if self._loop is None or not self.alive:
            raise RunError("the link to the sites does not run.")
        try:
            self._loop.call_soon_threadsafe(run)
            return result.result(timeout=_CALL_SECONDS)
        except (RuntimeError, TimeoutError):
            raise RunError("the link to the sites does not answer.") from None

    def sites(self) -> tuple[dict[str, SiteState], str | None]:
        """Return name -> state of all sites in the trust store, and what is wrong with the trust store, if anything."""
        return self.call(lambda: (self._site_states(), self.admission.problem))

    # --- in the thread ---

    def _site_states(self) -> dict[str, SiteState]:
        self.admission.refresh()
        states = {}
        for name, facts in self.admission.sites().items():
            seen = [ago for node in facts.valid if (ago := self.mailroom.seen_before(node)) is not None]
            states[name] = SiteState(online=0.0 in seen, seen_before=min(seen, default=None), facts=facts)
        return states

    def _run(self, started: Future[int]) -> None:
        try:
            asyncio.run(self._serve(started))
        except BaseException as error:
            if started.done():
                log.exception("the link to the sites ended")
            else:
                started.set_exception(error)

    async def _serve(self, started: Future[int]) -> None:
        raise_descriptor_limit()
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = grpc.aio.server(options=list(SERVER.items()))
        healthy = _Health()
        health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
        server.add_generic_rpc_handlers((self._service.handlers(),))
        credentials = grpc.dynamic_ssl_server_credentials(
            self._configuration(), self._changed_certificates, require_client_authentication=True
        )
        try:
            port = server.add_secure_port(self._address, credentials)
        except RuntimeError:
            raise RunError(f"cannot listen on {self._address}; another process may use the port.") from None
        await server.start()
        for name in ("", SERVICE):
            await healthy.set(name, health_pb2.HealthCheckResponse.SERVING)
        started.set_result(port)
        watch = asyncio.create_task(self._service.watch())
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({watch, stop}, return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                watch.result()  # a defect; without it nobody would be expelled, so the link ends
        finally:
            watch.cancel()
            stop.cancel()
            await server.stop(_GRACE_SECONDS)

    def _changed_certificates(self) -> Any:
        """Return what the next connection is served with, or None if nothing has changed; gRPC asks in threads of its own."""
        with contextlib.suppress(TrustError):  # one of the files is just being replaced
            found = self._files.read()
            if found != self._certificates:
                # First: a key that does not open costs its time once, not at every connection.
                self._certificates = found
                return self._configuration()
        return None

    def _configuration(self) -> Any:
        _, certificate, ca = self._certificates
        key = plain_pem(load_server_key(self._files.key, self._files.passphrase))
        return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=ca)
