"""Asking sites over Flower's public Grid and judging what they answer, updates as well as metrics.

Guarantee (tests: tests/server/rounds/test_interrupted_rounds.py, test_site_metrics.py): a site counts as one
that may have released what nobody here knows of until an answer came that is what was asked for, or a
refusal that cannot hide one.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Generic, TypeVar

from flwr.app import Message
from flwr.serverapp.grid import Grid

from server.rounds.roster import POLL_SECONDS, Authority
from shared.errors import AdapterError, RunError, TrustError
from shared.job.job import Job
from shared.secure_sum.messages import Ready
from shared.trust.receipts import Receipt, check_release
from shared.wire.messages import (
    MALFORMED,
    MASKED,
    METRICS,
    READY,
    TRAIN,
    MetricsReply,
    Refusal,
    RequestKind,
    SiteDescription,
    TrainReply,
    TrainRequest,
    pack_request,
    released,
    unpack_receipt,
)

_LONGEST_POLL_SECONDS = 1.0
_NODES_PER_PULL = 16  # so many answers are in memory at once
_PATIENT_SHARE = 0.75  # of the time that the answers took last time passes before the first look
_EXPIRES_AFTER_SECONDS = 5.0  # the end of the round's patience; a site does not begin what nobody waits for

_TYPES: Mapping[RequestKind, str] = {"train": TRAIN, "metrics": METRICS, "ready": READY, "masked": MASKED}

ReplyT = TypeVar("ReplyT", TrainReply, MetricsReply, Ready)


def exchange(
    grid: Grid,
    requests: Callable[[Sequence[int]], list[Message]],
    nodes: Sequence[int],
    *,
    timeout: float,
    expected: float,
    meanwhile: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, Message]]:
    """Ask `nodes` and yield (node, answer) as they come, until all came or `timeout` seconds passed.

    What was yielded is not kept, and the answers of at most `_NODES_PER_PULL` nodes are in memory: a thousand updates need not
    fit into it. That a request arrives, also at a site that was cut off or killed meanwhile, is the Grid's business.

    Flower's own `send_and_receive` polls every three seconds; this begins with every tenth of one. A reply is matched by the
    request that it answers: an error about a lost message comes from the Grid, not from the node.

    Args:
        requests: makes the messages for some nodes, signed now.
        expected: seconds that the answers will take, as far as one knows; asking before costs the sites' calls their time.
        meanwhile: what can be done once the requests are out.
    """
    started = time.monotonic()
    messages = requests(nodes) if nodes else []
    identifiers = grid.push_messages(messages) if messages else []
    # An id for each message, empty where it could not be sent.
    node_of = {i: message.metadata.dst_node_id for i, message in zip(identifiers, messages, strict=True) if i}
    meanwhile()
    time.sleep(max(0.0, min(_PATIENT_SHARE * expected, _LONGEST_POLL_SECONDS) - (time.monotonic() - started)))
    while node_of:
        waiting, some_came = list(node_of), False
        for first in range(0, len(waiting), _NODES_PER_PULL):
            came = deque(grid.pull_messages(waiting[first : first + _NODES_PER_PULL]))
            while came:
                message = came.popleft()
                node = node_of.pop(message.metadata.reply_to_message_id, None)
                if node is not None:
                    some_came = True
                    yield node, message
        elapsed = time.monotonic() - started
        if elapsed > timeout:
            break
        if not some_came:
            # A long round is asked about less often: the delay stays within two percent of it.
            time.sleep(min(max(POLL_SECONDS, elapsed / 50), _LONGEST_POLL_SECONDS))


class Question(ABC, Generic[ReplyT]):
    """What sites are asked, all with the same bytes, and how their answers are judged.

    Attributes:
        kind: of the question.
        job, number, adapter: what it is about.
        sites: node id -> description of those who are asked.
        unknown: names of the sites that may have released what nobody here knows of.
        failed: why an answer did not count, by site.
        codes: of refusals, by site.
    """

    kind: ClassVar[RequestKind]
    may_hide: ClassVar[frozenset[str]] = frozenset({MALFORMED})
    """Codes of refusals that may hide a release."""
    attempt = 0
    """At the round, where the sites are told."""

    def __init__(self, job: Job, number: int, adapter: bytes, sites: Mapping[int, SiteDescription]) -> None:
        self.job, self.number, self.adapter, self.sites = job, number, adapter, sites
        self.unknown = {site.site for site in sites.values()}
        self.failed: dict[str, str] = {}
        self.codes: dict[str, str] = {}
        self.request: TrainRequest | None = None

    @abstractmethod
    def unpack(self, message: Message) -> ReplyT | Refusal:
        """Return what a site answered; never raises."""

    @abstractmethod
    def take(self, reply: ReplyT, site: SiteDescription) -> None:
        """Check a reply, strike its site off `unknown` if it is what was asked for, and add it.

        Raises:
            AdapterError, RunError: it does not count.
        """

    @abstractmethod
    def received(self, receipt: Receipt) -> None:
        """Take note of the receipt of a release, whether or not it will count."""

    @abstractmethod
    def judged(self, site: str, reply: ReplyT | None) -> None:
        """Tell that an answer was taken, or not (`failed` says why); None if it is no reply."""

    def requests(self, grid: Grid, nodes: Sequence[int], authority: Authority | None) -> list[Message]:
        """Return the messages to some nodes, signed now."""
        order = authority.order(self.number, self.adapter, self.attempt, self.kind) if authority else None
        self.request = TrainRequest(
            job=self.job, round_number=self.number, adapter=self.adapter, attempt=self.attempt, order=order
        )
        packed = pack_request(self.request, self.kind)
        ttl = self.job.federation.round_timeout_seconds + _EXPIRES_AFTER_SECONDS
        return [grid.create_message(packed, _TYPES[self.kind], node, str(self.number), ttl) for node in nodes]


def collect(
    grid: Grid,
    question: Question[ReplyT],
    *,
    authority: Authority | None,
    expected: float = 0.0,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Ask, and judge each answer as it comes, until everyone answered or time is up.

    Args:
        authority: signs the requests to real sites.
        expected, meanwhile: see `exchange`.
    """
    for node, message in exchange(
        grid,
        lambda nodes: question.requests(grid, nodes, authority),
        list(question.sites),
        timeout=question.job.federation.round_timeout_seconds,
        expected=expected,
        meanwhile=meanwhile,
    ):
        site, answer = question.sites[node], question.unpack(message)
        reply = None if isinstance(answer, Refusal) else answer
        if isinstance(answer, Refusal):
            question.failed[site.site], question.codes[site.site] = f"{answer.code}: {answer.reason}", answer.code
            repeated = authority is not None and authority.may_repeat(message.metadata.reply_to_message_id)
            # What cannot be read may hide a release, and so may a refusal to a repeated request.
            if not message.has_error() and answer.code not in question.may_hide and not repeated:
                question.unknown.discard(site.site)
        else:
            try:
                receipt = _checked_receipt(question, site.site, answer, message, authority)
            except TrustError as error:
                question.failed[site.site] = str(error)
            else:
                if receipt is not None:
                    question.received(receipt)  # a full disk here ends the attempt: it is not the site's fault
                try:
                    question.take(answer, site)
                except (AdapterError, RunError) as error:
                    question.failed[site.site] = str(error)
        question.judged(site.site, reply)


def _checked_receipt(
    question: Question[ReplyT],
    name: str,
    reply: TrainReply | MetricsReply | Ready,
    message: Message,
    authority: Authority | None,
) -> Receipt | None:
    """Return the receipt that came with a release; None in a simulation, and for what is no release.

    Raises:
        TrustError: it is not one of this site's, for this question and this release.
    """
    if authority is None or authority.keys is None or isinstance(reply, Ready):
        return None
    request, signature, keys = question.request, unpack_receipt(message), authority.keys(name)
    assert request is not None  # noqa: S101 (it was asked)
    assert request.order is not None  # noqa: S101 (by an authority)
    # By the name under which the key was admitted, whatever the reply says.
    what = replace(released(request, request.order.sent_at, reply), site=name)
    return Receipt(what, key=check_release(keys, what, signature), signature=signature)
