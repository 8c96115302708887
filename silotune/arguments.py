"""Arguments of the public functions that are of another type than they say: told as every other mistake, in one sentence."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

from shared.errors import ConfigError, excerpt
from shared.numbers import read_number

T = TypeVar("T")


def path_of(value: Any, name: str) -> Path:
    """Return a path; `ConfigError`, calling it `name`, if it is none."""
    if isinstance(value, str | os.PathLike) and isinstance(os.fspath(value), str):
        return Path(value)
    raise ConfigError(f"{name} is {excerpt(value)}; expected a path, as text or a pathlib.Path.")


def path_or_none(value: Any, name: str) -> Path | None:
    """Return a path, or None of None; see `path_of`."""
    return None if value is None else path_of(value, name)


def number_of(value: Any, name: str) -> float:
    """Return a number, NaN and infinity included, which have their own refusals; `ConfigError` if it is none."""
    if isinstance(value, float):
        return value
    try:
        return read_number(value)
    except ValueError:
        raise ConfigError(f"{name} is {excerpt(value)}; expected a number.") from None


def instance_of(value: Any, kind: type[T], name: str, how: str) -> T:
    """Return a value of this kind; `ConfigError`, saying how to get one, of another."""
    if isinstance(value, kind):
        return value
    raise ConfigError(f"{name} is {excerpt(value)}; expected a {kind.__name__}: {how}.")
