"""Finds out what a compliance report states: read from the files of one run and recomputed from what was executed.

Formal guarantees (tests: tests/server/reports/test_compliance_report.py)
    * Every epsilon is composed anew from the executed (noise_multiplier, sample_rate, steps), by PLD, and once more by PRV; a
      recorded number that differs is reported, never repeated (test_a_recorded_epsilon_that_differs_is_a_discrepancy).
    * A site without noise, or with injected randomness, has no epsilon here (test_without_privacy_no_epsilon_is_printed).
    * Gaussian releases of metrics are composed with the training (test_released_metrics_are_composed).
    * Nothing in the run folder is written, and nothing outside it, its job's folder and the given accounts is read
      (test_the_run_folder_is_only_read).
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from server.reports.compliance import checks
from server.reports.compliance.facts import (
    CentralFacts,
    ComposedEpsilon,
    Facts,
    FileHash,
    Guarantee,
    Release,
    SiteFacts,
)
from server.reports.compliance.ledgers import Account, ledger_facts
from server.reports.compliance.log import LogFacts, read_log
from server.reports.compliance.records import AuditRecord, CentralRecord, PrivacyRecord, parse_record
from server.reports.run.formats import natural_key
from server.reports.run.run_data import RunData, read_run
from server.runs.folder import load_job
from server.store.home import CoordinatorHome
from server.store.submission import Submission
from shared.errors import PrivacyError, RunError, TrustError
from shared.job.job import Job
from shared.privacy.accounting import GaussianSteps, check_delta
from shared.privacy.central_statement import central_statement
from shared.privacy.cross_check import prv_cross_check
from shared.privacy.plan import PrivacyPlan
from shared.privacy.statement import SiteRelease, Statement, run_statement, site_statement
from shared.trust.signed_folder import SIGNATURE_FILE, verify_folder
from shared.trust.signed_job import SignedJob


def read_facts(run_dir: Path, accounts: Sequence[Account] = ()) -> Facts:
    """Read a run folder and what belongs to it.

    Raises:
        RunError: if a required file is missing or malformed, or what a site executed cannot be accounted for.
    """
    # 1. What the run wrote, and what each site executed.
    data, job = read_run(run_dir), load_job(run_dir)
    sites = _sites(run_dir, job, stopped_early=data.stopped_early)
    central = read_central(run_dir / "privacy.json") if job.privacy.central else None
    if central is None:
        guarantees = _guarantees(sites, job, stopped_early=data.stopped_early)
    else:
        guarantees = (central_guarantee(central, job, stopped_early=data.stopped_early),)
    audits = tuple(parse_record(AuditRecord, path) for path in sorted(run_dir.glob("audit/tier*.json")))
    ledgers = tuple(ledger_facts(account, job.sha256, [site.release for site in sites]) for account in accounts)

    # 2. What stands around it at a coordinator; a signature or a log that does not hold is a discrepancy.
    submission, home = _coordinator(run_dir)
    problems: list[str] = []
    signed = _signed_job(submission, problems) if submission else None
    log = _log(home, job.sha256, problems) if home else None
    if log is not None and central is not None:
        log = log.without_participants()
    signer = _adapter_signer(run_dir / "adapter", problems)

    # 3. Whether all of it fits together.
    problems += checks.job_discrepancies(data, job, signed)
    problems += checks.site_discrepancies(data, job, sites)
    problems += checks.central_discrepancies(central, job)
    problems += checks.statement_discrepancies(data, [guarantee.statement for guarantee in guarantees])
    problems += checks.log_discrepancies(log, sites)
    problems += checks.other_discrepancies(job, ledgers, audits)
    return Facts(
        data=data,
        job=job,
        signed_job=signed,
        coordinator=home.load_config().name if home else None,
        sites=sites,
        central=central,
        guarantees=guarantees,
        releases=_releases(data, sites, log),
        ledgers=ledgers,
        log=log,
        audits=audits,
        adapter_signer=signer,
        sources=_sources(run_dir, submission, accounts, data),
        discrepancies=tuple(map(data.named, problems)),
    )


def read_central(path: Path) -> CentralFacts:
    """Read and recompute what a trusted coordinator published.

    Raises:
        RunError: if there is no such record, it is malformed or cannot be accounted for.
    """
    record = parse_record(CentralRecord, path)
    release = record.release
    if not release.protected:
        return CentralFacts(record=record, epsilon=None, epsilon_prv=None)
    try:
        epsilon = release.epsilon
    except PrivacyError as error:
        raise RunError(f"{path} cannot be accounted for: {error}; no report is made of it.") from None
    if math.isinf(epsilon) or (record.rounds and not release.steps):
        raise RunError(f"{path} cannot be accounted for: its epsilon cannot be bounded; no report is made of it.")
    return CentralFacts(record=record, epsilon=epsilon, epsilon_prv=_prv(release.events, record.delta))


def central_guarantee(central: CentralFacts, job: Job, *, stopped_early: bool = False) -> Guarantee:
    """Return the statement, made anew from the record's numbers."""
    statement = central_statement(
        central.record.release, job.name, stopped_early=stopped_early, pretrained=not job.model.is_image_network
    )
    return Guarantee(unit=central.record.unit, sites=(), statement=statement, composed=())


def _sites(run_dir: Path, job: Job, *, stopped_early: bool) -> tuple[SiteFacts, ...]:
    records = [(path, parse_record(PrivacyRecord, path)) for path in run_dir.glob("sites/*/privacy.json")]
    facts = []
    for path, record in sorted(records, key=lambda item: natural_key(item[1].site)):
        try:
            facts.append(_site(record, job, stopped_early=stopped_early))
        except PrivacyError as error:
            raise RunError(f"{path} cannot be accounted for: {error}; no report is made of it.") from None
    return tuple(facts)


def _site(record: PrivacyRecord, job: Job, *, stopped_early: bool) -> SiteFacts:
    events = record.training
    check_delta(record.delta)
    if len(record.rounds) != len(record.update_sha256):
        raise PrivacyError(f"{len(record.rounds)} rounds and {len(record.update_sha256)} hashes of updates")
    if record.private and record.rounds and not sum(event.steps for event in events):
        raise PrivacyError("updates were released, but no noisy step is recorded")
    private = record.private and job.privacy.mechanism != "none"
    # A request of unknown outcome counts as the job planned it, as the coordinator counts it; see server/rounds/loop.py.
    plan = PrivacyPlan.from_job(job) if private and record.rounds_unanswered else None
    release = SiteRelease(
        site=record.site,
        unit=record.unit,
        delta=record.delta,
        max_grad_norm=record.max_grad_norm,
        declared_records=record.declared_records,
        randomness=record.randomness,
        epsilon_budget=record.epsilon_budget or 0.0,
        steps_planned=record.steps_planned,
        events=events,
        rounds=record.rounds,
        updates=record.update_sha256,
        unanswered=record.rounds_unanswered,
        per_round=plan.mechanism(job.training.local_steps) if plan else None,
        metrics=record.metrics.names if record.metrics else (),
        metrics_mechanism=record.metrics.mechanism if record.metrics else None,
        metrics_sha256=record.metrics.sha256 if record.metrics else None,
        private=private,
        **_later_fields(record),
    )
    stated = release.protected
    if stated and math.isinf(release.epsilon_bound):
        raise PrivacyError("its epsilon cannot be bounded")
    return SiteFacts(
        release=release,
        statement=site_statement(
            release, job.name, stopped_early=stopped_early, pretrained=not job.model.is_image_network
        ),
        epsilon=release.epsilon_bound if stated else None,
        epsilon_arrived=release.epsilon if stated else None,
        epsilon_prv=_prv(release.possible_events, release.delta) if stated else None,
        recorded=record.recorded if stated else None,
    )


def _later_fields(record: PrivacyRecord) -> dict[str, Any]:
    """Whole numbers that a record and a release of a later version both have, such as records per person."""
    extra = record.model_extra or {}
    names = {field.name for field in dataclasses.fields(SiteRelease)} & extra.keys()
    return {name: extra[name] for name in names if type(extra[name]) is int}


def _prv(events: tuple[GaussianSteps, ...], delta: float) -> float | None:
    steps: Counter[tuple[float, float]] = Counter()
    for event in events:
        steps[event.noise_multiplier, event.sample_rate] += event.steps
    merged = [GaussianSteps(noise_multiplier=s, sample_rate=q, steps=count) for (s, q), count in steps.items()]
    return prv_cross_check(merged, delta).epsilon


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
    """Return the statement's table, with PRV's epsilon of the same releases: those of the largest epsilons."""

    def events(release: SiteRelease) -> tuple[GaussianSteps, ...]:
        return release.planned_events if stopped_early else release.possible_events

    worst = sorted(releases, key=lambda r: r.epsilon_planned if stopped_early else r.epsilon_bound, reverse=True)
    return [
        ComposedEpsilon(
            sites=int(row["sites"]),
            epsilon=float(row["epsilon"]),
            epsilon_prv=_prv(
                tuple(event for release in worst[: int(row["sites"])] for event in events(release)),
                worst[0].delta,
            ),
        )
        for row in statement.up_to_m_sites
    ]


def _coordinator(run_dir: Path) -> tuple[Submission | None, CoordinatorHome | None]:
    """Return the submission and the coordinator's folder around a run folder, if it lies in one."""
    folder = run_dir.resolve().parent
    home = CoordinatorHome(folder.parent.parent)
    if not (folder / "signed_job.json").exists() or not home.config.exists():
        return None, None
    return Submission(folder), home


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


def _adapter_signer(folder: Path, problems: list[str]) -> str | None:
    if not (folder / SIGNATURE_FILE).exists():
        return None
    try:
        return verify_folder(folder).text
    except TrustError as error:
        problems.append(f"The signature of the adapter does not hold: {error}")
        return None


def _releases(data: RunData, sites: Sequence[SiteFacts], log: LogFacts | None) -> tuple[Release, ...]:
    """Return every release by round and site: what the run counts, what it does not, and what never arrived."""
    judged = {(entry.round, entry.site, entry.sha256): entry for entry in log.updates} if log else {}
    found: dict[tuple[int, str, str | None], Release] = {}
    for site in sites:
        name = site.release.site
        for number, sha256 in zip(site.release.rounds, site.release.updates, strict=True):
            known = judged.get((number, name, sha256))
            size = known.num_bytes if known else None
            found[number, name, sha256] = Release(
                round=number, site=name, sha256=sha256, num_bytes=size, outcome="accepted"
            )
        for number in site.release.unanswered:
            found[number, name, None] = Release(
                round=number,
                site=name,
                sha256=None,
                num_bytes=None,
                outcome="never answered",
                reason="counted as executed",
            )
        if site.release.metrics_mechanism is not None:
            arrived = site.release.metrics_sha256
            after = data.federated.rounds_planned + 1
            found[after, name, arrived] = Release(
                round=after,
                site=name,
                sha256=arrived,
                num_bytes=None,
                outcome="accepted" if arrived else "never answered",
                reason=f"metrics: {', '.join(site.release.metrics)}" + ("" if arrived else "; counted as executed"),
            )
    for key, entry in judged.items():
        if key not in found:
            outcome = "not counted" if entry.accepted else "refused" if entry.sha256 else "failed"
            found[key] = Release(
                round=entry.round,
                site=entry.site,
                sha256=entry.sha256,
                num_bytes=entry.num_bytes,
                outcome=outcome,
                reason=entry.reason,
            )
    told = {(release.round, release.site) for release in found.values()}
    for record in data.federated.rounds:
        for name, reason in record.failed.items():
            if (record.round, name) not in told:
                found[record.round, name, None] = Release(
                    round=record.round, site=name, sha256=None, num_bytes=None, outcome="failed", reason=reason or ""
                )
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
    return tuple(_hash(name, path) for name, path in paths.items() if path.is_file())


def _hash(name: str, path: Path) -> FileHash:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileHash(name=name, num_bytes=path.stat().st_size, sha256=digest)
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}); check its permissions.") from None
