"""Flower's Grid inside one process: messages go straight to the ClientApp, one frozen backbone serves all clients.

The ServerApp and ClientApp cannot tell it from the link: they see the same `Message` objects.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.grid import Grid

from server.records.results import DROPOUTS_FILE
from shared.files.atomic import write_json
from shared.files.json_files import Count, read_if_there
from shared.job.job import Job
from shared.link.envelope import COORDINATOR_NODE_ID, request
from shared.wire.messages import READY, TRAIN
from simulations.scenario import Scenario

_RUN_ID = 1
_ERROR_DROPPED = 100
_COMPUTES = (TRAIN, READY)  # what takes long, and is answered side by side

Together = Callable[[Sequence[tuple[Message, Context]]], list[Message]]


class InProcessGrid(Grid):
    """A Grid whose nodes are calls of one ClientApp.

    A message runs when its reply is pulled, one message at a pull, so that the caller sees replies arrive one by one.
    Requests to train may run several at a pull.

    Attributes:
        server_context: what a ServerApp is called with.
    """

    def __init__(
        self, client_app: ClientApp, num_nodes: int, *, together: Together | None = None, at_once: int = 1
    ) -> None:
        """Make a Grid of `num_nodes` nodes.

        Args:
            client_app: answers every message.
            num_nodes: number of nodes, with the partition ids from 0.
            together: answers up to `at_once` requests to train, all of one kind; None leaves these to `client_app` as well.
            at_once: how many.
        """
        self._client_app = client_app
        self._together, self._at_once = together, at_once
        self._contexts = {
            node: Context(
                run_id=_RUN_ID,
                node_id=node,
                node_config={"partition-id": node - 1, "num-partitions": num_nodes},
                state=RecordDict(),
                run_config={},
            )
            for node in range(1, num_nodes + 1)
        }
        self.server_context = Context(
            run_id=_RUN_ID, node_id=COORDINATOR_NODE_ID, node_config={}, state=RecordDict(), run_config={}
        )
        self._waiting: dict[str, Message] = {}
        self._ready: dict[str, Message] = {}
        self._run: object = None

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
        """See `Grid`."""
        return request(
            content,
            run_id=_RUN_ID,
            message_id=str(uuid4()),
            message_type=message_type,
            node=dst_node_id,
            group_id=group_id,
            ttl=ttl,
        )

    def get_node_ids(self) -> Iterable[int]:
        """See `Grid`."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """See `Grid`."""
        asked = {message.metadata.message_id: message for message in messages}
        self._waiting |= asked
        return list(asked)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run the oldest waiting message among `message_ids` and return its reply, with others that were answered beside it."""
        wanted = list(message_ids)
        oldest = next((identifier for identifier in self._waiting if identifier in set(wanted)), None)
        if not any(identifier in self._ready for identifier in wanted) and oldest is not None:
            first = self._waiting[oldest].metadata
            if self._together is not None and first.message_type in _COMPUTES and self._at_once > 1:
                # Also requests of the round that nobody pulls for yet: a caller may ask for a few at a time.
                alike = [
                    identifier
                    for identifier, message in self._waiting.items()
                    if (message.metadata.message_type, message.metadata.group_id)
                    == (first.message_type, first.group_id)
                ]
                chosen = [oldest, *(identifier for identifier in alike if identifier != oldest)][: self._at_once]
                messages = [self._waiting.pop(identifier) for identifier in chosen]
                replies = self._together([(m, self._contexts[m.metadata.dst_node_id]) for m in messages])
                self._ready.update(zip(chosen, replies, strict=True))
            else:
                message = self._waiting.pop(oldest)
                self._ready[oldest] = self._client_app(message, self._contexts[message.metadata.dst_node_id])
        return [self._ready.pop(identifier) for identifier in wanted if identifier in self._ready]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """See `Grid`."""
        waiting = set(self.push_messages(messages))
        replies: list[Message] = []
        while waiting:
            arrived = list(self.pull_messages(waiting))
            replies.extend(arrived)
            waiting -= {message.metadata.reply_to_message_id for message in arrived}
        return replies


class DropoutGrid(Grid):
    """Any Grid, with sites that now and then do not answer a training request.

    The draw depends only on seed, round, the site's place in the order of names and, of a round that is asked for again, how
    often it was before: so every backend and every resumed run sees the same drop-outs, and no run falls short for ever.
    """

    def __init__(
        self, inner: Grid, probability: float, seed: int, *, begin_try: Callable[[int], int] = lambda round_number: 0
    ) -> None:
        """Wrap `inner`.

        Args:
            probability: with which a site does not answer a request.
            seed: public.
            begin_try: returns how often a round was asked for before; called once for each time that it is.
        """
        self._inner, self._probability, self._seed, self._begin_try = inner, probability, seed, begin_try
        self._dropped: dict[str, Message] = {}

    def set_run(self, run: object) -> None:
        """See `Grid`."""
        self._inner.set_run(run)  # type: ignore[arg-type]  # not public

    @property
    def run(self) -> object:  # type: ignore[override]
        """See `Grid`."""
        return self._inner.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """See `Grid`."""
        return self._inner.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """See `Grid`."""
        return self._inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pass on what is not dropped; remember the rest as unanswered."""
        sent = list(messages)
        asked = [(p, m.metadata.group_id) for p, m in enumerate(sent) if m.metadata.message_type in _COMPUTES]
        tries = {group: self._begin_try(int(group)) for group in {group for _, group in asked}}
        dropped = {place for place, group in asked if self._drops(group, place, tries[group])}
        passed = iter(self._inner.push_messages([m for place, m in enumerate(sent) if place not in dropped]))
        return [self._drop(message) if place in dropped else next(passed) for place, message in enumerate(sent)]

    def _drop(self, message: Message) -> str:
        facts, identifier = message.metadata, str(uuid4())
        self._dropped[identifier] = request(
            message.content,
            run_id=facts.run_id,
            message_id=identifier,
            message_type=facts.message_type,
            node=facts.dst_node_id,
            group_id=facts.group_id,
            ttl=facts.ttl,
        )
        return identifier

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return replies, and an error for every dropped message."""
        wanted = list(message_ids)
        errors = [
            Message(
                Error(code=_ERROR_DROPPED, reason="dropped out (simulated)"),
                reply_to=self._dropped.pop(identifier),
            )
            for identifier in wanted
            if identifier in self._dropped
        ]
        # Flower answers an identifier that it does not know with an error of its own.
        dropped = {error.metadata.reply_to_message_id for error in errors}
        passed = [identifier for identifier in wanted if identifier not in dropped]
        return [*errors, *(self._inner.pull_messages(passed) if passed else [])]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """See `Grid`."""
        raise NotImplementedError("the round loop polls by itself")

    def _drops(self, group: str, position: int, tries: int) -> bool:
        # Messages of a round come in the order of site names, so the position stands for the site.
        label = f"{self._seed}/dropout/{group}/{position}" + (f"/{tries}" if tries else "")
        draw = int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "big") / 2.0**64
        return draw < self._probability


def with_dropouts(grid: Grid, scenario: Scenario, job: Job, folder: Path) -> Grid:
    """Return `grid`, with simulated drop-outs if the scenario has them.

    Args:
        job, folder: of the arm. Under secure aggregation a round may be asked for again, and the folder knows how often it was.
    """
    probability = scenario.simulation.dropout_probability
    if not probability:
        return grid
    if not job.privacy.shares_noise:
        return DropoutGrid(grid, probability, scenario.seed)
    return DropoutGrid(
        grid, probability, scenario.seed, begin_try=functools.partial(_begin_try, folder / DROPOUTS_FILE)
    )


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """`dropouts.json`: how often sites were asked to get ready, by round."""

    asked: dict[str, Count] = field(default_factory=dict)


def _begin_try(path: Path, round_number: int) -> int:
    """Return how often a round was asked for before, by earlier processes as well, and note that it is once more."""
    asked = (read_if_there(path, _Asked) or _Asked()).asked
    before = asked.get(str(round_number), 0)
    write_json(path, {"asked": asked | {str(round_number): before + 1}})
    return before
