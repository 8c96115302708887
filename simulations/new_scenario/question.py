"""What `silotune new` was asked: a file, what its columns are, and whatever the engineer declares instead of looking it up."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shared.data.datasets import PERSON_ROLE
from shared.errors import ConfigError
from shared.job.kinds import RULES, TaskKind
from shared.job.parsing import nearest
from shared.job.values import PERSON_UNITS
from shared.privacy.accounting import check_delta, check_epsilon
from shared.tasks import TASKS

Unit = Literal["record", "patient", "customer"]
DataKind = Literal["public", "synthetic", "private"]
SITE_ROLE = "site"
"""Role of the column whose values name the sites."""
USUAL_EPSILON = 8.0
"""Where --epsilon does not say it."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What was asked; None is left to `silotune new`.

    Attributes:
        data: the file.
        out: the scenario file.
        columns: role -> column, those of the task, and `site` and `person`.
        test: public evaluation records with the same columns.
        kind: kind of task.
        backbone, revision: as in `model`.
        epsilon, delta: the promise.
        unit: what it protects.
        sites: number of sites, where no column says it.
        data_kind: what the records are declared to be.
        file_format: how both files are written, as keys of `data.train`: delimiter, encoding, quoting.
        labels, value_range, max_length, num_records: declared, public; the records are not asked for them.
        image_shape: channels, height and width.
        declared_only: nothing may be looked up in the records.
    """

    data: Path
    out: Path
    columns: Mapping[str, str]
    test: Path | None = None
    kind: TaskKind | None = None
    backbone: str | None = None
    revision: str | None = None
    epsilon: float = USUAL_EPSILON
    delta: float | None = None
    unit: Unit | None = None
    sites: int | None = None
    data_kind: DataKind = "private"
    file_format: Mapping[str, str] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    value_range: tuple[float, float] | None = None
    max_length: int | None = None
    num_records: int | None = None
    image_shape: tuple[int, int, int] | None = None
    declared_only: bool = False

    @property
    def task_columns(self) -> dict[str, str]:
        """Columns of the task alone."""
        return {role: column for role, column in self.columns.items() if role not in (SITE_ROLE, PERSON_ROLE)}

    @property
    def protects_persons(self) -> bool:
        """True if the unit of privacy is a person."""
        return self.unit in PERSON_UNITS


def scenario_name(data: Path) -> str:
    """Return what the scenario of a file is called: its name without what no name of a run may hold."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", data.name.split(".")[0]).strip("-._") or "scenario"


def usual_unit(columns: Collection[str]) -> Unit | None:
    """Return what is protected where nothing says it: persons if a column tells whose a record is, else each record."""
    return "patient" if PERSON_ROLE in columns else None


def kind_named(task: str | None) -> TaskKind | None:
    """Return the kind of task of that name; None of None.

    Raises:
        ConfigError: if there is none.
    """
    if task is not None and task not in RULES:
        raise ConfigError(f"--task is {task!r}; {nearest(task, sorted(RULES))}")
    return next((kind for kind in RULES if kind == task), None)


def kind_of(question: Question) -> TaskKind:
    """Return the kind of task that the named columns are for; a `label` of numbers may still be a score.

    Raises:
        ConfigError: if no kind has these columns, or not the one that was asked for.
    """
    given = frozenset(question.task_columns)
    if question.kind == "regression" and given == {"text", "label"}:
        return "regression"
    fitting = [kind for kind, task in TASKS.items() if {*task.roles} == given]
    if question.kind is not None and question.kind not in fitting:
        wanted = _options(TASKS[question.kind].roles)
        raise ConfigError(f"--task {question.kind} needs {wanted}; found {_options(given) or 'no column'}.")
    if not fitting:
        known = "; ".join(f"{_options(task.roles)} ({kind})" for kind, task in TASKS.items())
        raise ConfigError(f"found {_options(given) or 'no column'}; name the columns of a task, one of: {known}.")
    return fitting[0]


def columns_of(kind: TaskKind, columns: Mapping[str, str]) -> dict[str, str]:
    """Return the columns by the roles of a kind of task: a `label` of numbers is the score of a regression."""
    found = dict(columns)
    if kind == "regression" and "label" in found:
        found["score"] = found.pop("label")
    return found


def check_question(question: Question) -> None:
    """Raise `ConfigError` or `PrivacyError` if the question contradicts itself, or asks for what no scenario can have, before
    any record is read.
    """
    check_epsilon(question.epsilon)
    if question.delta is not None:
        check_delta(question.delta)
    named: dict[str, str] = {}
    for role, column in question.columns.items():
        if column in named:
            raise ConfigError(f"--{named[column]} and --{role} both name the column {column!r}; name two columns.")
        named[column] = role
    if SITE_ROLE in question.columns and question.sites is not None and not question.declared_only:
        raise ConfigError(
            "--site names the column that says which site has a record, so --sites has no place; leave one out."
        )
    if question.protects_persons and PERSON_ROLE not in question.columns:
        raise ConfigError(f"--unit {question.unit} needs --person, the column that says whose record it is.")
    if question.unit == "record" and PERSON_ROLE in question.columns:
        raise ConfigError("--person says whose record it is, but --unit record protects single records; leave one out.")
    if question.out.suffix != ".toml":
        raise ConfigError(f"--out is {str(question.out)!r}; a scenario is a TOML file, so its name ends in .toml.")
    if question.declared_only:
        _check_declared(question)
    elif question.num_records is not None:
        raise ConfigError("--records declares how many there are, for --declared; without it they are counted.")


def _check_declared(question: Question) -> None:
    """Raise `ConfigError` unless everything is declared that would be looked up otherwise."""
    rules = RULES[kind_of(question)]
    needed: dict[str, object] = {"--records": question.num_records, "--sites": question.sites}
    if "image_shape" not in rules.keys:
        needed["--max-length"] = question.max_length
    if rules.check_labels is not None:
        needed["--labels"] = question.labels
    if {"target_range", "pixel_range"} & {*rules.keys}:
        needed["--range"] = question.value_range
    if missing := [option for option, value in needed.items() if not value]:
        raise ConfigError(
            f"--declared looks nothing up in the records, so {', '.join(missing)} must say it. Leave --declared "
            "out to look it up on this machine."
        )


def _options(roles: Collection[str]) -> str:
    order = ("text", "pair", "pixels", "tokens", "prompt", "label", "score", "tags", "response")
    return " and ".join(f"--{role}" for role in order if role in roles)
