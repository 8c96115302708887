"""Flower's Grid over the link, by Flower's public classes.

The round loop and the rest of a ServerApp run in a thread of their own and see what every Grid shows; nothing here blocks on a
site. Guarantees (tests: tests/integration/link/test_link.py): every method may be called from any thread; `pull_messages` never
raises for what a site sent; a reply names as its source the node whose stream it came on; once halted, every method that
asks or answers raises `Halted`, and no site is sent what this run still wanted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

from cryptography import x509
from flwr.app import Error, Message, Metadata, RecordDict
from flwr.serverapp.grid import Grid

from server.link.mailroom import KEPT_SECONDS, Answer
from server.link.server import LinkServer
from shared.errors import RunError
from shared.link.envelope import UNREADABLE, content_of, message, open_envelope, request, seal_envelope
from shared.link.frames import LinkError
from shared.link.line import Parcel, new_id
from shared.trust.certificates import pem_bytes

_POLL_SECONDS = 0.02


class Halted(RunError):
    """The run is to end now: it, or the whole coordinator, is being stopped."""


class LinkGrid(Grid):
    """The sites of one run.

    Args:
        server: started.
        run_id: Flower's number of the run; sites see it.
    """

    def __init__(self, server: LinkServer, run_id: int) -> None:
        self._server, self.run_id = server, run_id
        self._run: object = None
        self._halted = threading.Event()
        self._open: dict[str, float] = {}  # what was asked and not answered -> until when an answer is kept
        self._repeated: set[str] = set()

    def halt(self) -> None:
        """End the run that uses this Grid, in whatever thread it is."""
        self._halted.set()

    def close(self) -> None:
        """Forget what is not answered: a site must not train, and charge, for nobody."""
        wanted, self._open = [bytes.fromhex(identifier) for identifier in self._open], {}
        self._server.call(self._server.mailroom.withdraw, wanted)

    def may_repeat(self, message_id: str) -> bool:
        """Return whether the answer to a request that was pulled may be one to its repetition.

        A request whose stream ended is offered again on the next one. If the site's process died in between, it may have made,
        and charged, a release before, and refuse now.
        """
        return message_id in self._repeated

    # `Run` is not public, and nothing here uses it.
    def set_run(self, run: object) -> None:
        """See `Grid`."""
        self._run = run

    @property
    def run(self) -> object:  # type: ignore[override]
        """See `Grid`."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """See `Grid`; the id is random, and set."""
        return request(
            content,
            run_id=self.run_id,
            message_id=new_id().hex(),
            message_type=message_type,
            node=dst_node_id,
            group_id=group_id,
            ttl=ttl,
        )

    def get_node_ids(self) -> Iterable[int]:
        """See `Grid`; sites that are connected, or were a moment ago, and may be."""
        self._check()
        return self._server.call(self._node_ids)

    def arrivals(self) -> dict[int, int]:
        """Return node id -> how many streams the site has opened so far."""
        return self._server.call(self._server.mailroom.arrivals)

    def names(self) -> dict[int, str]:
        """Return node id -> name in its certificate, for all sites that may connect."""
        return self._server.call(self._server.admission.names)

    def keys(self, name: str) -> list[bytes]:
        """Return the keys of a site that may connect (SubjectPublicKeyInfo, DER)."""
        return self._server.call(self._server.admission.keys, name)

    def holder(self, certificate: x509.Certificate) -> str:
        """Return the name of the site that a certificate lets in; raises `TrustError` if it lets nobody in."""
        return self._server.call(self._server.admission.visitor, pem_bytes(certificate)).name

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """See `Grid`; messages that share their content are one set of bytes in memory."""
        self._check()
        messages, parcels = list(messages), []
        sealed: dict[tuple[int, str, str], bytes] = {}
        for one in messages:
            facts = one.metadata
            key = (id(one.content), facts.message_type, facts.group_id)
            if key not in sealed:
                sealed[key] = seal_envelope(one)
            parcels.append((facts.dst_node_id, Parcel(bytes.fromhex(facts.message_id), b"", sealed[key]), facts))
        self._server.call(self._send, parcels)
        now = time.monotonic()
        self._open = {name: until for name, until in self._open.items() if until > now}
        self._open |= {facts.message_id: now + facts.ttl + 2 * KEPT_SECONDS for _, _, facts in parcels}
        return [facts.message_id for _, _, facts in parcels]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """See `Grid`."""
        self._check()
        wanted = [bytes.fromhex(identifier) for identifier in message_ids]
        answers = self._server.call(self._server.mailroom.fetch, wanted)
        for answer in answers:
            self._open.pop(answer.request.metadata.message_id, None)
            if answer.request.times_offered > 1:
                self._repeated.add(answer.request.metadata.message_id)
        return [_reply(answer) for answer in answers]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """See `Grid`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        waiting, replies = set(self.push_messages(messages)), []
        while waiting and (deadline is None or time.monotonic() < deadline):
            came = list(self.pull_messages(waiting))
            replies += came
            waiting -= {reply.metadata.reply_to_message_id for reply in came}
            if not came:
                time.sleep(_POLL_SECONDS)
        return replies

    def _check(self) -> None:
        if self._halted.is_set():
            raise Halted("the run is being stopped.")

    # --- in the link's thread ---

    def _node_ids(self) -> list[int]:
        admitted = self._server.admission.names()
        return [node for node in self._server.mailroom.connected() if node in admitted]

    def _send(self, parcels: list[tuple[int, Parcel, Metadata]]) -> None:
        for node, parcel, metadata in parcels:
            self._server.mailroom.send(node, parcel, metadata)


def _reply(answer: Answer) -> Message:
    asked = answer.request.metadata
    content: RecordDict | Error
    if answer.code:
        content = Error(code=answer.code, reason=answer.reason)
    else:
        try:
            content = content_of(open_envelope(answer.payload))
        except LinkError as error:
            content = Error(code=UNREADABLE, reason=str(error))
    metadata = Metadata(
        run_id=asked.run_id,
        message_id=new_id().hex(),
        src_node_id=asked.dst_node_id,
        dst_node_id=asked.src_node_id,
        reply_to_message_id=asked.message_id,
        group_id=asked.group_id,
        created_at=time.time(),
        ttl=asked.ttl,
        message_type=asked.message_type,
    )
    return message(content, metadata)
