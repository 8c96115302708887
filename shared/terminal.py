"""What commands print: lines and tables for people, or JSON for programs."""

from __future__ import annotations

import io
import json
import unicodedata
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console


_REORDERING = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})


def console(
    width: int | None = None,
    *,
    as_json: bool = False,
    soft_wrap: bool = False,
    quiet: bool = False,
    captured: bool = False,
) -> Console:
    """Return where a command prints for people; text is shown as it is, without markup.

    Args:
        width: columns of a file or a pipe, where rich assumes 80; a terminal has its own.
        as_json: standard output is for JSON alone, so people read standard error.
        soft_wrap: lines are as long as they are; for commands that print no table.
        quiet: nothing is shown.
        captured: what is printed is kept, for `export_text` and `export_html`, and not shown.
    """
    from rich.console import Console
    from rich.text import Text

    class Shown(Console):
        """Shows labels, names and texts as they are, whatever stands in them."""

        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(shown_text(text), **options)

    # In a notebook, too, lines are lines: rich's own displays there want ipywidgets.
    plain: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": soft_wrap, "force_jupyter": False}
    if captured:
        return Shown(file=io.StringIO(), record=True, width=width, force_terminal=False, **plain)
    found = Shown(stderr=as_json, quiet=quiet, **plain)
    if width is not None and not found.is_terminal:
        found.width = width
    return found


def shown_text(text: str) -> str:
    """Return a text of a record, or a label, for people: what would steer a terminal or reorder a line is shown as such."""
    return "".join("\N{REPLACEMENT CHARACTER}" if _steers(c) else c for c in text)


def _steers(character: str) -> bool:
    if character in "\n\t":
        return False
    return unicodedata.category(character) == "Cc" or unicodedata.bidirectional(character) in _REORDERING


def print_json(value: Any) -> None:
    """Print `value` as one JSON line; a number that is not finite is a defect of the caller."""
    typer.echo(json.dumps(value, ensure_ascii=False, allow_nan=False))
