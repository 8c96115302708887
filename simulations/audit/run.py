"""Audits of a run: what its plan promises, put to the test on canaries and on simulated data.

Guarantees (tests: tests/simulations/audit/test_run.py)
    * No ledger is opened and no file of a site is written. Tier 1 needs the job and the privacy records only; tiers 2 and 3
      train anew on the data of a simulation and refuse the run of a real federation.
    * A run that has no epsilon (not private, or with injected randomness) is refused; no number is printed for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from server.records.privacy import AnyRecord, CoordinatorRecord, read_sites
from server.records.results import AuditRecord
from server.records.run import RunRecord
from server.rounds.central_release import SitesRelease
from server.runs.folder import load_job
from shared.epsilons import noise_rounded_down, rate_rounded_up
from shared.errors import RunError
from shared.files.atomic import write_json
from shared.files.json_files import finite_or_none, read_if_there, read_record
from shared.job.job import Job
from shared.privacy.accounting import GaussianSteps
from shared.privacy.plan import PrivacyPlan
from shared.version import silotune_version
from simulations.audit.canaries import train_on_gradient_canaries
from simulations.audit.mechanism import MechanismAudit, Release, audit_mechanism
from simulations.audit.mechanism_release import TrainerRelease
from simulations.audit.one_run import Training, audit_one_run
from simulations.audit.result import AuditResult, Verdict
from simulations.audit.shares_release import SharesRelease

Progress = Callable[[int, int, str], None]
"""Called with (done, total, what) as an audit goes on."""

ALPHA = 1e-3
MECHANISM_DIMENSION = 64
COORDINATOR = "the coordinator"
STEPS_PER_CALL = 32  # tier 1 repeats a training 17 times; more steps in each show nothing new
_SAME_PLAN = 1e-2  # relative: a calibrated noise multiplier may differ a little between versions


@dataclass(frozen=True, kw_only=True)
class AuditedRun:
    """What a finished run claims.

    Attributes:
        folder: the run folder.
        job: its job.
        site: the site with the largest epsilon, whose claim is audited.
        plan: what that site executed; `planned_steps` is the number of executed steps. Of shares of the noise it is what the
            sum of the honest sites' shares executed.
        claim: epsilon of these steps as its privacy record states it, at `plan.delta`.
        share: what that site executed by itself, if its noise is a share.
    """

    folder: Path
    job: Job
    site: str
    plan: PrivacyPlan
    claim: float
    share: PrivacyPlan | None = None

    @property
    def steps(self) -> GaussianSteps:
        """The executed mechanism."""
        return self.plan.mechanism(self.plan.planned_steps)


def open_run(folder: Path) -> AuditedRun:
    """Read what `folder` claims.

    Raises:
        RunError: if it holds no run, released nothing, or claims no epsilon.
    """
    job = load_job(folder)
    if job.privacy.mechanism == "none":
        raise RunError(f"the run in {folder} is not private (privacy.mechanism 'none'): it claims no epsilon to audit.")
    # Under central DP the coordinator alone released anything under a guarantee.
    path = folder / "privacy.json"
    records: Sequence[AnyRecord] = read_sites(folder)
    if job.privacy.central:
        records = [read_record(path, CoordinatorRecord)] if path.exists() else []
    if not records:
        where = "privacy.json" if job.privacy.central else "sites/NAME/privacy.json"
        raise RunError(f"{folder} holds no {where}; finish the run first.")
    for record in records:
        if not record.private or record.randomness != "os":
            raise RunError(
                f"site {record.site} of {folder} has no epsilon: its updates were released without noise, or with randomness "
                "that was injected for a test. There is nothing to audit."
            )
    worst = max(records, key=lambda record: record.epsilon_spent or 0.0)
    if not worst.events:
        raise RunError(f"no site of {folder} released anything, so there is nothing to audit; finish the run first.")
    plan = _executed_plan(job, worst)
    share = plan if plan.honest is not None else None
    return AuditedRun(
        folder=folder,
        job=job,
        site=COORDINATOR if job.privacy.central else worst.site,
        plan=plan.of_sum,
        share=share,
        claim=math.inf if worst.epsilon_spent is None else worst.epsilon_spent,
    )


def _executed_plan(job: Job, record: AnyRecord) -> PrivacyPlan:
    """Return the job's plan with the steps of a privacy record, if the two speak of the same mechanism."""
    plan = PrivacyPlan.of_coordinator(job) if job.privacy.central else PrivacyPlan.from_job(job)
    for event in record.training:
        found = (event.noise_multiplier, event.sample_rate)
        expected = (plan.noise_multiplier, plan.sample_rate)
        if not all(math.isclose(a, b, rel_tol=_SAME_PLAN) for a, b in zip(found, expected, strict=True)):
            raise RunError(
                f"the privacy record of site {record.site} has noise multiplier and sampling rate {found}, the job's plan "
                f"{expected}; they do not belong together. Restore the run folder."
            )
        plan = replace(plan, noise_multiplier=event.noise_multiplier)
    steps = sum(event.steps for event in record.training)
    released = len(record.events) > len(record.training)  # metrics, after the training
    return replace(plan, planned_steps=steps, delta=record.delta, metrics=plan.metrics if released else None)


def check_simulation(run: AuditedRun) -> None:
    """Raise `RunError` unless `run` is a simulation: an audit that trains never touches a real site's data."""
    if run.job.privacy.central:
        raise RunError(
            f"the noise of {run.folder} was added by the coordinator over all sites; tiers 2 and 3 train one site and so cannot "
            "audit it. Use --tier 1."
        )
    if run.share is not None:
        raise RunError(
            f"the noise of {run.folder} is shared by all sites; tiers 2 and 3 train one site and so cannot audit it. Use --tier "
            "1."
        )
    record = read_if_there(run.folder / "run.json", RunRecord)
    mode = (record and record.mode) or ""
    if not mode.startswith("simulation"):
        raise RunError(
            f"{run.folder} is {'a ' + mode if mode else 'not a simulation'}; tiers 2 and 3 train on the audited data and so work "
            "on simulations only. Use --tier 1, or simulate the job on public data and audit that."
        )


# --- tier 1 ---


def audit_run_mechanism(folder: Path, *, alpha: float = ALPHA, seed: int = 0) -> MechanismAudit:
    """Audit the mechanism of a run in seconds and write `audit/tier1.json` into its folder.

    The production trainer, or the coordinator's production round, runs on canaries with the run's plan: its sampling rate,
    noise multiplier and clipping norm, its optimiser, and as many steps per call as the run had, up to `STEPS_PER_CALL`. No data
    is read.

    Raises:
        RunError: see `open_run`.
    """
    run = open_run(folder)
    steps = min(run.plan.planned_steps, STEPS_PER_CALL)
    if run.share is not None:
        return _audit_sum(run, run.share, steps, alpha=alpha, seed=seed)
    release: Release = TrainerRelease(dimension=MECHANISM_DIMENSION, steps=steps, optimizer=run.job.training)
    if run.job.privacy.central:
        release = SitesRelease(dimension=MECHANISM_DIMENSION, rounds=steps, optimizer=run.job.aggregation)
    audit = audit_mechanism(
        release,
        replace(run.plan, planned_steps=steps),
        dimension=MECHANISM_DIMENSION,
        claim=run.claim,
        claimed_steps=run.plan.planned_steps,
        alpha=alpha,
        seed=seed,
    )
    save_result(run, mechanism_result(run, audit), seeds=[seed])
    return audit


def _audit_sum(run: AuditedRun, share: PrivacyPlan, steps: int, *, alpha: float, seed: int) -> MechanismAudit:
    """Audit both promises of shared noise: canaries against the opened sum of the honest sites, and against one site's words."""
    assert share.honest is not None  # noqa: S101 (it is a share)
    audits = []
    for sites, plan, claim in (
        (share.honest, run.plan, run.claim),
        (1, replace(share, honest=None), share.epsilon(share.planned_steps)),
    ):
        audits.append(
            audit_mechanism(
                SharesRelease(dimension=MECHANISM_DIMENSION, sites=sites),
                replace(plan, planned_steps=steps),
                dimension=MECHANISM_DIMENSION,
                claim=claim,
                claimed_steps=plan.planned_steps,
                alpha=alpha / 2,
                seed=seed,
            )
        )
    of_sum, of_share = audits
    order: tuple[Verdict, ...] = ("violated", "inconclusive", "consistent")
    # One result for both: a test that one site's words fail counts against the run, under a name of its own.
    both = replace(
        of_sum,
        p_values=dict(of_sum.p_values) | {f"{name}, one share": p for name, p in of_share.p_values.items()},
        alpha=alpha,
        observed_steps=of_sum.observed_steps + of_share.observed_steps,
        verdict=min(of_sum.verdict, of_share.verdict, key=order.index),
        noise_above=of_sum.noise_above or of_share.noise_above,
    )
    save_result(run, mechanism_result(run, both), seeds=[seed])
    return both


def mechanism_result(run: AuditedRun, audit: MechanismAudit) -> AuditResult:
    """Return a tier 1 audit in the form that all tiers share."""
    steps = min(run.plan.planned_steps, STEPS_PER_CALL)
    audited = "coordinator's round (with a fixed clipping bound)" if run.job.privacy.central else "trainer"
    if run.share is not None:
        audited = f"secure sum of {run.share.honest} honest sites, and one of its shares by itself,"
    return audit.result(
        f"the {audited} of this installation under the plan of {run.site} (unit {run.plan.unit}, sampling rate "
        f"{rate_rounded_up(run.plan.sample_rate)}, noise multiplier {noise_rounded_down(run.plan.noise_multiplier)}, "
        f"clipping norm {rate_rounded_up(run.plan.max_grad_norm)}), on canaries, {steps} of {run.plan.planned_steps} "
        f"steps per call, {audit.observed_steps} noisy steps in all; the accounting of all {run.plan.planned_steps} steps"
    )


# --- tier 2, gradient canaries ---


def audit_gradient_canaries(
    run: AuditedRun,
    *,
    num_canaries: int = 1000,
    trainings: int = 5,
    alpha: float = ALPHA,
    seed: int = 0,
    progress: Progress = lambda done, total, what: None,
) -> tuple[AuditResult, list[Training]]:
    """Guess which canary gradients went through the production trainer, seeing every noisy sum; also return the scores.

    Training t has the public seed `seed` + t.
    """
    release = TrainerRelease(dimension=num_canaries, steps=run.plan.planned_steps, micro_batch=num_canaries)
    done = []
    for number in range(trainings):
        progress(number, trainings, "trainings on canaries")
        done.append(train_on_gradient_canaries(release, run.plan, num_canaries=num_canaries, seed=seed + number))
    progress(trainings, trainings, "trainings on canaries")
    result = audit_one_run(
        done,
        run.steps,
        claim=run.claim,
        delta=run.plan.delta,
        alpha=alpha,
        audited=f"{trainings} trainings of {run.plan.planned_steps} steps under the plan of {run.site}, each on its own half of "
        f"{num_canaries} canary gradients, through the trainer of this installation; the guesser sees every noisy sum",
    )
    return result, done


# --- results ---


def save_result(run: AuditedRun, result: AuditResult, *, seeds: list[int]) -> AuditRecord:
    """Write `audit/tierN.json` atomically and return its content."""
    record = AuditRecord(
        **vars(result) | {name: finite_or_none(getattr(result, name)) for name in ("claim", "lower_bound", "ceiling")},
        run=run.job.name,
        job_sha256=run.job.sha256,
        site=run.site,
        seeds=tuple(seeds),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        version=silotune_version(),
    )
    write_json(run.folder / "audit" / f"tier{result.tier}.json", record)
    return record
