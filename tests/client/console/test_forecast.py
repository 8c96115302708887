"""What lies ahead of a budget, and what a job would cost: the numbers of the pages that decide, and no page that hangs."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from client.approval.facts import planned_charges
from client.console import forecast
from client.console.content import SiteContent
from client.policy.policy import load_policy
from shared.epsilons import rounded_up
from shared.web.roles import Role
from tests.client.console.conftest import Browser, Serving, text_of
from tests.client.console.homes import approvals_of, ask, charge, make_home, want_people

Serve = Callable[..., Serving]


@pytest.fixture(scope="module")
def served(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Serving:
    """A site with a past, at which two jobs wait."""
    home = make_home(tmp_path_factory.mktemp("ahead"))
    charge(home, jobs=["one"], rounds=3)
    want_people(home)
    ask(home, "first")
    ask(home, "second", training={"rounds": 20, "local_steps": 2})
    return serve(home)


def content(serving: Serving) -> SiteContent:
    found: SiteContent = serving.console.content
    return found


def test_one_job_is_as_its_request_says(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> None:
    home = make_home(tmp_path_factory.mktemp("one"))
    charge(home, jobs=["one"], rounds=3)
    want_people(home)
    ask(home)
    found = content(serve(home))
    budget = found.budgets.current()
    (shown,) = found.requests.all()
    facts = found.requests.facts(shown).facts
    told = found.forecasts.of(budget)
    assert {line.promise: line.after for line in facts.budget} == pytest.approx(told.after, abs=1e-12)
    assert [(one.request.id, one.state, one.after) for one in told.jobs] == [(shown.request.id, "waiting", told.after)]
    approvals, rules = approvals_of(home)
    approvals.refuse(shown.request.id, rules, by="olga", reason="no")
    assert found.forecasts.of(budget).jobs == ()


def test_jobs_add_up_by_the_rule_of_the_ledger(served: Serving) -> None:
    found = content(served)
    budget, policy = found.budgets.current(), load_policy(served.home.policy)
    told = found.forecasts.of(budget)
    assert [one.request.name for one in told.jobs] == ["first", "second"]
    jobs = [one.request.signed().job for one in told.jobs]
    plans = {job.sha256: planned_charges(job, policy) for job in jobs}
    assert told.after == told.jobs[-1].after == budget.after(plans)
    first, second = (budget.after({job: plan}) for job, plan in plans.items())
    together = told.after["together"]
    assert max(first["together"], second["together"]) < together < first["together"] + second["together"]
    assert found.forecasts.known(budget) is told, "computed once"
    charge(served.home, jobs=["another"], rounds=2)
    assert found.forecasts.known(found.budgets.current()) is None, "and anew once the ledger has changed"


def test_the_page_shows_it(served: Serving) -> None:
    browser = served.signed_in("officer")
    page = browser.get("/budget").text
    assert 'hx-get="/budget/' in page
    budget = content(served).budgets.current()
    part = browser.get(f"/budget/{budget.id}/forecast", headers={"hx-request": "true"}).text
    assert "<html" not in part
    told = content(served).forecasts.of(budget)
    assert f"{rounded_up(told.after['together'], 4)} of 8 will be spent" in text_of(part)
    assert "second" in part
    whole = browser.get(f"/budget/{budget.id}/forecast").text
    assert "<html" in whole
    page = browser.get("/budget").text
    assert "once all jobs that wait or run" in page, "known by now, so in the gauge itself"
    viewer = served.signed_in("viewer")
    page = viewer.get("/budget").text
    assert "/requests/" not in page
    assert "will be spent" in page


# --- what if ---


def what_if(browser: Browser, **typed: str) -> httpx.Response:
    account = content(browser.serving).budgets.current().id
    return browser.get(f"/budget/{account}/what-if", params=typed)


def test_what_if_is_what_a_request_would_say(served: Serving) -> None:
    found, browser = content(served), served.signed_in("researcher")
    budget = found.budgets.current()
    page = what_if(browser, steps="8", rate="0.25", by="noise", value="3").text
    request = next(
        one for one in found.requests.all() if one.request.name == "first"
    ).request  # the same, in rounds of two
    plan = planned_charges(request.signed().job, load_policy(served.home.policy))
    after = budget.after({"": plan})
    words = text_of(page)
    assert f"Once this job has run {rounded_up(after['together'], 4)}" in words
    assert "max_steps 8 at most 200 kept" in words
    assert "This site would refuse it" not in words
    part = browser.get(
        f"/budget/{budget.id}/what-if",
        params={"steps": "200", "rate": "0.5", "by": "noise", "value": "2"},
        headers={"hx-request": "true"},
    ).text
    assert "<html" not in part
    words = text_of(part)
    assert "This site would refuse it" in words
    assert "The whole job does not fit" in words
    page = what_if(
        browser, steps="20", rate="0.1", by="epsilon", value="2", summed="yes", sites="5", colluding="1", alone="6"
    )
    words = text_of(page.text)
    assert "min_colluding 1 at least 1 kept" in words
    assert "By itself" in words


def test_what_if_judges_whom_the_site_knows(served: Serving) -> None:
    before, browser = served.home.policy.read_text(), served.signed_in("viewer")
    typed = {"steps": "20", "rate": "0.1", "value": "2", "summed": "yes", "colluding": "1", "alone": "6"}
    try:
        named = f'[peers]\nsouth = "{1:064x}"\nwest = "{2:064x}"\n'
        served.home.policy.write_text(before.replace("[peers]\n", named))
        known = text_of(what_if(browser, **typed, sites="3").text)
        unknown = text_of(what_if(browser, **typed, sites="4").text)
        alone = text_of(what_if(browser, **(typed | {"summed": ""}), sites="4").text)
    finally:
        served.home.policy.write_text(before)
    assert "peers 3 sites that are known here [peers] names 3 with this one kept" in known
    assert "peers 4 sites that are known here [peers] names 3 with this one broken" in unknown
    assert "This site would refuse it" not in known
    assert "This site would refuse it" in unknown
    assert "is seen, and judged by peers, when each round begins" in known
    assert "[peers]" not in alone
    assert "signers , validity , tasks , backbones , limits , metrics ." in alone


@pytest.mark.parametrize(
    "typed",
    [
        {"steps": "x"},
        {"steps": "1_3"},
        {"value": "1_3"},
        {"steps": "0"},
        {"steps": "999999999999"},
        {"rate": "nan"},
        {"rate": "0"},
        {"value": "inf"},
        {"value": "-1"},
        {"by": "noise", "value": "1e-9"},
        {"summed": "yes", "sites": "1"},
        {"summed": "yes", "colluding": "9"},
        {"summed": "yes", "sites": "<script>alert(1)</script>"[:20]},
    ],
)
def test_what_cannot_be_is_told_and_not_computed(served: Serving, typed: dict[str, str]) -> None:
    answer = what_if(served.signed_in("viewer"), **typed)
    assert answer.status_code == 200
    assert "callout danger" in answer.text
    assert "<script>alert" not in answer.text


def test_it_works_before_the_first_charge(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> None:
    home = make_home(tmp_path_factory.mktemp("new"))
    browser = serve(home).signed_in("viewer")
    page = browser.get("/budget").text
    place = re.search(r'href="(/budget/[0-9a-f]{16}/what-if)"', page)
    assert place is not None
    words = text_of(browser.get(place[1]).text)
    assert "Spent now (epsilon) 0" in words
    assert not (home.path / "ledger.db").exists()


def test_only_the_latest_is_computed(served: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one is computed, a browser asks for three more: the last of them is computed, the others are not."""
    found, computed, begun, go = content(served), [], threading.Event(), threading.Event()
    budget = found.budgets.current()
    real = forecast.planned_charges

    def slow(job: Any, policy: Any) -> Any:
        computed.append(job.training.rounds)
        begun.set()
        assert go.wait(20)
        return real(job, policy)

    monkeypatch.setattr(forecast, "planned_charges", slow)
    answers: dict[int, Any] = {}

    def ask_for(steps: int, asker: str = "a") -> None:
        settings = {
            "training": {"rounds": steps, "local_steps": 1},
            "privacy": {"noise_multiplier": 5.0, "sample_rate": 0.01},
        }
        answers[steps] = found.forecasts.what_if(budget, settings, asker=asker)

    threads = [threading.Thread(target=ask_for, args=(steps,)) for steps in (31, 32, 33, 34)]
    threads.append(threading.Thread(target=ask_for, args=(35, "b")))
    threads[0].start()
    assert begun.wait(20)
    for thread in threads[1:]:
        thread.start()
        threading.Event().wait(0.05)
    go.set()
    for thread in threads:
        thread.join(30)
    assert sorted(computed) == [31, 34, 35]
    assert {steps for steps, answer in answers.items() if answer is None} == {32, 33}
    assert found.forecasts._latest == {}
    before = list(computed)
    ask_for(34)
    assert (computed, answers[34] is not None) == (before, True)


def test_whoever_waits_too_long_is_told(served: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "_WAIT_SECONDS", 0.05)
    browser = served.signed_in("officer")
    with content(served).forecasts._turns:
        answer = what_if(browser, steps="77")
    assert (answer.status_code, "try again" in answer.text) == (200, True)


def test_roles(served: Serving) -> None:
    account = content(served).budgets.current().id
    for role in Role:
        browser = served.signed_in(role.value)
        for path in ("forecast", "what-if"):
            assert browser.get(f"/budget/{account}/{path}").status_code == 200
            assert browser.get(f"/budget/{'0' * 16}/{path}").status_code == 404
    for path in ("forecast", "what-if"):
        assert served.browser().get(f"/budget/{account}/{path}").status_code == 303
