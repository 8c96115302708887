"""The site's long-lived process: pulls messages, lets the installed ClientApp answer, pushes the replies.

What it never does: download or execute code, listen on a port, send data, or tell the coordinator more than the refusals
and releases of `client.site.site`. The backbone is loaded once, when a job is announced, so a round pays no import and no load.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import TypeVar

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from client.app import make_client_app
from client.node.fleet import HEARTBEAT_SECONDS, FleetConnection, RunOver, TlsFacts, Unreachable, tls_facts
from client.node.status import StatusFile
from client.site.guard import Guard
from client.site.home import Identity, SiteHome, load_identity, open_site
from client.site.site import Site
from client.site.slots import Slots
from shared.errors import SilotuneError, place_of
from shared.trust.audit_log import AuditLog, Event
from shared.wire.messages import WITHHELD, carries_release

log = logging.getLogger("silotune.node")

FIRST_POLL_SECONDS, LONGEST_POLL_SECONDS = 0.05, 0.5
_LASTED_SECONDS = 60.0
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.5, 5.0
_ERROR_IN_CLIENT_APP = 100

AnswerT = TypeVar("AnswerT")


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
        self._status = StatusFile(home)

    def stop(self) -> None:
        """Ask `run` to return after the message at hand; safe in a signal handler and in any thread."""
        self._stop.set()

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
            _log(site).append(Event.NODE_STARTED, version=site.describe().version, pid=os.getpid())
            self._status.say("starting")
            wait = _FIRST_WAIT_SECONDS
            try:
                while not self._stop.is_set():
                    started = time.monotonic()
                    try:
                        self._session(site, client_app)
                    except SilotuneError as error:
                        log.warning("%s", error)
                        self._status.say("waiting", problem=str(error))
                    wait = _FIRST_WAIT_SECONDS if time.monotonic() - started > _LASTED_SECONDS else wait
                    self._stop.wait(wait)
                    wait = min(2 * wait, _LONGEST_WAIT_SECONDS)
            finally:
                _log(site).append(Event.NODE_STOPPED, pid=os.getpid())
                self._status.say("stopped")

    def _session(self, site: Site, client_app: ClientApp) -> None:
        """Connect and serve until the connection is lost for good, the key was exchanged, or `stop` is called."""
        identity = load_identity(self.home, passphrase=self._passphrase)
        facts = tls_facts(identity.address, identity.ca_certificate)
        connection = FleetConnection(
            identity.address, ca_certificate=identity.ca_certificate, private_key=identity.private_key
        )
        try:
            connection.activate()
            self._note_connected(site, identity, facts)
            with self._heartbeats(connection):
                self._serve(site, client_app, connection, identity)
        finally:
            connection.close()

    def _serve(self, site: Site, client_app: ClientApp, connection: FleetConnection, identity: Identity) -> None:
        installed = self._installed()
        answered = time.monotonic()
        while not self._stop.is_set():
            if self._installed() != installed:
                self._note_rotation(site)
                return
            try:
                message = self._persistently(connection.pull)
            except RunOver as error:
                log.warning("%s", error)
                continue
            if message is None:
                # Within a fiftieth of the silence so far: prompt between rounds, and light on the coordinator otherwise.
                silence = time.monotonic() - answered
                self._stop.wait(min(max(FIRST_POLL_SECONDS, silence / 50), LONGEST_POLL_SECONDS))
                continue
            self._status.say("working", message_type=message.metadata.message_type)
            reply = answer(client_app, message, connection.node_id)
            try:
                sent = self._persistently(partial(connection.push, reply))
                self._note_sent(site, message, reply, sent)
            except RunOver as error:
                log.warning("a reply was not taken: %s", error)
            self._status.say("connected", left_out=str(site.left_out) if site.left_out else None)
            with contextlib.suppress(SilotuneError):  # the next round would find out, and say so
                site.anticipate()
            answered = time.monotonic()

    def _persistently(self, call: Callable[[], AnswerT]) -> AnswerT:
        """Call until the network carries it: a reply that is not delivered would be trained for nothing."""
        wait, cut = _FIRST_WAIT_SECONDS, False
        while True:
            try:
                result = call()
                if cut:
                    log.info("the coordinator answers again")
                    self._status.say("connected", problem=None)
                return result
            except Unreachable as error:
                cut = True
                if self._stop.is_set():
                    raise
                log.warning("%s", error)
                self._status.say("waiting", problem=str(error))
                self._stop.wait(wait)
                wait = min(2 * wait, _LONGEST_WAIT_SECONDS)

    @contextlib.contextmanager
    def _heartbeats(self, connection: FleetConnection) -> Iterator[None]:
        """Tell the coordinator in the background that this site lives, also while it trains."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(HEARTBEAT_SECONDS / 2):
                # What is wrong is reported by the next pull or push.
                with contextlib.suppress(SilotuneError):
                    connection.heartbeat()
                self._status.say()

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(timeout=HEARTBEAT_SECONDS)

    def _installed(self) -> tuple[int, ...]:
        """Return what changes when another key, certificate or CA is installed."""
        return tuple(
            path.stat().st_mtime_ns for path in (self.home.certificate, self.home.key, self.home.ca_certificate)
        )

    def _note_connected(self, site: Site, identity: Identity, facts: TlsFacts) -> None:
        until = identity.certificate.not_valid_after_utc.isoformat(timespec="seconds")
        log.info("connected to %s over %s, ALPN %s, %s", identity.address, facts.tls_version, facts.alpn, facts.cipher)
        _log(site).append(Event.NODE_CONNECTED, coordinator=identity.address, certificate_until=until, **asdict(facts))
        self._status.say(
            "connected", coordinator=identity.address, certificate_until=until, problem=None, **asdict(facts)
        )

    def _note_rotation(self, site: Site) -> None:
        log.info("another key or certificate was installed; connecting anew")
        _log(site).append(Event.KEY_ROTATED)

    def _note_sent(self, site: Site, message: Message, reply: Message, num_bytes: int) -> None:
        event = Event.RELEASE_SENT if carries_release(reply) else Event.REPLY_SENT
        _log(site).append(event, message_type=message.metadata.message_type, bytes=num_bytes)


def _log(site: Site) -> AuditLog:
    """Return the audit log of a site that `open_site` opened."""
    assert isinstance(site.guard, Guard)  # noqa: S101
    return site.guard.log


def answer(client_app: ClientApp, message: Message, node_id: int) -> Message:
    """Return the installed ClientApp's answer; of an exception nothing leaves but that there was one."""
    context = Context(
        run_id=message.metadata.run_id, node_id=node_id, node_config={}, state=RecordDict(), run_config={}
    )
    try:
        return client_app(message, context)
    except Exception as error:
        log.error("a message of type %r failed: %s", message.metadata.message_type, place_of(error))
        return Message(Error(code=_ERROR_IN_CLIENT_APP, reason=WITHHELD), reply_to=message)
