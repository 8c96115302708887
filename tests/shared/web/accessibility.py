"""Whether a page in a browser keeps WCAG 2.2 AA, by axe-core (Deque Systems, MPL 2.0), and whether it fits its window."""

from __future__ import annotations

from typing import Any

from axe_playwright_python.sync_playwright import Axe

_RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
_OPTIONS = {
    "resultTypes": ["violations"],
    "runOnly": {"type": "tag", "values": _RULES},
    "rules": {"target-size": {"enabled": True}},  # off by itself, though of WCAG 2.2 AA
}
_WIDER = "document.documentElement.scrollWidth > innerWidth"
WIDTHS = (360, 1280, 2560)


def violations(page: Any) -> list[str]:
    """Return what of a page breaks a rule, with the first element that does."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(Axe().axe_script)
    found = page.evaluate("options => axe.run(document, options).then(found => found.violations)", _OPTIONS)
    return [f"{one['id']}: {one['help']}: {one['nodes'][0]['html'][:200]}" for one in found]


def violations_everywhere(page: Any) -> list[str]:
    """Return them for the light and the dark theme, narrow and wide, and at which widths the page is wider than its window."""
    told = []
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        if page.evaluate(_WIDER):
            told.append(f"wider than {width}")
        for theme in ("light", "dark") if width < 2000 else ():
            page.emulate_media(color_scheme=theme)
            told += [f"{theme}, {width}: {one}" for one in violations(page)]
    return told
