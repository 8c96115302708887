"""`privacy.json`: what a site, or a trusted coordinator, released and what it spent; enough to recompute epsilon.

Formal guarantees (tests: tests/shared/privacy/test_statement.py, test_central.py, tests/server/reports/test_compliance_report.py)
    * Every epsilon in a record is composed from the executed events that stand beside it.
    * No epsilon is written for a release whose randomness was injected or that added no noise.
    * What is read back as a release is what was executed; no recorded epsilon or sentence enters it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from shared.errors import PrivacyError
from shared.files.json_files import Count, Positive, Share, damaged, finite_or_none, read_record
from shared.job.job import Job
from shared.privacy.accountant.cross_check import CrossCheck, prv_cross_check
from shared.privacy.accounting import GaussianSteps, check_delta
from shared.privacy.central_statement import CentralRelease, central_statement, not_covered_central
from shared.privacy.planned import PlannedPrivacy
from shared.privacy.randomness import Origin
from shared.privacy.shared_noise import SharedNoise
from shared.privacy.statement import ACCOUNTANT, Release, SiteRelease, not_covered, relation, site_statement

COORDINATOR = "coordinator"
_LATER_KEYS = ("shared", "epsilon_alone")


@dataclass(frozen=True, kw_only=True)
class PrivacyRecord:
    """What the record of a site and that of a trusted coordinator both tell; see `SiteRelease` for what was executed.

    Attributes:
        sample_rate, noise_multiplier: of the last event of training; None if there was none.
        epsilon_budget: cap of the site, or what the job plans for the coordinator; None if unknown.
        epsilon_spent: of everything that arrived, by PLD; None where none may be stated.
        epsilon_spent_prv, epsilon_spent_prv_missing: the same by PRV, or why there is none.
        epsilon_planned: of a run that ended early, or whose noise is shared: epsilon of the whole plan, which was promised.
        events: everything that arrived; metrics that did are the last one.
        statement: all of this in words, and what it does not cover, which `not_covered` lists.
    """

    run: str | None = None
    unit: str
    relation: str | None = None
    delta: Share
    sample_rate: Share | None = None
    noise_multiplier: Positive | None = None
    steps_planned: Count
    steps_executed: Count | None = None
    epsilon_budget: Positive | None = None
    epsilon_spent: Positive | None = None
    epsilon_spent_prv: Positive | None = None
    epsilon_spent_prv_missing: str | None = None
    epsilon_planned: Positive | None = None
    accountant: str | None = None
    randomness: Origin
    private: bool = True
    events: tuple[GaussianSteps, ...]
    rounds: tuple[Count, ...]
    statement: str | None = None
    not_covered: tuple[str, ...] = ()

    @property
    def training(self) -> tuple[GaussianSteps, ...]:
        """The executed steps of training."""
        return self.events

    @property
    def recorded(self) -> float | None:
        """The epsilon that was written down for everything that was executed, as far as anybody knows."""
        return self.epsilon_spent

    @property
    def epsilon_stated(self) -> float | None:
        """What was spent at most (requests that were never answered count as executed), or was promised."""
        return self.recorded if self.epsilon_planned is None else self.epsilon_planned

    @property
    def over_budget(self) -> bool:
        """Whether more is stated than the cap."""
        if self.epsilon_stated is None or self.epsilon_budget is None:
            return False
        return self.epsilon_stated > self.epsilon_budget * (1 + 1e-6)


@dataclass(frozen=True, kw_only=True)
class MetricsEvent(GaussianSteps):
    """The site metrics that were asked for; `sha256` is None if nobody here knows whether they were released."""

    names: tuple[str, ...]
    sha256: str | None

    @property
    def mechanism(self) -> GaussianSteps:
        """As the accountant takes it."""
        return GaussianSteps(noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate, steps=self.steps)


@dataclass(frozen=True, kw_only=True)
class SiteRecord(PrivacyRecord):
    """`sites/NAME/privacy.json`.

    Attributes:
        epsilon_bound: with every request of unknown outcome counted as executed.
        shared: how many share the noise; None where each site adds all of it.
        epsilon_alone: of the whole plan, if secure aggregation fails.
        metrics: the release of metrics; None if there was none.
    """

    site: str
    records_per_person: Count | None = None
    max_grad_norm: Positive
    epsilon_bound: Positive | None = None
    rounds_unanswered: tuple[Count, ...] = ()
    update_sha256: tuple[str, ...]
    declared_records: Count
    metrics: MetricsEvent | None = None
    # Of shares of the noise only: its epsilons above are those of the sum, `events` and `noise_multiplier` those of one share.
    shared: SharedNoise | None = None
    epsilon_alone: Positive | None = None

    @classmethod
    def of(cls, release: SiteRelease, run: str, *, stopped_early: bool = False, pretrained: bool = True) -> SiteRecord:
        """Return the record of what a site released; see `run_statement` for the two flags."""
        metrics = None
        if release.metrics_mechanism is not None:
            mechanism = asdict(release.metrics_mechanism)
            metrics = MetricsEvent(**mechanism, names=release.metrics, sha256=release.metrics_sha256)
        return cls(
            **_stated(release, run, release.unit, stopped_early=stopped_early or release.shared is not None),
            site=release.site,
            records_per_person=release.records_per_person,
            max_grad_norm=release.max_grad_norm,
            epsilon_budget=release.epsilon_budget or None,
            epsilon_bound=finite_or_none(release.epsilon_bound) if release.protected else None,
            rounds_unanswered=release.unanswered,
            update_sha256=release.updates,
            declared_records=release.declared_records,
            metrics=metrics,
            statement=site_statement(release, run, stopped_early=stopped_early, pretrained=pretrained),
            not_covered=not_covered(release.unit, pretrained=pretrained, shared=release.shared is not None),
            shared=release.shared,
            epsilon_alone=finite_or_none(release.epsilon_alone)
            if release.protected and release.epsilon_alone
            else None,
        )

    def fields(self) -> dict[str, Any]:
        """Return what is written: keys that older versions did not have only where there is something to say."""
        return {key: value for key, value in asdict(self).items() if value is not None or key not in _LATER_KEYS}

    @property
    def training(self) -> tuple[GaussianSteps, ...]:
        """See `PrivacyRecord`."""
        return self.events[:-1] if self.metrics and self.metrics.sha256 is not None else self.events

    @property
    def recorded(self) -> float | None:
        """See `PrivacyRecord`."""
        return self.epsilon_spent if self.epsilon_bound is None else self.epsilon_bound

    def release(self, job: Job) -> SiteRelease:
        """Return what was executed, to be accounted anew.

        What was promised follows from the job, whatever the record says of it: how many steps were planned, and how many sites
        share the noise. A request of unknown outcome counts as the job planned it, as the coordinator counts it
        (`server.rounds.local`).

        Raises:
            PrivacyError: if it cannot be accounted for.
        """
        check_delta(self.delta)
        if len(self.rounds) != len(self.update_sha256):
            raise PrivacyError(f"{len(self.rounds)} rounds and {len(self.update_sha256)} hashes of updates")
        if self.private and self.rounds and not sum(event.steps for event in self.training):
            raise PrivacyError("updates were released, but no noisy step is recorded")
        private = self.private and job.privacy.mechanism != "none"
        plan = PlannedPrivacy.from_job(job) if private else None
        asked = plan is not None and bool(self.rounds or self.rounds_unanswered)
        return SiteRelease(
            site=self.site,
            unit=self.unit,
            records_per_person=self.records_per_person,
            delta=self.delta,
            max_grad_norm=self.max_grad_norm,
            declared_records=self.declared_records,
            randomness=self.randomness,
            epsilon_budget=self.epsilon_budget or 0.0,
            steps_planned=plan.planned_steps if plan else self.steps_planned,
            events=self.training,
            rounds=self.rounds,
            updates=self.update_sha256,
            unanswered=self.rounds_unanswered,
            per_round=plan.mechanism(job.training.local_steps) if plan and asked else None,
            metrics=self.metrics.names if self.metrics else (),
            metrics_mechanism=self.metrics.mechanism if self.metrics else None,
            metrics_sha256=self.metrics.sha256 if self.metrics else None,
            private=private,
            shared=plan.shared_noise if plan else None,
        )


@dataclass(frozen=True, kw_only=True)
class CoordinatorRecord(CentralRelease, PrivacyRecord):
    """`privacy.json` of the run itself: what a trusted coordinator published, the unit being one site."""

    released_by: str = COORDINATOR
    trusts: tuple[str, ...] = (COORDINATOR,)
    # Where a site's record stands under local DP.
    site: ClassVar[str] = COORDINATOR
    declared_records: ClassVar[None] = None
    rounds_unanswered: ClassVar[tuple[int, ...]] = ()

    @classmethod
    def of(
        cls, release: CentralRelease, run: str, *, stopped_early: bool = False, pretrained: bool = True
    ) -> CoordinatorRecord:
        """Return the record of what the coordinator published; see `run_statement` for the two flags."""
        return cls(
            **vars(release) | _stated(release, run, "site", stopped_early=stopped_early),
            statement=central_statement(release, run, stopped_early=stopped_early).one_site,
            not_covered=not_covered_central(pretrained=pretrained),
        )


AnyRecord = SiteRecord | CoordinatorRecord
"""Of whoever stands for a guarantee: each site, or the coordinator alone."""


def read_sites(run_dir: Path) -> list[SiteRecord]:
    """Return the record of every site of a run, by the names of their folders; see `read_site`."""
    return [read_site(path) for path in sorted(run_dir.glob("sites/*/privacy.json"))]


def read_site(path: Path) -> SiteRecord:
    """Return the record of a site.

    Raises:
        RunError: as `read_record` does, and if metrics were released and are not the last event: epsilon would be too small.
    """
    record = read_record(path, SiteRecord)
    found = record.metrics
    if found and found.sha256 is not None and record.events[-1:] != (found.mechanism,):
        raise damaged(path, "metrics were released, but the last of its events is not their release")
    return record


def require_claim(record: AnyRecord, path: Path) -> None:
    """Raise `RunError` unless a private record states an epsilon, or test randomness leaves none to state."""
    if record.randomness != "injected" and record.epsilon_spent is None:
        raise damaged(path, "epsilon_spent is missing, without which no privacy can be claimed")


def _stated(release: Release, run: str, unit: str, *, stopped_early: bool) -> dict[str, Any]:
    """Return what both kinds of record state in the same words."""
    protected = release.protected
    check = prv_cross_check(release.spent_events, release.delta) if protected else CrossCheck()
    last = release.events[-1] if release.events else None
    return {
        "run": run,
        "unit": unit,
        "relation": relation(unit),
        "delta": release.delta,
        "sample_rate": last.sample_rate if last else None,
        "noise_multiplier": last.noise_multiplier if last else None,
        "steps_planned": release.steps_planned,
        "steps_executed": release.steps,
        "epsilon_spent": finite_or_none(release.epsilon) if protected else None,
        "epsilon_spent_prv": check.epsilon,
        "epsilon_spent_prv_missing": check.reason,
        "epsilon_planned": finite_or_none(release.epsilon_promised) if protected and stopped_early else None,
        "accountant": ACCOUNTANT,
        "randomness": release.randomness,
        "private": release.private,
        "events": release.arrived_events,
        "rounds": release.rounds,
    }
