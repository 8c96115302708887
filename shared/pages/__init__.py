"""The shell of every HTML page that Silotune writes: its head, its base style sheet, and how a template is filled in.

Guarantee (test_pages.py): a page is one file that runs no script and loads nothing, every text in it is escaped, no control
character stands in it but line ends and tabs, and a name that a template uses and nobody gave is an error.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import BytecodeCache, Environment, FileSystemLoader, StrictUndefined
from jinja2.bccache import Bucket
from markupsafe import Markup

_FOLDER = Path(__file__).parent
_CONTROLS = {
    code: "\N{REPLACEMENT CHARACTER}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"
}


class _Compiled(BytecodeCache):
    """Templates as this process compiled them, which takes longer than filling one in; of the values nothing is kept."""

    def __init__(self) -> None:
        self._kept: dict[str, bytes] = {}

    def load_bytecode(self, bucket: Bucket) -> None:
        """See `BytecodeCache`; it compares the template's text itself."""
        if (code := self._kept.get(bucket.key)) is not None:
            bucket.bytecode_from_string(code)

    def dump_bytecode(self, bucket: Bucket) -> None:
        """See `BytecodeCache`."""
        self._kept[bucket.key] = bucket.bytecode_to_string()


_COMPILED = _Compiled()


def render_page(template: Path, *, filters: Mapping[str, Callable[..., Any]] | None = None, **values: Any) -> bytes:
    """Return the page that a template makes of `values`, UTF-8.

    Args:
        template: NAME.html, which extends `page.html`; its own style sheet, NAME.css beside it, follows those two here.
        filters: what the template calls, beside what Jinja has.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, _FOLDER]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        bytecode_cache=_COMPILED,
    )
    environment.filters |= filters or {}
    sheets = (_FOLDER / "tokens.css", _FOLDER / "page.css", template.with_suffix(".css"))
    style = "".join(sheet.read_text(encoding="utf-8") for sheet in sheets)
    # The page's Content-Security-Policy admits exactly this style sheet.
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    page = environment.get_template(template.name).render(
        **values,
        style=Markup(style),  # noqa: S704 - files of this package
        style_hash=Markup(f"'sha256-{digest}'"),  # noqa: S704 - base64
    )
    return page.replace("\r\n", "\n").translate(_CONTROLS).encode("utf-8", errors="replace")
