"""A form made from a job's own settings: its fields, what somebody typed, and the job or what is wrong with it, field by field.

Formal guarantees (tests: tests/server/console/test_new_job.py)
    * Every setting of a job has a field, and the defaults of the form are those of the settings
      (test_every_setting_has_a_field, test_what_is_not_typed_is_the_default).
    * What the form calls valid, the command line reads as the same job (test_the_file_is_the_job).
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Union, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from shared.job.job import Job
from shared.job.kinds import RULES
from shared.job.parsing import explain

MOST_CHARACTERS = 4000
"""Of one field."""
FIRST = (
    "name",
    "task.kind",
    "task.labels",
    "model.backbone",
    "training.rounds",
    "training.local_steps",
    "training.learning_rate",
    "privacy.mechanism",
    "privacy.epsilon",
    "privacy.epsilon_alone",
    "privacy.max_colluding",
    "privacy.delta",
    "privacy.sample_rate",
    "privacy.noise_multiplier",
    "federation.min_sites",
)
"""What every job has to think of; the rest stands folded below."""
_OFFERED = {"federation.min_sites": "2"}
"""What a field begins with where most sites refuse the default: no policy of the template lets an update stand alone."""
_FIXED = ("schema_version",)
_OPTIONAL = {
    "training.early_stopping": "training.early_stopping.patience",
    "privacy.central": "privacy.central.num_sites",
}
"""Sections that a job has only if one of their keys is given."""
EVALUATION_PATH, EVALUATION_COLUMNS = "evaluation.path", "evaluation.columns"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One field of the form.

    Attributes:
        key: of the setting, such as training.rounds.
        choices: the values that it can have; empty if it is typed.
        is_list: several values, one a line.
        default: as it would be typed; "" if there is none.
        offered: what stands in the field at first.
        is_required: there is none.
        about: what the setting means, in English, by its own documentation.
    """

    key: str
    choices: tuple[str, ...]
    is_list: bool
    default: str
    offered: str
    is_required: bool
    about: str

    @property
    def section(self) -> str:
        """Its section; "" of the top level."""
        return self.key.rpartition(".")[0]

    @property
    def id(self) -> str:
        """Names it in a page."""
        return self.key.replace(".", "-")


@dataclass(frozen=True, kw_only=True)
class Filled:
    """A form with what somebody typed.

    Attributes:
        typed: by key.
        job: it makes; None if it makes none.
        errors: what is wrong, by key; "" of the whole.
    """

    typed: Mapping[str, str] = field(default_factory=dict)
    job: Job | None = None
    errors: Mapping[str, list[str]] = field(default_factory=dict)

    def value(self, entry: Entry) -> str:
        """Return what stands in a field."""
        return self.typed.get(entry.key, entry.offered)


def _entries(model: type[BaseModel], prefix: str = "") -> Iterator[Entry]:
    for name, info in model.model_fields.items():
        key = f"{prefix}{name}"
        if key in _FIXED:
            continue
        inner = _section(info.annotation)
        if inner is not None:
            yield from _entries(inner, f"{key}.")
        else:
            yield _entry(key, info, optional=any(key.startswith(f"{one}.") for one in _OPTIONAL))


def _entry(key: str, info: FieldInfo, *, optional: bool) -> Entry:
    default = info.get_default()
    is_required = default is PydanticUndefined and not optional
    text = "" if default is PydanticUndefined else _written(default)
    choices = tuple(_choices(info.annotation))
    if None in {*_options(info.annotation)} and choices and "none" not in choices:
        choices = ("none", *choices)
    return Entry(
        key=key,
        choices=choices,
        is_list=any(get_origin(option) is tuple for option in _options(info.annotation)),
        default=text,
        offered=_OFFERED.get(key, text),
        is_required=is_required,
        about=re.sub(r"\s+", " ", info.description or "").replace("`", ""),
    )


def _options(annotation: Any) -> list[Any]:
    if isinstance(annotation, types.UnionType) or get_origin(annotation) is Union:
        return [None if option is types.NoneType else option for option in get_args(annotation)]
    return [annotation]


def _choices(annotation: Any) -> list[str]:
    found = []
    for option in _options(annotation):
        if get_origin(option) is Literal:
            found += [str(one) for one in get_args(option)]
    return found


def _section(annotation: Any) -> type[BaseModel] | None:
    for option in _options(annotation):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _written(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return "\n".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


ENTRIES = tuple(_entries(Job))
"""All fields of a job."""
BY_KEY = {entry.key: entry for entry in ENTRIES}


def filled(typed: Mapping[str, str]) -> Filled:
    """Return the job that was typed, or what is wrong with it."""
    texts = {key: text for key in BY_KEY if len(text := typed.get(key, "").strip()) <= MOST_CHARACTERS}
    texts |= {key: typed.get(key, "").strip()[:MOST_CHARACTERS] for key in (EVALUATION_PATH, EVALUATION_COLUMNS)}
    try:
        return Filled(typed=texts, job=Job.model_validate(_raw(texts)))
    except ValidationError as error:
        errors: dict[str, list[str]] = {}
        for detail in error.errors(include_url=False)[:30]:
            errors.setdefault(_place(detail["loc"]), []).append(explain(Job, detail))
        return Filled(typed=texts, errors=errors)


def run_file(form: Filled) -> str:
    """Return the run file (TOML) of a valid form: what was typed, and where the public records of the evaluation lie."""
    assert form.job is not None  # noqa: S101 (the caller asked)
    known, made = form.job.model_dump(mode="json"), _raw(form.typed)
    found = _typed_values(made, known)
    scalars = {key: value for key, value in found.items() if not isinstance(value, dict)}
    sections = {key: value for key, value in found.items() if isinstance(value, dict)}
    roles = RULES[form.job.task.kind].roles
    columns = dict.fromkeys(roles, "") | {role: role for role in roles}
    for part in re.split(r"[,\n]", form.typed.get(EVALUATION_COLUMNS, "")):
        role, equals, column = (text.strip() for text in part.partition("="))
        if equals and role in columns and column:
            columns[role] = column
    path = form.typed.get(EVALUATION_PATH) or "public.jsonl"
    return tomli_w.dumps(scalars | sections | {"evaluation": {"path": path, "columns": columns}})


def _raw(texts: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings that differ from their defaults, as a run file would have them."""
    raw: dict[str, Any] = {"task": {}, "training": {}}
    left_out = {section for section, key in _OPTIONAL.items() if not texts.get(key)}
    for entry in ENTRIES:
        text = texts.get(entry.key, "")
        if not text or _same(text, entry.default) or any(entry.key.startswith(f"{one}.") for one in left_out):
            continue
        place = raw
        *sections, last = entry.key.split(".")
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = _listed(text) if entry.is_list and text.casefold() != "none" else text
    return raw


def _same(text: str, default: str) -> bool:
    return text.replace("\r\n", "\n") == default


def _listed(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"[,\n]", text) if part.strip()]


def _typed_values(made: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of `known`, as the settings hold them, at the keys of `made`."""
    found: dict[str, Any] = {}
    for key, value in made.items():
        if isinstance(value, dict):
            if inner := _typed_values(value, known[key]):
                found[key] = inner
        else:
            found[key] = "none" if known[key] is None else known[key]
    return found


def _place(location: tuple[int | str, ...]) -> str:
    """Return the field that a finding is about; "" for one about the whole."""
    parts = [str(part) for part in location]
    for length in range(len(parts), 0, -1):
        if (key := ".".join(parts[:length])) in BY_KEY:
            return key
    return ""
