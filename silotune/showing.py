"""How what the command line prints is shown elsewhere: as text, and as HTML in a notebook."""

from __future__ import annotations

import base64
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from shared import terminal
from shared.files.atomic import write_bytes
from shared.libraries import hide_progress

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 120
_PRE = (
    '<pre style="white-space: pre-wrap; overflow-x: auto; line-height: normal; '
    "font-family: Menlo, Consolas, 'DejaVu Sans Mono', monospace\">{code}</pre>"
)


class Shown:
    """Something that prints itself to a console; `print` and notebooks show the same."""

    def _show(self, console: Console) -> None:
        raise NotImplementedError

    def __str__(self) -> str:
        return text_of(self._show)

    def _repr_html_(self) -> str:
        return html_of(self._show)


class Figure:
    """A figure, for notebooks and files.

    Attributes:
        data: the figure's bytes.
        media_type: "image/svg+xml" or "image/png". In an SVG text is text, and nothing is loaded from elsewhere.
    """

    def __init__(self, data: bytes, media_type: str) -> None:
        self.data, self.media_type = data, media_type

    @classmethod
    def of_svg(cls, element: str) -> Figure:
        """Return the figure of an SVG element of a page, as a document of its own."""
        return cls(element.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).encode(), "image/svg+xml")

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the figure to a file and return where it is; `RunError` if the disk does not take it."""
        write_bytes(Path(path), self.data)
        return Path(path)

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        if self.media_type == "image/png":
            return {"image/png": base64.b64encode(self.data).decode()}
        return {"text/html": self.data.decode()}  # notebooks show it in the page, so that its text stays text


def text_of(show: Callable[[Console], None]) -> str:
    """Return what `show` prints, without blanks at the ends of lines."""
    lines = _captured(show).export_text().splitlines()
    return "\n".join(line.rstrip() for line in lines).strip("\n")


def html_of(show: Callable[[Console], None]) -> str:
    """Return what `show` prints as one escaped HTML element."""
    return _captured(show).export_html(inline_styles=True, code_format=_PRE)


def _captured(show: Callable[[Console], None]) -> Console:
    console = terminal.console(WIDTH, captured=True)
    show(console)
    return console


@contextmanager
def quietly() -> Iterator[None]:
    """Silence what libraries say beside their work, as commands do."""
    hide_progress()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
