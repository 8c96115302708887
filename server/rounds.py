"""The round loop, resumable, on Flower's public Grid; the same for simulation and for real sites.

Reading order of one round: select, send, collect (check and add each reply as it comes), aggregate, evaluate, checkpoint.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from flwr.app import Message
from flwr.serverapp.grid import Grid
from torch import Tensor

from server.central import CentralPrivacy, SitesAggregation, SitesRound, without_participants
from server.checkpoint import Checkpoint, RoundRecord
from server.earlier_requests import EarlierRequests, unknown_release, with_update
from server.early_stopping import best_round, is_over, keeps_best, stopped_early
from server.exchange import exchange
from server.observer import Observer
from server.roster import Authority, Roster
from server.site_metrics import collect_site_metrics
from server.strategies import Aggregation
from shared import adapters
from shared.adapters import Shapes
from shared.config import Job
from shared.errors import AdapterError, RunError
from shared.messages import (
    MALFORMED,
    TRAIN,
    Refusal,
    SiteDescription,
    TrainReply,
    TrainRequest,
    pack_request,
    unpack_reply,
)
from shared.privacy.accounting import GaussianSteps, compose_epsilon
from shared.privacy.plan import PrivacyPlan
from shared.privacy.statement import SiteRelease
from shared.updates import decode_update

RETRY_SECONDS = 2.0


class TooFewSites(RunError):
    """A round brought fewer valid updates than `federation.min_sites`; the last checkpoint stands.

    Attributes:
        releases: everything that sites released so far, this round included.
    """

    def __init__(self, message: str, releases: dict[str, SiteRelease]) -> None:
        super().__init__(message)
        self.releases = releases


@dataclass(frozen=True, kw_only=True)
class Coordinator:
    """What the loop needs besides the Grid; storage and evaluation are injected.

    Attributes:
        job: the job.
        initial_adapter: global adapter before round 1, from the job's public seed.
        update_shapes: names and shapes that a site's update must have.
        exact_scaling: alpha / rank if both LoRA factors are trained.
        evaluate: metrics of an adapter on public data.
        decide: the same on the public records that decide; None if there are none, or there is nothing to decide.
        evaluate_every: evaluate after every so many rounds, and always after the last.
        save: makes a checkpoint durable.
        observer: is told about progress.
        authority: signs requests to real sites; with it, too few sites are waited for.
        central: draws sites and adds noise where the job trusts the coordinator to; else None.
    """

    job: Job
    initial_adapter: dict[str, Tensor]
    update_shapes: Shapes
    exact_scaling: float | None
    evaluate: Callable[[dict[str, Tensor]], dict[str, float | None]]
    evaluate_every: int
    save: Callable[[Checkpoint], None]
    observer: Observer
    authority: Authority | None = None
    central: CentralPrivacy | None = None
    decide: Callable[[dict[str, Tensor]], dict[str, float | None]] | None = None


def run_rounds(
    grid: Grid, coordinator: Coordinator, resume_from: Checkpoint | None, *, stop_after: int | None = None
) -> Checkpoint:
    """Run the job's remaining rounds and return the last checkpoint.

    Args:
        grid: Flower's view of the connected nodes.
        coordinator: job, evaluation, storage, observer.
        resume_from: state to continue from, or None.
        stop_after: stop after this round although the job has more; the run can be resumed.

    Raises:
        RunError: if fewer than `federation.min_sites` valid replies came and there is no authority to wait for more.
        PrivacyError: under central DP, if interruptions have used up the noisy rounds that the job declares.
    """
    job, authority, observer = coordinator.job, coordinator.authority, coordinator.observer
    roster = Roster(grid, job, authority=authority, observer=observer)
    last = min(job.training.rounds, stop_after or job.training.rounds)

    def ended(checkpoint: Checkpoint) -> bool:
        return checkpoint.round_number >= last or is_over(checkpoint, job)

    if resume_from and ended(resume_from) and not _metrics_due(resume_from, job):
        return resume_from
    if resume_from:
        observer.resumed(resume_from)
    if resume_from and coordinator.central:
        coordinator.central.ledger.check(resume_from)
    earlier = EarlierRequests()
    if resume_from and authority and not coordinator.central:
        # They may have been executed, by sites that may not be there any more.
        earlier = EarlierRequests(authority.asked_since(resume_from.round_number))
        resume_from = replace(resume_from, releases=earlier.accounted(resume_from.releases, job))
    sites = roster.wait()
    checkpoint = resume_from or _before_training(coordinator)
    while not ended(checkpoint):
        try:
            checkpoint = _run_round(grid, coordinator, sites, checkpoint, earlier)
        except TooFewSites as error:
            # Updates that came are releases, aggregated or not.
            checkpoint = replace(checkpoint, releases=error.releases)
            coordinator.save(checkpoint)
            if authority is None:
                raise
            observer.waiting(str(error))
            time.sleep(RETRY_SECONDS)
        else:
            coordinator.save(checkpoint)
            observer.round_done(checkpoint)
        roster.update()
        sites = roster.present()
        if len(sites) < job.federation.min_sites:
            sites = roster.wait()
    if stopped_early(checkpoint, job):
        observer.stopped_early(checkpoint)
    if _metrics_due(checkpoint, job):
        checkpoint = collect_site_metrics(
            grid, job, sites, checkpoint, authority=authority, observer=observer, earlier=earlier
        )
        last_round = replace(checkpoint.history[-1], epsilon_max=epsilon_max(checkpoint.releases))
        checkpoint = replace(checkpoint, history=[*checkpoint.history[:-1], last_round])
        coordinator.save(checkpoint)
        observer.metrics_done(checkpoint)
    return checkpoint


def _metrics_due(checkpoint: Checkpoint, job: Job) -> bool:
    """Return whether the last round is over and the sites were not asked for their metrics yet."""
    return is_over(checkpoint, job) and bool(job.site_metrics.names) and checkpoint.site_metrics is None


def select_sites(sites: dict[int, SiteDescription], job: Job, round_number: int) -> list[int]:
    """Return the node ids to ask in a round: all, or a draw from the public seed and the round number.

    The draw is public, so it gives no privacy amplification and none is claimed.
    """
    nodes = list(sites)
    wanted = job.federation.sites_per_round
    if wanted is None or wanted >= len(nodes):
        return nodes
    seed = hashlib.sha256(f"{job.seed}/select/{round_number}".encode()).digest()
    drawn = np.random.default_rng(list(seed)).choice(len(nodes), size=wanted, replace=False)
    return [nodes[index] for index in sorted(drawn)]


def _run_round(
    grid: Grid,
    coordinator: Coordinator,
    sites: dict[int, SiteDescription],
    checkpoint: Checkpoint,
    earlier: EarlierRequests,
) -> Checkpoint:
    job, observer, round_number = coordinator.job, coordinator.observer, checkpoint.round_number + 1
    started = time.monotonic()
    # 1. Select; under central DP by secret coins.
    attempt = coordinator.central.begin(round_number) if coordinator.central else None
    asked = attempt.draw(sites) if attempt else select_sites(sites, job, round_number)
    # 2. Send the same bytes to everyone.
    adapter = adapters.encode(checkpoint.adapter)

    def requests(nodes: Sequence[int]) -> list[Message]:
        order = coordinator.authority.order(round_number, adapter) if coordinator.authority else None
        content = TrainRequest(job=job, round_number=round_number, adapter=adapter, order=order)
        return [
            Message(pack_request(content), dst_node_id=node, message_type=TRAIN, group_id=str(round_number))
            for node in nodes
        ]

    observer.round_started(round_number, [sites[node].site for node in asked], adapter)
    # 3. Collect until everyone answered or time is up. Each reply is checked, added and forgotten as it comes: memory does not
    #    grow with the sites, and the sums are exact, so arrival order changes nothing.
    aggregation = _aggregation(coordinator, attempt, [sites[node].declared_records for node in asked], checkpoint)
    made: dict[str, _Made] = {}
    names: list[str] = []
    failed: dict[str, str] = {}
    unanswered = {sites[node].site for node in asked}
    bytes_up = 0
    timeout = job.federation.round_timeout_seconds
    plan = PrivacyPlan.from_job(job)
    for found in exchange(
        grid,
        requests,
        asked,
        timeout=timeout,
        expected=_exchange_seconds(checkpoint.history[-1]) if coordinator.authority else 0.0,
        repeat=coordinator.authority is not None,
        meanwhile=coordinator.central.account_ahead
        if coordinator.central
        else lambda: _account_ahead(checkpoint.releases, plan, job.training.local_steps),
    ):
        name, message = sites[found.node].site, found.message
        observer.site_done(round_number, name)
        answer = unpack_reply(message)
        if isinstance(answer, Refusal):
            failed[name] = f"{answer.code}: {answer.reason}"
            # What came and cannot be read may hide an executed round, and so may a refusal to a repeated request.
            if not message.has_error() and answer.code != MALFORMED and found.times_asked == 1:
                unanswered.discard(name)
            observer.update_judged(round_number, name, None, failed[name])
            continue
        bytes_up += len(answer.update)
        try:
            # 4. Check before anything may touch the adapter.
            _check_reply(answer, name, job, plan, round_number)
            made[name] = _Made.of(answer)
            unanswered.discard(name)
            update = decode_update(answer.update, coordinator.update_shapes, job.federation.update_dtype)
            # 5. Add.
            aggregation.add(update, sites[found.node].declared_records)
            names.append(name)
        except (AdapterError, RunError) as error:
            failed[name] = str(error)
        observer.update_judged(round_number, name, answer, failed.get(name))
    names.sort()
    for name in sorted(unanswered - made.keys() - failed.keys()):
        failed[name] = f"no answer within {timeout:g} s"
        observer.update_judged(round_number, name, None, failed[name])
    # A release is a release, aggregated or not: account for all that were made under this plan. Under central DP the
    # coordinator's release is what counts; which sites answered, or how many, must not show in anything.
    releases = checkpoint.releases
    if attempt is None:
        described = {description.site: description for description in sites.values()}
        this = _ThisRequest(earlier=earlier, number=round_number, adapter_sha256=hashlib.sha256(adapter).hexdigest())
        releases = _account(checkpoint.releases, made, job, this)
        releases = _account_unanswered(releases, [described[name] for name in sorted(unanswered)], job, this)
    if attempt is None and len(names) < job.federation.min_sites:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(failed.items())) or "none was asked"
        raise TooFewSites(
            f"round {round_number}: {len(names)} valid updates, federation.min_sites is "
            f"{job.federation.min_sites} ({reasons}). "
            "The run stands at the last checkpoint; mend the sites and resume.",
            releases,
        )
    # 6. Aggregate: mean, or noisy sum under central DP, and server optimiser.
    following, server_state = aggregation.result()
    # 7. Evaluate on public data.
    before_evaluation = time.monotonic()
    due = round_number % coordinator.evaluate_every == 0 or round_number == job.training.rounds
    metrics = coordinator.evaluate(following) if due else {}
    deciding = coordinator.decide(following) if due and coordinator.decide else {}
    finished = time.monotonic()
    record = RoundRecord(
        round=round_number,
        metrics=metrics,
        deciding=deciding,
        epsilon_max=coordinator.central.epsilon() if coordinator.central else epsilon_max(releases),
        sites=names,
        failed=dict(sorted(failed.items())),
        bytes_up=bytes_up,
        bytes_down=len(adapter) * len(asked),
        seconds=finished - started,
        seconds_evaluation=finished - before_evaluation,
    )
    history = [*checkpoint.history, without_participants(record) if attempt else record]
    is_best = bool(checkpoint.best_adapter) and best_round(history, job) == round_number
    # 8. The caller makes this durable.
    return Checkpoint(
        job_sha256=job.sha256,
        round_number=round_number,
        adapter=following,
        server_state=server_state,
        releases=releases,
        history=history,
        best_adapter=following if is_best else checkpoint.best_adapter,
    )


@dataclass(frozen=True, kw_only=True)
class _Made:
    """What is kept of a release: everything but its bytes."""

    reply: TrainReply
    update_sha256: str

    @classmethod
    def of(cls, reply: TrainReply) -> _Made:
        return cls(reply=replace(reply, update=b""), update_sha256=hashlib.sha256(reply.update).hexdigest())


def _aggregation(
    coordinator: Coordinator, attempt: SitesRound | None, asked_records: Sequence[int], checkpoint: Checkpoint
) -> Aggregation | SitesAggregation:
    """Return the round's aggregation, empty: the coordinator's private release under central DP, else a mean."""
    if attempt is not None:
        return attempt.aggregation(checkpoint.adapter, checkpoint.server_state, coordinator.update_shapes)
    return Aggregation(
        checkpoint.adapter,
        checkpoint.server_state,
        coordinator.update_shapes,
        asked_records,
        config=coordinator.job.aggregation,
        exact_scaling=coordinator.exact_scaling,
    )


def _exchange_seconds(last: RoundRecord) -> float:
    """Return how long the answers took in the round before; 0 if there was none, or it is not told."""
    return last.seconds - last.seconds_evaluation if last.round and last.seconds is not None else 0.0


def epsilon_max(releases: dict[str, SiteRelease]) -> float | None:
    """Return the largest epsilon of a site, or None if there is none to state."""
    values = [release.epsilon for release in releases.values() if release.protected and release.steps]
    return max(values) if values else None


def _before_training(coordinator: Coordinator) -> Checkpoint:
    started = time.monotonic()
    metrics = coordinator.evaluate(coordinator.initial_adapter)
    deciding = coordinator.decide(coordinator.initial_adapter) if coordinator.decide else {}
    seconds = time.monotonic() - started
    first = RoundRecord(round=0, metrics=metrics, deciding=deciding, seconds=seconds, seconds_evaluation=seconds)
    checkpoint = Checkpoint(
        job_sha256=coordinator.job.sha256,
        round_number=0,
        adapter=coordinator.initial_adapter,
        history=[without_participants(first) if coordinator.central else first],
        best_adapter=coordinator.initial_adapter if keeps_best(coordinator.job) else {},
    )
    coordinator.save(checkpoint)
    coordinator.observer.round_done(checkpoint)
    return checkpoint


def _check_reply(reply: TrainReply, name: str, job: Job, plan: PrivacyPlan, round_number: int) -> None:
    """Raise `RunError` if a reply is for another job or round, bears another name, or executed another mechanism."""
    if reply.site != name:
        raise RunError(f"the node of site {name!r} answered as {reply.site!r}")
    if reply.job_sha256 != job.sha256:
        raise RunError(f"answered for job {reply.job_sha256[:12]}, expected {job.sha256[:12]}")
    if reply.round_number != round_number:
        raise RunError(f"stale update of round {reply.round_number}, expected round {round_number}")
    executed = (reply.noise_multiplier, reply.sample_rate, reply.max_grad_norm, reply.delta, reply.steps)
    asked = (plan.noise_multiplier, plan.sample_rate, plan.max_grad_norm, plan.delta, job.training.local_steps)
    if not np.allclose(executed, asked, rtol=1e-6, atol=0.0):
        raise RunError(f"executed the mechanism {executed}, but the job's plan is {asked} (sigma, q, C, delta, steps)")
    if reply.declared_records < 1:
        raise RunError(f"declares {reply.declared_records} records, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class _ThisRequest:
    """The request of a round, beside those of earlier processes for the same round.

    Attributes:
        earlier: these.
        number: of the round.
        adapter_sha256: of the adapter that it starts from.
    """

    earlier: EarlierRequests
    number: int
    adapter_sha256: str

    def unanswered(self, release: SiteRelease, *, came: bool) -> tuple[int, ...]:
        """Return the rounds of unknown outcome, this one being answered, or not, after others that nobody answered."""
        others = tuple(number for number in release.unanswered if number != self.number)
        lost = self.earlier.lost(release.site, self.number, self.adapter_sha256)
        if not came:
            known = release.rounds.count(self.number)
            known -= self.earlier.came_from_others(release.site, self.number, self.adapter_sha256)
            lost += known <= 0  # else it came before, and this one was a repetition
        return (*others, *[self.number] * lost)


def _account(
    releases: dict[str, SiteRelease], made: dict[str, _Made], job: Job, asked: _ThisRequest
) -> dict[str, SiteRelease]:
    """Return the releases with this round's executed mechanisms added; an update that came before counts once."""
    result = dict(releases)
    for name, release_made in sorted(made.items()):
        reply = release_made.reply
        private = reply.noise_multiplier > 0
        release = result.get(name) or SiteRelease(
            site=name,
            unit=job.privacy.unit,
            records_per_person=job.privacy.records_per_person,
            delta=reply.delta,
            max_grad_norm=reply.max_grad_norm,
            declared_records=reply.declared_records,
            randomness=reply.randomness,
            epsilon_budget=reply.epsilon_budget,
            steps_planned=PrivacyPlan.from_job(job).planned_steps,
            private=private,
        )
        release = replace(release, unanswered=asked.unanswered(release, came=True))
        executed = None
        if private:
            executed = GaussianSteps(
                noise_multiplier=reply.noise_multiplier, sample_rate=reply.sample_rate, steps=reply.steps
            )
        result[name] = replace(
            with_update(release, asked.number, release_made.update_sha256, executed),
            epsilon_budget=reply.epsilon_budget,
            private=release.private and private,
            randomness=reply.randomness if release.randomness == "os" else release.randomness,
        )
    return result


def _account_ahead(releases: dict[str, SiteRelease], plan: PrivacyPlan, steps: int) -> None:
    """Compose what each site will have spent after this round, while the sites train: the accountant remembers it."""
    if plan.private:
        for events in {release.events for release in releases.values()} or {()}:
            compose_epsilon([*events, plan.mechanism(steps)], plan.delta)


def _account_unanswered(
    releases: dict[str, SiteRelease], sites: Sequence[SiteDescription], job: Job, asked: _ThisRequest
) -> dict[str, SiteRelease]:
    """Return the releases with the requests noted whose outcome nobody here knows: the site may have answered them."""
    plan = PrivacyPlan.from_job(job)
    result = dict(releases)
    for site in sites:
        release = result.get(site.site) or unknown_release(site, plan)
        per_round = plan.mechanism(job.training.local_steps) if plan.private else None
        unanswered = asked.unanswered(release, came=False)
        result[site.site] = replace(release, unanswered=unanswered, per_round=per_round)
    return result
