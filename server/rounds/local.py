"""Local DP: every site adds its own noise and keeps its own account; here is noted what each released.

Guarantee (tests: tests/server/rounds/test_loop.py, test_interrupted_rounds.py): every update that came counts,
once for each different one, aggregated or not; a request whose outcome nobody here knows is noted,
for the site may have answered it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from server.aggregation import Adapter, Aggregation
from server.records.rounds import RoundRecord
from server.rounds.earlier_requests import EarlierRequests
from server.rounds.releases import Made, Releases, unknown_release, with_update
from server.rounds.roster import Authority
from server.rounds.updates import Arrived, AtHand, collect_updates
from server.store.checkpoint import Checkpoint
from shared.job.job import Job
from shared.privacy.accounting import GaussianSteps, compose_epsilon
from shared.privacy.plan import PrivacyPlan
from shared.privacy.statement import SiteRelease
from shared.tensors.adapters import Shapes
from shared.wire.messages import SiteDescription


class LocalPrivacy:
    """What a coordinator needs where sites protect themselves, or nobody does.

    `server.rounds.central.CentralPrivacy` has the same interface; the round loop never asks which it has.

    Attributes:
        least_updates: a round with fewer is not aggregated.
        earlier: what earlier processes of this run asked of the sites after its checkpoint.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self.least_updates = job.federation.min_sites
        self.earlier = EarlierRequests()

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise `RunError` if the account lacks a completed round: never, it lies in the checkpoint."""

    def resume(self, checkpoint: Checkpoint, authority: Authority | None) -> Checkpoint:
        """Return the checkpoint to go on from: what was asked after it may have been executed."""
        if authority is None:
            return self.with_open_requests(checkpoint, EarlierRequests())
        self.earlier = EarlierRequests(authority.asked_since(checkpoint.round_number))
        return self.with_open_requests(checkpoint, self.earlier)

    def with_open_requests(self, checkpoint: Checkpoint, asked: EarlierRequests) -> Checkpoint:
        """Return `checkpoint` with what was asked after it, and so may have been executed, in the sites' accounts.

        Simulated sites, which nobody signs requests to, release nothing to anybody in a round that is given up.
        """
        return replace(checkpoint, releases=asked.accounted(checkpoint.releases, self._job))

    def begin(self, round_number: int) -> LocalRound:
        """Return one attempt at a round."""
        return LocalRound(self._job, round_number, self.earlier)

    def account_ahead(self, releases: Releases) -> None:
        """Compose what will be spent after this round, while sites train; the accountant remembers."""
        plan = PrivacyPlan.from_job(self._job)
        if plan.private:
            steps = self._job.training.local_steps
            more = plan.together(steps) or plan.mechanism(steps)
            for events in {release.spent_events for release in releases.values()} or {()}:
                compose_epsilon([*events, more], plan.delta)

    def epsilon(self, releases: Releases) -> float | None:
        """Return the largest epsilon of a site, or None if there is none to state."""
        values = [release.epsilon for release in releases.values() if release.protected and release.steps]
        return max(values) if values else None

    def published(self, record: RoundRecord) -> RoundRecord:
        """Return a round's record as it may be published: here, who took part is no secret."""
        return record

    def release(self) -> None:
        """Return what the coordinator itself has released under noise of its own: nothing."""


class LocalRound:
    """One attempt at one round."""

    def __init__(self, job: Job, round_number: int, earlier: EarlierRequests) -> None:
        self._job, self._number, self._earlier = job, round_number, earlier

    def draw(self, sites: Mapping[int, SiteDescription]) -> list[int]:
        """Return the node ids to ask: all sites, or some by the public seed."""
        return select_sites(sites, self._job, self._number)

    def collect(self, at_hand: AtHand) -> Arrived:
        """Ask the sites, and return what came."""
        return collect_updates(at_hand, self.aggregation)

    def aggregation(
        self, current: Adapter, server_state: Adapter, shapes: Shapes, asked_records: Sequence[int]
    ) -> Aggregation:
        """Return the round's weighted mean, empty; exact where both LoRA factors are trained."""
        lora = self._job.lora
        exact_scaling = lora.alpha / lora.rank if self._job.averages_products else None
        config = self._job.aggregation
        return Aggregation(current, server_state, shapes, asked_records, config=config, exact_scaling=exact_scaling)

    def account(
        self, releases: Releases, made: Mapping[str, Made], unknown: Sequence[SiteDescription], adapter_sha256: str
    ) -> dict[str, SiteRelease]:
        """Return what every site has released; an update that came before counts once.

        Args:
            releases: before this round.
            made: the updates that came, by site, aggregated or not.
            unknown: sites that may have released one that nobody here knows of.
            adapter_sha256: of the adapter that the sites were sent.
        """
        plan, result = PrivacyPlan.from_job(self._job), dict(releases)
        for name, one in sorted(made.items()):
            reply = one.reply
            release = result.get(name) or replace(
                unknown_release(name, reply.declared_records, plan),
                delta=reply.delta,
                max_grad_norm=reply.max_grad_norm,
            )
            unanswered = self._unanswered(release, adapter_sha256, came=True)
            result[name] = _with_reply(replace(release, unanswered=unanswered), self._number, one)
        per_round = plan.mechanism(self._job.training.local_steps) if plan.private else None
        for site in sorted(unknown, key=lambda site: site.site):
            release = result.get(site.site) or unknown_release(site.site, site.declared_records, plan)
            unanswered = self._unanswered(release, adapter_sha256, came=False)
            result[site.site] = replace(release, unanswered=unanswered, per_round=per_round)
        return result

    def _unanswered(self, release: SiteRelease, adapter_sha256: str, *, came: bool) -> tuple[int, ...]:
        """Return the rounds of unknown outcome, this one being answered, or not, after others that nobody answered."""
        others = tuple(number for number in release.unanswered if number != self._number)
        lost = self._earlier.lost(release.site, self._number, adapter_sha256)
        if not came:
            known = release.rounds.count(self._number)
            known -= self._earlier.came_from_others(release.site, self._number, adapter_sha256)
            lost += known <= 0  # else it came before, and this one was a repetition
        return (*others, *[self._number] * lost)


def _with_reply(release: SiteRelease, round_number: int, made: Made) -> SiteRelease:
    """Return `release` with the mechanism that an update says was executed."""
    reply = made.reply
    private = reply.noise_multiplier > 0
    executed = None
    if private:
        executed = GaussianSteps(
            noise_multiplier=reply.noise_multiplier, sample_rate=reply.sample_rate, steps=reply.steps
        )
    return replace(
        with_update(release, round_number, made.update_sha256, executed),
        epsilon_budget=reply.epsilon_budget,
        private=release.private and private,
        randomness=reply.randomness if release.randomness == "os" else release.randomness,
    )


def select_sites(sites: Mapping[int, SiteDescription], job: Job, round_number: int) -> list[int]:
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
