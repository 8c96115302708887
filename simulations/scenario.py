"""A scenario: a job plus what only a simulation needs - data, partition, drop-outs, baselines."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from shared.data.cells import shorten
from shared.data.datasets import PERSON_ROLE, DataSource, read_records
from shared.data.records import FileRecord
from shared.errors import ConfigError, DataError, ModelError, excerpt
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.job.parsing import Section, apply_overrides, load_toml, nearest, parse, set_key, unknown_key
from shared.job.values import PERSON_UNITS, Name
from shared.privacy.persons import Persons
from shared.tasks import Record
from simulations.data.builtin_data import BUILTIN
from simulations.data.demo_data import fold_rows, split_public_test
from simulations.data.partitions import PartitionConfig
from simulations.data.small_gpt2 import resolve_backbone

DataKind = Literal["public", "synthetic", "private"]
BaselineName = Literal["central-dp", "non-private", "non-private-all-layers", "federated-non-private"]

_JOB_SECTIONS = ("model", "lora", "task", "training", "privacy", "aggregation", "federation", "site_metrics")


class DataConfig(Section):
    """Where the records come from: a data set that the project knows, or files with declared columns."""

    builtin: str | None = None
    """A public data set that the project knows: `movie-reviews`, `movie-ratings`, `banking77`, `bc5cdr`, `chinese-reviews`,
    `people-daily`, `question-answers`, `replies`, `digits`; see `simulations.data.builtin_data`."""
    train: DataSource | None = None
    """The sites' records."""
    test: DataSource | None = None
    """Public evaluation records; None holds `num_test` records out of `train`."""
    kind: DataKind | None = None
    """`public`, `synthetic` or `private`: what a sweep may do with the records. None: private, or public for `builtin`."""
    test_kind: DataKind | None = None
    """The same for the file `test`. None: what `kind` says, or private."""
    num_test: int = Field(default=2000, ge=1)
    """Records held out for public evaluation where there is no test file."""
    evaluation_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of each site's records that it never trains on, for `site_metrics`; see `evaluation_share` of a site."""
    num_confirm: int = Field(default=0, ge=0)
    """Further evaluation records, held out of the test file if there is one, for a figure that selected nothing in a sweep."""
    split_seed: int = Field(default=0, ge=0)
    """Public seed of that split; it does not change with `seed`, so that repeats share their test records."""

    @field_validator("builtin")
    @classmethod
    def _check_builtin(cls, name: str | None) -> str | None:
        if name is not None and name not in BUILTIN:
            raise ValueError(f"no built-in data set has this name; {nearest(name, sorted(BUILTIN))}")
        return name

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if (self.builtin is None) == (self.train is None):
            raise ValueError("give either data.builtin or data.train, not both and not neither")
        if self.test is None and self.test_kind is not None:
            raise ValueError(
                "data.test_kind speaks of the file data.test, which is not given; remove it or add the file"
            )
        return self

    @property
    def declared_kind(self) -> DataKind:
        """What the sites' records are; whatever is not declared counts as private."""
        return self.kind or ("public" if self.builtin is not None else "private")

    @property
    def evaluation_kind(self) -> DataKind:
        """What the evaluation records are: those held out of the sites' records are of their kind."""
        if self.test is None:
            return self.declared_kind
        return self.test_kind or self.kind or "private"


class BaselinesConfig(Section):
    """Arms that run after the federated one, on the same data, for comparison."""

    arms: tuple[BaselineName, ...] = ()
    """`central-dp`: all records at one trusted site; `non-private`: the same without clipping and noise;
    `non-private-all-layers`: that with LoRA in all layers, the best that the data give without a budget;
    `federated-non-private`: the same sites without clipping and noise. Arms without noise have settings of their own, which
    converge (`simulations.running.baselines`), and none of the job's `training`."""
    central_dp: dict[str, Any] = Field(default_factory=dict)
    """Job keys to change in that arm, for example {"training": {"learning_rate": 0.003}}."""
    non_private: dict[str, Any] = Field(default_factory=dict)
    """Likewise."""
    non_private_all_layers: dict[str, Any] = Field(default_factory=dict)
    """Likewise."""
    federated_non_private: dict[str, Any] = Field(default_factory=dict)
    """Likewise."""

    def changes(self, arm: str) -> dict[str, Any]:
        """Return the job keys that `arm` changes."""
        return dict(getattr(self, arm.replace("-", "_")))


class SimulationConfig(Section):
    """How the clients are run."""

    backend: Literal["in-process", "ray"] = "in-process"
    """`in-process`: one frozen backbone for all clients; `ray`: Flower's simulation runtime, for many processors."""
    clients_at_once: int = Field(default=64, ge=1, le=10_000)
    """Clients of the `in-process` backend that are trained side by side over one backbone, each as if alone up to rounding: many
    small clients fill a batch. Each holds its adapter and moments while it trains. 1 trains one after the other."""
    num_actors: int = Field(default=2, ge=1)
    """Parallel client processes of the `ray` backend, each with one backbone."""
    dropout_probability: float = Field(default=0.0, ge=0, lt=1)
    """Chance that a site that was asked does not answer in a round, drawn from the public seed."""
    kill_in_round: int | None = Field(default=None, ge=1)
    """Of `silotune federation`: while this round runs, the process of the last site is killed, as by a power cut."""
    evaluate_every: int = Field(default=1, ge=1)
    """Rounds between evaluations on public data."""
    repeats: int = Field(default=1, ge=1, le=100)
    """Run everything under this many seeds (seed, seed + 1, ...); the report states mean and spread."""
    folds: int | None = Field(default=None, ge=2, le=20)
    """k-fold cross-validation: k runs, each of which holds another k-th of the records out for evaluation, so that every record
    is evaluation data once; the report states mean and spread. It takes the place of `data.num_test`."""
    threads: int | None = Field(default=None, ge=1)
    """Processor threads of the numerical library; None leaves its default."""


@dataclass(frozen=True, kw_only=True)
class Fold:
    """One of the `of` parts of a cross-validation.

    Attributes:
        number: from 1.
        train: records of the sites: those of all other parts.
        test: the records of this part.
    """

    number: int
    of: int
    train: list[Record]
    test: list[Record]


class Scenario(Section):
    """Everything that `silotune simulate` reads."""

    name: Name
    """Name of the run."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Public seed of the partition, drop-outs and the model's initialisation."""
    job: Job
    data: DataConfig
    partition: PartitionConfig
    simulation: SimulationConfig = SimulationConfig()
    baselines: BaselinesConfig = BaselinesConfig()
    compute: ComputeConfig = ComputeConfig()
    base: Path
    """Folder that relative data paths start from."""

    @model_validator(mode="after")
    def _check_folds(self) -> Self:
        if self.simulation.folds is None:
            return self
        if self.data.test is not None:
            raise ValueError(
                "simulation.folds makes evaluation data of every part of data.train in turn, and data.test gives other "
                "evaluation data; remove one of the two"
            )
        if self.data.num_confirm:
            raise ValueError(
                "data.num_confirm is for sweeps and simulation.folds for single scenarios; remove one of them"
            )
        if self.simulation.repeats > 1:
            raise ValueError(
                "simulation.folds and simulation.repeats both repeat the scenario; set one of them, and run the scenario again "
                "with another seed and data.split_seed for the other"
            )
        return self

    def load_folds(self) -> list[Fold]:
        """Return the parts of the cross-validation: disjoint, covering all records, no text (or person) in two of them.

        A built-in data set's own test records are left aside.

        Raises:
            DataError: see `load_data`; or if there are fewer texts (or persons) than folds.
        """
        records, _ = self._read()
        persons = persons_of(records, self.job.privacy.unit)
        parts = fold_rows(records, self.simulation.folds or 1, seed=self.data.split_seed, persons=persons)
        return [
            Fold(
                number=number,
                of=len(parts),
                train=[records[row] for row in sorted({*range(len(records))} - {*rows})],
                test=_without_ids([records[row] for row in rows]),
            )
            for number, rows in enumerate(parts, start=1)
        ]

    def load_data(self) -> tuple[list[Record], list[Record]]:
        """Return (records of the sites, public evaluation records).

        Raises:
            DataError: if a file is missing or malformed.
        """
        train, test, _ = self._split()
        return train, test

    def load_confirmation(self) -> list[Record]:
        """Return the `num_confirm` further evaluation records, disjoint from both parts of `load_data`.

        Raises:
            DataError: see `load_data`.
        """
        return self._split()[2]

    def _read(self) -> tuple[Sequence[Record], Sequence[Record] | None]:
        """Return all records, and a built-in data set's own test records."""
        if self.data.builtin is not None:
            found = BUILTIN[self.data.builtin].load()
            return found.train, found.test
        assert self.data.train is not None  # noqa: S101 (checked by DataConfig)
        return self._read_file(self.data.train), None

    def _read_file(self, source: DataSource) -> list[dict[str, Any]]:
        """Return the records of a file, whose labels are the task's."""
        records = read_records(source, base=self.base)
        labels = self.job.task.labels if self.job.task.has_classes and "label" in source.columns else ()
        wrong = [row for row, record in enumerate(records, start=1) if labels and str(record["label"]) not in labels]
        if wrong:
            # A label may be a note by mistake: only rows are named.
            raise DataError(
                f"{source.path}: {len(wrong):,} of {len(records):,} rows have a label in column {source.columns['label']!r} that "
                f"is not among task.labels ({', '.join(labels)}), first at row {shorten([str(row) for row in wrong], 5)}. Mend "
                "the data, name the right column in data.train.columns or data.test.columns, or add the label."
            )
        return records

    def _split(self) -> tuple[list[Record], list[Record], list[Record]]:
        """Return the records of the sites, of the evaluation, and those that confirm it."""
        records, given = self._read()
        if self.data.test is not None:
            given = self._read_file(self.data.test)
        persons = persons_of(records, self.job.privacy.unit)
        train: list[Record]
        test: list[Record]
        if given is not None:
            train, test = list(records), list(given)
        else:
            train, test = split_public_test(
                records, num_test=self.data.num_test, seed=self.data.split_seed, persons=persons
            )
        if persons is not None:
            _require_other_persons(train, test)
        confirm: list[Record] = []
        if self.data.num_confirm:
            # The test records stay the same ones, so that figures with and without confirmation can be compared.
            source = train if given is None else test
            kept, confirm = split_public_test(
                source,
                num_test=self.data.num_confirm,
                seed=self.data.split_seed,
                persons=persons_of(source, self.job.privacy.unit) if source is train else None,
            )
            train, test = (kept, test) if given is None else (train, kept)
        return train, _without_ids(test), _without_ids(confirm)


def _without_ids(records: Sequence[Record]) -> list[Record]:
    """Return the records without the person: nothing that evaluates needs to know whose record it is."""
    return [
        record.without(PERSON_ROLE)
        if isinstance(record, FileRecord)
        else {role: value for role, value in record.items() if role != PERSON_ROLE}
        for record in records
    ]


def persons_of(records: Sequence[Record], unit: str) -> Persons | None:
    """Return whose records these are, if persons are the unit of privacy.

    Raises:
        DataError: if there is no id column, or it is not filled everywhere.
    """
    if unit not in PERSON_UNITS:
        return None
    if records and PERSON_ROLE not in records[0]:
        raise DataError(
            f"privacy.unit is {unit!r}, but the data has no id column; declare it in data.train.columns, for example "
            f'{PERSON_ROLE} = "{unit}_id".'
        )
    return Persons.from_ids([record[PERSON_ROLE] for record in records])


def _require_other_persons(train: Sequence[Record], test: Sequence[Record]) -> None:
    """Raise `DataError` if a test file names persons who are in the training data, whom its results would tell about."""
    if not test or PERSON_ROLE not in test[0]:
        return
    owners = Persons.from_ids([record[PERSON_ROLE] for record in (*train, *test)]).owners
    if shared := set(owners[: len(train)].tolist()) & set(owners[len(train) :].tolist()):
        raise DataError(
            f"{len(shared):,} persons of the evaluation data also have records in the training data. Public results would tell "
            "about them without noise; take all records of a person out of one of the two."
        )


def load_scenario(path: Path, overrides: Sequence[str] = ()) -> Scenario:
    """Read a scenario file and apply `--set` overrides.

    The sections of a job stand at the top level beside `[data]`, `[partition]`, `[simulation]`, `[baselines]` and
    `[compute]`.

    Raises:
        ConfigError: naming every bad key.
    """
    path = scenario_path(path)
    raw = apply_overrides(load_scenario_file(path), overrides)
    changed = f" with --set {excerpt(' --set '.join(overrides), 200)}" if overrides else ""
    return build_scenario(raw, source=f"{path}{changed}", base=path.resolve().parent)


def scenario_path(path: Path) -> Path:
    """Return the file of a scenario: `path`, or where there is no such file, the one of that name that ships, such as `demo`.

    Raises:
        ConfigError: if it is a bare name that nothing has.
    """
    if path.exists() or path.suffix or len(path.parts) != 1:
        return path
    if path.name not in (known := _builtin()):
        raise ConfigError(
            f"{path} does not exist, nor is it the name of a scenario that ships; {nearest(path.name, sorted(known))}"
        )
    return known[path.name]


def _builtin() -> dict[str, Path]:
    """Return the scenarios that ship with the package."""
    return {file.stem: file for file in Path(str(files("simulations"))).glob("*.toml")}


def load_scenario_file(path: Path) -> dict[str, Any]:
    """Read a scenario or sweep file; `ConfigError`, saying what a scenario is, if it is something else."""
    try:
        return load_toml(path)
    except ConfigError as error:
        if path.suffix == ".toml" or not path.exists():
            raise
        what = "a folder" if path.is_dir() else "no TOML file"
        raise ConfigError(
            f"{path} is {what}; expected a scenario, a TOML file that says which records, task, model and settings to simulate. "
            f"`silotune new RECORDS --text COLUMN --label COLUMN` looks at a file of records and writes one."
        ) from error


def builtin_scenario(name: str, overrides: Sequence[str] = ()) -> Scenario:
    """Return a scenario that ships with the package, such as "demo"."""
    known = _builtin()
    if name not in known:
        raise ConfigError(f"no built-in scenario {name!r}; {nearest(name, sorted(known))}")
    return load_scenario(known[name], overrides)


def changed_job(job: Job, changes: dict[str, Any], *, source: str) -> Job:
    """Return `job` with nested keys replaced.

    Raises:
        ConfigError: if a key is unknown or a value out of range.
    """
    raw = job.model_dump(mode="json")
    for section, values in changes.items():
        raw[section] = {**raw[section], **values} if isinstance(values, dict) and section in raw else values
    return parse(Job, raw, source=source)


def changed_scenario(scenario: Scenario, changes: Mapping[str, Any]) -> Scenario:
    """Return `scenario` with keys such as "training.rounds" replaced, checked anew.

    Raises:
        ConfigError: if a key is unknown or a value out of range.
    """
    job = scenario.job.model_dump(mode="json")
    raw = {name: job[name] for name in _JOB_SECTIONS if name in job}
    raw |= scenario.model_dump(mode="json", exclude={"job", "base"})
    for key, value in changes.items():
        set_key(raw, key, value, said=f"setting {key!r}")
    return build_scenario(raw, source="the changed scenario", base=scenario.base)


def _backbone(backbone: str, base: Path) -> str:
    """Return a backbone with the path of a relative folder made absolute, so that a run works from every folder.

    A relative path starts from the scenario file, as those of the data do; one that is not there, from the current folder.
    """
    if ":" in backbone or backbone.startswith("~") or Path(backbone).is_absolute():
        return backbone
    for folder in (base, Path.cwd()):
        try:
            if (folder / backbone).is_dir():
                return os.path.abspath(folder / backbone)
        except (OSError, ValueError):
            break  # no path at all; what it is instead is found out later
    if backbone.startswith("."):
        raise ModelError(f"model.backbone {backbone!r} is not a folder below {base} nor {Path.cwd()}; check the path.")
    return backbone


def build_scenario(raw: dict[str, Any], *, source: str, base: Path) -> Scenario:
    """Return the scenario in the content of a scenario file; `source` names it in errors, `base` starts relative paths.

    Raises:
        ConfigError: naming every bad key.
    """
    known = {*Scenario.model_fields, *_JOB_SECTIONS} - {"job", "base"}
    for key in raw:
        if key not in known:
            raise ConfigError(f"{source} is not valid:\n  - {unknown_key(key, sorted(known), Job, Scenario)}")
    job = {key: raw[key] for key in ("name", "seed", *_JOB_SECTIONS) if key in raw}
    rest = {key: value for key, value in raw.items() if key not in _JOB_SECTIONS}
    model = job.get("model")
    if isinstance(model, dict) and isinstance(model.get("backbone"), str):
        job["model"] = {**model, "backbone": _backbone(resolve_backbone(model["backbone"]), base)}
    parsed = parse(Job, job, source=source)
    return parse(Scenario, {**rest, "job": parsed, "base": base}, source=source)
