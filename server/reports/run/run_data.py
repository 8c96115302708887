"""What a run's files say together: the run, its trainings and what follows from them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from server.records.energy import EnergyRecord
from server.records.privacy import AnyRecord, SiteRecord
from server.records.results import AuditRecord, EvaluationRecord, Folds, Repeats, SiteMetrics
from server.records.rounds import RoundRecord
from server.records.run import RunRecord
from server.reports.run.formats import LOWER_IS_BETTER, natural_key
from server.rounds.convergence import constant_loss, why_diverged
from shared.errors import RunError
from shared.job.model import told_backbone
from shared.job.values import PERSON_UNITS
from shared.privacy.statement import Statement


@dataclass(frozen=True, kw_only=True)
class FileHash:
    """A file that a report speaks of, or was made from."""

    name: str
    num_bytes: int
    sha256: str

    @classmethod
    def of(cls, name: str, path: Path) -> FileHash:
        """Return the size and hash of `path`; raises `RunError` if it cannot be read."""
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            return cls(name=name, num_bytes=path.stat().st_size, sha256=digest)
        except OSError as error:
            raise RunError(f"{path} cannot be read ({error.strerror}); check its permissions.") from None


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One training: the federated run itself or a baseline beside it."""

    name: str
    job: Mapping[str, Any]
    private: bool
    rounds: tuple[RoundRecord, ...]
    evaluation: EvaluationRecord | None
    sites: tuple[AnyRecord, ...]
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
        losses = [(record.round, loss) for record in self.rounds if (loss := record.metrics.get("loss")) is not None]
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

    @property
    def job_privacy(self) -> Mapping[str, Any]:
        """The privacy settings of the job."""
        privacy: Mapping[str, Any] = self.job["privacy"]
        return privacy

    @property
    def budget(self) -> float | None:
        """The budget that the job asked for; without one, the largest of the sites' own."""
        wanted = _number(self.job_privacy.get("epsilon"))
        if wanted is not None:
            return wanted
        return max((site.epsilon_budget for site in self.sites if site.epsilon_budget is not None), default=None)

    @property
    def delta(self) -> float | None:
        """The largest delta of any site; before there is one, the job's."""
        wanted = self.job_privacy.get("delta")
        return max((site.delta for site in self.sites), default=wanted if isinstance(wanted, float) else None)

    @property
    def unit(self) -> str | None:
        """The unit of privacy; every one, where sites differ."""
        wanted = self.job_privacy.get("unit")
        return ", ".join(sorted({site.unit for site in self.sites})) or (wanted if isinstance(wanted, str) else None)

    @property
    def declared(self) -> str:
        """What sites declare a number of."""
        return f"{self.unit}s" if self.unit in PERSON_UNITS else "records"

    def undefined(self, metric: str) -> bool:
        """Whether the evaluation data leaves the metric undefined."""
        return self.evaluation is not None and self.evaluation.metrics.get(metric, 0.0) is None

    def final(self, metric: str) -> float | None:
        """The metric of the final model; before there is one, that of the last measured round."""
        if self.evaluation is not None:
            value = self.evaluation.metrics.get(metric)
            if value is not None or self.undefined(metric):
                return value
        measured = [value for record in self.rounds if (value := record.metrics.get(metric)) is not None]
        return measured[-1] if measured else None


@dataclass(frozen=True, kw_only=True)
class RunData:
    run: RunRecord
    federated: Arm
    baselines: tuple[Arm, ...]
    statement: Statement | None
    adapter: tuple[FileHash, ...]
    repeats: Repeats | None
    folds: Folds | None
    audits: tuple[AuditRecord, ...]
    site_metrics: SiteMetrics | None
    energy: EnergyRecord | None
    """What this training drew, where it was counted."""
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
    def arms(self) -> tuple[Arm, ...]:
        """Every training, the run itself first."""
        return (self.federated, *self.baselines)

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
    return _renamed(data, data.called) if data.run.dataset.site_names else data


def without_names(data: RunData) -> RunData:
    """Return `data` for readers elsewhere: sites are numbered, what they answered is left out, of paths the last part stays."""
    others = {site.site for arm in data.baselines for site in arm.sites if isinstance(site, SiteRecord)}
    others |= {site for arm in data.baselines for record in arm.rounds for site in (*record.sites, *record.failed)}
    known = [*data.site_names, *sorted(others - {*data.site_names})]
    numbers = {site: f"site-{number}" for number, site in enumerate(known, start=1)}
    data = _renamed(data, lambda site: numbers.get(site, site))
    arms = []
    for arm in data.arms:
        rounds = tuple(replace(record, failed=dict.fromkeys(record.failed, "")) for record in arm.rounds)
        job, model = arm.job, arm.job.get("model")
        if isinstance(model, Mapping) and isinstance(backbone := model.get("backbone"), str):
            job = {**job, "model": {**model, "backbone": told_backbone(backbone)}}
        arms.append(replace(arm, rounds=rounds, job=job))
    dataset = data.run.dataset
    name, test_name = (path and Path(path).name for path in (dataset.name, dataset.test_name))
    run = replace(data.run, dataset=replace(dataset, site_names={}, name=name, test_name=test_name))
    return replace(data, run=run, federated=arms[0], baselines=tuple(arms[1:]))


def _audit_renamed(audit: AuditRecord, called: Callable[[str], str]) -> AuditRecord:
    """Return an audit with its site called so; its sentences are about that one alone."""
    if audit.site is None:
        return audit
    whole = re.compile(rf"(?<![\w.-]){re.escape(audit.site)}(?![\w-])")
    audited, *reasons = (
        whole.sub(lambda _: called(audit.site or ""), text) for text in (audit.audited, *audit.reasons)
    )
    return replace(audit, audited=audited, reasons=tuple(reasons), site=called(audit.site))


def _renamed(data: RunData, called: Callable[[str], str]) -> RunData:
    """Return `data` with every site called so, in sentences about sites, too."""

    def named(text: str) -> str:
        return _SITE_IN_TEXT.sub(lambda found: found[1] + called(found[2]), text)

    arms = []
    for arm in data.arms:
        rounds = tuple(
            replace(
                record,
                sites=list(map(called, record.sites)),
                failed={called(site): reason for site, reason in record.failed.items()},
                doubted={called(site): doubt for site, doubt in record.doubted.items()},
            )
            for record in arm.rounds
        )
        # Under central DP no site is named.
        sites = tuple(
            replace(site, site=called(site.site), statement=site.statement and named(site.statement))
            if isinstance(site, SiteRecord)
            else site
            for site in arm.sites
        )
        arms.append(replace(arm, rounds=rounds, sites=sites))
    statement = data.statement
    if statement is not None:
        statement = replace(statement, one_site=named(statement.one_site), text=named(statement.text))
    audits = tuple(_audit_renamed(audit, called) for audit in data.audits)
    return replace(data, federated=arms[0], baselines=tuple(arms[1:]), statement=statement, audits=audits)


def job_value(job: Mapping[str, Any], section: str, key: str) -> Any:
    """One setting of a job, None where the job does not have it."""
    values = job.get(section)
    return values.get(key) if isinstance(values, Mapping) else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)
