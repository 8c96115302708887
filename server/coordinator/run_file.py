"""A run file (TOML): a job's sections, `[evaluation]` and optionally `[compute]`; how it becomes a submission."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import Field

from server.rounds.early_stopping import require_public_records
from server.store.submission import Submission, now_text, submissions
from shared.data.datasets import DataSource, read_records, write_jsonl
from shared.errors import ConfigError, DataError, RunError, TrustError
from shared.files.atomic import sync_folder, write_json, write_text
from shared.files.bounded import read_named_text
from shared.files.json_files import read_object
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.job.parsing import Section, apply_overrides, load_toml, parse
from shared.privacy.central import CentralPlan
from shared.privacy.plan import PrivacyPlan
from shared.tasks import Record, task_of
from shared.trust.signed_job import SignedJob, sign_job
from shared.trust.signing import SigningKey, VerifyKey


class RunSettings(Section):
    """What a run file holds besides the job: the sections `[evaluation]`, `[compute]` and `[coordinator]`."""

    evaluation: DataSource
    """Public evaluation records; never a site's."""
    compute: ComputeConfig = ComputeConfig()
    evaluate_every: int = Field(default=1, ge=1)
    """Rounds between evaluations."""
    valid_days: int = Field(default=30, ge=1, le=366)
    """Days after which the signed job expires."""


def read_run_file(path: Path, overrides: Sequence[str] = ()) -> tuple[Job, RunSettings, list[Record]]:
    """Read a run file: a job's sections plus `[evaluation]` and optionally `[compute]`; check that they fit together.

    Raises:
        ConfigError, DataError, PrivacyError: as their texts say.
    """
    job, settings = read_run_settings(path, overrides)
    records: list[Record] = list(read_records(settings.evaluation, base=path.resolve().parent))
    require_public_records(job, len(records))
    task = task_of(job)
    missing = [role for role in task.roles if records and role not in records[0]]
    if missing:
        raise DataError(
            f"task {job.task.kind!r} needs the column role {missing[0]!r}; declare it in evaluation.columns of {path}."
        )
    return job, settings, records


def read_run_settings(path: Path, overrides: Sequence[str] = ()) -> tuple[Job, RunSettings]:
    """Read a run file without its evaluation records, which need not be on this machine.

    Raises:
        ConfigError, PrivacyError: as their texts say.
    """
    raw = apply_overrides(load_toml(path), overrides)
    own = {key: raw.pop(key) for key in list(raw) if key in RunSettings.model_fields}
    job = parse(Job, raw, source=str(path))
    settings = parse(RunSettings, own, source=str(path))
    if job.model.backbone.startswith("."):
        raise ConfigError(
            f"model.backbone {job.model.backbone!r} is relative, and every site would look for it in another folder. Name an "
            "absolute path that all sites have, or a hub id with model.revision."
        )
    if job.privacy.sites_add_noise:
        PrivacyPlan.from_job(job).epsilon()
    elif job.privacy.mechanism == "central":
        CentralPlan.from_job(job).plan.epsilon()
    return job, settings


def sign_run(job: Job, settings: RunSettings, *, signer: SigningKey, coordinator: VerifyKey) -> SignedJob:
    """Sign `job` for a coordinator, from now on for the days of its run file."""
    issued = datetime.now(UTC)
    return sign_job(
        job,
        signer=signer,
        coordinator=coordinator,
        issued=issued,
        not_after=issued + timedelta(days=settings.valid_days),
    )


def read_signed(path: Path, job: Job, *, coordinator: VerifyKey) -> SignedJob:
    """Read a job that was signed elsewhere, checked to be that of a run file, for this coordinator, and valid now.

    Raises:
        TrustError: it is not.
    """
    try:
        text = read_named_text(path, "utf-8")
    except (OSError, ValueError) as error:
        raise TrustError(f"{path} cannot be read ({error}); give what `silotune coordinator sign` wrote.") from None
    signed = SignedJob.from_json(text, source=str(path))
    if signed.job.sha256 != job.sha256:
        raise TrustError(
            f"{path} is signed for another job ({signed.job.sha256[:12]}) than that of the run file ({job.sha256[:12]}); sign "
            "this run file, or give the one that was signed."
        )
    if signed.coordinator != coordinator:
        raise TrustError(f"{path} is signed for another coordinator; sign it for {coordinator.text}.")
    signed.check_time(datetime.now(UTC))
    return signed


def submit(
    jobs: Path,
    job: Job,
    settings: RunSettings,
    records: Sequence[Record],
    *,
    signer: SigningKey,
    coordinator: VerifyKey,
) -> Submission:
    """Sign `job` and put it where the coordinator finds it.

    Raises:
        RunError: if this very job was submitted before.
    """
    check_new(jobs, job)
    return submit_signed(jobs, sign_run(job, settings, signer=signer, coordinator=coordinator), settings, records)


def check_new(jobs: Path, job: Job) -> None:
    """Raise `RunError` if this very job was submitted before."""
    for other in submissions(jobs):
        if other.state()["job_sha256"] == job.sha256:
            raise RunError(
                f"this very job was submitted before, as {other.name}; sites would answer with the releases that they stored. "
                "Change its name or its seed to run it again."
            )


def submit_signed(jobs: Path, signed: SignedJob, settings: RunSettings, records: Sequence[Record]) -> Submission:
    """Put a signed job where the coordinator finds it; the folder appears complete or not at all.

    Raises:
        RunError: if this very job was submitted before.
    """
    job = signed.job
    jobs.mkdir(parents=True, exist_ok=True)
    check_new(jobs, job)
    known = submissions(jobs)
    number = max((int(other.name.split("-", 1)[0]) for other in known), default=0) + 1
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=jobs))
    try:
        write_text(draft / "signed_job.json", signed.to_json())
        write_json(draft / "settings.json", settings.model_dump(mode="json"))
        write_jsonl(draft / "evaluation.jsonl", list(records))
        state = {"state": "submitted", "since": now_text(), "job_sha256": job.sha256, "signer": signed.signer.text}
        write_json(draft / "state.json", state)
        target = jobs / f"{number:04d}-{job.name}"
        os.rename(draft, target)
        sync_folder(jobs)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return Submission(target)


def settings_of(submission: Submission) -> RunSettings:
    """Return the coordinator's part of the run file."""
    raw = read_object(submission.path / "settings.json")
    return parse(RunSettings, raw, source=str(submission.path / "settings.json"))


def evaluation_records(submission: Submission, job: Job) -> Sequence[Record]:
    """Return the public evaluation records."""
    roles = {role: role for role in task_of(job).roles}
    return read_records(DataSource(path="evaluation.jsonl", columns=roles), base=submission.path)
