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
_CUT_OFF = """() => [...document.querySelectorAll(".scroll")].filter(one => one.querySelector("table.stack")
  && one.scrollWidth > one.clientWidth).map(one => one.getAttribute("aria-labelledby") || one.getAttribute("aria-label"))"""
"""Tables of records, of which each has a line or a block of its own; those with a column for each run may be scrolled."""
_SHIFTED = """() => [...document.querySelectorAll(".stack td, .stack tbody th")].filter(cell => cell.offsetParent
  && parseFloat(getComputedStyle(cell).paddingLeft) + parseFloat(getComputedStyle(cell).textIndent) < -.5)
  .map(cell => cell.dataset.label || cell.textContent.trim().slice(0, 20))"""
"""Cells of which the begin, a label beside the value, lies outside of them."""
WIDTHS = (360, 600, 704, 720, 768, 900, 960, 1024, 1100, 1200, 1280, 1366, 1440, 1760, 1920, 2560)
_JUDGED = (360, 1280)
"""By axe, which takes half a second."""


def violations(page: Any) -> list[str]:
    """Return what of a page breaks a rule, with the first element that does."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(Axe().axe_script)
    found = page.evaluate("options => axe.run(document, options).then(found => found.violations)", _OPTIONS)
    return [f"{one['id']}: {one['help']}: {one['nodes'][0]['html'][:200]}" for one in found]


def violations_everywhere(page: Any) -> list[str]:
    """Return them for the light and the dark theme, narrow and wide, and at which widths something does not fit its window."""
    told = cut_off(page)
    for width in _JUDGED:
        page.set_viewport_size({"width": width, "height": 900})
        for theme in ("light", "dark"):
            page.emulate_media(color_scheme=theme)
            told += [f"{theme}, {width}: {one}" for one in violations(page)]
    return told


def cut_off(page: Any) -> list[str]:
    """Return at which widths a page is wider than its window, or a table of records wider than its place."""
    told = []
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        told += [f"wider than {width}"] if page.evaluate(_WIDER) else []
        told += [f"a column of {one} is cut off at {width}" for one in page.evaluate(_CUT_OFF)]
        told += [f"the begin of {one} is cut off at {width}" for one in page.evaluate(_SHIFTED)]
    return told
