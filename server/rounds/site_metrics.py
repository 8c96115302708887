"""What the sites measure on their own held-out records: asked for once, after the last round, and added up.

Every site that took part may refuse; its refusal costs nothing and stops nothing. A site that was asked and never answered is
counted as if it had released: its own ledger knows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from flwr.app import Message
from flwr.serverapp.grid import Grid

from server.records.results import SiteMetrics
from server.rounds.earlier_requests import EarlierRequests
from server.rounds.exchange import Question, collect
from server.rounds.observer import Observer
from server.rounds.roster import Authority
from server.store.checkpoint import Checkpoint
from shared.epsilons import noise_rounded_down
from shared.errors import RunError
from shared.job.job import Job
from shared.privacy.plan import PrivacyPlan
from shared.privacy.statement import SiteRelease
from shared.runtime.site_metrics import estimate, num_bins
from shared.tensors import adapters
from shared.trust.receipts import Receipt
from shared.wire.messages import MetricsReply, Refusal, SiteDescription, unpack_metrics


def collect_site_metrics(
    grid: Grid,
    job: Job,
    sites: Mapping[int, SiteDescription],
    checkpoint: Checkpoint,
    *,
    authority: Authority | None,
    observer: Observer,
    earlier: EarlierRequests,
) -> Checkpoint:
    """Ask the sites that took part for the job's metrics and return the checkpoint with what came.

    Args:
        sites: node id -> description of those present.
        checkpoint: after the last round.
        earlier: what earlier processes of this run asked. A site that they asked about another adapter, before the run was
            put back, is not asked again: that would be a second release, where the job plans one.
    """
    # That of a round after the last planned one, also of a run that ended before it.
    number = job.training.rounds + 1
    adapter = adapters.encode(checkpoint.result)
    own = {hashlib.sha256(adapter).hexdigest()}
    asked = {
        node: site
        for node, site in sites.items()
        if site.site in checkpoint.releases and earlier.adapters_asked(site.site, number) <= own
    }
    observer.metrics_asked(number, [site.site for site in asked.values()], adapter)
    question = _Metrics(job, number, adapter, asked, observer)
    collect(grid, question, authority=authority)
    replies = question.replies
    # A refusal now says nothing of what a site answered an earlier process.
    unknown = question.unknown | earlier.sites_asked(number)
    released = _account(checkpoint.releases, replies, unknown, job)
    return replace(checkpoint, releases=released, site_metrics={name: replies[name].counts for name in sorted(replies)})


class _Metrics(Question[MetricsReply]):
    """The question for the metrics, and what came.

    Attributes:
        replies: by site, those that were taken.
    """

    kind = "metrics"

    def __init__(
        self, job: Job, number: int, adapter: bytes, sites: Mapping[int, SiteDescription], observer: Observer
    ) -> None:
        super().__init__(job, number, adapter, sites)
        self._observer = observer
        self.replies: dict[str, MetricsReply] = {}

    def unpack(self, message: Message) -> MetricsReply | Refusal:
        return unpack_metrics(message)

    def take(self, reply: MetricsReply, site: SiteDescription) -> None:
        _check(reply, site.site, self.job, self.adapter)
        self.unknown.discard(site.site)
        self.replies[site.site] = reply

    def received(self, receipt: Receipt) -> None:
        self._observer.receipt(receipt)

    def judged(self, site: str, reply: MetricsReply | None) -> None:
        """See `Question`; of metrics that were not taken only the reason is told."""
        self._observer.metrics_judged(site, self.replies.get(site), self.failed.get(site))


def site_metrics_record(checkpoint: Checkpoint, job: Job) -> SiteMetrics:
    """Return the content of `site_metrics.json`: noisy counts of every site, and what they say together."""
    counts = checkpoint.site_metrics or {}
    return SiteMetrics(
        noise_multiplier=job.site_metrics.noise_multiplier,
        largest_loss=job.site_metrics.largest_loss,
        labels=job.task.labels,
        sites=counts,
        estimates=tuple(
            estimate(name, [counts[site][name] for site in counts], job) for name in job.site_metrics.names if counts
        ),
    )


def _check(reply: MetricsReply, name: str, job: Job, adapter: bytes) -> None:
    """Raise `RunError` unless a reply is for this job and adapter, from this site, and has the counts that were asked for."""
    if reply.site != name:
        raise RunError(f"the node of site {name!r} answered as {reply.site!r}")
    if reply.job_sha256 != job.sha256 or reply.adapter_sha256 != hashlib.sha256(adapter).hexdigest():
        raise RunError("the metrics are of another job or another adapter")
    asked = job.site_metrics
    if not math.isclose(reply.noise_multiplier, asked.noise_multiplier, rel_tol=1e-6):
        raise RunError(
            f"the metrics carry noise of {noise_rounded_down(reply.noise_multiplier)}, but the job's plan is "
            f"{noise_rounded_down(asked.noise_multiplier)}"
        )
    sizes = {metric: num_bins(metric, job) for metric in asked.names}
    if {metric: len(values) for metric, values in reply.counts.items()} != sizes:
        raise RunError(f"the metrics do not have the counts that were asked for ({sizes})")
    if not all(math.isfinite(value) for values in reply.counts.values() for value in values):
        raise RunError("a count is not a finite number")


def _account(
    releases: dict[str, SiteRelease], replies: dict[str, MetricsReply], unknown: Iterable[str], job: Job
) -> dict[str, SiteRelease]:
    """Return the releases with the metrics added: those that came, and those of which nobody here knows."""
    plan, result = PrivacyPlan.from_job(job), dict(releases)
    for name in sorted({*replies, *unknown} & releases.keys()):
        reply = replies.get(name)
        release = replace(result[name], metrics=job.site_metrics.names, metrics_mechanism=plan.metrics)
        if reply is not None:
            sha256 = hashlib.sha256(reply.canonical()).hexdigest()
            randomness = reply.randomness if release.randomness == "os" else release.randomness
            release = replace(release, metrics_sha256=sha256, randomness=randomness)
        result[name] = release
    return result
