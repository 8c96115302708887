"""Finds out what a compliance report states: read from the files of one run and recomputed from what was executed.

Formal guarantees (tests: tests/server/reports/test_compliance_report.py)
    * Every epsilon is composed anew from the executed (noise_multiplier, sample_rate, steps), by PLD, and once more by PRV; a
      recorded number that differs is reported, never repeated (test_a_recorded_epsilon_that_differs_is_a_discrepancy).
    * Both promises of noise that sites share are composed so too, of all planned attempts
      (test_compliance_promises.py::test_both_promises_and_what_was_spent_have_a_second_accountant).
    * A site without noise, or with injected randomness, has no epsilon here (test_without_privacy_no_epsilon_is_printed).
    * Gaussian releases of metrics are composed with the training (test_released_metrics_are_composed).
    * Nothing in the run folder is written, and nothing outside it, its job's folder and the given accounts is read
      (test_the_run_folder_is_only_read).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from server.records.privacy import CoordinatorRecord, SiteRecord, read_site
from server.reports.compliance import checks
from server.reports.compliance.facts import (
    CentralFacts,
    ComposedEpsilon,
    Facts,
    Guarantee,
    PromiseFacts,
    Release,
    SiteFacts,
)
from server.reports.compliance.ledgers import Account, ledger_facts
from server.reports.compliance.log import LogFacts, read_log
from server.reports.run.formats import natural_key
from server.reports.run.reading import read_run
from server.reports.run.run_data import FileHash, RunData
from server.runs.folder import load_job
from server.store.home import CoordinatorHome
from server.store.submission import Submission
from shared.errors import PrivacyError, RunError, TrustError
from shared.files.json_files import read_record
from shared.job.job import Job
from shared.privacy.accountant.cross_check import prv_cross_check
from shared.privacy.accounting import GaussianSteps, merged
from shared.privacy.central_statement import central_statement
from shared.privacy.statement import SiteRelease, Statement, events_at_sites, run_statement, site_statement, worst_first
from shared.trust.signed_folder import SIGNATURE_FILE, verify_folder
from shared.trust.signed_job import SignedJob
from shared.trust.signing import VerifyKey


def read_facts(run_dir: Path, accounts: Sequence[Account] = (), *, signed: SignedJob | None = None) -> Facts:
    """Read a run folder and what belongs to it.

    Args:
        signed: the job as it was signed, of a run that no longer lies at its coordinator.

    Raises:
        RunError: if a required file is missing or malformed, or what a site executed cannot be accounted for.
    """
    # 1. What the run wrote, and what each site executed.
    submission, home = _coordinator(run_dir)
    goes_on = submission is not None and _goes_on(
        submission
    )  # first: what it writes meanwhile is more than is expected
    data, job = read_run(run_dir), load_job(run_dir)
    at_hand = max((record.round for record in data.federated.rounds), default=0) + 1 if goes_on else None
    sites = _sites(run_dir, job, stopped_early=data.stopped_early)
    central = read_central(run_dir / "privacy.json") if job.privacy.central else None
    if central is None:
        guarantees = _guarantees(sites, job, stopped_early=data.stopped_early)
    else:
        guarantees = (central_guarantee(central, job, stopped_early=data.stopped_early),)
    ledgers = tuple(ledger_facts(account, job.sha256, [site.release for site in sites]) for account in accounts)

    # 2. What stands around it at a coordinator; a signature or a log that does not hold is a discrepancy.
    problems: list[str] = []
    signed = _signed_job(submission, problems) if submission else signed
    log = _log(home, job.sha256, problems) if home else None
    if log is not None and central is not None:
        log = log.without_participants()
    signer = _adapter_signer(run_dir / "adapter", signed.coordinator if signed else None, problems)

    # 3. Whether all of it fits together.
    problems += checks.job_discrepancies(data, job, signed)
    problems += checks.site_discrepancies(data, job, sites)
    problems += checks.central_discrepancies(central, job)
    problems += checks.statement_discrepancies(data, [guarantee.statement for guarantee in guarantees])
    problems += checks.log_discrepancies(log, sites, job, at_hand=at_hand)
    problems += checks.other_discrepancies(job, ledgers, data.audits)
    return Facts(
        data=data,
        job=job,
        signed_job=signed,
        coordinator=home.load_config().name if home else None,
        sites=sites,
        central=central,
        guarantees=guarantees,
        releases=_releases(data, sites, log, at_hand),
        ledgers=ledgers,
        log=log,
        adapter_signer=signer,
        sources=_sources(run_dir, submission, accounts, data),
        discrepancies=tuple(map(data.named, problems)),
        at_hand=at_hand,
    )


def read_central(path: Path) -> CentralFacts:
    """Read and recompute what a trusted coordinator published.

    Raises:
        RunError: if there is no such record, it is malformed or cannot be accounted for.
    """
    record = read_record(path, CoordinatorRecord)
    if not record.protected:
        return CentralFacts(record=record, epsilon=None, epsilon_prv=None, recorded=None)
    try:
        epsilon = record.epsilon
    except PrivacyError as error:
        raise RunError(f"{path} cannot be accounted for: {error}; no report is made of it.") from None
    if math.isinf(epsilon) or (record.rounds and not record.steps):
        raise RunError(f"{path} cannot be accounted for: its epsilon cannot be bounded; no report is made of it.")
    prv = _prv(record.events, record.delta)
    return CentralFacts(record=record, epsilon=epsilon, epsilon_prv=prv, recorded=record.epsilon_spent)


def central_guarantee(central: CentralFacts, job: Job, *, stopped_early: bool = False) -> Guarantee:
    """Return the statement, made anew from the record's numbers."""
    statement = central_statement(
        central.record, job.name, stopped_early=stopped_early, pretrained=not job.model.is_image_network
    )
    return Guarantee(unit=central.record.unit, sites=(), statement=statement, composed=())


def _sites(run_dir: Path, job: Job, *, stopped_early: bool) -> tuple[SiteFacts, ...]:
    records = [(path, read_site(path)) for path in run_dir.glob("sites/*/privacy.json")]
    facts = []
    for path, record in sorted(records, key=lambda item: natural_key(item[1].site)):
        try:
            facts.append(_site(record, job, stopped_early=stopped_early))
        except PrivacyError as error:
            raise RunError(f"{path} cannot be accounted for: {error}; no report is made of it.") from None
    return tuple(facts)


def _site(record: SiteRecord, job: Job, *, stopped_early: bool) -> SiteFacts:
    release = record.release(job)
    stated = release.protected
    if stated and math.isinf(release.epsilon_bound):
        raise PrivacyError("its epsilon cannot be bounded")
    return SiteFacts(
        record=record,
        release=release,
        statement=site_statement(
            release, job.name, stopped_early=stopped_early, pretrained=not job.model.is_image_network
        ),
        epsilon=release.epsilon_bound if stated else None,
        epsilon_arrived=release.epsilon if stated else None,
        epsilon_prv=_prv(release.possible_events, release.delta) if stated else None,
        recorded=record.recorded if stated else None,
        promises=tuple(_promises(record, release)) if stated and release.shared is not None else (),
    )


def _promises(record: SiteRecord, release: SiteRelease) -> Iterator[PromiseFacts]:
    yield PromiseFacts(
        title="first promise, planned",
        epsilon=release.epsilon_promised,
        epsilon_prv=_prv(release.planned_events, release.delta),
        recorded=record.epsilon_planned,
    )
    yield PromiseFacts(
        title="second promise, planned",
        epsilon=release.epsilon_alone,
        epsilon_prv=_prv(replace(release, shared=None).planned_events, release.delta),
        recorded=record.epsilon_alone,
    )


def _prv(events: Iterable[GaussianSteps], delta: float) -> float | None:
    return prv_cross_check(merged(events), delta).epsilon


def _guarantees(sites: Sequence[SiteFacts], job: Job, *, stopped_early: bool) -> tuple[Guarantee, ...]:
    units = sorted({site.release.unit for site in sites}) or [job.privacy.unit]
    found = []
    for unit in units:
        releases = [site.release for site in sites if site.release.unit == unit]
        statement = run_statement(
            releases, job.name, stopped_early=stopped_early, pretrained=not job.model.is_image_network
        )
        found.append(
            Guarantee(
                unit=unit,
                sites=tuple(release.site for release in releases),
                statement=statement,
                composed=tuple(_composed(statement, releases, stopped_early=stopped_early)),
            )
        )
    return tuple(found)


def _composed(statement: Statement, releases: Sequence[SiteRelease], *, stopped_early: bool) -> list[ComposedEpsilon]:
    """Return the statement's table, with PRV's epsilon of the same releases."""
    rows = statement.up_to_m_sites
    # PRV, as it is here, knows no person whose data are in one sum several times.
    most = 1 if any(release.shared for release in releases) else len(releases)
    delta = worst_first(releases, stopped_early=stopped_early)[0].delta if rows else 0.0
    return [
        ComposedEpsilon(
            sites=row.sites,
            epsilon=row.epsilon,
            epsilon_prv=_prv(events_at_sites(releases, row.sites, stopped_early=stopped_early), delta)
            if row.sites <= most
            else None,
        )
        for row in rows
    ]


def _coordinator(run_dir: Path) -> tuple[Submission | None, CoordinatorHome | None]:
    """Return the submission and the coordinator's folder around a run folder, if it lies in one."""
    folder = run_dir.resolve().parent
    home = CoordinatorHome(folder.parent.parent)
    if not (folder / "signed_job.json").exists() or not home.config.exists():
        return None, None
    return Submission(folder), home


def _goes_on(submission: Submission) -> bool:
    """Return whether the coordinator works on a run, or will again; not where it cannot be told."""
    try:
        return submission.is_open
    except RunError:
        return False


def _signed_job(submission: Submission, problems: list[str]) -> SignedJob | None:
    try:
        return submission.signed_job()
    except TrustError as error:
        problems.append(f"The signature of the job does not hold: {error}")
        return None


def _log(home: CoordinatorHome, job_sha256: str, problems: list[str]) -> LogFacts | None:
    try:
        return read_log(home, job_sha256)
    except TrustError as error:
        problems.append(f"The coordinator's audit log does not hold: {error}")
        return None


def _adapter_signer(folder: Path, coordinator: VerifyKey | None, problems: list[str]) -> str | None:
    if not (folder / SIGNATURE_FILE).exists():
        return None
    try:
        return verify_folder(folder, coordinator).text
    except TrustError as error:
        problems.append(f"The signature of the adapter does not hold: {error}")
        return None


def _releases(
    data: RunData, sites: Sequence[SiteFacts], log: LogFacts | None, at_hand: int | None
) -> tuple[Release, ...]:
    """Return every release by round and site: what the run counts, what it does not, and what never arrived."""
    judged = {(entry.round, entry.site, entry.sha256): entry for entry in log.updates} if log else {}
    found: dict[tuple[int, str, str | None], Release] = {}

    def add(number: int, name: str, outcome: str, reason: str = "", sha256: str | None = None) -> None:
        known = judged.get((number, name, sha256)) if sha256 else None
        size = known.num_bytes if known else None
        found[number, name, sha256] = Release(
            round=number, site=name, sha256=sha256, num_bytes=size, outcome=outcome, reason=reason
        )

    for release in (site.release for site in sites):
        for number, sha256 in zip(release.rounds, release.updates, strict=True):
            add(number, release.site, "accepted", sha256=sha256)
        for number in release.unanswered:
            add(number, release.site, "never answered", "counted as executed")
        if release.metrics_mechanism is not None:
            arrived, reason = release.metrics_sha256, f"metrics: {', '.join(release.metrics)}"
            outcome = "accepted" if arrived else "never answered"
            reason += "" if arrived else "; counted as executed"
            add(data.federated.rounds_planned + 1, release.site, outcome, reason, arrived)
    for key, entry in judged.items():
        if key not in found:
            uncounted = "round at hand" if at_hand is not None and entry.round >= at_hand else "not counted"
            outcome = uncounted if entry.accepted else "refused" if entry.sha256 else "failed"
            add(entry.round, entry.site, outcome, entry.reason, entry.sha256)
    told = {(number, name) for number, name, _ in found}
    for record in data.federated.rounds:
        for name, why in record.failed.items():
            if (record.round, name) not in told:
                add(record.round, name, "failed", why)
    return tuple(sorted(found.values(), key=lambda release: (release.round, natural_key(release.site))))


def _sources(
    run_dir: Path, submission: Submission | None, accounts: Sequence[Account], data: RunData
) -> tuple[FileHash, ...]:
    names = ["job.json", "run.json", "metrics.jsonl", "evaluation.json", "statement.json", "privacy.json"]
    names.append("checkpoint.safetensors")
    paths = {name: run_dir / name for name in names}
    more = [*run_dir.glob("sites/*/privacy.json"), *run_dir.glob("audit/tier*.json")]
    for path in sorted(more, key=lambda path: natural_key(path.relative_to(run_dir).as_posix())):
        paths[path.relative_to(run_dir).as_posix()] = path
    if submission is not None:
        paths["signed_job.json"] = submission.path / "signed_job.json"
    for account in accounts:
        what = "ledger" if account.from_ledger else "export of the ledger"
        paths[f"{what} of {data.called(account.export.site)}: {account.file.name}"] = account.file
    return tuple(FileHash.of(name, path) for name, path in paths.items() if path.is_file())
