"""A site's console in Chromium: signing in by hand, every page without an error, with the keyboard, at every width."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from client.console.pages import NAVIGATION
from shared.web.roles import Role
from tests.client.console.conftest import PASSWORD, Serving, take
from tests.client.console.homes import approvals_of, ask, make_home, want_people
from tests.shared.web import browsers
from tests.shared.web.accessibility import violations, violations_everywhere
from tests.shared.web.browsers import needs_chromium, open_whole, watched_page

pytestmark = needs_chromium
chromium = browsers.chromium


@pytest.fixture
def page(chromium: Any) -> Iterator[Any]:
    """A page that must not log an error; refused scripts and styles are errors there."""
    with watched_page(chromium) as found:
        yield found


def sign_in(page: Any, serving: Serving, name: str) -> None:
    page.goto(f"{serving.address}/sign-in")
    page.get_by_label("Name").fill(name)
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_label("Code of the authenticator").fill(serving.code(name))
    page.keyboard.press("Enter")
    page.wait_for_url("**/requests" if name in ("officer", "Jan") else "**/budget")


def test_every_page_at_every_width_in_both_themes(page: Any, serving: Serving) -> None:
    sign_in(page, serving, "officer")
    found = {}
    paths = [
        *(entry.path for entry in NAVIGATION if entry.key != "accounts"),
        "/releases/log",
        "/account",
        "/policy/edit",
        "/policy/versions/1",
        f"/budget/{serving.console.content.budgets.current().id}/what-if",
    ]
    paths += [f"/requests/{one.request.id}" for one in serving.console.content.requests.all()]
    for path in paths:
        open_whole(page, f"{serving.address}{path}")
        if path.startswith("/requests/"):
            page.locator("#rules").wait_for()
        if told := violations_everywhere(page):
            found[path] = told
    assert found == {}


def test_what_breaks_a_rule_is_found(page: Any) -> None:
    page.set_content(
        "<main style='background:#fff;color:#ccc'><input><p>faint</p></main><div style='width:9000px'>.</div>"
    )
    found = " ".join(violations_everywhere(page))
    for told in ("color-contrast", "label", "html-has-lang", "wider than 360"):
        assert told in found


def test_pages_of_guests_and_administrators(page: Any, serving: Serving) -> None:
    for path in ("/sign-in", "/welcome"):
        page.goto(f"{serving.address}{path}")
        assert violations(page) == []
    sign_in(page, serving, "administrator")
    page.goto(f"{serving.address}/accounts")
    page.set_viewport_size({"width": 360, "height": 800})
    assert violations(page) == []
    page.get_by_label("Name", exact=True).fill("Quinn")
    page.get_by_role("button", name="Invite", exact=True).click()
    code = page.locator(".callout .secret").inner_text()
    page.get_by_role("button", name="Sign out").click()
    page.goto(f"{serving.address}/welcome")
    page.get_by_label("Invitation code").fill(code)
    page.keyboard.press("Enter")
    page.wait_for_selector("svg path")
    assert violations(page) == []


def test_the_budget_is_drawn_and_the_chain_checked(page: Any, serving: Serving) -> None:
    sign_in(page, serving, "officer")
    page.get_by_role("link", name="Budget").click()
    page.wait_for_selector(".u-wrap canvas")
    page.get_by_role("rowheader", name="triage", exact=True).wait_for()
    assert page.locator(".u-legend").inner_text().count("Spent") == 1
    page.get_by_role("link", name="Releases and audit").click()
    page.get_by_text("are unbroken").wait_for()


def test_the_keyboard_is_enough(page: Any, serving: Serving) -> None:
    page.goto(f"{serving.address}/sign-in")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("document.activeElement.getBoundingClientRect().top") >= 0
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    for text in ("viewer", PASSWORD, serving.code("viewer")):
        page.keyboard.type(text)
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid", "focus is seen"
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_url("**/budget")


def test_switches_work_without_a_script(chromium: Any, serving: Serving) -> None:
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{serving.address}/sign-in")
    page.get_by_role("button", name="中文").click()
    assert page.get_by_role("heading").inner_text() == "登录"
    page.get_by_role("button", name="深色").click()
    assert page.locator("html").get_attribute("data-theme") == "dark"
    context.close()


def test_a_job_is_read_refused_and_approved_by_two(
    chromium: Any, page: Any, serve: Callable[..., Serving], tmp_path: Path
) -> None:
    home = make_home(tmp_path)
    want_people(home, 2)
    request = ask(home)
    serving = serve(home)
    administrator = next(one for one in serving.console.accounts.all() if one.role is Role.ADMINISTRATOR)
    take(serving, serving.console.accounts.invite("Jan", Role.OFFICER, by=administrator), "Jan")
    sign_in(page, serving, "officer")
    page.get_by_role("link", name="Budget").click()
    page.get_by_role("link", name="1 request waits").click()
    page.get_by_role("link", name="triage-2").click()
    page.get_by_role("rowheader", name="max_epsilon_per_job").wait_for()
    page.get_by_role("button", name="Refuse the job").click()
    assert page.locator("#reason-refuse").evaluate("field => field.validity.valueMissing"), "a reason is asked for"
    page.get_by_label("Reason", exact=True).fill("no consent for these patients")
    page.keyboard.press("Enter")
    page.get_by_text("no consent for these patients").wait_for()
    assert page.locator("h1 .badge").inner_text() == "refused"
    page.get_by_label("Reason, if you like").fill("the board agreed after all")
    page.get_by_role("button", name="Approve the job").click()
    page.get_by_text("You approved it.").wait_for()
    assert violations(page) == []
    context = chromium.new_context(viewport={"width": 360, "height": 800})
    other = context.new_page()
    sign_in(other, serving, "Jan")
    other.goto(f"{serving.address}/requests/{request.id}")
    other.get_by_text("the board agreed after all").wait_for()
    other.get_by_role("button", name="Approve the job").click()
    other.get_by_text("approved, not begun").wait_for()
    context.close()
    page.reload()
    assert page.locator("h1 .badge").inner_text() == "approved, not begun"
    assert page.locator(".side .count").count() == 0
    approvals, rules = approvals_of(home)
    assert [state for _, state in approvals.listed(rules)] == ["approved"]
