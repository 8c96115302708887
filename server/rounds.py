"""The round loop, resumable, on Flower's public Grid; the same for simulation and for real sites.

Reading order of one round: select, send, collect, check, aggregate, evaluate, checkpoint.
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

from server.checkpoint import Checkpoint, RoundRecord
from server.observer import Observer
from server.roster import POLL_SECONDS, Authority, Roster
from server.strategies import aggregate
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

RETRY_SECONDS = 2.0
_LONGEST_POLL_SECONDS = 1.0
_PATIENT_SHARE = 0.75  # of the time that the answers took last time passes before the first look
# A request may be lost with the process that pulled it, while its node stays online. Sites answer a repeated one with what
# they stored, so asking again costs no budget; each time after twice as long.
ASK_AGAIN_SECONDS = 30.0


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
        evaluate_every: evaluate after every so many rounds, and always after the last.
        save: makes a checkpoint durable.
        observer: is told about progress.
        authority: signs requests to real sites; with it, too few sites are waited for.
    """

    job: Job
    initial_adapter: dict[str, Tensor]
    update_shapes: Shapes
    exact_scaling: float | None
    evaluate: Callable[[dict[str, Tensor]], dict[str, float]]
    evaluate_every: int
    save: Callable[[Checkpoint], None]
    observer: Observer
    authority: Authority | None = None


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
    """
    job, authority, observer = coordinator.job, coordinator.authority, coordinator.observer
    roster = Roster(grid, job, authority=authority, observer=observer)
    last = min(job.training.rounds, stop_after or job.training.rounds)
    if resume_from and resume_from.round_number >= last:
        return resume_from
    if resume_from:
        observer.resumed(resume_from)
    if resume_from and authority:
        resume_from = _with_interrupted_round(resume_from, authority, job)
    sites = roster.wait()
    checkpoint = resume_from or _before_training(coordinator)
    while checkpoint.round_number < last:
        try:
            checkpoint = _run_round(grid, coordinator, sites, checkpoint)
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
    return checkpoint


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
    grid: Grid, coordinator: Coordinator, sites: dict[int, SiteDescription], checkpoint: Checkpoint
) -> Checkpoint:
    job, observer, round_number = coordinator.job, coordinator.observer, checkpoint.round_number + 1
    started = time.monotonic()
    # 1. Select.
    asked = select_sites(sites, job, round_number)
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
    # 3. Collect until everyone answered or time is up.
    replies: dict[str, TrainReply] = {}
    failed: dict[str, str] = {}
    unanswered = {sites[node].site for node in asked}
    timeout = job.federation.round_timeout_seconds
    plan = PrivacyPlan.from_job(job)
    for node, message in _exchange(
        grid,
        requests,
        asked,
        timeout=timeout,
        expected=_exchange_seconds(checkpoint.history[-1]) if coordinator.authority else 0.0,
        repeat=coordinator.authority is not None,
        meanwhile=lambda: _account_ahead(checkpoint.releases, plan, job.training.local_steps),
    ):
        name = sites[node].site
        answer = unpack_reply(message)
        if isinstance(answer, Refusal):
            failed[name] = f"{answer.code}: {answer.reason}"
        else:
            replies[name] = answer
        # What came and cannot be trusted may hide an executed round as well.
        if not message.has_error() and not (isinstance(answer, Refusal) and answer.code == MALFORMED):
            unanswered.discard(name)
        observer.site_done(round_number, name)
    for name in unanswered - failed.keys():
        failed[name] = f"no answer within {timeout:g} s"
    # 4. Check every reply before it may touch the adapter.
    updates: dict[str, dict[str, Tensor]] = {}
    made: dict[str, TrainReply] = {}
    for name, reply in sorted(replies.items()):
        try:
            _check_reply(reply, name, job, plan, round_number)
            made[name] = reply
            updates[name] = adapters.decode(reply.update, coordinator.update_shapes)
        except (AdapterError, RunError) as error:
            failed[name] = str(error)
            if name not in made:
                unanswered.add(name)
    for name in sorted({*replies, *failed}):
        observer.update_judged(round_number, name, replies.get(name), failed.get(name))
    # A release is a release, aggregated or not: account for all that were made under this plan.
    described = {description.site: description for description in sites.values()}
    releases = _account(checkpoint.releases, made, job, round_number)
    releases = _account_unanswered(releases, [described[name] for name in sorted(unanswered)], job, round_number)
    if len(updates) < job.federation.min_sites:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(failed.items())) or "none was asked"
        raise TooFewSites(
            f"round {round_number}: {len(updates)} valid updates, federation.min_sites is "
            f"{job.federation.min_sites} ({reasons}). "
            "The run stands at the last checkpoint; mend the sites and resume.",
            releases,
        )
    # 5. Aggregate in the order of names, so that arrival order changes nothing.
    names = sorted(updates)
    following, server_state = aggregate(
        checkpoint.adapter,
        [updates[name] for name in names],
        [replies[name].declared_records for name in names],
        checkpoint.server_state,
        config=job.aggregation,
        exact_scaling=coordinator.exact_scaling,
    )
    # 6. Evaluate on public data.
    before_evaluation = time.monotonic()
    due = round_number % coordinator.evaluate_every == 0 or round_number == job.training.rounds
    metrics = coordinator.evaluate(following) if due else {}
    finished = time.monotonic()
    record = RoundRecord(
        round=round_number,
        metrics=metrics,
        epsilon_max=epsilon_max(releases),
        sites=names,
        failed=dict(sorted(failed.items())),
        bytes_up=sum(len(reply.update) for reply in replies.values()),
        bytes_down=len(adapter) * len(asked),
        seconds=finished - started,
        seconds_evaluation=finished - before_evaluation,
    )
    # 7. The caller makes this durable.
    return Checkpoint(
        job_sha256=job.sha256,
        round_number=round_number,
        adapter=following,
        server_state=server_state,
        releases=releases,
        history=[*checkpoint.history, record],
    )


def _exchange_seconds(last: RoundRecord) -> float:
    """Return how long the answers took in the round before; 0 if there was none."""
    return last.seconds - last.seconds_evaluation if last.round else 0.0


def epsilon_max(releases: dict[str, SiteRelease]) -> float | None:
    """Return the largest epsilon of a site, or None if there is none to state."""
    values = [release.epsilon for release in releases.values() if release.protected and release.steps]
    return max(values) if values else None


def _before_training(coordinator: Coordinator) -> Checkpoint:
    started = time.monotonic()
    metrics = coordinator.evaluate(coordinator.initial_adapter)
    seconds = time.monotonic() - started
    first = RoundRecord(round=0, metrics=metrics, seconds=seconds, seconds_evaluation=seconds)
    checkpoint = Checkpoint(
        job_sha256=coordinator.job.sha256,
        round_number=0,
        adapter=coordinator.initial_adapter,
        history=[first],
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


def _account(
    releases: dict[str, SiteRelease], replies: dict[str, TrainReply], job: Job, round_number: int
) -> dict[str, SiteRelease]:
    """Return the releases with this round's executed mechanisms added; an update that came before counts once."""
    result = dict(releases)
    for name, reply in sorted(replies.items()):
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
        unanswered = tuple(number for number in release.unanswered if number != round_number)
        update_sha256 = hashlib.sha256(reply.update).hexdigest()
        if (round_number, update_sha256) in zip(release.rounds, release.updates, strict=True):
            result[name] = replace(release, unanswered=unanswered)
            continue
        events = release.events
        if private:
            executed = GaussianSteps(
                noise_multiplier=reply.noise_multiplier, sample_rate=reply.sample_rate, steps=reply.steps
            )
            events = _merged([*release.events, executed])
        result[name] = replace(
            release,
            events=events,
            rounds=(*release.rounds, round_number),
            updates=(*release.updates, update_sha256),
            unanswered=unanswered,
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
    releases: dict[str, SiteRelease], sites: Sequence[SiteDescription], job: Job, round_number: int
) -> dict[str, SiteRelease]:
    """Return the releases with the requests noted whose outcome nobody here knows: the site may have answered them."""
    plan = PrivacyPlan.from_job(job)
    result = dict(releases)
    for site in sites:
        release = result.get(site.site) or SiteRelease(
            site=site.site,
            unit=plan.unit,
            records_per_person=plan.records_per_person,
            delta=plan.delta,
            max_grad_norm=plan.max_grad_norm,
            declared_records=site.declared_records,
            randomness="os",
            epsilon_budget=0.0,
            steps_planned=plan.planned_steps,
            private=plan.private,
        )
        if round_number not in (*release.unanswered, *release.rounds):
            per_round = plan.mechanism(job.training.local_steps) if plan.private else None
            unanswered = (*release.unanswered, round_number)
            result[site.site] = replace(release, unanswered=unanswered, per_round=per_round)
    return result


def _merged(events: Sequence[GaussianSteps]) -> tuple[GaussianSteps, ...]:
    """Return `events` with equal mechanisms added up, in order of first appearance."""
    steps: dict[tuple[float, float], int] = {}
    for event in events:
        key = (event.noise_multiplier, event.sample_rate)
        steps[key] = steps.get(key, 0) + event.steps
    return tuple(GaussianSteps(noise_multiplier=s, sample_rate=q, steps=n) for (s, q), n in steps.items())


def _with_interrupted_round(checkpoint: Checkpoint, authority: Authority, job: Job) -> Checkpoint:
    """Return the checkpoint with those noted whom an earlier process asked for the next round before it died.

    They may have executed it, and may not be there any more when it is asked for again.
    """
    following = checkpoint.round_number + 1
    releases = _account_unanswered(checkpoint.releases, authority.asked_before(following), job, following)
    return replace(checkpoint, releases=releases)


def _exchange(
    grid: Grid,
    requests: Callable[[Sequence[int]], list[Message]],
    nodes: Sequence[int],
    *,
    timeout: float,
    expected: float,
    repeat: bool,
    meanwhile: Callable[[], None],
) -> list[tuple[int, Message]]:
    """Ask `nodes` and collect (node that was asked, reply) until all answered or `timeout` seconds passed.

    Flower's own `send_and_receive` polls every three seconds; this begins with every tenth of one. A reply is matched by the
    request that it answers: an error about a lost message comes from the SuperLink, not from the node.

    Args:
        requests: makes the messages for some nodes, signed now.
        expected: seconds that the answers will take, as far as one knows; asking before costs the sites' calls their time.
        repeat: ask those again who are silent; only for sites that answer a repeated request as the first.
        meanwhile: what can be done once the requests are out.
    """
    node_of: dict[str, int] = {}

    def ask(some: Sequence[int]) -> None:
        messages = requests(some)
        pushed = set(grid.push_messages(messages))
        metadata = [message.metadata for message in messages]
        node_of.update({facts.message_id: facts.dst_node_id for facts in metadata if facts.message_id in pushed})

    started, ask_again = time.monotonic(), ASK_AGAIN_SECONDS
    ask(nodes)
    meanwhile()
    collected: dict[int, Message] = {}
    time.sleep(max(0.0, min(_PATIENT_SHARE * expected, _LONGEST_POLL_SECONDS) - (time.monotonic() - started)))
    while waiting := {identifier for identifier, node in node_of.items() if node not in collected}:
        arrived = list(grid.pull_messages(waiting))
        for message in arrived:
            node = node_of.get(message.metadata.reply_to_message_id)
            if node is not None:
                collected.setdefault(node, message)
        elapsed = time.monotonic() - started
        if elapsed > timeout:
            break
        if repeat and elapsed > ask_again:
            ask([node for node in nodes if node not in collected])
            ask_again += 2 * ask_again
        if not arrived:
            # A long round is asked about less often: the delay stays within two percent of it.
            time.sleep(min(max(POLL_SECONDS, elapsed / 50), _LONGEST_POLL_SECONDS))
    return list(collected.items())
