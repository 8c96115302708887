"""JSON files of ours, read back: whatever happened to one on the way ends in one error, which names the file.

Guarantee (tests: tests/shared/files/test_json_files.py, and tests/integration/test_damaged_runs.py for every file of a run): a
file that is missing, cut short, of another kind or shape, or holds a key twice, NaN or too deep a nest is a `RunError`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from shared.errors import RunError

ModelT = TypeVar("ModelT", bound=BaseModel)


class DuplicateKey(ValueError):
    """An object of JSON with one key twice."""


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`.

    Raises:
        RunError: see the module's guarantee.
    """
    try:
        return parse_object(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path} is missing; restore it from a backup, or start a new run.") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise damaged(path, reason) from None


def read_record(path: Path, kind: type[ModelT]) -> ModelT:
    """Return the JSON object in `path`, checked against `kind`.

    Raises:
        RunError: see the module's guarantee.
    """
    raw = read_object(path)
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise damaged(path, f"{where}: {first['msg']}" if where else str(first["msg"])) from None


def parse_object(text: str) -> dict[str, Any]:
    """Return the JSON object in `text`.

    Raises:
        ValueError: if it is none, holds a key twice, a number that is not finite, or is nested too deep.
    """
    try:
        found = json.loads(text, object_pairs_hook=unique_keys, parse_constant=refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, not an object")
    return found


def damaged(path: Path, what: str) -> RunError:
    """Return the error for a file of ours that is not as it was written."""
    short = what if len(what) <= 200 else f"{what[:200]}…"
    return RunError(
        f"{path} is damaged or not of Silotune: {short}. Expected the file as Silotune wrote it; restore it from a backup, or "
        "start a new run in another folder."
    )


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these pairs; `DuplicateKey` if one of its keys stands there twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise DuplicateKey("it holds a key twice")
    return found


def refuse_constant(name: str) -> NoReturn:
    """Raise ValueError for NaN and infinity, which Python reads and JSON does not know."""
    raise ValueError(f"it holds {name}, which is no number")


def canonical_json(value: Any) -> str:
    """Return `value` as JSON with sorted keys and no spaces; NaN and infinity are refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def finite_or_none(value: float) -> float | None:
    """Return `value`, or None where JSON could not hold it."""
    return value if math.isfinite(value) else None
