"""Everything in a run's files that does not fit together, in sentences; a report prints them before anything else.

Each function compares two accounts of the same thing that were written at different moments or by different parts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from server.records.results import AuditRecord
from server.reports.compliance.ledgers import LedgerFacts
from server.reports.compliance.log import LogFacts
from server.reports.run.run_data import RunData
from shared.epsilons import as_set, delta_rounded_up, noise_rounded_down, rate_rounded_up, rounded_up
from shared.job.job import Job
from shared.privacy.plan import PrivacyPlan
from shared.privacy.shared_noise import SharedNoise
from shared.privacy.statement import SiteRelease, Statement
from shared.trust.signed_job import SignedJob

if TYPE_CHECKING:
    from server.reports.compliance.facts import Accounted, CentralFacts, SiteFacts

# Accountants of other versions differ in the last digits only.
RECORD_TOLERANCE = 1e-3

# Epsilon and delta as statements print them.
_CLAIM = re.compile(r"\((\d+(?:\.\d+)?), (\d+(?:\.\d+)?(?:e-\d+)?)\)")

_NAMED_JOB = "The job in the run folder is the one that the run names by its hash"
_UNNAMED_JOB = (
    "Not checked: whether the job in the run folder is the one that was run. run.json names no hash of it (job_sha256)"
)
_TWO_AGREE = "Two accountants of different construction agree within their error."
_TWO_AGREE_ON_SHARES = (
    "Two accountants of different construction agree within their error, on both promises of every site and on what was "
    "spent{known}. The epsilons of a person at several sites are by one of them alone."
)
_CHECKS = (
    "The recorded epsilon of every site and of the composition over sites is the one recomputed from the executed steps; what "
    "was promised is what the job plans.",
    _TWO_AGREE,
    "Every aggregated update stands in the site's privacy record; every site executed the noise, sampling rate and steps that "
    "the job says, and none spent more than its cap.",
    "The coordinator's audit log, if there is one, is unbroken and names the same updates by the same hashes.",
    "Every given ledger covers the steps that the coordinator received.",
    "No audit says violated, and each audited this very job.",
)


_CENTRAL_CHECKS = (
    "The recorded epsilon of the coordinator is the one recomputed from the executed rounds; their noise, sampling rate and "
    "planned number are those that the job says.",
    _TWO_AGREE,
    "The coordinator's audit log, if there is one, is unbroken.",
    "No audit says violated, and each audited this very job.",
)


def what_was_compared(
    data: RunData, signed: SignedJob | None, sites: Sequence[SiteFacts] = (), central: CentralFacts | None = None
) -> tuple[str, ...]:
    """Return what a report says of a run in which nothing was found, and what could not be compared."""
    job = _UNNAMED_JOB if data.run.job_sha256 is None else _NAMED_JOB
    if signed is not None:
        job += "; it is the one that was signed" if data.run.job_sha256 is None else ", and the one that was signed"
    if central is not None:
        return f"{job}.", *_CENTRAL_CHECKS
    shares = [found for site in sites for found in (*site.promises, site) if site.promises]
    if not shares:
        return f"{job}.", *_CHECKS
    known = ", wherever the second gives a number" if any(found.epsilon_prv is None for found in shares) else ""
    return f"{job}.", *(_TWO_AGREE_ON_SHARES.format(known=known) if one is _TWO_AGREE else one for one in _CHECKS)


def job_discrepancies(data: RunData, job: Job, signed: SignedJob | None) -> Iterator[str]:
    """Is it the job that was run, and the one that was signed?"""
    if data.run.job_sha256 not in (None, job.sha256) or data.job_sha256_matches is False:
        yield "job.json is not the job that run.json names by its hash."
    if signed is not None and signed.job.sha256 != job.sha256:
        yield "job.json is not the job that was signed (signed_job.json)."


def site_discrepancies(data: RunData, job: Job, sites: Sequence[SiteFacts]) -> Iterator[str]:
    """Does each site's record agree with itself, with the job and with the rounds?"""
    private = [site for site in sites if site.release.private and site.release.events]
    plan = PrivacyPlan.from_job(job) if private else None
    for site in sites:
        release = site.release
        name = f"Site {release.site}"
        if not site.record_agrees:
            yield (
                f"{name}: the run recorded epsilon {shown(site.recorded)}, recomputed from the executed steps it is "
                f"{shown(site.epsilon)}. This report uses the recomputed number."
            )
        yield from _accountant_discrepancies(name, site)
        for promise in site.promises:
            yield from _accountant_discrepancies(f"{name}, {promise.title}", promise)
        if site.over_budget:
            yield f"{name} spent more in this run than its cap of {as_set(release.epsilon_budget)}."
        if release.unit != job.privacy.unit:
            yield f"{name}: recorded for the unit {release.unit}, the job's unit is {job.privacy.unit}."
        if plan is not None and plan.private and release.private:
            yield from _plan_discrepancies(name, release, job, plan)
            yield from _promise_discrepancies(name, site, plan)
    yield from _uncounted_rounds(data, sites)
    yield from _doubted_updates(data)
    yield from _uncounted_metrics(data, sites)


def _accountant_discrepancies(name: str, found: Accounted) -> Iterator[str]:
    if not found.accountants_agree:
        both = f"PLD {shown(found.epsilon)}, PRV {shown(found.epsilon_prv)}"
        yield f"{name}: the accountants differ by more than their error ({both})."


def _plan_discrepancies(name: str, release: SiteRelease, job: Job, plan: PrivacyPlan) -> Iterator[str]:
    """Is what the record names as executed what the job plans? The coordinator accepts nothing else."""
    if any(not _close(event.noise_multiplier, plan.noise_multiplier) for event in release.events):
        yield f"{name} did not add the noise that the job says (noise multiplier {noise_rounded_down(plan.noise_multiplier)})."
    if any(not _close(event.sample_rate, plan.sample_rate) for event in release.events):
        yield f"{name} did not sample at the job's rate, {rate_rounded_up(plan.sample_rate)}."
    if not _close(release.delta, plan.delta):
        yield f"{name}: recorded at delta {delta_rounded_up(release.delta)}, the job's delta is {delta_rounded_up(plan.delta)}."
    expected = len(release.rounds) * job.training.local_steps
    if release.steps != expected:
        yield f"{name}: {release.steps} steps are recorded for {len(release.rounds)} updates, which took {expected}."
    found = release.metrics_mechanism
    if found is not None and (
        plan.metrics is None
        or not _close(found.noise_multiplier, plan.metrics.noise_multiplier)
        or (found.sample_rate, found.steps) != (plan.metrics.sample_rate, plan.metrics.steps)
    ):
        yield f"{name}: its metrics were not released with the noise that the job says."


def _promise_discrepancies(name: str, site: SiteFacts, plan: PrivacyPlan) -> Iterator[str]:
    """Does the record promise what the job plans? Whoever wrote it had the job, so nothing here may differ."""
    record, release = site.record, site.release
    if record.steps_planned != plan.planned_steps:
        yield f"{name}: recorded with {record.steps_planned} planned steps, the job plans {plan.planned_steps}."
    if record.shared != plan.shared_noise:
        yield f"{name}: recorded with {_sharing(record.shared)}, by the job it is {_sharing(plan.shared_noise)}."
    if not release.protected:
        return
    promised = release.shared is not None or record.epsilon_planned is not None
    for what, found, computed in (
        ("its whole plan", record.epsilon_planned, release.epsilon_promised if promised else None),
        ("what it sends by itself", record.epsilon_alone, release.epsilon_alone),
    ):
        if not agree(found, computed):
            yield (
                f"{name}: the run recorded epsilon {shown(found)} for {what}, by the job it is {shown(computed)}. This report "
                "uses the latter."
            )


def _sharing(shared: SharedNoise | None) -> str:
    if shared is None:
        return "all its noise at each site"
    return f"noise that {shared.honest} honest sites share, against {shared.against}"


def _close(found: float, expected: float) -> bool:
    return math.isclose(found, expected, rel_tol=1e-6)


def _doubted_updates(data: RunData) -> Iterator[str]:
    rounds: dict[str, list[int]] = {}
    for record in data.federated.rounds:
        for name in record.doubted:
            rounds.setdefault(name, []).append(record.round)
    for name, numbers in sorted(rounds.items()):
        yield (
            f"Site {name}: its update was shorter than the prescribed noise alone would make it in "
            f"{len(numbers)} of its rounds, first in round {numbers[0]}; it seems to add too little noise."
        )


def _uncounted_metrics(data: RunData, sites: Sequence[SiteFacts]) -> Iterator[str]:
    counted = {site.release.site for site in sites if site.release.metrics_sha256 is not None}
    for name in sorted(set(data.site_metrics.sites if data.site_metrics else ()) - counted):
        yield f"Site {name}: its metrics stand in site_metrics.json, but its privacy record does not count them."


def _uncounted_rounds(data: RunData, sites: Sequence[SiteFacts]) -> Iterator[str]:
    counted = {site.release.site: set(site.release.rounds) for site in sites}
    for record in data.federated.rounds:
        for name in record.sites:
            if name not in counted:
                yield f"Site {name}: its update was aggregated in round {record.round}, but it has no privacy record."
            elif record.round not in counted[name]:
                yield f"Site {name}: its update was aggregated in round {record.round}, which its privacy record does not count."


def central_discrepancies(central: CentralFacts | None, job: Job) -> Iterator[str]:
    """Does the record of a trusted coordinator agree with itself and with the job?"""
    if central is None:
        return
    plan, record = PrivacyPlan.of_coordinator(job), central.record
    for event in record.events:
        if not (_close(event.noise_multiplier, plan.noise_multiplier) and _close(event.sample_rate, plan.sample_rate)):
            yield (
                f"The coordinator's record has noise multiplier {noise_rounded_down(event.noise_multiplier)} at rate "
                f"{rate_rounded_up(event.sample_rate)}, the job's plan {noise_rounded_down(plan.noise_multiplier)} at "
                f"{rate_rounded_up(plan.sample_rate)}."
            )
    if not _close(record.delta, plan.delta):
        yield (
            f"The coordinator's record is at delta {delta_rounded_up(record.delta)}, the job's is "
            f"{delta_rounded_up(plan.delta)}."
        )
    if record.steps_planned != plan.planned_steps:
        yield (
            f"The coordinator's record has {record.steps_planned} planned rounds, the job plans {plan.planned_steps}."
        )
    if record.epsilon_budget is not None and not agree(record.epsilon_budget, plan.epsilon()):
        yield (
            f"The coordinator's record promises epsilon {shown(record.epsilon_budget)} for all planned rounds; by the job it is "
            f"{shown(plan.epsilon())}."
        )
    if not central.record_agrees:
        yield (
            f"The coordinator recorded epsilon {shown(central.record.epsilon_spent)}, recomputed from the executed rounds it is "
            f"{shown(central.epsilon)}. This report uses the recomputed number."
        )
    yield from _accountant_discrepancies("The coordinator's record", central)
    executed = sum(event.steps for event in central.record.events)
    if executed != len(central.record.rounds):
        yield f"The coordinator's record names {len(central.record.rounds)} rounds, but {executed} are accounted for."


def statement_discrepancies(data: RunData, statements: Sequence[Statement]) -> Iterator[str]:
    """Does statement.json state what is recomputed?"""
    if data.statement is None or len(statements) != 1:
        return
    computed = {row.sites: row.epsilon for row in statements[0].up_to_m_sites}
    for row in data.statement.up_to_m_sites:
        if not computed:
            yield "statement.json states an epsilon, but none can be stated from what was executed."
            return
        if row.sites in computed and not agree(row.epsilon, computed[row.sites]):
            yield (
                f"statement.json states epsilon {shown(row.epsilon)} for a person at {row.sites} sites; recomputed it is "
                f"{shown(computed[row.sites])}."
            )
    yield from _claims_in_words(data.statement, statements[0])


def _claims_in_words(stated: Statement, computed: Statement) -> Iterator[str]:
    """Do the sentences claim what is recomputed? Words differ from version to version, the numbers of a claim do not."""
    if stated.one_site not in stated.text:
        yield "statement.json says two different things: its text is not that for a person at one site."
    found, expected = _CLAIM.findall(stated.one_site), _CLAIM.findall(computed.one_site)
    same = len(found) == len(expected) and all(
        math.isclose(float(one), float(other), rel_tol=RECORD_TOLERANCE, abs_tol=2 * RECORD_TOLERANCE)
        and _close(float(delta), float(other_delta))
        for (one, delta), (other, other_delta) in zip(found, expected, strict=True)
    )
    if not same:
        yield f"statement.json claims {_claims(found)} in its words; recomputed it is {_claims(expected)}."


def _claims(pairs: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"({epsilon}, {delta})" for epsilon, delta in pairs) or "nothing"


def log_discrepancies(
    log: LogFacts | None, sites: Sequence[SiteFacts], job: Job, *, at_hand: int | None = None
) -> Iterator[str]:
    """Does the coordinator's audit log name the same updates as the privacy records, and no request that these forgot?

    Of a round `at_hand` the privacy records say nothing before it is over.
    """
    if log is None:
        return
    log = log.before(at_hand)
    judged = {(entry.round, entry.site) for entry in log.updates}
    for number, name in sorted(log.asked - judged):
        release = next((site.release for site in sites if site.release.site == name), None)
        known = release is not None and number in {*release.rounds, *release.unanswered}
        if number <= job.training.rounds and not known:
            yield (
                f"Site {name}, round {number}: by the audit log it was asked, and nothing says what came of it. It may have "
                "released an update that is not counted; its own ledger knows. Let the coordinator end or resume the run."
            )
    accepted = {(entry.round, entry.site, entry.sha256) for entry in log.updates if entry.accepted}
    counted = {
        (number, site.release.site, sha256)
        for site in sites
        for number, sha256 in zip(site.release.rounds, site.release.updates, strict=True)
    }
    for number, name, _ in sorted(counted - accepted):
        yield f"Site {name}, round {number}: the counted update is not in the coordinator's audit log."
    for number, name, sha256 in sorted(accepted - counted, key=str):
        yield (
            f"Site {name}, round {number}: the audit log accepted the update {str(sha256)[:12]}…, which is not counted. It was "
            "released all the same; the site's own ledger counts it."
        )


def other_discrepancies(job: Job, ledgers: Sequence[LedgerFacts], audits: Sequence[AuditRecord]) -> Iterator[str]:
    """Do the accounts cover the releases, and do the audits speak of this job and not against it?"""
    for ledger in ledgers:
        yield from ledger.problems
    for audit in audits:
        if audit.verdict == "violated":
            yield f"The audit of tier {audit.tier} says: violated. The claim does not hold as stated."
        if audit.job_sha256 not in (None, job.sha256):
            yield f"The audit of tier {audit.tier} was made of another job."


def agree(one: float | None, other: float | None) -> bool:
    """Whether two epsilons are the same but for the last digits."""
    if one is None or other is None:
        return one == other
    return math.isclose(one, other, rel_tol=RECORD_TOLERANCE, abs_tol=RECORD_TOLERANCE)


def shown(value: float | None) -> str:
    """Return an epsilon for comparison, four decimals rounded up, or "none"."""
    if value is None:
        return "none"
    return rounded_up(value, 4)
