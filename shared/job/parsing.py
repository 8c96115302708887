"""Sections of settings, frozen and checked at construction; how they are read from TOML and the command line."""

from __future__ import annotations

import copy
import difflib
import re
import tomllib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo

from shared.errors import ConfigError, excerpt
from shared.files.bounded import read_named_text
from shared.job.values import NAME_PATTERN, SHA256_PATTERN

_MOST_FINDINGS = 30  # a hostile job could have a hundred thousand, and each is compared with what is known


class Section(BaseModel):
    """Base of all configuration sections: frozen, finite numbers only, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _read_none(cls, raw: Any) -> Any:
        """TOML has no null, so the word "none" stands for None wherever a setting can be None."""
        if not isinstance(raw, Mapping):
            return raw
        fields = cls.model_fields
        return {
            key: None if key in fields and says_none(value) and takes_none(fields[key].annotation) else value
            for key, value in raw.items()
        }

    def set_keys(self) -> set[str]:
        """Return the keys whose value is not the default."""
        return {name for name, field in type(self).model_fields.items() if getattr(self, name) != field.get_default()}


def says_none(value: object) -> bool:
    """Return whether this is the word for None, in whatever case."""
    return isinstance(value, str) and value.strip().casefold() == "none"


def takes_none(annotation: Any) -> bool:
    """Return whether a setting of this type can be None, and has no choice that is called "none" itself."""
    if not isinstance(annotation, types.UnionType) and get_origin(annotation) is not Union:
        return False
    options = get_args(annotation)
    names = {name for option in options if get_origin(option) is Literal for name in get_args(option)}
    return types.NoneType in options and "none" not in names


SectionT = TypeVar("SectionT", bound=BaseModel)


def parse(model: type[SectionT], raw: Mapping[str, Any], *, source: str) -> SectionT:
    """Build `model` from plain data.

    Raises:
        ConfigError: naming `source`, every bad key with what was found and, for unknown keys, the nearest known one.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{source} is not valid: it holds a {type(raw).__name__}; expected named keys.")
    try:
        return model.model_validate(dict(raw))
    except ValidationError as error:
        found = error.errors(include_url=False)
        lines = [_misplaced(model, detail) or explain(model, detail) for detail in found[:_MOST_FINDINGS]]
        if len(found) > _MOST_FINDINGS:
            lines.append(f"and {len(found) - _MOST_FINDINGS:,} more")
        raise ConfigError(f"{source} is not valid:\n" + "\n".join(f"  - {line}" for line in lines)) from None


def load_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ConfigError: if it is missing, unreadable or not TOML.
    """
    try:
        text = read_named_text(path, "utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; check the path.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as TOML: {error}") from None
    return toml_of(text, source=str(path))


def toml_of(text: str, *, source: str) -> dict[str, Any]:
    """Return what a TOML text holds; `source` names it in errors.

    Raises:
        ConfigError: if it is not TOML.
    """
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ConfigError(f"{source} cannot be read as TOML: it is nested too deep.") from None
    except ValueError as error:
        raise ConfigError(f"{source} cannot be read as TOML: {error}") from None


def apply_overrides(raw: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of `raw` with `section.key=value` items set; values are read as TOML, else as plain text.

    Raises:
        ConfigError: if an item has no `=` or runs through something that is not a section.
    """
    try:
        result: dict[str, Any] = copy.deepcopy(dict(raw))
    except RecursionError:
        raise ConfigError("the settings are nested too deep; sections hold values, lists and sections.") from None
    for item in overrides:
        key, separator, text = item.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"--set {item!r} is not of the form section.key=value, for example training.rounds=10.")
        set_key(result, key.strip(), toml_value(text.strip()), said=f"--set {item!r}")
    return result


def set_key(raw: dict[str, Any], key: str, value: Any, *, said: str) -> None:
    """Set `section.key` in settings; `ConfigError`, which begins with what was `said`, if it runs through no section."""
    *sections, last = key.split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"{said}: {section!r} is a value, not a section.")
    raw[last] = value


def nearest(name: str, known: Sequence[str]) -> str:
    """Return a hint for an unknown name: the nearest known one, or the list of all."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"


def unknown_key(key: str, known: Sequence[str], *models: type[BaseModel]) -> str:
    """Return what to say of a key that there is not: the section of one of `models` that has it, else the nearest known key."""
    inside = sorted(
        {f"{name}.{key}" for model in models for name, inner in _sections(model) if key in inner.model_fields}
    )
    hint = f"did you mean {' or '.join(map(repr, inside))}?" if inside else nearest(key, known)
    return f"unknown key {excerpt(key)}; {hint}"


def toml_value(text: str) -> Any:
    """Return what `text` is as a value of TOML, else the text itself."""
    try:
        found = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return found["value"] if len(found) == 1 else text  # a line end in it would hide what stands after


_PATTERNS = {
    NAME_PATTERN: "expected 1 to 64 letters (a to z, A to Z), digits, points, underscores and hyphens, a letter or digit first",
    SHA256_PATTERN: "expected 64 hexadecimal digits, in small letters",
    r"\S": "expected text that is not blank",
}
"""What a pattern asks for, in words."""


_KINDS = {
    "int_type": "expected a whole number",
    "int_parsing": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "float_parsing": "expected a number",
    "bool_type": "expected true or false",
    "bool_parsing": "expected true or false",
    "string_type": "expected text",
    "string_unicode": "expected text that is valid UTF-8",
    "dict_type": "expected named keys, as a section has",
    "model_type": "expected named keys, as a section has",
}
"""What a kind of value is called, which pydantic calls by names of Python's classes and of its parsers."""


def explain(model: type[BaseModel], detail: Any) -> str:
    """Return one of pydantic's findings about a `model` as a line for people: where, what is wrong, what was found."""
    location = [str(part) for part in detail["loc"]]
    where = ".".join(location) or "the whole"
    if detail["type"] == "extra_forbidden":
        if len(location) == 1:
            return unknown_key(where, list(model.model_fields), model)
        return f"unknown key {excerpt(where)}; {nearest(location[-1], _known_keys(model, location[:-1]))}"
    if detail["type"] == "missing":
        return f"{where} is missing"
    message = re.sub("^Input should be (?=greater|less)", "expected a number ", str(detail["msg"]))
    message = message.removeprefix("Value error, ").replace("Input should be", "expected", 1)
    message = _KINDS.get(detail["type"], message)
    for limit in detail.get("ctx", {}).values():
        if isinstance(limit, float) and 0 < limit < 1e-3:  # else written with all its zeros
            message = f"{message.rsplit(' ', 1)[0]} {limit:g}"
    found = detail.get("input")
    if detail["type"] == "string_pattern_mismatch":
        message = _PATTERNS.get(detail["ctx"]["pattern"], message)
    field = _field(model, location)
    if detail["type"] in ("tuple_type", "list_type"):
        items = "" if field is None else str(field.annotation)
        of_numbers = any(name in items for name in ("int", "float")) and "str" not in items
        message = "expected a list, such as " + ("[0.5, 1]" if of_numbers else '["a", "b"]')
        if isinstance(found, str) and found.startswith("[") and not of_numbers:
            message += "; after --set in single quotes, since the shell removes double ones"
    secret = field is not None and not field.repr
    shown = "" if isinstance(found, dict | BaseModel) or found is None or secret else f" (found {excerpt(found)})"
    if not location and detail["type"] == "value_error":  # about several sections, which it names itself
        return message
    return f"{where}: {message}{shown}"


def _misplaced(model: type[BaseModel], detail: Any) -> str | None:
    """Return what to say of a key of the top level that stands in a table, as whatever follows a [table] does; None of others."""
    location = [str(part) for part in detail["loc"]]
    if len(location) != 2 or location[1] not in model.model_fields or isinstance(detail.get("input"), Mapping):
        return None
    table, key = location
    if key in dict(_sections(model)).get(table, BaseModel).model_fields:
        return None  # a key of the section as well
    return f"{key} stands below [{table}] and belongs above the first [section]: in TOML a key counts to the section before it"


def _sections(model: type[BaseModel]) -> list[tuple[str, type[BaseModel]]]:
    """Return the sections of a model with their names, those that may be left out too."""
    found = [(name, _section_in(field.annotation)) for name, field in model.model_fields.items()]
    return [(name, inner) for name, inner in found if inner is not None]


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """Return the one section that a setting of this type can be; None if there is none, or a choice of several."""
    options = get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    found = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
    return found[0] if len(found) == 1 else None


def _field(model: type[BaseModel], path: Sequence[str]) -> FieldInfo | None:
    found: FieldInfo | None = None
    for part in path:
        inner = model if found is None else found.annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return found  # inside of a list, or of a choice: what holds for the whole holds for its parts
        found = inner.model_fields.get(part)
        if found is None:
            return None
    return found


def _known_keys(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    for part in path:
        inner = dict(_sections(model)).get(part)
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)
