"""What is shown while a console that was just started reads what years have left."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from client.console.content import SiteContent
from client.console.pages import NAVIGATION
from tests.client.console.conftest import Serving, text_of

PATHS = [entry.path for entry in NAVIGATION if entry.key != "accounts"]


@pytest.fixture
def reading(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> Iterator[SiteContent]:
    """The content of a console whose ledger and log are being read."""
    content: SiteContent = serving.console.content
    monkeypatch.setattr("client.console.content._SHORTLY", 0.01)
    content.is_read.clear()
    yield content
    content.is_read.set()


def test_a_page_comes_at_once_and_asks_again(serving: Serving, reading: SiteContent) -> None:
    browser = serving.signed_in("officer")
    reading.requests.forget_count()
    with pytest.MonkeyPatch.context() as patched:
        for owner in ("client.budget.accounts.Budgets.all", "client.console.requests.Requests.all"):
            patched.setattr(owner, lambda *_: pytest.fail("a page waits for what is being read"))
        for path in PATHS:
            page = browser.get(path)
            assert (page.status_code, "Being read" in page.text) == (200, True), path
            assert f'hx-get="{path}?asks-again"' in page.text
            assert f'href="{path}?waits"' in page.text
        again = browser.get(f"{PATHS[0]}?asks-again", headers={"hx-request": "true"})
        assert (again.status_code, "hx-refresh" in again.headers) == (204, False)
    reading.is_read.set()
    again = browser.get(f"{PATHS[0]}?asks-again", headers={"hx-request": "true"})
    assert (again.status_code, again.headers["hx-refresh"]) == (204, "true")
    for path in PATHS:
        assert "Being read" not in browser.get(path).text


def test_without_a_script_one_waits(serving: Serving, reading: SiteContent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.console.content.MOST_SECONDS", 0.01)
    page = serving.signed_in("officer").get("/budget?waits")
    assert (page.status_code, "Being read" in page.text) == (200, False)
    assert text_of(page.text).count("Spent (epsilon)") == 1


def test_reading_ahead_ends_whatever_happens(serving: Serving, reading: SiteContent) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("client.budget.accounts.Budgets.all", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            reading.read_ahead()
    assert reading.is_read.is_set()
    reading.read_ahead()
    (budget,) = reading.budgets.all()
    assert "spent" in vars(budget), "the accounting is done, too"
