"""Chromium for tests of consoles: a page in which nothing may go wrong unseen.

A module with such tests has `pytestmark = needs_chromium`, and `chromium = browsers.chromium` for the fixture.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
needs_chromium = [
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="needs playwright (make install)"),
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed here (Debian: chromium)"),
]


@contextmanager
def running_chromium() -> Iterator[Any]:
    """Yield a browser without a screen."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """One browser for all tests of a module."""
    with running_chromium() as browser:
        yield browser


_WHOLE = """() => !document.querySelector(".htmx-request")
  && [...document.querySelectorAll("[data-chart]")].every(chart => chart.childNodes.length)"""


def open_whole(page: Any, address: str) -> None:
    """Go to a page and wait until the parts and charts are there that come later; half a second less than "networkidle"."""
    page.goto(address)
    page.wait_for_function(_WHOLE)


@contextmanager
def watched_page(browser: Any) -> Iterator[Any]:
    """Yield a page that must not log an error; refused scripts and styles are errors there."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page, told = context.new_page(), list[str]()
    page.set_default_timeout(20_000)
    page.on("console", lambda message: told.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("dialog", lambda dialog: told.append(dialog.message))
    yield page
    context.close()
    assert told == []
