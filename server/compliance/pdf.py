"""Lays a document out as PDF/UA-1: tagged, with title, language and fonts inside, by Typst, which needs no system package.

The template is fixed, and the document reaches it as JSON: no text of a run is ever read as Typst code. Fonts are those inside
the Typst package, so that the same document gives the same bytes on every machine; a document with letters that they do not
have is set with the machine's own fonts.
"""

from __future__ import annotations

import dataclasses
import json
from datetime import datetime
from pathlib import Path

from server.compliance.document import Document
from shared.errors import RunError

_TEMPLATE = Path(__file__).with_name("report.typ")


def render_pdf(document: Document, now: datetime) -> bytes:
    """Return the PDF.

    Args:
        now: date of creation in its metadata.

    Raises:
        RunError: if Typst cannot lay it out.
    """
    import typst

    inputs = {"document": json.dumps(dataclasses.asdict(document), ensure_ascii=False)}
    problem = ""
    for own_fonts_only in (True, False):
        try:
            return typst.compile(
                _TEMPLATE,
                sys_inputs=inputs,
                ignore_system_fonts=own_fonts_only,
                pdf_standards=["ua-1"],
                timestamp=int(now.timestamp()),
            )
        except typst.TypstError as error:
            problem = error.message
    raise RunError(f"the report cannot be laid out as PDF ({problem}); make it with --format html.")
