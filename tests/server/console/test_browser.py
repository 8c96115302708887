"""A coordinator's console in Chromium: every page without an error at every width, and a run that is followed live."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from server.console.navigation import NAVIGATION
from server.store.home import CoordinatorHome
from server.store.submission import Submission
from tests.client.console.conftest import PASSWORD, Serving
from tests.server.console.homes import SITES, go_on, say
from tests.shared.web import browsers
from tests.shared.web.accessibility import cut_off, violations_everywhere
from tests.shared.web.browsers import needs_chromium, watched_page

pytestmark = needs_chromium
chromium = browsers.chromium

RUN = "0004-at-hand"


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
    page.wait_for_url("**/runs")


PAGES = {
    "officer": ["/runs", "/runs/0001-pilot", "/runs/compare?run=0001-pilot&run=0002-wider", "/sites"],
    "engineer": ["/sites", "/runs/0002-wider", f"/runs/{RUN}"],
    "researcher": [entry.path for entry in NAVIGATION if entry.key == "new_job"],
}


@pytest.mark.parametrize("role", PAGES)
def test_every_page_at_every_width_in_both_themes(page: Any, serving: Serving, role: str) -> None:
    sign_in(page, serving, role)
    found = {}
    for path in PAGES[role]:
        page.goto(f"{serving.address}{path}")
        for chart in page.locator(".chart").all():
            chart.locator(".u-wrap canvas").wait_for()
        if "/runs/" in path:
            page.get_by_text("Delta", exact=True).first.wait_for()
        if told := violations_everywhere(page):
            found[path] = told
    assert found == {}


def test_long_names_cut_off_no_column(page: Any, serving: Serving) -> None:
    sign_in(page, serving, "officer")
    for path in ("/runs", "/sites", f"/runs/{RUN}"):
        page.goto(f"{serving.address}{path}")
        page.locator("table.stack tbody th").first.wait_for()
        lengthen = """name => document.querySelectorAll(".stack tbody th")
          .forEach(one => { (one.querySelector("a") || one).textContent = name })"""
        page.evaluate(lengthen, f"0004-{'a' * 59}")
        assert cut_off(page) == [], path


def test_a_run_is_followed(page: Any, serving: Serving, home: CoordinatorHome) -> None:
    sign_in(page, serving, "engineer")
    page.get_by_role("link", name=RUN).click()
    page.get_by_text("This page follows what happens.").wait_for()
    page.get_by_text("5 / 8").wait_for()
    row = page.get_by_role("row", name="north")
    row.get_by_text("training").wait_for()
    drawn = page.locator(".chart canvas").first.evaluate("canvas => canvas.toDataURL()")
    # A round ends, and one of the sites is killed.
    go_on(Submission(home.jobs / RUN), 6)
    rest = tuple(name for name in SITES if name != "north")
    say(home, job=RUN, online=rest, round={"round": 7, "sites": dict.fromkeys(SITES, "training"), "codes": {}})
    page.get_by_text("6 / 8").wait_for()
    row.get_by_text("lost").wait_for()
    page.wait_for_function("drawn => document.querySelector('.chart canvas').toDataURL() !== drawn", arg=drawn)
    say(home, job=RUN, round={"round": 7, "sites": {"north": "sent"}, "codes": {}})
    row.get_by_text("sent").wait_for()
    page.get_by_role("button", name="Stop this run").click()
    page.get_by_text("It is being stopped.").wait_for()
    (home.jobs / RUN / "stop").unlink()
    go_on(Submission(home.jobs / RUN), 5)
    say(home, job=RUN, round={"round": 6, "sites": {"north": "training", "st-anna": "sent"}, "codes": {}})


def test_what_is_ticked_stays_ticked(page: Any, serving: Serving, home: CoordinatorHome) -> None:
    sign_in(page, serving, "viewer")
    page.get_by_text("This page follows what happens.").wait_for()
    for name in ("0001-pilot", "0002-wider"):
        page.get_by_label(f"Compare {name}").check()
    go_on(Submission(home.jobs / RUN), 6)
    page.get_by_text("6 / 8").wait_for()
    page.get_by_role("button", name="Compare the chosen ones").click()
    page.get_by_role("heading", name="Settings that differ").wait_for()
    assert page.locator(".u-legend").first.inner_text().count("0001-pilot") == 1
    go_on(Submission(home.jobs / RUN), 5)


def test_without_a_script_everything_is_there(chromium: Any, serving: Serving) -> None:
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    sign_in(page, serving, "officer")
    page.get_by_role("link", name="0001-pilot").click()
    page.get_by_text("Load the page again to see").is_visible()
    page.get_by_role("link", name="Show the reports").click()
    page.get_by_role("button", name="Make the run report").wait_for()
    page.go_back()
    page.get_by_role("link", name="It is being computed").click()
    page.get_by_text("Noise multiplier").wait_for()
    context.close()
