"""One round's updates, as sites send them: asked for, judged as each comes, added up.

Guarantee (tests: tests/server/rounds/test_loop.py): an update is checked for site, job, round, mechanism, shapes and length
before anything of it may touch the adapter.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from flwr.app import Message
from flwr.serverapp.grid import Grid
from torch import Tensor

from server.aggregation import Adapter
from server.records.rounds import RoundRecord
from server.rounds.exchange import Question, ReplyT, collect
from server.rounds.observer import Observer
from server.rounds.releases import Made
from server.rounds.roster import Authority
from server.rounds.update_bounds import UpdateBounds
from server.store.checkpoint import Checkpoint
from shared.errors import RunError
from shared.job.job import Job
from shared.privacy.plan import PrivacyPlan
from shared.tensors import adapters
from shared.tensors.adapters import Shapes
from shared.trust.receipts import Receipt
from shared.wire.messages import Refusal, SiteDescription, TrainReply, unpack_reply
from shared.wire.updates import decode_update


@dataclass(frozen=True, kw_only=True)
class AtHand:
    """What one attempt at a round is about.

    Attributes:
        grid: Flower's view of the connected nodes.
        job: the job.
        authority: signs requests to real sites; None in a simulation.
        observer: is told about progress.
        shapes: names and shapes that an update must have.
        checkpoint: the state before the round.
        asked: node id -> description of the sites that take part.
        meanwhile: what can be done while they train.
    """

    grid: Grid
    job: Job
    authority: Authority | None
    observer: Observer
    shapes: Shapes
    checkpoint: Checkpoint
    asked: Mapping[int, SiteDescription]
    meanwhile: Callable[[], None]

    @property
    def number(self) -> int:
        """Number of the round, 1-based."""
        return self.checkpoint.round_number + 1

    @cached_property
    def adapter(self) -> bytes:
        """The global adapter that goes out, encoded."""
        return adapters.encode(self.checkpoint.adapter)

    def ask(self, question: Question[ReplyT]) -> None:
        """Collect the answers to a question that takes as long as training."""
        collect(
            self.grid,
            question,
            authority=self.authority,
            expected=_exchange_seconds(self.checkpoint.history[-1]) if self.authority else 0.0,
            meanwhile=self.meanwhile,
        )


class RoundAggregation(Protocol):
    """What updates are added to."""

    def add(self, update: Mapping[str, Tensor], declared_records: int) -> None:
        """Add one site's checked update."""

    def result(self) -> tuple[Adapter, Adapter]:
        """Return (next global adapter, next server state)."""


NewAggregation = Callable[[Adapter, Adapter, Shapes, Sequence[int]], RoundAggregation]


def collect_updates(at_hand: AtHand, new_aggregation: NewAggregation) -> Updates:
    """Ask the sites for a round and return what came until everyone answered or time is up.

    Args:
        new_aggregation: of the global adapter, the server's state, the shapes, and the public sizes of those who are asked.
    """
    checkpoint, asked = at_hand.checkpoint, list(at_hand.asked.values())
    adapter = at_hand.adapter
    at_hand.observer.round_started(at_hand.number, [site.site for site in asked], adapter)
    # Of a reply nothing stays but its part of the sums: memory does not grow with the sites, and
    # the sums are exact, so arrival order changes nothing.
    sizes = [site.declared_records for site in asked]
    aggregation = new_aggregation(checkpoint.adapter, checkpoint.server_state, at_hand.shapes, sizes)
    updates = Updates(at_hand, adapter, aggregation)
    at_hand.ask(updates)
    updates.close()
    return updates


def _exchange_seconds(last: RoundRecord) -> float:
    """Return how long the answers took in the round before; 0 if there was none, or it is not told."""
    return last.seconds - last.seconds_evaluation if last.round and last.seconds is not None else 0.0


class Arrived(Question[TrainReply]):
    """What sites are asked to release in one round, and what came of it.

    Attributes:
        made: the updates that came, by site, aggregated or not; without their bytes.
        names: sites whose update was added.
        doubted: what is suspicious about an update that was added, by site.
        bytes_up: of all updates.
        voided: whether what came is of no use because somebody's is missing, so that all are asked again at once.
    """

    voided = False

    def __init__(self, at_hand: AtHand, sent: bytes, sites: Mapping[int, SiteDescription]) -> None:
        super().__init__(at_hand.job, at_hand.number, sent, sites)
        self._observer = at_hand.observer
        self._plan = PrivacyPlan.from_job(self.job)
        self.made: dict[str, Made] = {}
        self.names: list[str] = []
        self.doubted: dict[str, str] = {}
        self.bytes_up = 0

    @property
    def bytes_down(self) -> int:
        """Bytes that went out to all sites."""
        return len(self.adapter) * len(self.sites)

    def unpack(self, message: Message) -> TrainReply | Refusal:
        return unpack_reply(message)

    def note(self, reply: TrainReply, site: SiteDescription) -> None:
        """Take note of a release that is what was asked for, whatever becomes of it.

        Raises:
            RunError: it is not.
        """
        self.bytes_up += len(reply.update)
        self._check(reply, site.site)
        self.made[site.site] = Made.of(reply)
        self.unknown.discard(site.site)

    def _check(self, reply: TrainReply, name: str) -> None:
        """Raise `RunError` for another name, job, round or mechanism than was asked."""
        if reply.site != name:
            raise RunError(f"the node of site {name!r} answered as {reply.site!r}")
        if reply.job_sha256 != self.job.sha256:
            raise RunError(f"answered for job {reply.job_sha256[:12]}, expected {self.job.sha256[:12]}")
        if reply.round_number != self.number:
            raise RunError(f"stale update of round {reply.round_number}, expected round {self.number}")
        executed = (reply.noise_multiplier, reply.sample_rate, reply.max_grad_norm, reply.delta, reply.steps)
        same_steps = reply.steps == self.job.training.local_steps  # of many, one fewer is within any tolerance
        asked = (
            self._plan.noise_multiplier,
            self._plan.sample_rate,
            self._plan.max_grad_norm,
            self._plan.delta,
            self.job.training.local_steps,
        )
        if not (same_steps and np.allclose(executed, asked, rtol=1e-6, atol=0.0)):
            raise RunError(
                f"executed the mechanism {executed}, but the job's plan is {asked} (sigma, q, C, delta, steps)"
            )

    def received(self, receipt: Receipt) -> None:
        self._observer.receipt(receipt)

    def judged(self, site: str, reply: TrainReply | None) -> None:
        self._observer.site_done(self.number, site)
        self._observer.update_judged(self.number, site, reply, self.failed.get(site))

    def close(self) -> None:
        """Order the names, and note those that said nothing."""
        self.names.sort()
        for name in sorted(self.unknown - self.failed.keys()):
            self.failed[name] = f"no answer within {self.job.federation.round_timeout_seconds:g} s"
            self._observer.update_judged(self.number, name, None, self.failed[name])

    @abstractmethod
    def result(self) -> tuple[Adapter, Adapter]:
        """Return (next global adapter, next server state)."""

    def shortage(self) -> str:
        """Return why the round cannot be aggregated, and what to do."""
        reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(self.failed.items())) or "none was asked"
        return (
            f"round {self.number}: {len(self.names)} valid updates, federation.min_sites is "
            f"{self.job.federation.min_sites} ({reasons}). "
            "The run stands at the last checkpoint; mend the sites and resume."
        )


class Updates(Arrived):
    """The updates of one round, each added to the aggregation as it comes."""

    kind = "train"

    def __init__(self, at_hand: AtHand, adapter: bytes, aggregation: RoundAggregation) -> None:
        super().__init__(at_hand, adapter, at_hand.asked)
        self._shapes, self._aggregation = at_hand.shapes, aggregation
        self._bounds = UpdateBounds(
            self.job,
            self._plan,
            at_hand.checkpoint.adapter,
            self._shapes,
            self.number,
            earlier=[record.norms for record in at_hand.checkpoint.history[:-1]],
        )

    def take(self, reply: TrainReply, site: SiteDescription) -> None:
        """See `Question`; everything is checked before anything may touch the adapter."""
        self.note(reply, site)
        update = decode_update(reply.update, self._shapes, self.job.federation.update_dtype)
        # A site that declares another size in its answer is judged by the larger one; by its description it weighs.
        doubt = self._bounds.check(update, max(site.declared_records, reply.declared_records))
        self._aggregation.add(update, site.declared_records)
        self.names.append(site.site)
        if doubt:
            self.doubted[site.site] = doubt
            self._observer.update_doubted(self.number, site.site, doubt)

    def result(self) -> tuple[Adapter, Adapter]:
        """Return (next global adapter, next server state), with noise if it is the coordinator's to add."""
        return self._aggregation.result()
