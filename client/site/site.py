"""One site: its own configuration, data, ledger and outbox in one folder, and its answers.

The way from a request to a release is `client.site.release`; what a site keeps is `client.site.opened`.

Guarantees (tests: tests/client/site/test_site.py)
    * Whether a request is answered, and how a refusal reads, follows from the request, from what
      the site declares and from its ledger, never from a record: a job trains without the records
      that it cannot use (client/site/usable.py), and whatever fails while records are read has one code
      and one text (tests/client/site/test_oracles.py; docs/decisions/0014).
    * A job is trained only if its unit of privacy is the one by which the site's budget counts
      (tests/client/site/test_person_site.py).
    * With a `Guard`, nothing is trained that is not signed and within the policy
      (tests/client/site/test_guard.py), nor, where the policy requires that, what people did not approve
      (tests/client/site/test_approved_jobs.py).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TypeVar

from client.site.opened import OpenedFolder
from client.site.release import Metrics, Update
from client.site.secure.shares import Shares
from client.site.terms import check_terms
from client.site.usable import PUBLIC_ERRORS, LeftOut
from client.training.proof import load_proven
from shared.errors import SilotuneError, TrustError, place_of
from shared.job.job import Job
from shared.runtime.runtime import Runtime, load_runtime
from shared.secure_sum.messages import Ready
from shared.trust.signed_job import SignedJob
from shared.version import silotune_version
from shared.wire.messages import MetricsReply, Refusal, SiteDescription, TrainReply, TrainRequest

log = logging.getLogger("silotune.site")

AnswerT = TypeVar("AnswerT")


class Site(OpenedFolder):
    """A site's folder, opened, that answers."""

    @functools.cached_property
    def update(self) -> Update:
        """Releases the updates of rounds."""
        return Update(self)

    @functools.cached_property
    def shares(self) -> Shares:
        """Takes part in rounds under secure aggregation."""
        return Shares(self)

    @functools.cached_property
    def metrics(self) -> Metrics:
        """Releases the site metrics."""
        return Metrics(self)

    def describe(self) -> SiteDescription:
        """Return the public description of this site."""
        return SiteDescription(
            site=self.config.name, declared_records=self.declared_records, version=silotune_version()
        )

    def accept(self, signed_job: SignedJob | None) -> SiteDescription | Refusal:
        """Describe this site; given a job, first check it and load its model, so that no round has to."""
        if signed_job is None:
            return self.describe()

        def prepare() -> SiteDescription:
            self.admit_job(signed_job)
            self.prepare(signed_job.job)
            # Central DP is accounted by the coordinator; a site keeps no account of unit "site".
            if signed_job.job.privacy.mechanism != "central":
                self.checked_ledger()
            self.guard.prepared(signed_job)
            return self.describe()

        return self.guarded(prepare, job=signed_job.job, round_number=None)

    def prepare(self, job: Job) -> Runtime:
        """Load and prove the model, encode the data, warm the cache; releases nothing."""
        runtime = load_proven(job, self.config.compute.of_each)
        self.usable(runtime, job)
        return runtime

    def examine(self, job: Job) -> LeftOut:
        """Return what `job` could not use of the records, for the site's engineer; notes nothing.

        Raises:
            PolicyError: the job does not fit what the site declares.
            ModelError, ConfigError: the job's model cannot be loaded here.
        """
        check_terms(self.config, job, declared_records=self.declared_records)
        summed = job.privacy.shares_noise
        return self.trained.usable(load_runtime(job, self.config.compute.of_each), summed=summed).left_out

    def answer(self, request: TrainRequest) -> TrainReply | Refusal:
        """Train one round, or refuse with a text that reveals nothing about the data."""
        return self.guarded(lambda: self.update.make(request), job=request.job, round_number=request.round_number)

    def answer_ready(self, request: TrainRequest) -> Ready | Refusal:
        """Compute for an attempt at a round under secure aggregation, and say so; nothing is released."""
        return self.guarded(lambda: self.shares.ready(request), job=request.job, round_number=request.round_number)

    def answer_masked(self, request: TrainRequest) -> TrainReply | Refusal:
        """Release the masked input for a roster, or refuse with a text that reveals nothing about the data."""
        return self.guarded(lambda: self.shares.masked(request), job=request.job, round_number=request.round_number)

    def answer_metrics(self, request: TrainRequest) -> MetricsReply | Refusal:
        """Release the job's site metrics, or refuse with a text that reveals nothing about the data."""
        return self.guarded(lambda: self.metrics.make(request), job=request.job, round_number=request.round_number)

    def refuse_unreadable(self, error: SilotuneError) -> Refusal:
        """Answer a request that could not be read, or whose job is not signed by whom it says."""
        log.error("refused an unreadable request: %s", error)
        # A signature that does not hold concerns only what the coordinator sent itself.
        public = isinstance(error, TrustError)
        self.guard.refused(None, None, error, sent=public)
        if not public:
            return Refusal.withheld(self.config.name)
        reason = f"the job's signature does not hold: {error}"
        return Refusal(site=self.config.name, code=type(error).__name__, reason=reason)

    def guarded(self, act: Callable[[], AnswerT], *, job: Job, round_number: int | None) -> AnswerT | Refusal:
        """Return what `act` returns, or a refusal whose text reveals nothing about the data."""
        what = f"job {job.name}" + (f", round {round_number}" if round_number is not None else "")
        try:
            return act()
        except SilotuneError as error:
            public = isinstance(error, PUBLIC_ERRORS)
            log.log(logging.WARNING if public else logging.ERROR, "refused %s: %s", what, error)
            self.guard.refused(job, round_number, error, sent=public)
            if not public:
                return Refusal.withheld(self.config.name)
            return Refusal(site=self.config.name, code=type(error).__name__, reason=self.guard.told(error))
        except Exception as error:  # its text may quote data
            log.error("failed: %s: %s", what, place_of(error))
            self.guard.refused(job, round_number, error, sent=False)
            return Refusal.withheld(self.config.name)
