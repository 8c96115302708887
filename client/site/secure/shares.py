"""A site in a round under secure aggregation: get ready, which releases nothing, then send one masked input for one roster.

    ready    admit, check, the budget as well, compute sample, sum and share of the noise, keep them in memory; say so with a
             fresh key
    masked   admit, check who else is on the roster, charge, mask, store, send

Guarantees (tests: tests/client/site/secure/)
    * What was drawn for one attempt is masked once, for the first roster that passes, and forgotten; another attempt has fresh
      coins, noise and keys (test_an_attempt_is_masked_once).
    * Both accounts are charged, durably, before an input is masked; it is stored before it leaves. The same request again gets
      the same bytes, at no charge, also after a restart; a process that died in between has dropped out
      (test_a_kill_at_any_line_loses_no_charge).
    * What the site's budget and policy will not let out is refused before it is ready, so that nobody else is charged for an
      attempt that cannot succeed (test_a_budget_that_is_spent_refuses_before_others_are_charged).
    * Whether a request is answered, and how a refusal reads, follows from what the coordinator sent, what the site declares, its
      ledger and whom it trusts, never from a record (test_why_a_roster_is_refused_is_told).
    * The policy's hours are those in which an attempt begins. What this site said ready for in them it still sends within the
      round's time-out (test_an_attempt_that_began_within_the_hours_is_finished).
    * An approval has begun once something is charged: getting ready, which costs nothing, keeps none from expiring
      (tests/client/site/test_approved_jobs.py, test_both_exchanges_of_a_sum_over_sites_wait_and_stop).
    * What was drawn for one job is not kept beyond another's (test_what_was_drawn_is_dropped_once_nobody_can_ask_for_it).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from client.ledger.account import Charge
from client.site.opened import OpenedFolder
from client.site.release import Begun, checked_adapter, hash_of, reply_to
from client.site.usable import on_records
from client.training.gradient import NoisySum, noisy_sums
from client.training.proof import load_proven
from client.training.trainer import LocalWork
from shared.errors import DroppedOut, PolicyError, PrivacyError, RosterError, TrustError
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import Origin
from shared.privacy.shares import check_sizes
from shared.runtime.runtime import Runtime
from shared.secure_sum.messages import MOST_WORDS, Ready, unpack_roster
from shared.secure_sum.site import SecureSite
from shared.wire.messages import TrainReply, TrainRequest

MECHANISM = "distributed"
_ON_THE_WAY_SECONDS = 10.0  # between the end of the coordinator's patience with the first exchange and the second one


@dataclass(kw_only=True)
class _Attempt:
    """What is drawn for one attempt, and its key: in memory only, until it is masked."""

    place: tuple[int, int, str]  # round, attempt, SHA-256 of the adapter
    plan: PrivacyPlan
    machine: SecureSite
    words: NDArray[np.uint64]
    origin: Origin
    seconds: float
    until: float  # by `time.monotonic`: afterwards nobody waits for it


@dataclass(kw_only=True)
class _Asked:
    """What was computed last for a job; nobody can ask for it any more once the job's signature has ended."""

    not_after: datetime | None = None  # None in a simulation
    round_number: int = 0
    adapter_sha256: str = ""
    computed: int = 0  # attempts at this round
    said_ready: tuple[int, int] = (0, 0)  # round and attempt
    until: float = 0.0  # by `time.monotonic`, for these


class Shares:
    """The two answers of a site; see the module."""

    def __init__(self, site: OpenedFolder) -> None:
        self._site = site
        self._drawn: dict[str, _Attempt] = {}  # by job: the latest attempt only
        self._asked: dict[str, _Asked] = {}  # by job

    def ready(self, request: TrainRequest) -> Ready:
        """Compute for an attempt and say so; asked again, the same.

        Raises:
            SilotuneError: as for a release; nothing is charged here.
        """
        begun = self.begin(request)
        return begun if isinstance(begun, Ready) else self.make_begun(begun)

    def make_begun(self, begun: Begun) -> Ready:
        """Compute what was begun, by itself."""
        started = time.monotonic()
        (found,) = self.compute([begun])
        return self.finish(begun, found, seconds=time.monotonic() - started)

    def begin(self, request: TrainRequest) -> Ready | Begun:
        """Do all that comes before computing, but for the charge; or return what was said before."""
        site, job = self._site, request.job
        # 1. What the site accepts at all.
        plan = self._admit(request)
        # 2. What was drawn already and not masked yet; by a certificate that was exchanged since, nobody would take it.
        drawn = self._drawn.get(job.sha256)
        if drawn is not None and drawn.place == _place(request):
            ready = drawn.machine.ready()
            if ready.certificate == site.guard.certified_key()[1]:
                drawn.until = self._said_ready(request)  # said again, it holds from now on
                return ready
        # 3. Model, global adapter and budget, all checked before a record is read.
        runtime = load_proven(job, site.config.compute.of_each)
        _check_length(runtime)
        start = checked_adapter(runtime, plan, request)
        request_sha256 = _request_sha256(request)
        site.check_charge(job, _charge_for(request, request_sha256, plan))
        site.check_decided(request)
        self._note_computation(request)
        self._forget(job.sha256)
        usable = site.usable(runtime, job)
        work = LocalWork(
            examples=usable.examples,
            views=usable.views,
            declared_records=site.declared_records,
            randomness=site.new_randomness(),
            persons=usable.persons,
        )
        return Begun(
            request=request,
            request_sha256=request_sha256,
            plan=plan,
            runtime=runtime,
            start=start,
            work=work,
            reservation=None,  # charged once the roster is known
            sums=site.sums(runtime, job, usable, start),
        )

    @staticmethod
    def compute(begun: Sequence[Begun]) -> list[NoisySum]:
        """Return the noisy sums of sites that were asked the same."""
        first = begun[0]
        with on_records():
            return noisy_sums(
                first.runtime,
                [one.work for one in begun],
                first.start,
                plan=first.plan,
                round_number=first.request.round_number,
                attempt=first.request.attempt,
                sums=first.sums,
            )

    def finish(self, begun: Begun, found: NoisySum, *, seconds: float) -> Ready:
        """Keep what was computed, and return the word that this site is ready."""
        site, request = self._site, begun.request
        key, certificate = site.guard.certified_key()
        machine = SecureSite(
            site=site.config.name,
            job_sha256=request.job.sha256,
            round_number=request.round_number,
            attempt=request.attempt,
            adapter_sha256=_place(request)[2],
            declared_records=site.declared_records,
            key=key,
            certificate=certificate,
        )
        self._drawn[request.job.sha256] = _Attempt(
            place=_place(request),
            plan=begun.plan,
            machine=machine,
            words=found.words,
            origin=begun.work.randomness.origin,
            seconds=seconds,
            until=self._said_ready(request),
        )
        return machine.ready()

    def masked(self, request: TrainRequest) -> TrainReply:
        """Return the masked input for a roster; asked again, the same bytes.

        Raises:
            RosterError: the roster is not what it should be; nothing was charged.
            DroppedOut: this site is not ready for it; nothing was charged.
            PolicyError: it does not accept it; nothing was charged.
            BudgetExceeded: it does not fit into the site's budget; nothing was charged.
        """
        site, job = self._site, request.job
        site.admit(request, "masked", begun=self._has_begun(request))
        request_sha256 = _request_sha256(request)
        stored = site.outbox.stored_round(job.sha256, request.round_number, request_sha256=request_sha256)
        if stored is not None:
            site.checked_ledger()
            site.guard.repeated(request, stored.update)
            return stored
        drawn = self._drawn.get(job.sha256)
        if drawn is None or drawn.place[:2] != (request.round_number, request.attempt):
            raise DroppedOut(
                f"site {site.config.name} has nothing ready for attempt {request.attempt} at round {request.round_number}: it "
                "was started anew, or has sent for another roster. Begin another attempt."
            )
        with _about_the_roster():
            roster = unpack_roster(request.adapter)
            check_sizes([entry.declared_records for entry in roster], noise_multiplier=drawn.plan.noise_multiplier)
            site.guard.admit_peers(job, [entry.site for entry in roster])
            key_of = site.guard.peer_keys()
            context = drawn.machine.accept(roster, min_sites=job.federation.min_sites, key_of=key_of)
        # From here on it is this roster or none.
        del self._drawn[job.sha256]
        site.check_decided(request)
        reservation = self._charge(request, request_sha256, drawn.plan)
        site.note_begun(request)
        masked = drawn.machine.masked(drawn.words, context)
        reply = reply_to(request, site, drawn.plan, masked.to_bytes(), steps=1, origin=drawn.origin)
        site.outbox.store_round(reply, request_sha256=request_sha256, optimizer_state={}, residual=None)
        site.close(request, reservation, reply.update, executed_steps=1, seconds=drawn.seconds)
        return reply

    def _admit(self, request: TrainRequest) -> PrivacyPlan:
        site, job = self._site, request.job
        site.admit(request, "ready")
        if job.privacy.mechanism != MECHANISM:
            raise PolicyError(
                f"privacy.mechanism is {job.privacy.mechanism!r}; only {MECHANISM!r} has rounds of two exchanges."
            )
        if not 1 <= request.round_number <= job.training.rounds:
            raise PolicyError(f"round {request.round_number} is outside the job's {job.training.rounds} rounds.")
        if request.attempt < 1:
            raise PolicyError(f"attempt {request.attempt} at round {request.round_number}; they are counted from 1.")
        ledger = site.checked_ledger()
        site.guard.admit_attempt(ledger, job, request.round_number, request.attempt)
        return PrivacyPlan.from_job(job)

    def _note_computation(self, request: TrainRequest) -> None:
        """Refuse to compute, which is not charged and can be watched from outside, more often than job and policy say.

        Raises:
            PolicyError: a round before the last one, another adapter for the same, or too many attempts at it.
        """
        number, _, adapter = _place(request)
        asked = self._asked.get(request.job.sha256) or _Asked()
        last = asked.round_number
        if number < last or (number == last and adapter != asked.adapter_sha256):
            raise PolicyError(
                f"round {number} was asked for, but this site has computed round {last} of the job"
                f"{' from another adapter' if number == last else ''}; rounds go forward only, each from one adapter."
            )
        computed = asked.computed + 1 if number == last else 1
        if computed > (most := self._site.guard.most_attempts(request.job)):
            raise PolicyError(
                f"this site has computed {most} attempts at round {number}, as many as the job plans and its policy allows."
            )
        if request.order is not None:  # the same job may have been signed more than once
            end = request.order.signed_job.not_after
            asked.not_after = max(asked.not_after or end, end)
        asked.round_number, asked.adapter_sha256, asked.computed = number, adapter, computed
        self._asked[request.job.sha256] = asked

    def _forget(self, job_sha256: str) -> None:
        """Drop what nobody can ask for any more: the earlier draw of a job that begins anew, and what other jobs left."""
        self._drawn.pop(job_sha256, None)
        now = time.monotonic()
        for other in [other for other, drawn in self._drawn.items() if drawn.until < now]:
            del self._drawn[other]
        over = self._site.guard.is_past
        for other in [job for job, asked in self._asked.items() if asked.not_after and over(asked.not_after)]:
            if other != job_sha256:  # whose signature may have ended since it was admitted
                del self._asked[other]
                self._drawn.pop(other, None)

    def _said_ready(self, request: TrainRequest) -> float:
        """Note that this site says ready now; return until when it sends what it was ready for."""
        asked = self._asked[request.job.sha256]
        asked.said_ready = request.round_number, request.attempt
        asked.until = time.monotonic() + request.job.federation.round_timeout_seconds + _ON_THE_WAY_SECONDS
        return asked.until

    def _has_begun(self, request: TrainRequest) -> bool:
        """Return whether a roster came in time for what this site said ready to, and so was admitted then."""
        asked = self._asked.get(request.job.sha256)
        arrived = time.monotonic() - request.waited_seconds
        return (
            asked is not None and asked.said_ready == (request.round_number, request.attempt) and arrived <= asked.until
        )

    def _charge(self, request: TrainRequest, request_sha256: str, plan: PrivacyPlan) -> int:
        job = request.job
        self._site.guard.admit_attempt(self._site.checked_ledger(), job, request.round_number, request.attempt)
        return self._site.charge(job, _charge_for(request, request_sha256, plan))


def _place(request: TrainRequest) -> tuple[int, int, str]:
    return request.round_number, request.attempt, hashlib.sha256(request.adapter).hexdigest()


def _charge_for(request: TrainRequest, request_sha256: str, plan: PrivacyPlan) -> Charge:
    """Return what an attempt costs."""
    return Charge(
        job_id=request.job.sha256,
        round=request.round_number,
        request_sha256=request_sha256,
        mechanism=plan.mechanism(1),
        # How many attempts are made may depend on what was released, so the whole plan counts from its first one on.
        planned_steps=plan.planned_steps,
        together=plan.together(1),
        attempt=request.attempt,
    )


def _check_length(runtime: Runtime) -> None:
    """Raise `PolicyError` if no masked input could hold the gradients: it would be noticed after the charge."""
    trained = sum(parameter.numel() for parameter in runtime.model.trainable().values())
    if trained > MOST_WORDS:
        raise PolicyError(
            f"the job trains {trained:,} values, and a secure sum has room for {MOST_WORDS:,}; lower lora.rank, or adapt fewer "
            "layers."
        )


@contextmanager
def _about_the_roster() -> Iterator[None]:
    """Turn an error about what all sites of a roster see into one that may be told."""
    try:
        yield
    except (TrustError, PrivacyError) as error:
        raise RosterError(str(error)) from None


def _request_sha256(request: TrainRequest) -> str:
    return hash_of(request, f"{request.round_number}/{request.attempt}".encode())
