"""The pages of the research console over real HTTP: what they show and refuse, and that they leave everything as it was."""

from __future__ import annotations

import csv
import html
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute

from shared.web.guarding import POLICY
from simulations.console.drawing import BOTTOM, TOP, draw
from simulations.console.frontier import Point, with_front
from tests.simulations.console.conftest import EVIL, Browser, Serving, files_of, make_folder
from tests.simulations.console.folders import make_run, write_json


@pytest.fixture
def browser(serving: Serving) -> Browser:
    return serving.signed_in()


def ids(serving: Serving) -> dict[str, str]:
    """Return the id of every run by path."""
    return {run.path: run.id for run in serving.console.content.index.now().runs.values()}


def rows(page: str) -> list[str]:
    """Return the names of the runs in the table, in order, by their paths."""
    return re.findall(r'class="path note">([^<]*)</span></th>', page)


def words(page: str) -> str:
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page)))


# --- the table ---


def test_the_table_has_what_counts(serving: Serving, browser: Browser) -> None:
    page = words(browser.page("/runs?q=first"))
    for text in ("reviews", "sequence_classification", "embedded:all-minilm-l6-v2", "movie-reviews", "iid"):
        assert text in page
    assert "2.988" in page, "2.98765, rounded up"
    assert "80.3 % ± 1.5 (3)" in page
    assert "82.0 %" in page
    assert "88.0 %" in page
    assert "−7.7" in page
    assert "2026-11-02 09:30" in page
    assert "0:01:02" in page
    assert "1 of 20" in page


def test_what_is_broken_is_shown_with_its_reason(browser: Browser) -> None:
    page = words(browser.page("/runs?state=broken"))
    assert "cannot be read" in page
    assert "run.json is damaged or not of Silotune: it is not JSON" in page


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("q=DEEP+er", ["deep/er/lm"]),
        ("q=dirichlet+0.3", ["deep/er/lm"]),
        ("task=none", []),
        ("data=replies", ["deep/er/lm"]),
        ("sweep=none&most=3", ["eps1", "evil", "first", "deep/er/lm", "going"]),
        ("sweep=none&least=5", ["early", "open"]),
        ("sweep=none&least=5&most=6", ["early"]),
        ("sweep=none&least=x&most=&q=eps1", ["eps1"]),
        ("state=running", ["going"]),
    ],
)
def test_filters(browser: Browser, query: str, found: list[str]) -> None:
    assert sorted(rows(browser.page(f"/runs?{query}"))) == sorted(found)


def test_sorting(browser: Browser) -> None:
    def in_order(sort: str, down: int) -> list[str]:
        return rows(browser.page(f"/runs?sweep=none&data=movie-reviews&sort={sort}&down={down}"))

    assert in_order("epsilon", 0)[:2] == ["eps1", "first"]
    assert in_order("epsilon", 1)[0] == "open", "no privacy is more than any epsilon"
    assert in_order("value", 1)[:3] == ["open", "early", "first"]
    assert in_order("gap", 1)[0] == in_order("gap", 0)[0] == "first", "what has none comes last"
    assert in_order("nothing", 1) == in_order("created", 1)
    page = browser.page("/runs?sort=value&down=1")
    assert 'aria-sort="descending"' in page
    assert "sort=value&amp;down=0" in page


def test_pages_of_the_table(serve: Callable[[Path], Serving], tmp_path: Path) -> None:
    for number in range(53):
        make_run(tmp_path / f"run-{number}", num_sites=0, num_rounds=1)
    browser = serve(tmp_path).signed_in()
    assert len(rows(browser.page("/runs?sort=name"))) == 50
    assert len(rows(browser.page("/runs?sort=name&page=2"))) == 3
    assert rows(browser.page("/runs?page=9999")) == []
    assert browser.get("/runs?page=0").status_code == 422


def test_an_empty_folder(serve: Callable[[Path], Serving], tmp_path: Path) -> None:
    browser = serve(tmp_path).signed_in()
    assert "There is no run in this folder yet" in browser.page("/runs")
    assert "There is no point to draw" in browser.page("/frontier")
    assert "There is no sweep" in browser.page("/sweeps")
    make_run(tmp_path / "late")
    assert rows(browser.page("/runs")) == ["late"]


# --- one run, and several ---


def test_one_run(serving: Serving, browser: Browser) -> None:
    page = words(browser.page(f"/runs/{ids(serving)['early']}"))
    assert "5.100" in page
    assert "the whole plan: 7.999" in page
    assert "delta 1e-05, each record" in page
    assert "training.learning_rate" in page
    assert "Trial of the sweep" in words(browser.page(f"/runs/{ids(serving)['sweeps/budgets/trials/1_0-0_1-0']}"))
    assert "no privacy" in words(browser.page(f"/runs/{ids(serving)['open']}"))


def test_runs_side_by_side(serving: Serving, browser: Browser) -> None:
    known = ids(serving)
    query = "&".join(f"run={known[path]}" for path in ("first", "eps1", "early"))
    page = words(browser.page(f"/runs/compare?{query}"))
    differ = page.partition("Settings that differ")[2]
    assert "training.learning_rate 1.5 0.7 1.5" in differ
    assert "privacy.epsilon 3 1 8" in differ
    assert "model.backbone" not in differ
    assert "80.3 % ± 1.5 (3)" in page
    told = browser.get(f"/runs/curves.json?{query}&metric=accuracy").json()
    assert told["rounds"] == list(range(7))
    assert [one["label"] for one in told["series"]] == ["reviews (first)", "reviews (eps1)", "early"]
    assert told["series"][1]["values"][-1] == pytest.approx(0.7)
    assert not told["log"]
    assert browser.get(f"/runs/curves.json?run={known['deep/er/lm']}&metric=perplexity&log=1").json()["log"]
    assert "All settings are the same" in browser.page(f"/runs/compare?run={known['first']}")
    assert "No run was chosen" in browser.page("/runs/compare?run=nothing")


def test_at_most_twelve_side_by_side(serving: Serving, browser: Browser) -> None:
    page = browser.page("/runs/compare?" + "&".join(f"run={one}" for one in ids(serving).values()))
    assert "these are the first 12" in page
    assert len(browser.get("/runs/curves.json?" + "&run=".join(["", *ids(serving).values()])).json()["series"]) == 12


# --- frontier ---


def test_the_frontier_of_all_runs(serving: Serving, browser: Browser) -> None:
    page = browser.page("/frontier?data=movie-reviews")
    lines = [words(row) for row in re.findall(r"<tr>.*?</tr>", page, flags=re.DOTALL)]
    found = {line.split()[-1]: line for line in lines}
    for path, front in (("eps1", True), ("first", True), ("early", True), ("open", True), ("going", False)):
        assert ("on the front" in found[path]) is front, path
        assert f'href="/runs/{ids(serving)[path]}"' in page
    assert "5.100 7.999" in found["early"], "executed, and planned"
    assert "no privacy" in found["open"]
    assert "0.999" in found["sweeps/budgets/trials/1_0-0_1-1"]
    assert page.count('class="plan"') == 3, "a line, a mark and the legend's"
    assert "evil" not in found, "of other data"


def test_the_frontier_of_chosen_runs(serving: Serving, browser: Browser) -> None:
    known = ids(serving)
    page = browser.page(f"/frontier?run={known['first']}&run={known['open']}")
    assert f'href="/runs/{known["first"]}"' in page
    assert known["eps1"] not in page
    lines = [json.loads(one) for one in browser.page(f"/frontier/export.jsonl?run={known['first']}").splitlines()]
    assert [(one["runs"], one["executed"]) for one in lines] == [([known["first"]], 2.98765)]


def test_the_frontier_of_a_sweep(serving: Serving, browser: Browser) -> None:
    (sweep,) = serving.console.content.index.now().sweeps
    page = browser.page(f"/frontier?sweep={sweep}")
    assert "Two seeds." in page
    lines = [json.loads(one) for one in browser.page(f"/frontier/export.jsonl?sweep={sweep}").splitlines()]
    assert [(one["executed"], one["front"]) for one in lines] == [
        (0.999, True),
        (0.999, False),
        (7.992, True),
        (7.992, False),
        (None, True),
        (None, False),
    ]
    assert all(len(one["runs"]) == one["num"] == 2 for one in lines)
    assert all(f"/runs/{run}" in page for one in lines for run in one["runs"])
    assert "59.5 % ± 0.7 (2)" in words(page)
    assert f"/frontier?sweep={sweep}" in browser.page("/sweeps")
    assert len(rows(browser.page(f"/runs?sweep={sweep}"))) == 12


def test_of_equal_points_none_is_said_to_be_worse() -> None:
    def point(executed: float | None, value: float) -> Point:
        return Point(label="", runs=(), executed=executed, planned=None, value=value)

    points = [point(1.0, 0.5), point(1.0, 0.5), point(2.0, 0.5), point(2.0, 0.7), point(None, 0.7), point(None, 0.9)]
    lower = [replace(one, value=-one.value) for one in points]
    assert [(one.executed, one.value, one.front) for one in with_front(points, higher=True)] == [
        (1.0, 0.5, True),
        (1.0, 0.5, True),
        (2.0, 0.7, True),
        (2.0, 0.5, False),
        (None, 0.9, True),
        (None, 0.7, False),
    ]
    fronts = [[one.front for one in with_front(some, higher=one)] for some, one in ((points, True), (lower, False))]
    assert fronts[0] == fronts[1]


def test_no_axis_of_shares_goes_beyond_what_there_can_be() -> None:
    for values in ((0.2, 1.0), (1.0, 1.0), (0.0, 0.0), (0.98, 0.99)):
        points = [Point(label="", runs=(), executed=1.0, planned=None, value=value, sd=0.05, num=3) for value in values]
        drawing = draw(points, most=1.0)
        assert drawing is not None
        assert all(0.0 <= tick <= 1.0 for _, tick in drawing.down)
        assert all(TOP <= place <= BOTTOM for mark in drawing.marks for place in (mark.y, mark.low, mark.high))
    free = draw([Point(label="", runs=(), executed=1.0, planned=None, value=value) for value in (0.2, 1.0)])
    assert free is not None
    assert max(tick for _, tick in free.down) >= 1.0


def test_boxes_of_runs_with_one_name_are_told_apart(browser: Browser) -> None:
    page = browser.page("/runs")
    named = re.findall(r'type="checkbox"[^>]*aria-label="([^"]*)"', page)
    assert len(named) == len(set(named)) > 5


def test_epsilons_of_other_units_stand_apart(serve: Callable[[Path], Serving], tmp_path: Path) -> None:
    for number in range(2):
        make_run(tmp_path / f"record-{number}", num_sites=1)
    make_run(tmp_path / "patient", num_sites=1, unit="patient")
    make_run(tmp_path / "void", num_sites=1, executed=None, randomness="injected")
    make_run(tmp_path / "federation", num_sites=1, data="")
    browser = serve(tmp_path).signed_in()
    page = browser.page("/frontier")
    assert "record-0</a>" in page
    assert "patient</a>" not in page
    assert "1 private run that states no epsilon is left out" in page
    assert "federation</a>" not in page, "of data that have no name here"
    assert "federation</a>" in browser.page("/frontier?data=–")
    page = browser.page("/frontier?promise=patient+1e-05")
    assert "record-0</a>" not in page
    assert "patient</a>" in page


# --- files ---


def test_files_have_what_is_shown(serving: Serving, browser: Browser) -> None:
    answer = browser.get("/runs/export.csv?q=first")
    assert answer.headers["content-disposition"] == 'attachment; filename="runs.csv"'
    (row,) = csv.DictReader(io.StringIO(answer.text, newline=""))
    assert float(row["epsilon_executed"]) == 2.98765, "all digits"
    assert (row["path"], row["num_seeds"], row["non_private"]) == ("first", "3", "0.88")
    found = [json.loads(line) for line in browser.page("/runs/export.jsonl").splitlines()]
    assert len(found) == 20
    assert next(one for one in found if one["path"] == "broken")["problem"]
    rounds = list(csv.DictReader(io.StringIO(browser.page(f"/runs/curves/export.csv?run={ids(serving)['first']}"))))
    assert len(rounds) == 14
    assert (rounds[-2]["round"], rounds[-2]["metric"]) == ("6", "accuracy")
    assert browser.get("/runs/export.exe").status_code == 404


def test_no_spreadsheet_computes_a_name(serve: Callable[[Path], Serving], tmp_path: Path) -> None:
    make_run(tmp_path / "=1+1", name="=HYPERLINK(1)", data="@SUM(A1)", num_sites=0)
    page = serve(tmp_path).signed_in().page("/runs/export.csv")
    (row,) = csv.DictReader(io.StringIO(page))
    assert (row["path"], row["name"], row["data"]) == ("'=1+1", "'=HYPERLINK(1)", "'@SUM(A1)")


# --- attacks ---


def test_names_are_only_text(serving: Serving, browser: Browser) -> None:
    """Of runs, data, settings, metrics, sites and folders; what asks is only text as well."""
    known, query = (
        ids(serving),
        {"q": EVIL, "data": EVIL, "metric": EVIL, "promise": EVIL, "run": EVIL, "sweep": "none"},
    )
    pages = ["/runs", "/frontier", f"/runs/{known['evil']}", f"/runs/compare?run={known['evil']}&run={known['first']}"]
    pages = [browser.page(path) for path in pages]
    pages += [browser.get(path, params=query).text for path in ("/runs", "/runs/compare", "/frontier")]
    for page in pages:
        assert "<script>alert" not in page
        assert "<img" not in page
    assert sum(html.escape(EVIL) in page.replace("&#34;", "&quot;") for page in pages) >= 4


def test_odd_names_of_folders_and_metrics(serve: Callable[[Path], Serving], tmp_path: Path) -> None:
    odd = tmp_path.joinpath(b"caf\xe9 \xff".decode(errors="surrogateescape"))
    make_run(odd, name="\ud800\u202e\x00", num_sites=1)
    run = make_run(tmp_path / EVIL.replace("/", "∕"), num_sites=1)
    metrics = {"accuracy": 0.5, "\udfff": 0.2, EVIL: 0.3}
    write_json(run / "evaluation.json", {"metrics": metrics, "primary_metric": EVIL})
    (run / "metrics.jsonl").write_text(json.dumps({"round": 1, "metrics": metrics}) + "\n")
    serving = serve(tmp_path)
    browser = serving.signed_in()
    paths = [f"/runs/{run_id}" for run_id in ids(serving).values()]
    paths += ["/runs", "/frontier", "/runs/export.csv", "/runs/export.jsonl"]
    asked = "?" + "&".join(f"run={run_id}" for run_id in ids(serving).values())
    paths += [f"{path}{asked}" for path in ("/runs/compare", "/runs/curves.json", "/runs/curves/export.jsonl")]
    for path in paths:
        page = browser.page(path)
        assert "\x00" not in page
        assert "export" in path or "json" in path or "<script>alert" not in page


@pytest.mark.parametrize(
    "name", ["..%2f..%2fetc%2fpasswd", "..", "%2e%2e", "0" * 16, "first", "%00", "a" * 64, "/etc/passwd", "\u00e9"]
)
def test_no_address_is_a_path(browser: Browser, name: str) -> None:
    for path in (f"/runs/{name}", f"/runs/{name}/report", f"/frontier?sweep={name}", f"/static/{name}"):
        answer = browser.get(path, follow_redirects=True)
        assert answer.status_code in (200, 404, 422), path
        assert "root:" not in answer.text
    answer = browser.get("/runs/" + "a" * 65)
    assert answer.status_code == 422


def test_every_page_needs_an_account(serving: Serving) -> None:
    browser = serving.browser()
    found = [route for route in serving.app.routes if isinstance(route, APIRoute) and "see results" in route.tags]
    assert len(found) >= 10
    for route in found:
        path = route.path.replace("{run_id}", ids(serving)["first"]).replace("{form}", "csv")
        answer = browser.get(path)
        assert answer.status_code == 303, path
        assert answer.headers["location"].startswith("/sign-in")
        assert answer.headers["content-security-policy"] == POLICY


def test_nothing_can_be_changed_but_the_visit(serving: Serving) -> None:
    forms = {
        route.path
        for route in serving.app.routes
        if isinstance(route, APIRoute) and "GET" not in route.methods and "see results" in route.tags
    }
    assert forms == set()


def test_nothing_is_written_among_the_runs(serve: Callable[[Path], Serving], tmp_path: Path) -> None:
    root = make_folder(tmp_path / "runs")
    before = files_of(root)
    serving = serve(root)
    browser = serving.signed_in()
    for run_id in ids(serving).values():
        browser.page(f"/runs/{run_id}")
    everything = "&".join(f"run={run_id}" for run_id in ids(serving).values())
    for path in ("/runs", "/sweeps", "/frontier", "/runs/export.csv", f"/runs/compare?{everything}", "/account"):
        browser.page(path)
    assert files_of(root) == before


def test_both_languages(browser: Browser) -> None:
    headers: dict[str, Any] = {"accept-language": "zh"}
    for path, word in (("/runs", "筛选"), ("/frontier", "前沿"), ("/sweeps", "参数扫描")):
        assert word in browser.get(path, headers=headers).text
