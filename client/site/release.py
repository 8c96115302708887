"""From a request to a release in six steps, the same for a round's update and for the site metrics.

Admit the request; repeat what it was answered before; prepare model, adapter and records; charge;
compute; store and close.

Guarantees (tests: tests/client/site/test_site.py, tests/client/site/test_site_metrics.py)
    * The ledger is charged, durably, before the first noisy step; a crash keeps the charge.
    * A finished release is stored before it leaves. The same request again returns the same bytes
      and is not charged again; a request that differs in any byte is a new release, is charged, and
      takes the stored one's place.
    * Everything that may be told is decided before a record is read (tests/client/site/test_oracles.py).
"""

from __future__ import annotations

import hashlib
import logging
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from client.ledger.account import Charge
from client.site.opened import OpenedFolder
from client.site.usable import UsableRecords, on_records
from client.training.adapter_bounds import check_bounds
from client.training.independence import check_adapter
from client.training.proof import load_proven
from client.training.trainer import LocalRound, LocalWork, Sums, train_local_rounds
from shared.errors import PolicyError
from shared.job.job import Job
from shared.privacy.accounting import GaussianSteps
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import Origin
from shared.runtime.runtime import Runtime
from shared.runtime.site_metrics import cast_votes, count_votes, noisy_counts
from shared.tensors import adapters
from shared.wire.messages import MetricsReply, TrainReply, TrainRequest
from shared.wire.updates import encode_update

log = logging.getLogger("silotune.site")

ReplyT = TypeVar("ReplyT", TrainReply, MetricsReply)
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A release that is admitted and prepared, and not yet computed.

    Attributes:
        request, request_sha256: what was asked.
        plan: what is to be executed.
        runtime, start: the model and the global adapter, checked.
        work: what the site brings.
        reservation: of the charge; None if nothing private is released, or it is charged later.
        sums: computes the clipped sums with all processes of the site; None if it is one.
    """

    request: TrainRequest
    request_sha256: str
    plan: PrivacyPlan
    runtime: Runtime
    start: dict[str, Tensor]
    work: LocalWork
    reservation: int | None
    sums: Sums | None = None


class Release(ABC, Generic[ReplyT, ResultT]):
    """A kind of release, and the six steps to it."""

    def __init__(self, site: OpenedFolder) -> None:
        self._site = site

    def make(self, request: TrainRequest) -> ReplyT:
        """Return the release that a request asks for.

        Raises:
            PolicyError: the site does not accept the request.
            BudgetExceeded: the release does not fit into the site's budget; nothing was charged.
            DataError, ModelError, AdapterError, PrivacyError, LedgerError: as their texts say.
        """
        begun = self.begin(request)
        return self.make_begun(begun) if isinstance(begun, Begun) else begun

    def begin(self, request: TrainRequest) -> ReplyT | Begun:
        """Do all that comes before computing, the charge last; or return what was released before.

        Raises:
            SilotuneError: see `make`.
        """
        site, job = self._site, request.job
        # 1. What the site accepts at all.
        site.admit(request)
        plan = self._admit(request)
        # 2. A release that was already made is sent again as it is.
        request_sha256 = hash_of(request, self._place(request))
        stored = self._stored(request, request_sha256)
        if stored is not None:
            if plan.private:
                site.checked_ledger()
            site.guard.repeated(request, self._content(stored))
            return stored
        if plan.private:
            site.guard.admit_progress(site.checked_ledger(), request, request_sha256)
        # 3. Model and global adapter, all checked before a record is read or anything is charged.
        runtime = load_proven(job, site.config.compute.of_each)
        start = checked_adapter(runtime, plan, request)
        usable = self._usable(runtime, job)
        sums = self._sums(runtime, job, usable, start)
        # 4. Charge first.
        site.check_decided(request)
        reservation = self._charge(request, request_sha256, plan)
        site.note_begun(request)
        return Begun(
            request=request,
            request_sha256=request_sha256,
            plan=plan,
            runtime=runtime,
            start=start,
            work=LocalWork(
                examples=usable.examples,
                views=usable.views,
                declared_records=site.declared_records,
                randomness=site.new_randomness(),
                optimizer_state=self._moments(request),
                # Under central DP the whole site is the unit.
                persons=None if job.privacy.mechanism == "central" else usable.persons,
            ),
            reservation=reservation,
            sums=sums,
        )

    def make_begun(self, begun: Begun) -> ReplyT:
        """Compute what was begun, by itself, and release it."""
        # 5. Compute, with one noise event for each step that was charged.
        started = time.monotonic()
        result = self._compute(begun)
        return self.finish(begun, result, seconds=time.monotonic() - started)

    def finish(self, begun: Begun, result: ResultT, *, seconds: float) -> ReplyT:
        """Store the release before it leaves, then close the charge."""
        # 6. Store, close.
        reply, steps = self._store(begun, result)
        content = self._content(reply)
        self._site.close(begun.request, begun.reservation, content, executed_steps=steps, seconds=seconds)
        return reply

    @abstractmethod
    def _admit(self, request: TrainRequest) -> PrivacyPlan:
        """Return the plan, or raise `PolicyError` for what no job may ask of this site."""

    @abstractmethod
    def _place(self, request: TrainRequest) -> bytes:
        """Return what tells this release of a job from its others."""

    @abstractmethod
    def _stored(self, request: TrainRequest, request_sha256: str) -> ReplyT | None:
        """Return the release that was made for exactly this request, or None."""

    @abstractmethod
    def _usable(self, runtime: Runtime, job: Job) -> UsableRecords:
        """Return the records that it is computed from."""

    def _sums(self, runtime: Runtime, job: Job, usable: UsableRecords, start: dict[str, Tensor]) -> Sums | None:
        """Return what computes clipped sums with all processes of the site, if the release has such sums."""
        return None

    @abstractmethod
    def _charge(self, request: TrainRequest, request_sha256: str, plan: PrivacyPlan) -> int | None:
        """Charge it, durably, and return the reservation; None if nothing private is released."""

    def _moments(self, request: TrainRequest) -> dict[str, Tensor]:
        """Return the local optimiser's moments to start from."""
        return {}

    @abstractmethod
    def _compute(self, begun: Begun) -> ResultT:
        """Return what was computed on the records, with noise."""

    @abstractmethod
    def _store(self, begun: Begun, result: ResultT) -> tuple[ReplyT, int]:
        """Store the reply; return it and the executed steps."""

    @abstractmethod
    def _content(self, reply: ReplyT) -> bytes:
        """Return the bytes that ledger and log name by hash."""


class Update(Release[TrainReply, LocalRound]):
    """One round's update."""

    def _admit(self, request: TrainRequest) -> PrivacyPlan:
        job = request.job
        if job.privacy.shares_noise:
            raise PolicyError(
                "privacy.mechanism is 'distributed', so this site sends nothing of a round but what is masked; no update of its "
                "own can be asked for."
            )
        if not 1 <= request.round_number <= job.training.rounds:
            raise PolicyError(f"round {request.round_number} is outside the job's {job.training.rounds} rounds.")
        return PrivacyPlan.from_job(job)

    def _place(self, request: TrainRequest) -> bytes:
        return str(request.round_number).encode()

    def _stored(self, request: TrainRequest, request_sha256: str) -> TrainReply | None:
        return self._site.outbox.stored_round(request.job.sha256, request.round_number, request_sha256=request_sha256)

    def _usable(self, runtime: Runtime, job: Job) -> UsableRecords:
        return self._site.usable(runtime, job)

    def _sums(self, runtime: Runtime, job: Job, usable: UsableRecords, start: dict[str, Tensor]) -> Sums | None:
        return self._site.sums(runtime, job, usable, start)

    def _charge(self, request: TrainRequest, request_sha256: str, plan: PrivacyPlan) -> int | None:
        if not plan.private:
            return None
        training = request.job.training
        # Of a job that may stop early, the ledger is told the whole plan.
        planned = None if training.early_stopping is None else plan.planned_steps
        mechanism = plan.mechanism(training.local_steps)
        return self._site.charge(request.job, _charge_for(request, request_sha256, mechanism, planned_steps=planned))

    def _moments(self, request: TrainRequest) -> dict[str, Tensor]:
        return self._site.outbox.kept("optimizer", request.job.sha256, request.round_number)

    def _compute(self, begun: Begun) -> LocalRound:
        with on_records():
            return train_local_rounds(
                begun.runtime,
                [begun.work],
                begun.start,
                training=begun.request.job.training,
                plan=begun.plan,
                round_number=begun.request.round_number,
                sums=begun.sums,
            )[0]

    def _store(self, begun: Begun, result: LocalRound) -> tuple[TrainReply, int]:
        site, plan, request, randomness = self._site, begun.plan, begun.request, begun.work.randomness
        job, round_number = request.job, request.round_number
        # Encoded with what the encoding lost in earlier rounds.
        encoded = encode_update(
            result.delta,
            job.federation.update_dtype,
            residual=site.outbox.kept("residual", job.sha256, round_number),
            salt=randomness.stream("salt", round_number=round_number, step=0).uint64(2).tobytes().hex(),
        )
        reply = reply_to(request, site, plan, encoded.data, steps=result.executed_steps, origin=randomness.origin)
        site.outbox.store_round(
            reply,
            request_sha256=begun.request_sha256,
            optimizer_state=result.optimizer_state,
            residual=encoded.residual,
        )
        return reply, result.executed_steps

    def _content(self, reply: TrainReply) -> bytes:
        return reply.update


class Metrics(Release[MetricsReply, dict[str, list[float]]]):
    """The site metrics of a job: noisy counts over the held-out records.

    The request is that of a round after the last one, so an order for one is none for the other.
    """

    def _admit(self, request: TrainRequest) -> PrivacyPlan:
        job, config = request.job, self._site.config
        self._site.guard.admit_metrics(job)
        plan = PrivacyPlan.from_job(job)
        if plan.metrics is None or request.round_number != job.training.rounds + 1:
            raise PolicyError("the job plans no site metrics, or they were asked for before its last round ended.")
        if not config.evaluation_share:
            raise PolicyError(f"site {config.name} holds no records out of training, so it has no metrics to release.")
        return plan

    def _place(self, request: TrainRequest) -> bytes:
        return b"metrics"

    def _stored(self, request: TrainRequest, request_sha256: str) -> MetricsReply | None:
        return self._site.outbox.stored_metrics(request.job.sha256, request_sha256=request_sha256)

    def _usable(self, runtime: Runtime, job: Job) -> UsableRecords:
        with on_records():
            usable = self._site.held_out.usable(runtime)
        if usable.left_out.rows:
            log.warning("job %s, held-out records: %s. The coordinator is not told.", job.name, usable.left_out)
        return usable

    def _charge(self, request: TrainRequest, request_sha256: str, plan: PrivacyPlan) -> int:
        return self._site.charge(request.job, _charge_for(request, request_sha256, _planned(plan)))

    def _compute(self, begun: Begun) -> dict[str, list[float]]:
        work, request = begun.work, begun.request
        begun.runtime.load(begun.start)
        owners = work.persons.owners if work.persons else None
        with on_records():
            return {
                name: noisy_counts(
                    count_votes(cast, owners),
                    noise_multiplier=_planned(begun.plan).noise_multiplier,
                    stream=work.randomness.stream("noise", round_number=request.round_number, step=step),
                )
                for step, (name, cast) in enumerate(cast_votes(begun.runtime, work.examples, request.job).items())
            }

    def _store(self, begun: Begun, result: dict[str, list[float]]) -> tuple[MetricsReply, int]:
        reply = MetricsReply(
            site=self._site.config.name,
            job_sha256=begun.request.job.sha256,
            adapter_sha256=hashlib.sha256(begun.request.adapter).hexdigest(),
            counts=result,
            noise_multiplier=_planned(begun.plan).noise_multiplier,
            randomness=begun.work.randomness.origin,
        )
        self._site.outbox.store_metrics(reply, request_sha256=begun.request_sha256)
        return reply, len(begun.request.job.site_metrics.names)

    def _content(self, reply: MetricsReply) -> bytes:
        return reply.canonical()


def _charge_for(
    request: TrainRequest, request_sha256: str, mechanism: GaussianSteps, *, planned_steps: int | None = None
) -> Charge:
    return Charge(
        job_id=request.job.sha256,
        round=request.round_number,
        request_sha256=request_sha256,
        mechanism=mechanism,
        planned_steps=planned_steps,
    )


def _planned(plan: PrivacyPlan) -> GaussianSteps:
    assert plan.metrics is not None  # noqa: S101 (`Metrics._admit` refused otherwise)
    return plan.metrics


def checked_adapter(runtime: Runtime, plan: PrivacyPlan, request: TrainRequest) -> dict[str, Tensor]:
    """Return a request's global adapter, checked: names, shapes, size, and in company."""
    job = request.job
    adapter = adapters.decode(request.adapter, runtime.global_shapes(job.averages_products))
    check_bounds(job, plan, runtime.initial, adapter, rounds_before=request.round_number - 1)
    sha256 = hashlib.sha256(request.adapter).hexdigest()
    # Simulated sites share one runtime and get the same bytes.
    if plan.private and runtime.tried_adapter != sha256:
        check_adapter(runtime, adapter)
        runtime.tried_adapter = sha256
    return adapter


def hash_of(request: TrainRequest, place: bytes) -> str:
    """Return the SHA-256 of what a request asks for: job, `place` among the releases of the job, adapter."""
    digest = hashlib.sha256()
    for part in (request.job.sha256.encode(), place, request.adapter):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def reply_to(
    request: TrainRequest, site: OpenedFolder, plan: PrivacyPlan, update: bytes, *, steps: int, origin: Origin
) -> TrainReply:
    """Return what leaves a site for a round: the encoded update, or a masked input, and the mechanism that made it."""
    return TrainReply(
        site=site.config.name,
        round_number=request.round_number,
        job_sha256=request.job.sha256,
        update=update,
        declared_records=site.declared_records,
        noise_multiplier=plan.noise_multiplier,
        sample_rate=plan.sample_rate,
        max_grad_norm=plan.max_grad_norm,
        delta=plan.delta,
        steps=steps,
        randomness=origin,
        epsilon_budget=site.config.budget.epsilon if plan.private else 0.0,
    )
