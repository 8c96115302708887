"""JSON files of ours, read back: whatever happened to one on the way ends in one error, which names the file.

Guarantee (tests: tests/shared/files/test_json_files.py, and tests/integration/test_damaged_runs.py for every file of a run): a
file that is missing, cut short, too long, of another kind or shape, or holds a key twice, NaN, a number beyond 1.8e308 or too
deep a nest is a `RunError`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, cast

from pydantic import Field, TypeAdapter, ValidationError

from shared.errors import PrivacyError, RunError
from shared.files.bounded import MOST_TEXT_BYTES

RecordT = TypeVar("RecordT")
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)

# Numbers of a record, checked where one is read.
Count = Annotated[int, Field(ge=0, lt=2**53)]
Positive = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Whole = Annotated[int, Field(gt=-(2**53), lt=2**53)]


def read_text(path: Path) -> str:
    """Return the UTF-8 text in `path`; raises `RunError` if there is none."""
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # reading might wait for ever, or never end
            raise damaged(path, "it is no plain file")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RunError(f"{path} is missing; restore it from a backup, or start a new run.") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise damaged(path, reason) from None


class DuplicateKey(ValueError):
    """An object of JSON with one key twice."""


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`.

    Raises:
        RunError: see the module's guarantee.
    """
    return _object(_bounded_text(path), path)


def read_record(path: Path, kind: type[RecordT]) -> RecordT:
    """Return the JSON object in `path` as a `kind`, a dataclass or model; keys that it does not know are passed over.

    Raises:
        RunError: see the module's guarantee.
    """
    return parse_record(_bounded_text(path), kind, path)


def read_if_there(path: Path, kind: type[RecordT]) -> RecordT | None:
    """Return the JSON object in `path` as `read_record` does, None if there is no such file."""
    return read_record(path, kind) if path.exists() else None


def parse_record(text: str, kind: type[RecordT], path: Path, *, where: str = "") -> RecordT:
    """Return the JSON `text`, which stands in `path` (at `where`), as a `kind`; see `read_record`."""
    _object(text, path, where)
    try:
        return cast(RecordT, _adapter(cast(Hashable, kind)).validate_json(text, strict=True))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key, message = ".".join(str(part) for part in first["loc"]), first["msg"].removeprefix("Value error, ")
        raise damaged(path, f"{where}{key}: {message}" if key else f"{where}{message}") from None
    except PrivacyError as error:  # of a mechanism that cannot be accounted for
        raise damaged(path, f"{where}{error}") from None


def _bounded_text(path: Path) -> str:
    if path.is_file() and (size := path.stat().st_size) > MOST_TEXT_BYTES:
        raise damaged(path, f"it has {size:,} bytes, and such a file at most {MOST_TEXT_BYTES:,}")
    return read_text(path)


@lru_cache
def _adapter(kind: Hashable) -> TypeAdapter[object]:
    return TypeAdapter(cast(type[object], kind))


def _object(text: str, path: Path, where: str = "") -> dict[str, Any]:
    try:
        return parse_object(text)
    except json.JSONDecodeError as error:
        raise damaged(path, f"{where}it is not JSON ({error})") from None
    except ValueError as error:
        raise damaged(path, f"{where}{error}") from None


def parse_object(text: str) -> dict[str, Any]:
    """Return the JSON object in `text`.

    Raises:
        ValueError: if it is none, holds a key twice, a number that is not finite or beyond 1.8e308, or is nested too deep.
    """
    try:
        found = json.loads(
            text,
            object_pairs_hook=unique_keys,
            parse_constant=refuse_constant,
            parse_float=finite_number,
            parse_int=whole_number,
        )
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, not an object")
    return found


def damaged(path: Path, what: str) -> RunError:
    """Return the error for a file of ours that is not as it was written."""
    short = what.removesuffix(".") if len(what) <= 200 else f"{what[:200]}…"
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


def finite_number(text: str) -> float:
    """Return a number of JSON; ValueError for one like 1e999, which Python reads as infinity."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it holds {text[:20]}, which is too large for a number")
    return number


def whole_number(text: str) -> int:
    """Return a whole number of JSON; ValueError for one that no floating-point number reaches, such as 1 with 400 zeros."""
    finite_number(text)
    return int(text)


def canonical_json(value: Any) -> str:
    """Return `value` as JSON with sorted keys and no spaces; NaN and infinity are refused."""
    return _CANONICAL.encode(value)


def finite_or_none(value: float) -> float | None:
    """Return `value`, or None where JSON could not hold it."""
    return value if math.isfinite(value) else None
