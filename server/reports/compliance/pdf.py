"""Lays a document out as PDF/UA-1: tagged, with title, language and fonts inside, by Typst, which needs no system package.

The template is fixed, and the document reaches it as JSON: no text of a run is ever read as Typst code. Fonts are those inside
the Typst package and the extra `cjk`, so that the same document gives the same bytes on every machine with that extra, or on
every one without; a document with characters that they do not have is set with the machine's own fonts, and a character that
no font has is written as its code point, with a note.
"""

from __future__ import annotations

import dataclasses
import json
from datetime import datetime
from pathlib import Path
from typing import Any

from server.reports.compliance.document import Document, Paragraph
from shared.errors import RunError
from shared.fonts import HOW_TO_GET_FONTS, packaged_cjk_font, shown_in_pdf

_TEMPLATE = Path(__file__).with_name("report.typ")


def render_pdf(document: Document, now: datetime) -> bytes:
    """Return the PDF.

    Args:
        now: date of creation in its metadata.

    Raises:
        RunError: if Typst cannot lay it out.
    """
    import typst

    plain = dataclasses.asdict(document)
    packaged = packaged_cjk_font()
    fonts: list[Path] = [packaged.parent] if packaged else []
    problem = ""
    for content, own_fonts_only in ((plain, True), (plain, False), (_escaped(document), True)):
        try:
            return typst.compile(
                _TEMPLATE,
                sys_inputs={"document": json.dumps(content, ensure_ascii=False)},
                font_paths=fonts,
                ignore_system_fonts=own_fonts_only,
                pdf_standards=["ua-1"],
                timestamp=int(now.timestamp()),
            )
        except typst.TypstError as error:
            problem = error.message
    raise RunError(f"the report cannot be laid out as PDF ({problem}); make it with --format html.")


def _escaped(document: Document) -> dict[str, Any]:
    """Return the document with the characters that no font has as code points, and a note that says so."""
    shown = shown_in_pdf()

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return shown(value)
        if isinstance(value, dict):
            return {key: walk(inner) for key, inner in value.items()}
        return [walk(inner) for inner in value] if isinstance(value, list | tuple) else value

    note = Paragraph(text=HOW_TO_GET_FONTS, role="note")
    first, *others = document.sections
    noted = dataclasses.replace(first, blocks=(*first.blocks, note))
    changed = dataclasses.replace(document, sections=(noted, *others))
    return {key: walk(value) for key, value in dataclasses.asdict(changed).items()}
