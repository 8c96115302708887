"""The pages of a console: templates of its own room over those that all share, and the files that browsers load."""

from __future__ import annotations

import hashlib
import mimetypes
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi.responses import Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from shared.errors import printable
from shared.version import silotune_version
from shared.web.asked import own_path
from shared.web.languages import LANGUAGES
from shared.web.roles import allowed

if TYPE_CHECKING:
    from shared.web.asked import Asked

HERE = Path(__file__).parent
_TOKENS = HERE.parent / "pages" / "tokens.css"


class StaticFiles:
    """Style sheets and scripts, read once; a browser keeps each as long as its address stays the same.

    Args:
        folders: a later one's file takes the place of an earlier one's of that name.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        files = [_TOKENS, *(path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir()))]
        self._contents = {path.name: path.read_bytes() for path in files}
        self._marks = {name: hashlib.sha256(content).hexdigest()[:12] for name, content in self._contents.items()}

    def address(self, name: str) -> str:
        """Return where a file is served."""
        return f"/static/{name}?v={self._marks[name]}"

    def answer(self, name: str) -> Response | None:
        """Return a file; None if there is none of that name."""
        content = self._contents.get(name)
        if content is None:
            return None
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        return Response(content, media_type=kind, headers={"cache-control": "public, max-age=31536000, immutable"})


class Pages:
    """Renders templates.

    Args:
        folders: with `templates/`; of a name that several have the first one's counts.
        static: see `StaticFiles`.
        filters: what templates call beside what all consoles have.
        paths: of the routes that the console has.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        *,
        static: StaticFiles,
        filters: Mapping[str, Callable[..., Any]],
        paths: frozenset[str],
    ) -> None:
        self._environment = Environment(
            loader=FileSystemLoader([folder / "templates" for folder in folders]),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.filters |= {"moment": moment, "printed": printed, **filters}
        self._environment.globals |= {"static": static.address, "languages": LANGUAGES, "version": silotune_version()}
        self._paths = paths

    def render(self, template: str, asked: Asked, **values: Any) -> str:
        """Return the page that a template makes of a request and values.

        `back` is the address of the same page: of an answer to a form the one that its route names, else the beginning.
        """
        account, request = asked.account, asked.request
        query = f"?{request.url.query}" if request.url.query else ""
        own = own_path(request.url.path + query) if request.method == "GET" else "/"
        entries = [
            entry
            for entry in asked.console.navigation
            if account is not None and allowed(account.role, entry.action) and entry.path in self._paths
        ]
        return self._environment.get_template(template).render(
            t=asked.texts,
            asked=asked,
            console=asked.console,
            account=account,
            entries=entries,
            here=request.url.path,
            **{"back": own, **values},
        )


def moment(seconds: int | None) -> str:
    """Return a time for people; UTC, as everywhere in Silotune."""
    return "–" if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def printed(value: object) -> str:
    """Return a text that somebody else chose, without what steers a terminal or reorders a page."""
    return printable(str(value))
