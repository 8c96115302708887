"""Reads a run folder into frozen records.

Every file is checked on reading; what a report relies on is required, everything else may be missing and is
shown as not recorded. Keys that this version does not know are ignored. Nothing is written.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.reports.run.formats import LOWER_IS_BETTER, natural_key
from server.rounds.convergence import DIVERGED_FILE, constant_loss, why_diverged
from shared.errors import RunError

Positive = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class Machine(_Record):
    system: str | None = None
    cpu_count: int | None = None
    device: str | None = None
    precision: str | None = None


class Dataset(_Record):
    name: str | None = None
    train_records: Count | None = None
    test_records: Count | None = None
    test_records_at_max_length: Count | None = None
    test_kind: Literal["public", "synthetic", "private"] | None = None
    """What a simulation's evaluation records were declared to be; a coordinator's own are public, and nothing is recorded."""
    test_name: str | None = None
    """File of the evaluation records where it is one of its own."""
    site_names: dict[str, str] = {}
    """What the data calls a site whose folder has another name, such as one in ASCII."""


class PublicCounts(_Record):
    """The public records in two parts: those that figures are of, and those by which something was chosen."""

    reported: Count
    deciding: Count


class RunRecord(_Record):
    """`run.json`: what happened around the training."""

    name: str | None = None
    job_sha256: str | None = None
    created: datetime | None = None
    finished: datetime | None = None
    status: Literal["running", "completed", "stopped"]
    mode: str | None = None
    seconds: Positive | None = None
    peak_rss_mb: Positive | None = None
    versions: dict[str, str | None] = {}
    machine: Machine = Machine()
    dataset: Dataset = Dataset()
    public_records: PublicCounts | None = None

    @property
    def test_records(self) -> int | None:
        """How many records every figure of the run is of."""
        return self.dataset.test_records if self.public_records is None else self.public_records.reported


class RoundRecord(_Record):
    """One line of `metrics.jsonl`; round 0 is the state before training."""

    round: Count
    metrics: dict[str, Any] = {}
    epsilon_max: Positive | None = None
    sites: tuple[str, ...] = ()
    failed: dict[str, str | None] = {}
    bytes_up: Count | None = None
    bytes_down: Count | None = None
    seconds: Positive | None = None

    def metric(self, name: str) -> float | None:
        return _number(self.metrics.get(name))


class ReliabilityBin(_Record):
    """One bin of a reliability diagram."""

    count: Count
    confidence: Share
    accuracy: Share


class CalibrationRecord(_Record):
    """What a temperature did on public records that it was not fitted on."""

    temperature: Annotated[float, Field(gt=0)]
    fitted_on: Count
    reported_on: Count
    loss_before: Finite
    loss_after: Finite
    error_before: Share
    error_after: Share
    bins_before: tuple[ReliabilityBin, ...]
    bins_after: tuple[ReliabilityBin, ...]


class Evaluation(_Record):
    """`evaluation.json`: the final model on the test set."""

    primary_metric: str
    higher_is_better: bool | None = None
    round: Count | None = None
    metrics: dict[str, Any]
    labels: tuple[str, ...] | None = None
    confusion: tuple[tuple[Count, ...], ...] | None = None
    confusion_cells: tuple[tuple[Count, Count, Count], ...] | None = None
    roc: Annotated[tuple[tuple[Share, Share], ...], Field(min_length=2)] | None = None
    pairs: Annotated[tuple[tuple[Finite, Finite], ...], Field(min_length=1)] | None = None
    note: str | None = None
    calibration: CalibrationRecord | None = None


class SiteRecord(_Record):
    """`sites/<name>/privacy.json`: what one site spent, in its own words."""

    site: str
    unit: str | None = None
    relation: str | None = None
    delta: Annotated[float, Field(ge=0, le=1)] | None = None
    sample_rate: Annotated[float, Field(ge=0, le=1)] | None = None
    noise_multiplier: Positive | None = None
    max_grad_norm: Positive | None = None
    steps_planned: Count | None = None
    steps_executed: Count | None = None
    epsilon_budget: Positive | None = None
    epsilon_spent: Positive | None = None
    epsilon_spent_prv: Positive | None = None
    epsilon_bound: Positive | None = None
    epsilon_planned: Positive | None = None
    """Of a run that ended early: epsilon of the whole plan, which is what it promised."""
    rounds_unanswered: tuple[int, ...] = ()
    accountant: str | None = None
    randomness: Literal["os", "injected"] | None = None
    declared_records: Count | None = None
    statement: str | None = None

    @property
    def epsilon_stated(self) -> float | None:
        """What the site has spent at most (requests that were never answered count as executed), or was promised."""
        if self.epsilon_planned is not None:
            return self.epsilon_planned
        return self.epsilon_spent if self.epsilon_bound is None else self.epsilon_bound

    @property
    def over_budget(self) -> bool:
        if self.epsilon_stated is None or self.epsilon_budget is None:
            return False
        return self.epsilon_stated > self.epsilon_budget * (1 + 1e-6)


class CoordinatorRecord(SiteRecord):
    """`privacy.json` of the run: what a trusted coordinator published about all sites together."""

    site: str = "coordinator"


class ComposedEpsilon(_Record):
    sites: Annotated[int, Field(ge=1)]
    epsilon: Positive


class Statement(_Record):
    """`statement.json`: what the run as a whole promises, and what it does not."""

    one_site: str | None = None
    up_to_m_sites: tuple[ComposedEpsilon, ...] = ()
    not_covered: tuple[str, ...] = ()
    text: str


class SiteMetric(_Record):
    """One line of `site_metrics.json`: what the sites' noisy counts say together."""

    metric: str
    value: float | None = None
    standard_error: Positive | None = None
    sites: Annotated[int, Field(ge=1)]


class SiteMetrics(_Record):
    """`site_metrics.json`: metrics on the sites' own held-out records."""

    noise_multiplier: Positive
    sites: dict[str, Any] = {}
    estimates: tuple[SiteMetric, ...] = ()


class AuditRecord(_Record):
    """`audit/tierN.json`: what an audit of the mechanism found."""

    tier: Annotated[int, Field(ge=1, le=3)]
    audited: str
    claim: Positive | None = None
    lower_bound: Positive | None = None
    ceiling: Positive | None = None
    alpha: Positive
    verdict: Literal["consistent", "violated", "inconclusive"]
    reasons: tuple[str, ...] = ()


class EnsembleRecord(_Record):
    """What the adapters of all seeds say together; epsilon is the composition of their runs."""

    metrics: dict[str, Finite]
    epsilon: Positive | None = None
    delta: Annotated[float, Field(ge=0, le=1)] | None = None


class Repeats(_Record):
    """`repeats.json`: the same scenario under several seeds; final value of the primary metric by arm."""

    seeds: tuple[int, ...]
    arms: dict[str, Annotated[tuple[Finite, ...], Field(min_length=2)]]
    ensembles: dict[str, EnsembleRecord] = {}


class Folds(_Record):
    """`folds.json`: a cross-validation; final value of every metric by arm and metric, one for each fold."""

    folds: Annotated[int, Field(ge=2)]
    test_records: tuple[Count, ...]
    arms: dict[str, dict[str, Annotated[tuple[Finite, ...], Field(min_length=2)]]]


class DivergedRecord(_Record):
    """`diverged.json` of a baseline that could not go on."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class AdapterFile:
    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One training: the federated run itself or a baseline beside it."""

    name: str
    job: Mapping[str, Any]
    private: bool
    rounds: tuple[RoundRecord, ...]
    evaluation: Evaluation | None
    sites: tuple[SiteRecord, ...]
    """Who released under a guarantee: the sites, or the coordinator alone under central DP."""
    problem: str | None = None
    """Why a baseline could not go on, if its training diverged so far that no update could be aggregated."""

    @property
    def central_sites(self) -> int | None:
        """The declared number of sites under central DP, else None."""
        central = job_value(self.job, "privacy", "central")
        value = _number(central.get("num_sites")) if isinstance(central, Mapping) else None
        return None if value is None else int(value)

    @property
    def rounds_planned(self) -> int:
        """Rounds that the job asked for, at least those that were run."""
        planned = _number(job_value(self.job, "training", "rounds"))
        return max(int(planned) if planned is not None else 0, self.rounds_done)

    @property
    def rounds_done(self) -> int:
        return self.rounds[-1].round if self.rounds else 0

    @property
    def early_stopping(self) -> Mapping[str, Any] | None:
        """The rule by which the run may end before its planned rounds."""
        rule = job_value(self.job, "training", "early_stopping")
        return rule if isinstance(rule, Mapping) else None

    @property
    def kept_round(self) -> int:
        """The round whose adapter is handed out."""
        kept = self.evaluation.round if self.evaluation is not None else None
        return self.rounds_done if kept is None else kept

    @property
    def diverged(self) -> str | None:
        """Why this training counts as diverged, or None."""
        if self.problem is not None:
            return self.problem
        losses = [(record.round, loss) for record in self.rounds if (loss := record.metric("loss")) is not None]
        started = next((loss for number, loss in losses if number == 0), None)
        if self.evaluation is not None and self.evaluation.confusion is not None and started is not None:
            constant = constant_loss([sum(row) for row in self.evaluation.confusion])
            started = max(started, constant or 0.0)
        return why_diverged(
            started=started,
            final=self.final("loss"),
            losses=[loss for number, loss in losses if number],
            kept_round=self.kept_round,
            private=self.private,
        )

    @property
    def epsilon(self) -> float | None:
        """The largest epsilon that any site spent, or the last one of the round records."""
        if not self.private:
            return None
        spent = [site.epsilon_stated for site in self.sites if site.epsilon_stated is not None]
        recorded = [record.epsilon_max for record in self.rounds if record.epsilon_max is not None]
        return max(spent or recorded[-1:], default=None)

    def undefined(self, metric: str) -> bool:
        """Whether the evaluation data leaves the metric undefined."""
        return self.evaluation is not None and self.evaluation.metrics.get(metric, 0.0) is None

    def final(self, metric: str) -> float | None:
        """The metric of the final model; before there is one, that of the last measured round."""
        if self.evaluation is not None:
            value = _number(self.evaluation.metrics.get(metric))
            if value is not None or self.undefined(metric):
                return value
        measured = [value for record in self.rounds if (value := record.metric(metric)) is not None]
        return measured[-1] if measured else None


@dataclass(frozen=True, kw_only=True)
class RunData:
    run: RunRecord
    federated: Arm
    baselines: tuple[Arm, ...]
    statement: Statement | None
    adapter: tuple[AdapterFile, ...]
    repeats: Repeats | None
    folds: Folds | None
    audits: tuple[AuditRecord, ...]
    site_metrics: SiteMetrics | None
    job_sha256_matches: bool | None
    """Whether job.json is the job that run.json names; None if run.json names none."""

    def called(self, site: str) -> str:
        """What people call a site: its name in the data with the folder's in brackets, or the one that it has."""
        real = self.run.dataset.site_names.get(site)
        return site if real is None else f"{real} ({site})"

    def named(self, text: str) -> str:
        """Return a sentence of ours about sites, such as a statement, with every site called as `called` says."""
        return _SITE_IN_TEXT.sub(lambda found: found[1] + self.called(found[2]), text)

    @property
    def complete(self) -> bool:
        return self.run.status == "completed"

    @property
    def stopped_early(self) -> bool:
        """Whether the run ended before its planned rounds by its own rule."""
        arm = self.federated
        return self.complete and arm.early_stopping is not None and arm.rounds_done < arm.rounds_planned

    @property
    def primary_metric(self) -> str:
        if self.federated.evaluation is not None:
            return self.federated.evaluation.primary_metric
        seen = {name for record in self.federated.rounds for name in record.metrics}
        return next((name for name in ("accuracy", "perplexity", "macro_f1", "f1") if name in seen), "loss")

    @property
    def higher_is_better(self) -> bool:
        evaluation = self.federated.evaluation
        if evaluation is not None and evaluation.higher_is_better is not None:
            return evaluation.higher_is_better
        return self.primary_metric not in LOWER_IS_BETTER

    @property
    def site_names(self) -> tuple[str, ...]:
        """Every site that is known to the run, in natural order."""
        names = {site.site for site in self.federated.sites}
        for record in self.federated.rounds:
            names.update(record.sites, record.failed)
        return tuple(sorted(names, key=natural_key))


# In a sentence a name ends before the full stop; a comma stands in "of a site, NAME".
_SITE_IN_TEXT = re.compile(r"\b([Ss]ite,? )([A-Za-z0-9]+(?:[._-]+[A-Za-z0-9]+)*)")


def with_real_names(data: RunData) -> RunData:
    """Return `data` with every site called as `RunData.called` says, for pages that people read."""
    if not data.run.dataset.site_names:
        return data
    called, named = data.called, data.named
    arms = []
    for arm in (data.federated, *data.baselines):
        rounds = tuple(
            record.model_copy(
                update={
                    "sites": tuple(map(called, record.sites)),
                    "failed": {called(site): reason for site, reason in record.failed.items()},
                }
            )
            for record in arm.rounds
        )
        sites = tuple(
            site.model_copy(update={"site": called(site.site), "statement": site.statement and named(site.statement)})
            for site in arm.sites
        )
        arms.append(replace(arm, rounds=rounds, sites=sites))
    statement = data.statement
    if statement is not None:
        words = {"one_site": statement.one_site and named(statement.one_site), "text": named(statement.text)}
        statement = statement.model_copy(update=words)
    return replace(data, federated=arms[0], baselines=tuple(arms[1:]), statement=statement)


def read_run(run_dir: Path) -> RunData:
    """Read and check a run folder.

    Raises:
        RunError: if a required file is missing or any file is malformed.
    """
    if not run_dir.is_dir():
        raise RunError(
            f"{run_dir} is not a folder; expected the folder of a run, with job.json and run.json in it. "
            "Give the folder that the run printed when it started."
        )
    run = _parse(RunRecord, _read(run_dir / "run.json"), run_dir / "run.json")
    complete = run.status == "completed"
    federated = read_arm(run_dir, name="federated", complete=complete)
    statement_path = run_dir / "statement.json"
    statement = None
    if federated.private and (complete or statement_path.exists()):
        statement = _parse(Statement, _read(statement_path), statement_path)
    if federated.private and complete and not federated.sites:
        raise RunError(
            f"{run_dir / 'sites'} holds no privacy.json, but the job is private and completed; expected "
            "one for every site (under central DP, one in the run's folder). Without them no epsilon can be shown: copy "
            "the sites' records back and write the report again."
        )
    return RunData(
        run=run,
        federated=federated,
        baselines=tuple(
            read_arm(folder, name=folder.name, complete=False) for folder in _folders(run_dir / "baselines")
        ),
        statement=statement,
        adapter=tuple(_adapter_files(run_dir / "adapter")),
        repeats=read_repeats(run_dir / "repeats.json"),
        folds=read_folds(run_dir / "folds.json"),
        audits=tuple(
            _parse(AuditRecord, _read(path), path) for path in sorted((run_dir / "audit").glob("tier[123].json"))
        ),
        site_metrics=_read_site_metrics(run_dir / "site_metrics.json"),
        job_sha256_matches=_job_matches(run_dir / "job.json", run.job_sha256),
    )


def _read_site_metrics(path: Path) -> SiteMetrics | None:
    return _parse(SiteMetrics, _read(path), path) if path.exists() else None


def job_value(job: Mapping[str, Any], section: str, key: str) -> Any:
    """One setting of a job, None where the job does not have it."""
    values = job.get(section)
    return values.get(key) if isinstance(values, Mapping) else None


def read_arm(folder: Path, *, name: str, complete: bool = False) -> Arm:
    """Read one training; a completed one must have its rounds and its evaluation."""
    job = _read_job(folder / "job.json")
    private = job["privacy"]["mechanism"] != "none"
    rounds = _read_rounds(folder / "metrics.jsonl", complete=complete)
    path = folder / "evaluation.json"
    evaluation = read_evaluation(path) if complete or path.exists() else None
    # A site that never answered released nothing and has no record.
    released = {name for record in rounds for name in record.sites} if complete else set()
    sites = tuple(
        read_site(site / "privacy.json", private=private)
        for site in _folders(folder / "sites")
        if site.name in released or (site / "privacy.json").exists()
    )
    if job["privacy"]["mechanism"] == "central":
        path = folder / "privacy.json"
        sites = (read_site(path, private=True, kind=CoordinatorRecord),) if path.exists() else ()
    names = [site.site for site in sites]
    for twice in {site for site in names if names.count(site) > 1}:
        raise RunError(
            f"two records under {folder / 'sites'} claim to be of site {twice!r}; expected one each. "
            "Remove the one that does not belong to this run."
        )
    path = folder / DIVERGED_FILE
    problem = _parse(DivergedRecord, _read(path), path).reason if path.exists() else None
    return Arm(name=name, job=job, private=private, rounds=rounds, evaluation=evaluation, sites=sites, problem=problem)


def _read_job(path: Path) -> dict[str, Any]:
    try:
        job = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise _malformed(path, f"it is not JSON ({error})") from error
    mechanism = job_value(job, "privacy", "mechanism") if isinstance(job, dict) else None
    if mechanism not in ("dp-sgd", "central", "none"):
        raise _malformed(path, f"privacy.mechanism is {mechanism!r}, expected 'dp-sgd', 'central' or 'none'")
    assert isinstance(job, dict)  # noqa: S101 - only a dict has a mechanism
    return job


def _read_rounds(path: Path, *, complete: bool) -> tuple[RoundRecord, ...]:
    """Read the rounds in order; while a run is going on, a last line without its end is not there yet."""
    if not complete and not path.exists():
        return ()
    text = _read(path)
    lines = text.splitlines() if complete or text.endswith("\n") else text.splitlines()[:-1]
    records = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            records.append(_parse(RoundRecord, line, path, where=f"line {number}: "))
    for earlier, later in pairwise(records):
        if later.round <= earlier.round:
            raise _malformed(path, f"round {later.round} follows round {earlier.round}, expected rising rounds")
    if complete and not records:
        raise _malformed(path, "it has no round, expected one line for each")
    return tuple(records)


def read_evaluation(path: Path) -> Evaluation:
    """Read and check an `evaluation.json`.

    Raises:
        RunError: if it is missing or malformed.
    """
    evaluation = _parse(Evaluation, _read(path), path)
    # None is a number that the evaluation data leaves undefined.
    value = evaluation.metrics.get(evaluation.primary_metric, "missing")
    if value is not None and _number(value) is None:
        raise _malformed(path, f"metrics has no number for the primary metric {evaluation.primary_metric!r}")
    if evaluation.confusion is not None:
        size = len(evaluation.labels) if evaluation.labels is not None else len(evaluation.confusion)
        if len(evaluation.confusion) != size or any(len(row) != size for row in evaluation.confusion):
            raise _malformed(path, f"confusion is not a square of {size} rows and columns, one for each label")
    elif evaluation.confusion_cells is not None:
        size = len(evaluation.labels or ())
        if any(true >= size or predicted >= size for true, predicted, _ in evaluation.confusion_cells):
            raise _malformed(path, f"confusion_cells names a label beyond the {size:,} in labels")
    return evaluation


def read_repeats(path: Path) -> Repeats | None:
    """Read a `repeats.json`, None if there is none; raises `RunError` if it is malformed."""
    return _parse(Repeats, _read(path), path) if path.exists() else None


def read_folds(path: Path) -> Folds | None:
    """Read a `folds.json`, None if there is none; raises `RunError` if it is malformed."""
    return _parse(Folds, _read(path), path) if path.exists() else None


def read_site(path: Path, *, private: bool, kind: type[SiteRecord] = SiteRecord) -> SiteRecord:
    """Read a `privacy.json`; raises `RunError` if it is malformed, or lacks what a private one must state."""
    site = _parse(kind, _read(path), path)
    if private:
        # With injected randomness there is no epsilon to state; the report says so.
        spent = () if site.randomness == "injected" else ("epsilon_spent",)
        for key in (*spent, "delta", "randomness"):
            if getattr(site, key) is None:
                raise _malformed(path, f"{key} is missing, without which no privacy can be claimed")
    return site


RecordT = TypeVar("RecordT", bound=_Record)


def _parse(kind: type[RecordT], text: str, path: Path, *, where: str = "") -> RecordT:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise _malformed(path, f"{where}{key + ': ' if key else ''}{first['msg']}") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RunError(
            f"{path} is missing; expected it in the folder of every run in this state. "
            "Check that this is a run folder and that it was copied completely."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise _malformed(path, f"it cannot be read as UTF-8 text ({error})") from error


def _malformed(path: Path, what: str) -> RunError:
    return RunError(
        f"{path} is malformed: {what}. Expected the file as the run wrote it; restore it from the original "
        "run folder, then write the report again."
    )


def _folders(parent: Path) -> Sequence[Path]:
    if not parent.is_dir():
        return ()
    return sorted((path for path in parent.iterdir() if path.is_dir()), key=lambda path: natural_key(path.name))


def _adapter_files(folder: Path) -> Sequence[AdapterFile]:
    """Name, size and hash of every regular file; links are not followed out of the run folder."""
    files = []
    for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
        if not stat.S_ISREG(path.lstat().st_mode):
            continue
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        name = path.relative_to(folder).as_posix()
        files.append(AdapterFile(name=name, num_bytes=path.stat().st_size, sha256=digest))
    return files


def _job_matches(path: Path, expected: str | None) -> bool | None:
    """Compare the hash of the job file, with or without its last line break, to the recorded one."""
    if expected is None:
        return None
    data = _read(path).encode()
    return expected.lower() in {hashlib.sha256(part).hexdigest() for part in (data, data.rstrip(b"\n"))}


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)
