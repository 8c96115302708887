"""What commands print: lines and tables for people, or JSON for programs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console


def console(width: int, *, as_json: bool = False) -> Console:
    """Return where a command prints for people; text is shown as it is, without markup.

    Args:
        width: columns of a file or a pipe, where rich assumes 80; a terminal has its own.
        as_json: standard output is for JSON alone, so people read standard error.
    """
    from rich.console import Console

    found = Console(stderr=as_json, highlight=False, markup=False)
    return found if found.is_terminal else Console(stderr=as_json, highlight=False, markup=False, width=width)


def print_json(value: Any) -> None:
    """Print `value` as one JSON line; a number that is not finite is a defect of the caller."""
    typer.echo(json.dumps(value, ensure_ascii=False, allow_nan=False))
