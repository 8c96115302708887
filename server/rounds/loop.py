"""The round loop, resumable, on Flower's public Grid; the same for simulation and for real sites.

Reading order of one round: select, collect (send; check and add each reply as it comes), account,
aggregate, evaluate, checkpoint. Who adds the noise and keeps the account is another's business:
`server.rounds.local`, `server.rounds.secure` or `server.rounds.central`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from flwr.serverapp.grid import Grid
from torch import Tensor

from server.records.rounds import RoundRecord
from server.rounds.central import CentralPrivacy
from server.rounds.early_stopping import best_round, is_over, keeps_best, stopped_early
from server.rounds.local import LocalPrivacy
from server.rounds.observer import Observer
from server.rounds.roster import Authority, Roster
from server.rounds.site_metrics import collect_site_metrics
from server.rounds.update_bounds import adapter_norms
from server.rounds.updates import AtHand
from server.store.checkpoint import Checkpoint
from shared.errors import RunError, RunHeld
from shared.job.job import Job
from shared.privacy.statement import SiteRelease
from shared.tensors.adapters import Shapes
from shared.wire.messages import SiteDescription

Metrics = dict[str, float | None]
Privacy = LocalPrivacy | CentralPrivacy
"""Who adds the noise of a run and keeps its account: every site for itself, or the coordinator."""


class TooFewSites(RunError):
    """A round brought fewer valid updates than `federation.min_sites`; the last checkpoint stands.

    Attributes:
        releases: everything that sites released so far, this round included.
        at_once: whether it is to be attempted again at once, with other sites or by other keys.
    """

    def __init__(self, message: str, releases: dict[str, SiteRelease], *, at_once: bool = False) -> None:
        super().__init__(message)
        self.releases, self.at_once = releases, at_once


class UselessRound(RunHeld):
    """What the sites released in a round leads nowhere that they would follow; the last checkpoint stands.

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
        privacy: who adds the noise and keeps the account.
        evaluate: metrics of an adapter on public data.
        decide: the same on the public records that decide; None if there are none, or there is nothing to decide.
        evaluate_every: evaluate after every so many rounds, and always after the last.
        save: makes a checkpoint durable.
        observer: is told about progress.
        authority: signs requests to real sites; with it, too few sites are waited for.
    """

    job: Job
    initial_adapter: dict[str, Tensor]
    update_shapes: Shapes
    privacy: Privacy
    evaluate: Callable[[dict[str, Tensor]], Metrics]
    evaluate_every: int
    save: Callable[[Checkpoint], None]
    observer: Observer
    authority: Authority | None = None
    decide: Callable[[dict[str, Tensor]], Metrics] | None = None

    def evaluated(self, adapter: dict[str, Tensor]) -> tuple[Metrics, Metrics]:
        """Return (metrics, those that decide) of an adapter."""
        metrics = self.evaluate(adapter)
        return metrics, self.decide(adapter) if self.decide else {}


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
        RunHeld: if a person must act before it goes on.
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
        resume_from = coordinator.privacy.resume(resume_from, authority)
    sites = roster.wait()
    checkpoint = resume_from or _before_training(coordinator)
    while not ended(checkpoint):
        try:
            checkpoint = _run_round(grid, coordinator, sites, checkpoint)
        except (TooFewSites, UselessRound) as error:
            # Updates that came are releases, aggregated or not.
            checkpoint = replace(checkpoint, releases=error.releases)
            coordinator.save(checkpoint)
            if isinstance(error, UselessRound) or (authority is None and not error.at_once):
                raise
            observer.waiting(str(error))
            if not error.at_once:
                roster.pause(str(error))
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
        checkpoint = _with_site_metrics(grid, coordinator, sites, checkpoint)
    return checkpoint


def _before_training(coordinator: Coordinator) -> Checkpoint:
    started = time.monotonic()
    metrics, deciding = coordinator.evaluated(coordinator.initial_adapter)
    seconds = time.monotonic() - started
    first = RoundRecord(
        round=0,
        metrics=metrics,
        deciding=deciding,
        norms=adapter_norms(coordinator.initial_adapter, coordinator.update_shapes),
        seconds=seconds,
        seconds_evaluation=seconds,
    )
    checkpoint = Checkpoint(
        job_sha256=coordinator.job.sha256,
        round_number=0,
        adapter=coordinator.initial_adapter,
        history=[coordinator.privacy.published(first)],
        best_adapter=coordinator.initial_adapter if keeps_best(coordinator.job) else {},
    )
    coordinator.save(checkpoint)
    coordinator.observer.round_done(checkpoint)
    return checkpoint


def _run_round(
    grid: Grid, coordinator: Coordinator, sites: Mapping[int, SiteDescription], checkpoint: Checkpoint
) -> Checkpoint:
    job, privacy, round_number = coordinator.job, coordinator.privacy, checkpoint.round_number + 1
    started = time.monotonic()
    # 1. Select: all, a public draw, or the coordinator's secret coins.
    attempt = privacy.begin(round_number)
    asked = {node: sites[node] for node in attempt.draw(sites)}
    # 2. Send the same bytes to everyone; check and add each reply as it comes.
    updates = attempt.collect(
        AtHand(
            grid=grid,
            job=job,
            authority=coordinator.authority,
            observer=coordinator.observer,
            shapes=coordinator.update_shapes,
            checkpoint=checkpoint,
            asked=asked,
            meanwhile=lambda: privacy.account_ahead(checkpoint.releases),
        )
    )
    # 3. Account, before anything can fail: a release is a release, aggregated or not.
    unknown = [site for site in asked.values() if site.site in updates.unknown]
    sha256 = hashlib.sha256(updates.adapter).hexdigest()  # of what they were sent
    releases = attempt.account(checkpoint.releases, updates.made, unknown, sha256)
    if len(updates.names) < privacy.least_updates:
        raise TooFewSites(updates.shortage(), releases, at_once=updates.voided)
    # 4. Aggregate, with noise if it is the coordinator's to add, and move by the server optimiser.
    try:
        following, server_state = updates.result()
    except RunHeld as error:
        raise UselessRound(str(error), releases) from None
    # 5. Evaluate on public data.
    before_evaluation = time.monotonic()
    due = round_number % coordinator.evaluate_every == 0 or round_number == job.training.rounds
    metrics, deciding = coordinator.evaluated(following) if due else ({}, {})
    finished = time.monotonic()
    # 6. Record what may be published.
    record = RoundRecord(
        round=round_number,
        metrics=metrics,
        deciding=deciding,
        epsilon_max=privacy.epsilon(releases),
        sites=updates.names,
        failed=dict(sorted(updates.failed.items())),
        doubted=dict(sorted(updates.doubted.items())),
        norms=adapter_norms(following, coordinator.update_shapes),
        bytes_up=updates.bytes_up,
        bytes_down=updates.bytes_down,
        seconds=finished - started,
        seconds_evaluation=finished - before_evaluation,
    )
    history = [*checkpoint.history, privacy.published(record)]
    is_best = bool(checkpoint.best_adapter) and best_round(history, job) == round_number
    # 7. The caller makes this durable.
    return Checkpoint(
        job_sha256=job.sha256,
        round_number=round_number,
        adapter=following,
        server_state=server_state,
        releases=releases,
        history=history,
        best_adapter=following if is_best else checkpoint.best_adapter,
    )


def _metrics_due(checkpoint: Checkpoint, job: Job) -> bool:
    """Return whether the last round is over and the sites were not asked for their metrics yet."""
    return is_over(checkpoint, job) and bool(job.site_metrics.names) and checkpoint.site_metrics is None


def _with_site_metrics(
    grid: Grid, coordinator: Coordinator, sites: Mapping[int, SiteDescription], checkpoint: Checkpoint
) -> Checkpoint:
    """Ask for the site metrics; return the last checkpoint, durable, with what they spent."""
    privacy, observer = coordinator.privacy, coordinator.observer
    checkpoint = collect_site_metrics(
        grid,
        coordinator.job,
        sites,
        checkpoint,
        authority=coordinator.authority,
        observer=observer,
        earlier=privacy.earlier,
    )
    last_round = replace(checkpoint.history[-1], epsilon_max=privacy.epsilon(checkpoint.releases))
    checkpoint = replace(checkpoint, history=[*checkpoint.history[:-1], last_round])
    coordinator.save(checkpoint)
    observer.metrics_done(checkpoint)
    return checkpoint
