"""Lays a document out as one HTML file: no script, nothing loaded, every text escaped; it prints on A4."""

from __future__ import annotations

import base64
import hashlib
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from server.reports.compliance.document import Document

_TEMPLATE, _STYLE = "report.html", "report.css"


def render_html(document: Document, now: datetime) -> bytes:
    """Return the page, UTF-8.

    Args:
        now: when it is made.
    """
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    style = (folder / _STYLE).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    page = environment.get_template(_TEMPLATE).render(
        document=document,
        date=now.date().isoformat(),
        style=Markup(style),  # noqa: S704 - a file of this package
        style_hash=Markup(f"'sha256-{digest}'"),  # noqa: S704 - base64
    )
    return page.encode("utf-8", errors="replace")
