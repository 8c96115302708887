"""Requests of the link as messages for a ClientApp, and its replies as answers."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Message

from client.link.client import Handler
from shared.link.envelope import request_of, seal_envelope
from shared.link.frames import Welcome
from shared.link.line import Parcel

COORDINATOR_NODE_ID = 1


def answering(answer: Callable[[Message, int], Message]) -> Handler:
    """Return a handler that lets `answer` reply to a message for this node; it should not raise.

    What is no message is not answered: the coordinator, whoever it is, learns nothing, and the site goes on.
    """

    def handle(request: Parcel, welcome: Welcome) -> bytes:
        asked = request_of(request.payload, message_id=request.id, coordinator=COORDINATOR_NODE_ID, node=welcome.node)
        return seal_envelope(answer(asked, welcome.node))

    return handle
