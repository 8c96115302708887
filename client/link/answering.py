"""Requests of the link as messages for a ClientApp, and its replies as answers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from flwr.app import Message

from client.link.client import Handler
from shared.link.envelope import request_of, seal_envelope
from shared.link.frames import Welcome
from shared.link.line import Parcel

log = logging.getLogger("silotune.node")


def answering(answer: Callable[[Message, int, float], Message]) -> Handler:
    """Return a handler that lets `answer` reply to a message; it should not raise.

    What is no message is not answered: the coordinator, whoever it is, learns nothing, and the site goes on. Nor is what waited
    here, behind another request, for longer than the coordinator waits: it would be trained, and charged, for nobody.

    Args:
        answer: takes the message, this node's number and how many seconds the message has waited here.
    """

    def handle(request: Parcel, welcome: Welcome) -> bytes | None:
        asked = request_of(request.payload, message_id=request.id, node=welcome.node)
        waited = time.monotonic() - request.since
        if waited > asked.metadata.ttl:
            log.warning("a request was left out: it waited here for %.0f s, and nobody waits for its answer", waited)
            return None
        return seal_envelope(answer(asked, welcome.node, waited))

    return handle
