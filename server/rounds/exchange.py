"""Asking sites over Flower's public Grid and judging what they answer, updates as well as metrics.

Guarantee (tests: tests/server/rounds/test_interrupted_rounds.py, test_site_metrics.py): a site counts as one
that may have released what nobody here knows of until an answer came that is what was asked for, or a
refusal that cannot hide one.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, Literal, TypeVar

from flwr.app import Message
from flwr.serverapp.grid import Grid

from server.rounds.roster import POLL_SECONDS, Authority
from shared.errors import AdapterError, RunError
from shared.job.job import Job
from shared.wire.messages import (
    MALFORMED,
    METRICS,
    TRAIN,
    Refusal,
    SiteDescription,
    TrainRequest,
    carries_release,
    pack_request,
)

_LONGEST_POLL_SECONDS = 1.0
_NODES_PER_PULL = 16  # all requests to a node in one pull, so that its release wins over its refusal
_PATIENT_SHARE = 0.75  # of the time that the answers took last time passes before the first look
# A request may be lost with the process that pulled it, while its node stays online. Sites answer a repeated one with what
# they stored, so asking again costs no budget; each time after twice as long.
ASK_AGAIN_SECONDS = 30.0

ReplyT = TypeVar("ReplyT")


@dataclass(frozen=True)
class Answer:
    """What a node answered.

    Attributes:
        times_asked: more than once, a refusal may answer a repetition, and the release may still be on its way.
    """

    node: int
    message: Message
    times_asked: int


def exchange(
    grid: Grid,
    requests: Callable[[Sequence[int]], list[Message]],
    nodes: Sequence[int],
    *,
    timeout: float,
    expected: float,
    repeat: bool,
    meanwhile: Callable[[], None] = lambda: None,
) -> Iterator[Answer]:
    """Ask `nodes` and yield each one's answer as it comes, until all came or `timeout` seconds passed.

    What was yielded is not kept, and the answers of at most `_NODES_PER_PULL` nodes are in memory: a thousand updates need not
    fit into it.

    Flower's own `send_and_receive` polls every three seconds; this begins with every tenth of one. A reply is matched by the
    request that it answers: an error about a lost message comes from the SuperLink, not from the node. Of several answers, one
    with a release counts.

    Args:
        requests: makes the messages for some nodes, signed now.
        expected: seconds that the answers will take, as far as one knows; asking before costs the sites' calls their time.
        repeat: ask those again who are silent; only for sites that answer a repeated request as the first.
        meanwhile: what can be done once the requests are out.
    """
    node_of: dict[str, int] = {}
    identifiers_of: dict[int, list[str]] = {}
    times_asked: Counter[int] = Counter()

    def ask(some: Sequence[int]) -> None:
        messages = requests(some)
        pushed = set(grid.push_messages(messages))
        metadata = [message.metadata for message in messages]
        for facts in metadata:
            if facts.message_id in pushed:
                node_of[facts.message_id] = facts.dst_node_id
                identifiers_of.setdefault(facts.dst_node_id, []).append(facts.message_id)
        times_asked.update(some)

    started, ask_again = time.monotonic(), ASK_AGAIN_SECONDS
    if nodes:
        ask(nodes)
    meanwhile()
    answered: set[int] = set()
    time.sleep(max(0.0, min(_PATIENT_SHARE * expected, _LONGEST_POLL_SECONDS) - (time.monotonic() - started)))
    while waiting := [node for node in identifiers_of if node not in answered]:
        some_came = False
        for first in range(0, len(waiting), _NODES_PER_PULL):
            some = waiting[first : first + _NODES_PER_PULL]
            came: dict[int, Message] = {}
            for message in grid.pull_messages({identifier for node in some for identifier in identifiers_of[node]}):
                some_came = True
                node = node_of.get(message.metadata.reply_to_message_id)
                if node in some and (node not in came or carries_release(message)):
                    came[node] = message
            answered.update(came)
            for node in list(came):
                yield Answer(node, came.pop(node), times_asked[node])
        elapsed = time.monotonic() - started
        if elapsed > timeout:
            break
        if repeat and elapsed > ask_again:
            ask([node for node in nodes if node not in answered])
            ask_again += 2 * ask_again
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
    """

    kind: ClassVar[Literal["train", "metrics"]]

    def __init__(self, job: Job, number: int, adapter: bytes, sites: Mapping[int, SiteDescription]) -> None:
        self.job, self.number, self.adapter, self.sites = job, number, adapter, sites
        self.unknown = {site.site for site in sites.values()}
        self.failed: dict[str, str] = {}

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
    def judged(self, site: str, reply: ReplyT | None) -> None:
        """Tell that an answer was taken, or not (`failed` says why); None if it is no reply."""

    def requests(self, grid: Grid, nodes: Sequence[int], authority: Authority | None) -> list[Message]:
        """Return the messages to some nodes, signed now."""
        order = authority.order(self.number, self.adapter) if authority else None
        content = TrainRequest(job=self.job, round_number=self.number, adapter=self.adapter, order=order)
        kind = TRAIN if self.kind == "train" else METRICS
        packed = pack_request(content, self.kind)
        return [grid.create_message(packed, kind, node, str(self.number)) for node in nodes]


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
        authority: signs the requests to real sites, which are asked again while they are silent.
        expected, meanwhile: see `exchange`.
    """
    for found in exchange(
        grid,
        lambda nodes: question.requests(grid, nodes, authority),
        list(question.sites),
        timeout=question.job.federation.round_timeout_seconds,
        expected=expected,
        repeat=authority is not None,
        meanwhile=meanwhile,
    ):
        site, answer = question.sites[found.node], question.unpack(found.message)
        reply = None if isinstance(answer, Refusal) else answer
        if isinstance(answer, Refusal):
            question.failed[site.site] = f"{answer.code}: {answer.reason}"
            # What cannot be read may hide a release, and so may a refusal to a repeated request.
            if not found.message.has_error() and answer.code != MALFORMED and found.times_asked == 1:
                question.unknown.discard(site.site)
        else:
            try:
                question.take(answer, site)
            except (AdapterError, RunError) as error:
                question.failed[site.site] = str(error)
        question.judged(site.site, reply)
