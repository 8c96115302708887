"""The research console in Chromium: by hand from the terminal's link, at every width, and a report that somebody forged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.shared.web import browsers
from tests.shared.web.accessibility import violations_everywhere
from tests.shared.web.browsers import needs_chromium, open_whole, watched_page
from tests.simulations.console.conftest import EVIL, Serving

pytestmark = needs_chromium
chromium = browsers.chromium

FORGED = """<!doctype html><title>forged</title><style>p { color: rgb(1, 2, 3); }</style><p id="p">mine</p>
<meta http-equiv="refresh" content="0;url=/sign-in"><script>document.title = "ran"</script>
<img src=x onerror="document.title = 'ran'"><form id="f" action="/sign-out" method="post"><button>go</button></form>
<iframe src="/runs"></iframe>"""


@pytest.fixture
def page(chromium: Any, serving: Serving) -> Iterator[Any]:
    """A page that is signed in, and must not log an error; refused scripts and styles are errors there."""
    with watched_page(chromium) as found:
        found.goto(f"{serving.address}/{serving.links[-1]}")
        found.get_by_role("button", name="Open the console").click()
        found.wait_for_url("**/runs")
        yield found


def paths_of(serving: Serving) -> list[str]:
    found = serving.console.content.index.now()
    known = {run.path: run.id for run in found.runs.values()}
    chosen = "&".join(f"run={known[path]}" for path in ("first", "eps1", "evil", "open"))
    one = [f"/runs/{known[path]}" for path in ("first", "evil", "broken")]
    sweep = f"/frontier?sweep={next(iter(found.sweeps))}"
    return ["/runs", *one, f"/runs/compare?{chosen}", f"/runs/compare?{chosen}&log=1", "/frontier", sweep, "/sweeps"]


def test_every_page_keeps_the_rules_at_every_width(page: Any, serving: Serving) -> None:
    found = {}
    for path in [*paths_of(serving), "/account", f"/{serving.links[-1]}"]:
        open_whole(page, f"{serving.address}{path}")
        if told := violations_everywhere(page):
            found[path] = told
    assert found == {}


def test_no_column_of_the_runs_is_cut_off(page: Any) -> None:
    for width in (360, 1280, 1440):
        page.set_viewport_size({"width": width, "height": 900})
        wide = "e => e.scrollWidth - e.clientWidth"
        assert page.locator(".scroll:has(table.runs)").evaluate(wide) <= 0, width
    page.set_viewport_size({"width": 360, "height": 900})
    shift = "cell => parseFloat(getComputedStyle(cell).paddingLeft) + parseFloat(getComputedStyle(cell).textIndent)"
    assert page.locator("table.runs td:not(.choose)").first.evaluate(shift) >= 0, "the label beside a value is seen"


def test_runs_are_chosen_and_drawn(page: Any) -> None:
    page.get_by_label("Words").fill("movie-reviews")
    page.get_by_label("Sweep", exact=True).select_option("no trials of sweeps")
    page.keyboard.press("Enter")
    page.get_by_text("5 of 20").wait_for()
    for box in page.get_by_role("checkbox").all()[:3]:
        box.check()
    page.get_by_role("button", name="Compare").click()
    page.wait_for_selector(".u-wrap canvas")
    assert page.locator(".u-legend .u-series").count() == 4, "three runs, and the round"
    page.get_by_label("Axis", exact=True).select_option("logarithmic")
    page.get_by_label("Metric", exact=True).select_option("loss")
    page.get_by_role("button", name="Show").click()
    page.wait_for_selector(".u-wrap canvas")
    page.get_by_role("button", name="Frontier").click()
    mark = page.locator("svg.frontier a").first
    mark.wait_for()
    mark.click()
    page.wait_for_url("**/runs/*")
    page.wait_for_selector(".u-wrap canvas")


def test_a_name_draws_no_element(page: Any, serving: Serving) -> None:
    (path,) = [path for path in paths_of(serving) if path.endswith("log=1")]
    open_whole(page, f"{serving.address}{path}")
    assert EVIL in page.locator(".u-legend").inner_text()
    assert page.locator("main img, .u-legend script").count() == 0


def test_it_works_without_a_script(chromium: Any, serving: Serving) -> None:
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{serving.address}/{serving.links[-1]}")
    page.get_by_role("button", name="Open the console").click()
    page.get_by_role("checkbox").first.check()
    page.get_by_role("button", name="Frontier").click()
    assert page.locator("svg.frontier a").count() == 1
    context.close()


def test_a_forged_report_can_do_nothing(chromium: Any, serving: Serving) -> None:
    run = next(run for run in serving.console.content.index.now().runs.values() if run.path == "first")
    (run.folder / "report.html").write_text(FORGED)
    context = chromium.new_context()
    page, asked = context.new_page(), list[str]()
    page.goto(f"{serving.address}/{serving.links[-1]}")
    page.get_by_role("button", name="Open the console").click()
    page.goto(f"{serving.address}/runs/{run.id}")
    with context.expect_page() as opened:
        page.get_by_role("link", name="Open the report").click()
    report = opened.value
    report.on("response", lambda answer: asked.append(answer.url))
    report.locator("#p").wait_for()
    assert report.title() == "forged", "no script ran"
    assert report.locator("#p").evaluate("e => getComputedStyle(e).color") == "rgb(1, 2, 3)", "its own style holds"
    assert report.evaluate("origin") == "null"
    assert report.evaluate("window.opener") is None
    report.get_by_role("button", name="go").click()
    report.wait_for_timeout(300)
    assert report.url.endswith("/report"), "no form left, and no refresh led on"
    assert [url for url in asked if not url.endswith("/report")] == []
    page.reload()
    assert "/runs/" in page.url, "still signed in"
    context.close()
    (run.folder / "report.html").unlink()
