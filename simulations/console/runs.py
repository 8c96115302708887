"""One run as the console shows it, read from its folder.

What a table and a figure need is read, no more: a report has everything. Every record is checked as reports check it, and
every epsilon is the one that the run's own records state.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from server.records.metrics import Metrics, in_range
from server.records.privacy import AnyRecord, CoordinatorRecord, SiteRecord, require_claim
from server.records.rounds import RoundRecord
from server.records.run import Dataset, RunRecord
from server.rounds.convergence import constant_loss, why_diverged
from shared.errors import RunError, printable
from shared.files.json_files import Count, Finite, Whole, damaged, parse_object, parse_record
from shared.job.kinds import primary_metric
from simulations.console.files import Reader, Stamp

FEDERATED = "federated"
CENTRAL_DP = "central-dp"
_LOWER_IS_BETTER = frozenset({"loss", "perplexity", "mae", "mae_of_mean", "rmse"})


@dataclass(frozen=True, kw_only=True)
class Spread:
    """One figure over several seeds or folds."""

    mean: float
    sd: float
    num: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of at least two values."""
        return cls(mean=statistics.fmean(values), sd=statistics.stdev(values), num=len(values))


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One training: the federated run itself, or a baseline.

    Attributes:
        metrics: of the final model; before there is one, of the last measured round.
        spreads: by metric, where there are seeds or folds.
        diverged: its loss says that nothing was learned; a baseline is no yardstick then.
    """

    name: str
    private: bool
    metrics: Mapping[str, float | None]
    spreads: Mapping[str, Spread] = field(default_factory=dict)
    diverged: bool = False

    def value(self, metric: str) -> float | None:
        """Return a metric: its mean where there are several seeds or folds."""
        return self.spreads[metric].mean if metric in self.spreads else self.metrics.get(metric)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run; of one that cannot be read, `problem` says why and most else is empty.

    Attributes:
        id: names it in addresses; opens nothing.
        path: of its folder beneath the folder of runs.
        executed: the largest epsilon of what was executed; None without protection, or if none may be stated.
        promised: that of the whole plan, of a run that ended early or whose noise is shared.
        alone: if secure aggregation fails; of shared noise only.
        asked: the epsilon that the job asks for; None if it names noise, or none.
        arms: the run itself first.
        sweep: id of the sweep that it is a trial of.
        stamps: see `Reader`.
    """

    id: str
    path: str
    folder: Path
    name: str
    problem: str = ""
    status: str = ""
    sweep: str = ""
    task: str = ""
    backbone: str = ""
    data: str = ""
    partition: str = ""
    mechanism: Literal["dp-sgd", "distributed", "central", "none", ""] = ""
    unit: str = ""
    delta: float | None = None
    executed: float | None = None
    promised: float | None = None
    alone: float | None = None
    asked: float | None = None
    metric: str = ""
    higher: bool = True
    arms: tuple[Arm, ...] = ()
    num_sites: int | None = None
    created: datetime | None = None
    seconds: float | None = None
    has_report: bool = False
    stamps: Mapping[Path, Stamp] = field(default_factory=dict)

    @property
    def private(self) -> bool:
        """Whether noise was to be added."""
        return self.mechanism not in ("", "none")

    @property
    def planned(self) -> float | None:
        """The epsilon that the plan comes to: as the run's records promise it, else as the job asks for it."""
        return self.asked if self.promised is None else self.promised

    @property
    def value(self) -> float | None:
        """The primary metric of the run itself."""
        return self.arms[0].value(self.metric) if self.arms else None

    @property
    def spread(self) -> Spread | None:
        """That over seeds or folds."""
        return self.arms[0].spreads.get(self.metric) if self.arms else None

    @property
    def central(self) -> float | None:
        """The same budget with all records at one place."""
        found = next((arm for arm in self.arms if arm.name == CENTRAL_DP and not arm.diverged), None)
        return found.value(self.metric) if found else None

    @property
    def open(self) -> float | None:
        """The best baseline without privacy that did not diverge."""
        values = [arm.value(self.metric) for arm in self.arms[1:] if not arm.private and not arm.diverged]
        known = [value for value in values if value is not None]
        return (max if self.higher else min)(known) if known else None

    @property
    def gap(self) -> float | None:
        """The run less its best baseline without privacy."""
        return None if self.value is None or self.open is None else self.value - self.open


def id_of(path: str) -> str:
    """Return what names a run or sweep in addresses."""
    return hashlib.sha256(path.encode(errors="surrogateescape")).hexdigest()[:16]


def read_run(folder: Path, path: str, *, sweep: str = "") -> Run:
    """Return the run in a folder; one that is damaged has a `problem`. Never raises for what lies in the folder."""
    reader = Reader()
    try:
        fields = _read(folder, reader)
    except (RunError, OSError, ValueError, RecursionError) as error:
        fields = broken(folder, error)
    return Run(id=id_of(path), path=printable(path), folder=folder, sweep=sweep, stamps=reader.stamps, **fields)


def broken(folder: Path, error: Exception) -> dict[str, Any]:
    """Return what is shown of a folder that cannot be read."""
    return {"name": printable(folder.name), "problem": printable(str(error).replace(f"{folder}/", ""))}


@dataclass(frozen=True, kw_only=True)
class _Evaluation:
    """`evaluation.json`, as far as it is shown here; see `server.records.results`."""

    metrics: Metrics
    primary_metric: str
    higher_is_better: bool | None = None
    round: Count | None = None
    confusion: list[list[Count]] | None = None


@dataclass(frozen=True, kw_only=True)
class _Repeats:
    seeds: tuple[Whole, ...]
    arms: dict[str, tuple[Finite, ...]]


@dataclass(frozen=True, kw_only=True)
class _Folds:
    folds: Count
    arms: dict[str, dict[str, tuple[Finite, ...]]]


@dataclass(frozen=True, kw_only=True)
class _Dataset(Dataset):
    partition: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _RunFacts(RunRecord):
    dataset: _Dataset = field(default_factory=_Dataset)


def _read(folder: Path, reader: Reader) -> dict[str, Any]:
    job = read_job(folder, reader)
    run = reader.record(folder / "run.json", _RunFacts)
    if run is None:
        raise damaged(folder / "run.json", "it is missing")
    over = run.status == "completed"
    evaluation = reader.record(folder / "evaluation.json", _Evaluation)
    rounds = [] if over and evaluation is not None else read_rounds(folder, reader)
    measured = next((record.metrics for record in reversed(rounds) if record.metrics), {})
    metric = evaluation.primary_metric if evaluation else primary_metric(_at(job, "task", "kind")) or "loss"
    higher = metric not in _LOWER_IS_BETTER
    if evaluation is not None and evaluation.higher_is_better is not None:
        higher = evaluation.higher_is_better
    privacy, central = job["privacy"], job["privacy"].get("central")
    names, records = _released(folder, reader, central=privacy["mechanism"] == "central")
    spreads = _spreads(folder, reader, metric)
    own = evaluation.metrics if evaluation else measured
    private = privacy["mechanism"] != "none"
    diverged = evaluation is not None and _diverged(folder, reader, evaluation, private=private)
    arms = [Arm(name=FEDERATED, private=private, metrics=own, spreads=spreads.get(FEDERATED, {}), diverged=diverged)]
    arms += [_baseline(place, reader, spreads.get(place.name, {})) for place in reader.folders(folder / "baselines")]
    return {
        "name": printable(run.name or _text(job.get("name")) or folder.name),
        "status": run.status,
        "task": _text(_at(job, "task", "kind")),
        "backbone": _text(_at(job, "model", "backbone")),
        "data": _text(run.dataset.name),
        "partition": _partition(run.dataset.partition),
        "mechanism": privacy["mechanism"],
        "unit": _text(privacy.get("unit")) if privacy["mechanism"] != "central" else "site",
        **_epsilons(privacy, records, rounds),
        "metric": metric,
        "higher": higher,
        "arms": tuple(arms),
        "num_sites": _number(central.get("num_sites")) if isinstance(central, dict) else len(names) or None,
        "created": run.created,
        "seconds": run.seconds,
        "has_report": reader.seen(folder / "report.html"),
    }


def read_rounds(folder: Path, reader: Reader, *, most: int | None = None) -> list[RoundRecord]:
    """Return the rounds of a run so far, the first `most` of them; a last line without its end is not there yet.

    Raises:
        RunError: a line is no round.
    """
    path = folder / "metrics.jsonl"
    lines = (reader.text(path) or "").split("\n")[:-1][:most]
    return [
        parse_record(line, RoundRecord, path, where=f"line {number}: ")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def read_job(folder: Path, reader: Reader) -> dict[str, Any]:
    """Return the settings of a run's job; raises `RunError` if there are none."""
    path = folder / "job.json"
    text = reader.text(path)
    if text is None:
        raise damaged(path, "it is missing")
    try:
        job = parse_object(text)
    except ValueError as error:
        raise damaged(path, str(error)) from None
    privacy = job.get("privacy")
    if not isinstance(privacy, dict) or privacy.get("mechanism") not in ("dp-sgd", "distributed", "central", "none"):
        raise damaged(path, "its privacy.mechanism is not known")
    return job


def _released(folder: Path, reader: Reader, *, central: bool) -> tuple[list[str], list[AnyRecord]]:
    """Return the names of the sites, and the record of everyone who released something under a guarantee."""
    names, records = [], list[AnyRecord]()
    for site in reader.folders(folder / "sites"):
        names.append(site.name)
        if not central and (record := reader.record(site / "privacy.json", SiteRecord)) is not None:
            records.append(record)
    if central and (whole := reader.record(folder / "privacy.json", CoordinatorRecord)) is not None:
        records.append(whole)
    return names, records


def _epsilons(
    privacy: Mapping[str, Any], records: Sequence[AnyRecord], rounds: Sequence[RoundRecord]
) -> dict[str, float | None]:
    """Return what was asked for, executed and promised; nothing of a run without noise, or with a test's randomness."""
    if privacy["mechanism"] == "none":
        return {}
    if any(record.randomness == "injected" for record in records):
        return {"asked": _positive(privacy.get("epsilon"))}
    for record in records:
        require_claim(record, Path("privacy.json"))
    so_far = [record.epsilon_max for record in rounds if record.epsilon_max is not None]
    return {
        "asked": _positive(privacy.get("epsilon")),
        "delta": max((record.delta for record in records), default=_positive(privacy.get("delta"))),
        "executed": _largest(record.recorded for record in records) if records else next(reversed(so_far), None),
        "promised": _largest(record.epsilon_planned for record in records),
        "alone": _largest(record.epsilon_alone for record in records if isinstance(record, SiteRecord)),
    }


def _spreads(folder: Path, reader: Reader, metric: str) -> dict[str, dict[str, Spread]]:
    """Return the spread over seeds or folds by arm and metric."""
    found: dict[str, dict[str, Spread]] = {}
    if (repeats := reader.record(folder / "repeats.json", _Repeats)) is not None:
        found |= {arm: {metric: Spread.of(values)} for arm, values in repeats.arms.items() if len(values) > 1}
    if (folds := reader.record(folder / "folds.json", _Folds)) is not None:
        for arm, metrics in folds.arms.items():
            found[arm] = {name: Spread.of(values) for name, values in metrics.items() if len(values) > 1}
    for spreads in found.values():
        for name, spread in spreads.items():
            in_range(name, spread.mean)
    return found


def _baseline(folder: Path, reader: Reader, spreads: Mapping[str, Spread]) -> Arm:
    job = read_job(folder, reader)
    private = job["privacy"]["mechanism"] != "none"
    evaluation = reader.record(folder / "evaluation.json", _Evaluation)
    metrics = evaluation.metrics if evaluation else {}
    diverged = reader.seen(folder / "diverged.json")
    if evaluation is not None and not diverged:
        diverged = _diverged(folder, reader, evaluation, private=private)
    return Arm(name=folder.name, private=private, metrics=metrics, spreads=spreads, diverged=diverged)


def _diverged(folder: Path, reader: Reader, evaluation: _Evaluation, *, private: bool) -> bool:
    """Return whether a training counts as diverged; the rule is the report's (`server.rounds.convergence`)."""
    kept = 1 if evaluation.round is None else evaluation.round
    rounds = read_rounds(folder, reader, most=1 if kept else None)
    losses = [(record.round, loss) for record in rounds if (loss := record.metrics.get("loss")) is not None]
    started = next((loss for number, loss in losses if number == 0), None)
    if evaluation.confusion is not None and started is not None:
        started = max(started, constant_loss([sum(row) for row in evaluation.confusion]) or 0.0)
    return (
        why_diverged(
            started=started,
            final=evaluation.metrics.get("loss"),
            losses=[loss for number, loss in losses if number],
            kept_round=kept,
            private=private,
        )
        is not None
    )


def _partition(fields: Mapping[str, Any]) -> str:
    """Return how records were spread over sites, in the words of the scenario: `dirichlet 0.3`, `column hospital`."""
    kind = _text(fields.get("kind"))
    detail = fields.get("alpha") if kind in ("dirichlet", "quantity") else fields.get("column")
    return kind if detail is None else printable(f"{kind} {detail}")


def _at(job: Mapping[str, Any], section: str, key: str) -> Any:
    values = job.get(section)
    return values.get(key) if isinstance(values, dict) else None


def _text(value: Any) -> str:
    return printable(value) if isinstance(value, str) else ""


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _positive(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and value > 0 else None


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)
