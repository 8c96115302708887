"""The ClientApp: Flower messages in and out of a `Site`; the same object in every transport.

Sites are opened once per process and kept, so a round pays no import, no model load and no tokenisation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.site.site import Site
from client.site.slots import Slots
from shared.errors import SilotuneError
from shared.secure_sum.messages import Ready
from shared.service.logs import about
from shared.wire.messages import (
    MetricsReply,
    Refusal,
    RequestKind,
    SiteDescription,
    TrainReply,
    TrainRequest,
    pack_description,
    pack_metrics,
    pack_ready,
    pack_refusal,
    pack_reply,
    unpack_describe,
    unpack_request,
    with_receipt,
)

log = logging.getLogger("silotune.site")

WAITED_SECONDS = "waited-seconds"
"""Key of the node's run configuration: how long a message has been at the site before it is looked at."""

OpenSite = Callable[[Context], Site]
Answer = SiteDescription | TrainReply | Ready | MetricsReply | Refusal
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Signed:
    """A release with its receipt."""

    release: TrainReply | MetricsReply
    receipt: bytes


def make_client_app(open_site: OpenSite, *, slots: Slots | None = None) -> ClientApp:
    """Return a ClientApp that answers with the site that `open_site` finds for a node.

    Args:
        slots: when answers leave, where the site's settings ask for slots.
    """
    app, slots = ClientApp(), slots or Slots()

    def answered(message: Message, context: Context, act: Callable[[Site], Answer | Signed]) -> Message:
        """Return the site's answer as a Flower message, in its slot; whatever is wrong becomes a refusal."""
        opened: list[Site] = []

        def act_in(site: Site) -> Answer | Signed:
            opened.append(site)
            return act(site)

        with slots.next_after_now(lambda: opened[0].config.answers.slot_seconds if opened else 0.0):
            return packed(attempt(context, open_site, act_in), message)

    @app.query("describe")
    def describe(message: Message, context: Context) -> Message:
        return answered(message, context, lambda site: site.accept(unpack_describe(message.content)))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return answered(message, context, lambda site: signed(site, asked(message, context), site.answer))

    @app.train("ready")
    def ready(message: Message, context: Context) -> Message:
        return answered(message, context, lambda site: site.answer_ready(asked(message, context, "ready")))

    @app.train("masked")
    def masked(message: Message, context: Context) -> Message:
        return answered(
            message, context, lambda site: signed(site, asked(message, context, "masked"), site.answer_masked)
        )

    @app.query("metrics")
    def metrics(message: Message, context: Context) -> Message:
        return answered(
            message, context, lambda site: signed(site, asked(message, context, "metrics"), site.answer_metrics)
        )

    return app


def signed(
    site: Site, request: TrainRequest, act: Callable[[TrainRequest], TrainReply | MetricsReply | Refusal]
) -> Answer | Signed:
    """Return what a site answers, a release with the receipt for it."""
    with about(job=request.job.name, round=request.round_number):
        answer = act(request)
        if isinstance(answer, Refusal):
            return answer
        try:
            receipt = site.guard.receipt(request, answer)
        except SilotuneError as error:
            # It was charged and is stored; asked again, it leaves once the key can be read.
            log.error("a release cannot be signed and stays here: %s", error)
            return Refusal.withheld(site.config.name)
        return Signed(answer, receipt) if receipt else answer


def asked(message: Message, context: Context, kind: RequestKind = "train") -> TrainRequest:
    """Return the request of a message; see `unpack_request`."""
    request = unpack_request(message.content, kind)
    return replace(request, waited_seconds=float(context.run_config.get(WAITED_SECONDS, 0.0)))


def attempt(context: Context, open_site: OpenSite, act: Callable[[Site], ResultT]) -> ResultT | Refusal:
    """Return what `act` makes of the node's site; whatever is wrong becomes a refusal."""
    try:
        site = open_site(context)
    except SilotuneError as error:
        log.error("the site cannot be opened: %s", error)
        return Refusal.withheld("")
    try:
        return act(site)
    except SilotuneError as error:
        return site.refuse_unreadable(error)


def packed(answer: Answer | Signed, message: Message) -> Message:
    """Return `answer` as the Flower message that replies to `message`."""
    if isinstance(answer, Signed):
        release = packed(answer.release, message)
        return Message(with_receipt(release.content, answer.receipt), reply_to=message)
    if isinstance(answer, TrainReply):
        content = pack_reply(answer)
    elif isinstance(answer, MetricsReply):
        content = pack_metrics(answer)
    elif isinstance(answer, Ready):
        content = pack_ready(answer)
    elif isinstance(answer, SiteDescription):
        content = pack_description(answer)
    else:
        content = pack_refusal(answer)
    return Message(content, reply_to=message)
