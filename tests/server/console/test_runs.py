"""The pages about runs: what stands there, who sees it, and how long it takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from server.console.runs import Runs
from server.store.home import CoordinatorHome
from shared.web.roles import Role
from tests.client.console.conftest import Browser, Serving, text_of
from tests.server.console.homes import copy, go_on, job_of, make_home, say, submit


def test_the_list_tells_what_is_known(serving: Serving) -> None:
    text = text_of(serving.signed_in("viewer").get("/runs").text)
    assert "0004-at-hand at hand running 5 / 8 3 accuracy 0.7 noise 2.0000 1.5501" in text
    assert "0003-secure failed 0 / 6 – – 4 / 16 –" in text
    assert "0002-wider stopped 3 / 4" in text
    assert text.index("0004-at-hand") < text.index("0001-pilot"), "the newest first"


def test_search_and_states(serving: Serving) -> None:
    browser = serving.signed_in("viewer")
    found = browser.get("/runs", params={"q": "WIDER"}).text
    assert ("0002-wider" in found, "0001-pilot" in found) == (True, False)
    found = browser.get("/runs", params={"state": "failed"}).text
    assert ("0003-secure" in found, "0001-pilot" in found) == (True, False)
    assert "none fits the search" in browser.get("/runs", params={"q": "no such"}).text


def test_a_run_tells_of_its_sites(serving: Serving) -> None:
    text = text_of(serving.signed_in("viewer").get("/runs/0004-at-hand").text)
    assert "5 / 8 round 6 is at hand" in text
    for line in ("charite waiting 5", "north training 5", "st-anna sent 5"):
        assert line in text


def test_its_promises_are_the_planners(serving: Serving) -> None:
    browser = serving.signed_in("viewer")
    text = text_of(browser.get("/runs/0003-secure/promises", headers={"hx-request": "true"}).text)
    assert "against the coordinator and up to 1 sites" in text
    assert "if secure aggregation fails" in text
    assert "Epsilon" in text_of(browser.get("/runs/0001-pilot/promises").text)


def test_curves_are_those_of_public_records(serving: Serving) -> None:
    browser = serving.signed_in("viewer")
    told = browser.get("/runs/0001-pilot/curve.json", params={"metric": "accuracy"}).json()
    assert told["rounds"] == list(range(9))
    assert told["series"][0]["values"][-1] == 0.5 + 0.04 * 8
    told = browser.get("/runs/0001-pilot/curve.json", params={"metric": "epsilon"}).json()
    assert (told["upwards"], told["series"][0]["values"][:2]) == (True, [None, 0.31])
    assert browser.get("/runs/0001-pilot/curve.json", params={"metric": "nothing"}).status_code == 404


@pytest.mark.parametrize("role", Role)
def test_everybody_with_an_account_sees_runs(serving: Serving, role: Role) -> None:
    browser = serving.signed_in(role.value)
    assert browser.get("/runs").status_code == 200
    assert browser.get("/runs/0001-pilot").status_code == 200


def test_nobody_else_does(serving: Serving) -> None:
    for path in ("/runs", "/runs/0001-pilot", "/runs/events", "/runs/0001-pilot/curve.json?metric=loss"):
        assert serving.browser().get(path).status_code == 303


@pytest.mark.parametrize(
    "name",
    [
        "0009-none",
        "..%2F..%2Fkeys",
        "0001-pilot%2F..%2F0002-wider",
        "....",
        "0001-pilot/",
        "%00",
        "1",
        "\U0001f600" * 9,
    ],
)
def test_no_path_leads_elsewhere(serving: Serving, name: str) -> None:
    browser = serving.signed_in("viewer")
    for path in (f"/runs/{name}", f"/runs/{name}/live", f"/runs/{name}/events", f"/runs/{name}/curve.json"):
        assert browser.get(path).status_code == 404
    assert serving.console.content.runs.find("0001-pilot/../0002-wider") is None


def test_under_central_dp_nobody_learns_who_was_drawn(serve: Callable[..., Serving], tmp_path: Path) -> None:
    home = make_home(tmp_path, ("north",))
    central = {"mechanism": "central", "unit": "site", "epsilon": 8.0, "central": {"num_sites": 200}}
    job = job_of("central", privacy=central, federation={"min_sites": 100})
    go_on(submit(home, job, 1, state="running"), 2, sites=("north",))
    say(home, job="0001-central", sites=("north",), round={"round": 3, "sites": {"north": "sent"}, "codes": {}})
    text = text_of(serve(home).signed_in("viewer").get("/runs/0001-central").text)
    assert "north waiting –" in text
    assert "Who is drawn for a round is secret" in text


def test_a_coordinator_that_does_not_run(serve: Callable[..., Serving], tmp_path: Path) -> None:
    home = make_home(tmp_path, ("north",))
    submission = submit(home, job_of(), 1, state="running")
    go_on(submission, 2)
    (submission.path / "state.json").write_text("{")
    browser = serve(home).signed_in("viewer")
    assert "The coordinator does not run" in browser.get("/runs").text
    assert "damaged" in browser.get("/runs/0001-triage").text
    say(home, sites=("north",), job=None)
    assert "The coordinator does not run" not in browser.get("/runs").text


def test_a_thousand_runs(serve: Callable[..., Serving], tmp_path: Path) -> None:
    home = make_home(tmp_path, ())
    first = submit(home, job_of("many"), 1, state="completed")
    go_on(first, 8)
    copy(first, range(2, 1001))
    browser = serve(home).signed_in("viewer")
    took = {}
    for path in ("/runs", "/runs?page=20", "/runs?q=0777", "/runs/0500-many", "/runs/0500-many/curve.json?metric=loss"):
        took[path] = min(_seconds(browser, path) for _ in range(3))  # others use this machine, too
    assert {path: seconds for path, seconds in took.items() if seconds > 0.3} == {}


def _seconds(browser: Browser, path: str) -> float:
    began = time.perf_counter()
    assert browser.get(path).status_code == 200
    return time.perf_counter() - began


def test_a_run_that_went_away_is_forgotten(home: CoordinatorHome) -> None:
    runs = Runs(home.jobs)
    assert [run.id for run in runs.all()][-1] == "0001-pilot"
    assert runs.find("0099-gone") is None
