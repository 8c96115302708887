"""Reads a run folder.

Every file is checked on reading; what a report relies on is required, everything else may be missing and is
shown as not recorded. Keys that this version does not know are ignored. Nothing is written.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Sequence
from pathlib import Path

from server.records.energy import ENERGY_FILE, EnergyRecord
from server.records.job import read_job
from server.records.metrics import in_range
from server.records.privacy import AnyRecord, CoordinatorRecord, read_site, require_claim
from server.records.results import (
    DIVERGED_FILE,
    FOLDS_FILE,
    REPEATS_FILE,
    Diverged,
    Folds,
    Repeats,
    SiteMetrics,
    read_audits,
    read_evaluation,
)
from server.records.rounds import read_rounds
from server.records.run import RunRecord
from server.reports.run.formats import natural_key
from server.reports.run.run_data import Arm, FileHash, RunData
from shared.errors import RunError
from shared.files.json_files import damaged, read_if_there, read_record, read_text
from shared.job.job_file import check_run_folder
from shared.privacy.statement import Statement


def read_run(run_dir: Path) -> RunData:
    """Read and check a run folder.

    Raises:
        RunError: if a required file is missing or any file is malformed.
    """
    check_run_folder(run_dir)
    run = read_record(_required(run_dir / "run.json"), RunRecord)
    complete = run.status == "completed"
    federated = read_arm(run_dir, name="federated", complete=complete)
    statement = None
    if federated.private:
        path = run_dir / "statement.json"
        statement = read_if_there(_required(path) if complete else path, Statement)
    if federated.private and complete and not federated.sites:
        raise RunError(
            f"{run_dir / 'sites'} holds no privacy.json, but the job is private and completed; expected "
            "one for every site (under central DP, one in the run's folder). Without them no epsilon can be shown: copy "
            "the sites' records back and write the report again."
        )
    data = RunData(
        run=run,
        federated=federated,
        baselines=tuple(
            read_arm(folder, name=folder.name, complete=False) for folder in _folders(run_dir / "baselines")
        ),
        statement=statement,
        adapter=tuple(_adapter_files(run_dir / "adapter")),
        repeats=read_if_there(run_dir / REPEATS_FILE, Repeats),
        folds=read_if_there(run_dir / FOLDS_FILE, Folds),
        audits=read_audits(run_dir),
        site_metrics=read_if_there(run_dir / "site_metrics.json", SiteMetrics),
        energy=read_if_there(run_dir / ENERGY_FILE, EnergyRecord),
        job_sha256_matches=_job_matches(run_dir / "job.json", run.job_sha256),
    )
    try:  # which metric the seeds' values are of stands in another file
        for values in data.repeats.arms.values() if data.repeats else ():
            for value in values:
                in_range(data.primary_metric, value)
    except ValueError as error:
        raise damaged(run_dir / REPEATS_FILE, f"arms: {error}") from None
    return data


def read_arm(folder: Path, *, name: str, complete: bool = False) -> Arm:
    """Read one training; a completed one must have its rounds and its evaluation."""
    job = read_job(_required(folder / "job.json"))
    private = job["privacy"]["mechanism"] != "none"
    path = folder / "metrics.jsonl"
    rounds = read_rounds(_required(path) if complete else path, complete=complete)
    path = folder / "evaluation.json"
    evaluation = read_evaluation(_required(path)) if complete or path.exists() else None
    # A site that never answered released nothing and has no record.
    released = {name for record in rounds for name in record.sites} if complete else set()
    paths = [
        path for site in _folders(folder / "sites") if (path := site / "privacy.json").exists() or site.name in released
    ]
    sites: tuple[AnyRecord, ...] = tuple(read_site(_required(path)) for path in paths)
    if job["privacy"]["mechanism"] == "central":
        paths = [path] if (path := folder / "privacy.json").exists() else []
        sites = tuple(read_record(path, CoordinatorRecord) for path in paths)
    if private:
        for site, path in zip(sites, paths, strict=True):
            require_claim(site, path)
    names = [site.site for site in sites]
    for twice in {site for site in names if names.count(site) > 1}:
        raise RunError(
            f"two records under {folder / 'sites'} claim to be of site {twice!r}; expected one each. "
            "Remove the one that does not belong to this run."
        )
    diverged = read_if_there(folder / DIVERGED_FILE, Diverged)
    return Arm(
        name=name,
        job=job,
        private=private,
        rounds=rounds,
        evaluation=evaluation,
        sites=sites,
        problem=diverged.reason if diverged else None,
    )


def _required(path: Path) -> Path:
    """Return `path`, of a file that every run in this state has; raises `RunError` if it is not there."""
    if not path.exists():
        raise RunError(
            f"{path} is missing; expected it in the folder of every run in this state. "
            "Check that this is a run folder and that it was copied completely."
        )
    return path


def _folders(parent: Path) -> Sequence[Path]:
    if not parent.is_dir():
        return ()
    return sorted((path for path in parent.iterdir() if path.is_dir()), key=lambda path: natural_key(path.name))


def _adapter_files(folder: Path) -> Sequence[FileHash]:
    """Name, size and hash of every regular file; links are not followed out of the run folder."""
    paths = [path for path in sorted(folder.rglob("*")) if stat.S_ISREG(path.lstat().st_mode)]
    return [FileHash.of(path.relative_to(folder).as_posix(), path) for path in paths]


def _job_matches(path: Path, expected: str | None) -> bool | None:
    """Compare the hash of the job file, with or without its last line break, to the recorded one."""
    if expected is None:
        return None
    data = read_text(path).encode()
    return expected.lower() in {hashlib.sha256(part).hexdigest() for part in (data, data.rstrip(b"\n"))}
