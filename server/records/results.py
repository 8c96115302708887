"""What was measured: `evaluation.json`, `site_metrics.json`, `audit/tierN.json`, and arms, seeds and folds side by side."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from server.records.metrics import Metrics, in_range
from shared.files.json_files import Count, Finite, Positive, Share, Whole, damaged, read_record
from shared.runtime.calibration import Calibration
from shared.runtime.site_metrics import Estimate
from shared.runtime.thresholds import Thresholds
from shared.tasks import Evaluation

DIVERGED_FILE = "diverged.json"
DROPOUTS_FILE = "dropouts.json"
FOLDS_FILE = "folds.json"
REPEATS_FILE = "repeats.json"


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord(Evaluation):
    """`evaluation.json`: the final model on public records.

    Attributes:
        round: whose adapter it is; None in files that did not say.
        calibration: how sure it is; None of a task without classes.
        thresholds: what was added to its logits, and is part of the metrics; None if the job asks for none.
    """

    metrics: Metrics
    primary_metric: str
    higher_is_better: bool | None = None
    round: Count | None = None
    calibration: Calibration | None = None
    thresholds: Thresholds | None = None

    @property
    def primary(self) -> float | None:
        """The primary metric; None where the evaluation data leaves it undefined."""
        return self.metrics[self.primary_metric]


def read_evaluation(path: Path) -> EvaluationRecord:
    """Read and check an `evaluation.json`.

    Raises:
        RunError: if it is missing or malformed.
    """
    found = read_record(path, EvaluationRecord)
    if found.primary_metric not in found.metrics:
        raise damaged(path, f"metrics has no number for the primary metric {found.primary_metric!r}")
    if found.confusion is not None:
        size = len(found.labels) if found.labels is not None else len(found.confusion)
        if len(found.confusion) != size or any(len(row) != size for row in found.confusion):
            raise damaged(path, f"confusion is not a square of {size} rows and columns, one for each label")
    elif found.confusion_cells is not None:
        size = len(found.labels or ())
        if any(true >= size or predicted >= size for true, predicted, _ in found.confusion_cells):
            raise damaged(path, f"confusion_cells names a label beyond the {size:,} in labels")
    return found


def _estimate_in_range(found: Estimate) -> Estimate:
    in_range(found.metric, found.value)
    return found


@dataclass(frozen=True, kw_only=True)
class SiteMetrics:
    """`site_metrics.json`: noisy counts on the sites' own held-out records by site and metric, and what they say together."""

    noise_multiplier: Positive
    largest_loss: Positive | None = None
    labels: tuple[str, ...] = ()
    sites: dict[str, dict[str, list[Finite]]] = field(default_factory=dict)
    estimates: tuple[Annotated[Estimate, AfterValidator(_estimate_in_range)], ...] = ()


@dataclass(frozen=True, kw_only=True)
class AuditRecord:
    """`audit/tierN.json`: what an audit of the mechanism found; see `simulations.audit.result`.

    Attributes:
        claim, lower_bound, ceiling: epsilons; None where one is infinite.
        run, site, job_sha256: what was audited.
    """

    tier: Annotated[int, Field(ge=1, le=3)]
    audited: str
    claim: Positive | None
    delta: Share
    alpha: Share
    lower_bound: Positive | None
    ceiling: Positive | None
    verdict: Literal["consistent", "violated", "inconclusive"]
    reasons: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    run: str | None = None
    job_sha256: str | None = None
    site: str | None = None
    seeds: tuple[Whole, ...] = ()
    date: str | None = None
    version: str | None = None


def read_audits(run_dir: Path) -> tuple[AuditRecord, ...]:
    """Read what every audit of a run found, by tier."""
    return tuple(read_record(path, AuditRecord) for path in sorted(run_dir.glob("audit/tier[123].json")))


@dataclass(frozen=True, kw_only=True)
class EnsembleRecord:
    """What the adapters of all seeds say together; epsilon is the composition of their runs."""

    metrics: Metrics
    epsilon: Positive | None = None
    delta: Share | None = None


_Values = Annotated[tuple[Finite, ...], Field(min_length=2)]


@dataclass(frozen=True, kw_only=True)
class Repeats:
    """`repeats.json`: the same scenario under several seeds; final value of the primary metric by arm."""

    seeds: tuple[Whole, ...]
    arms: dict[str, _Values]
    ensembles: dict[str, EnsembleRecord] = field(default_factory=dict)


def _values_in_range(metrics: dict[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
    for name, values in metrics.items():
        for value in values:
            in_range(name, value)
    return metrics


@dataclass(frozen=True, kw_only=True)
class Folds:
    """`folds.json`: a cross-validation; final value of every metric by arm and metric, one for each fold."""

    folds: Annotated[int, Field(ge=2)]
    test_records: tuple[Count, ...]
    arms: dict[str, Annotated[dict[str, _Values], AfterValidator(_values_in_range)]]


@dataclass(frozen=True, kw_only=True)
class Diverged:
    """`diverged.json` in the folder of a baseline that could not go on: why."""

    reason: str
