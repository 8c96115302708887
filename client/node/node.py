"""The site's long-lived process: takes messages from the link, lets the installed ClientApp answer.

What it never does: download or execute code, listen on a port but on loopback (for monitoring, and for its own processes where
`compute.processes` is above 1), send data, or tell the coordinator more than the refusals
and releases of `client.site.site`. The backbone is loaded once, when a job is announced, so a round pays no import and no load.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from client.app import WAITED_SECONDS, make_client_app
from client.link.answering import answering
from client.link.client import Credentials, LinkClient, NodeEvents
from client.node.health import is_connected
from client.node.metrics import pages
from client.node.status import StatusFile
from client.site.guard import Guard
from client.site.home import SiteHome, load_identity, open_site
from client.site.site import Site
from client.site.slots import Slots
from shared.errors import SilotuneError, place_of
from shared.link.envelope import FAILED
from shared.link.frames import Welcome
from shared.link.line import Parcel
from shared.service.manager import ServiceManager
from shared.service.page import Pages
from shared.trust.audit_log import AuditLog, Event
from shared.trust.certificates import pem_bytes
from shared.wire.messages import WITHHELD, carries_release

log = logging.getLogger("silotune.node")

_LOOK_SECONDS, _LOOKS_A_STATUS = 0.5, 10
_HANGS_AFTER_SECONDS = 120.0


class Node:
    """A site at work.

    Args:
        home: the site's folder; it is locked while `run` runs.
        passphrase: opens its keys; None for keys that are protected by file permissions only.
    """

    def __init__(self, home: SiteHome, *, passphrase: str | None) -> None:
        self.home = home
        self._passphrase = passphrase
        self._stop = threading.Event()
        self._client: LinkClient | None = None
        self._status = StatusFile(home)
        self._manager = ServiceManager()

    def stop(self) -> None:
        """Ask `run` to return after the message at hand; safe in a signal handler and in any thread."""
        self._stop.set()
        if self._client is not None:
            self._client.stop()

    def run(self) -> None:
        """Serve until `stop` is called.

        Raises:
            SilotuneError: the site cannot be opened; once it is, connection troubles are waited out.
        """
        with self.home.locked():
            site = open_site(self.home, passphrase=self._passphrase)
            # Whoever stops the node does not wait for the end of a slot.
            client_app = make_client_app(lambda context: site, slots=Slots(pause=self._stop.wait))
            site.checked_ledger()  # a broken ledger is found now, not in the first round
            for text in site.warnings():
                log.warning("%s.", text)
            work = Work(self.home, site, client_app, self._status)
            self._client = LinkClient(
                self.home.coordinator(),
                lambda: credentials_of(self.home, passphrase=self._passphrase),
                answering(work.answer),
                proxy=self.home.load_config().proxy,
                events=work,
            )
            if self._stop.is_set():
                return
            _log(site).append(Event.NODE_STARTED, version=site.describe().version, pid=os.getpid())
            metrics = Pages(site.config.metrics_listen, pages(self.home, site.config.name, self._status.facts))
            self._status.say("starting", metrics=metrics.told)
            self._manager.ready()  # whether the coordinator can be reached is another matter
            try:
                with self._watching(site, self._client):
                    self._client.run()
            finally:
                self._manager.stopping()
                metrics.close()
                site.end_processes()
                _log(site).append(Event.NODE_STOPPED, pid=os.getpid())
                self._status.say("stopped")

    @contextlib.contextmanager
    def _watching(self, site: Site, client: LinkClient) -> Iterator[None]:
        """Connect anew when another key, certificate or CA was installed, and say now and then that the process lives."""
        over = threading.Event()

        def watch() -> None:
            _guard(site).keep_policy()
            installed, looks = self._installed(), 0
            while not over.wait(_LOOK_SECONDS):
                looks += 1
                self._sign(client)
                if looks % _LOOKS_A_STATUS == 0:
                    self._status.say()
                if (now := self._installed()) != installed:
                    installed = now
                    log.info("another key or certificate was installed; connecting anew")
                    with contextlib.suppress(SilotuneError):  # a full disk; the connection matters more
                        _log(site).append(Event.KEY_ROTATED)
                    client.renew()

        thread = threading.Thread(target=watch, name="watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _sign(self, client: LinkClient) -> None:
        """Give the service manager a sign of life, unless the client hangs."""
        if client.lives(_HANGS_AFTER_SECONDS):
            self._manager.alive()
        self._manager.tell("connected" if is_connected(self._status.facts()) else "waiting for the coordinator")

    def _installed(self) -> tuple[int | None, ...]:
        """Return what changes when another key, certificate or CA is installed."""
        return tuple(_changed(path) for path in (self.home.certificate, self.home.key, self.home.ca_certificate))


class Work(NodeEvents):
    """What is done with each message, and noted of it and of the connection.

    Args:
        home: the site's folder.
        site: opened from it.
        client_app: answers.
        status: what the node says of itself.
    """

    def __init__(self, home: SiteHome, site: Site, client_app: ClientApp, status: StatusFile) -> None:
        self._home, self._site, self._client_app, self._status = home, site, client_app, status
        self._connected = self._working = False
        self._made: dict[str, tuple[Event, str]] = {}  # of replies that are not delivered yet, by their request

    def answer(self, message: Message, node: int, waited: float) -> Message:
        """Answer a message, for `answering`."""
        kind = message.metadata.message_type
        self._working = True
        self._say(message_type=kind)
        reply = answer(self._client_app, message, node, waited=waited)
        event = Event.RELEASE_SENT if carries_release(reply) else Event.REPLY_SENT
        self._made[message.metadata.message_id] = (event, kind)
        return reply

    def answered(self) -> None:
        """See `NodeEvents`; prepares for the next round while the answer is on its way."""
        self._working = False
        self._say(left_out=str(self._site.left_out) if self._site.left_out else None)
        with contextlib.suppress(SilotuneError):  # the next round would find out, and say so
            self._site.anticipate()

    def delivered(self, reply: Parcel, declined: bool) -> None:
        """See `NodeEvents`; whoever reads the log should not take for sent what the coordinator did not take."""
        event, kind = self._made.pop(reply.reply_to.hex(), (Event.REPLY_SENT, ""))
        how = {"declined": True} if declined else {}
        self._note(event, message_type=kind, bytes=len(reply.payload), **how)

    def connected(self, welcome: Welcome) -> None:
        """See `NodeEvents`."""
        address = self._site.config.coordinator
        self._connected = True
        self._note(Event.NODE_CONNECTED, coordinator=address, software=welcome.software)
        self._say(coordinator=address, problem=None)

    def trouble(self, error: SilotuneError) -> None:
        """See `NodeEvents`."""
        self._connected = False
        self._say(problem=str(error))

    def noticed(self, text: str) -> None:
        """See `NodeEvents`."""
        self._say(notice=text)

    def _say(self, **facts: object) -> None:
        state = "waiting" if not self._connected else "working" if self._working else "connected"
        self._status.say(state, **facts)

    def _note(self, event: Event, **details: object) -> None:
        # The connection must not end with a full disk: what a release costs was charged, and noted, when it was stored.
        try:
            _log(self._site).append(event, **details)
        except SilotuneError as error:
            log.error("%s", error)


def answer(client_app: ClientApp, message: Message, node: int, *, waited: float = 0.0) -> Message:
    """Return the installed ClientApp's answer; of an exception nothing leaves but that there was one."""
    run_id = message.metadata.run_id
    run_config: dict[str, bool | float | int | str] = {WAITED_SECONDS: waited}
    context = Context(run_id=run_id, node_id=node, node_config={}, state=RecordDict(), run_config=run_config)
    try:
        return client_app(message, context)
    except Exception as error:
        log.error("a message of type %r failed: %s", message.metadata.message_type, place_of(error))
        return Message(Error(code=FAILED, reason=WITHHELD), reply_to=message)


def credentials_of(home: SiteHome, *, passphrase: str | None) -> Credentials:
    """Return what a site shows the coordinator, checked.

    Raises:
        ConfigError, TrustError: as for `load_identity`.
    """
    found = load_identity(home, passphrase=passphrase)
    return Credentials(
        ca=found.ca_certificate,
        certificate=pem_bytes(found.certificate),
        key=found.private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    )


def _changed(path: os.PathLike[str]) -> int | None:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:  # it is just being replaced
        return None


def _log(site: Site) -> AuditLog:
    """Return the audit log of a site that `open_site` opened."""
    return _guard(site).log


def _guard(site: Site) -> Guard:
    assert isinstance(site.guard, Guard)  # noqa: S101
    return site.guard
