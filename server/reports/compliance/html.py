"""Lays a document out as one HTML file: no script, nothing loaded, every text escaped; it prints on A4."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from server.reports.compliance.document import Document
from shared.pages import render_page

_TEMPLATE = Path(__file__).with_name("report.html")


def render_html(document: Document, now: datetime) -> bytes:
    """Return the page, UTF-8.

    Args:
        now: when it is made.
    """
    return render_page(_TEMPLATE, document=document, date=now.date().isoformat())
