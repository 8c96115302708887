"""What manages accounts or lets more in needs password and code of the last five minutes: an open browser is not enough."""

from __future__ import annotations

from urllib.parse import urlencode

import pytest
from fastapi.routing import APIRoute

from shared.web.accounts.sessions import PROVEN_SECONDS
from shared.web.asked import Gate
from shared.web.roles import Action, Role
from tests.client.console.conftest import PASSWORD, Browser, Serving, take, text_of


def others(serving: Serving) -> list[object]:
    return [(one.name, one.role, one.disabled, one.invited) for one in serving.console.accounts.all()]


def deeds(serving: Serving) -> dict[str, dict[str, str]]:
    """Return every form of the page of accounts, with what it sends."""
    viewer = next(one for one in serving.console.accounts.all() if one.name == "viewer")
    return {
        "/accounts": {"name": "somebody new", "role": "viewer"},
        f"/accounts/{viewer.id}/role": {"role": "officer"},
        f"/accounts/{viewer.id}/disable": {},
        f"/accounts/{viewer.id}/enable": {},
        f"/accounts/{viewer.id}/reset": {},
        f"/accounts/{viewer.id}/end-sessions": {},
    }


def prove(browser: Browser, name: str, *, password: str = PASSWORD, **more: str) -> int:
    given = {"password": password, "totp": browser.serving.code(name), "next": "/accounts"} | more
    return browser.post("/account/prove", page="/account/prove", **given).status_code


def test_nothing_is_changed_without_a_proof(serving: Serving) -> None:
    browser = serving.signed_in("administrator")
    serving.clock.seconds += PROVEN_SECONDS
    before = others(serving)
    for path, form in deeds(serving).items():
        place = "/account/prove?next=%2Faccounts"
        place += "%3Fname%3Dsomebody%2Bnew%26role%3Dviewer%26" if path == "/accounts" else "%3F"
        place += "not-done%3Dyes"
        answer = browser.post(path, **form)
        assert (answer.status_code, answer.headers["location"]) == (303, place), path
        part = browser.post(path, headers={"hx-request": "true"}, **form)
        assert (part.status_code, part.headers["hx-redirect"]) == (204, place)
    assert others(serving) == before
    page = browser.get("/accounts")
    assert (page.status_code, "Confirm that it is you" in page.text) == (200, True), "looking needs none"


def test_after_it_everything_works_for_five_minutes(serving: Serving) -> None:
    browser, name = serving.signed_in("administrator"), "administrator"
    serving.clock.seconds += PROVEN_SECONDS
    assert prove(browser, name, password="some other sentence") == 422  # noqa: S106
    assert prove(browser, name, totp="000000") == 422
    assert browser.post("/accounts", name="x", role="viewer").headers["location"].startswith("/account/prove")
    form = browser.get("/account/prove?next=/accounts").text
    assert 'name="next" value="/accounts"' in form
    assert prove(browser, name) == 303
    assert "Confirm that it is you" not in browser.get("/accounts").text
    answer = browser.post("/accounts", name="Quinn", role="viewer")
    assert (answer.status_code, "Quinn" in answer.text) == (200, True)
    serving.clock.seconds += PROVEN_SECONDS
    assert browser.post("/accounts", name="y", role="viewer").status_code == 303
    assert {"x", "y"} & {one.name for one in serving.console.accounts.all()} == set()


def test_what_was_typed_need_not_be_typed_again(serving: Serving) -> None:
    browser = serving.signed_in("administrator")
    serving.clock.seconds += PROVEN_SECONDS
    typed = {"name": 'Rosa "<b>', "role": "officer"}
    place = browser.post("/accounts", **typed).headers["location"]
    assert (
        f'name="next" value="/accounts?{urlencode(typed)}&not-done=yes"'.replace("&", "&amp;")
        in browser.get(place).text
    )
    assert prove(browser, "administrator", next=f"/accounts?{urlencode(typed)}") == 303
    page = browser.get(f"/accounts?{urlencode(typed)}&not-done=yes").text
    assert "Nothing was done so far" in text_of(page), "the way back is none to where it was done"
    assert "Nothing was done so far" not in text_of(browser.get("/accounts").text)
    assert 'value="Rosa &#34;&lt;b&gt;"' in page
    assert 'value="officer" required checked' in page
    assert 'value="viewer" required checked' in browser.get("/accounts?role=none").text
    serving.clock.seconds += PROVEN_SECONDS
    long = browser.post("/accounts", name="é" * 400, role="officer").headers["location"]
    assert long == "/account/prove?next=%2Faccounts", "what is too long is not carried"


def test_an_administrator_is_warned_of_names_that_look_alike(serving: Serving) -> None:
    browser = serving.signed_in("administrator")
    serving.console.accounts.invite("Olga Officer", Role.OFFICER, by=serving.console.accounts.all()[0])
    for name, warned in (("0lga Offlcer", True), ("OIga 0fficer", True), ("Olga Office", False)):
        page = text_of(browser.post("/accounts", name=name, role="viewer").text)
        assert (f"{name} is easily taken for" in page) is warned, name
        assert "Olga Officer" in page


def test_a_proof_is_for_one_browser(serving: Serving) -> None:
    one, other = serving.signed_in("administrator"), serving.signed_in("administrator")
    serving.clock.seconds += PROVEN_SECONDS
    assert prove(one, "administrator") == 303
    assert other.post("/accounts", name="z", role="viewer").headers["location"].startswith("/account/prove")


def test_it_proves_only_who_is_signed_in(serving: Serving) -> None:
    """Another account's password and code prove nothing, nor does a role that may not manage accounts get further by one."""
    browser = serving.signed_in("administrator")
    serving.clock.seconds += PROVEN_SECONDS
    assert prove(browser, "engineer", account="engineer", username="engineer") == 422
    engineer = serving.signed_in("engineer")
    assert prove(engineer, "engineer") == 303
    assert engineer.post("/accounts", name="z", role="viewer").status_code == 403
    assert serving.browser().get("/account/prove").status_code == 303
    answer = engineer.post(
        "/account/prove",
        page="/account/prove",
        next="//evil.example/",
        password=PASSWORD,
        totp=serving.code("engineer"),
    )
    assert answer.headers["location"] == "/"


def test_guessing_is_held_back(serving: Serving) -> None:
    take(serving, serving.console.accounts.invite("Rae", Role.VIEWER, by=serving.console.accounts.all()[0]), "Rae")
    browser = serving.signed_in("Rae")
    guess = {"password": "a guess", "totp": "1"}
    told = [browser.post("/account/prove", page="/account/prove", **guess).status_code for _ in range(7)]
    assert told[0] == 422
    assert told[-1] == 429


@pytest.mark.parametrize("action", [Action.MANAGE_ACCOUNTS, Action.ACCEPT_POLICY, Action.DECIDE_REQUESTS])
def test_no_form_is_forgotten(serving: Serving, action: Action) -> None:
    """Of what an officer decides all that lets more in; a refusal needs no proof."""
    found = [
        (route.path, gate.proven)
        for route in serving.app.routes
        if isinstance(route, APIRoute) and route.methods != {"GET"}
        for gate in [one.dependency for one in route.dependencies]
        if isinstance(gate, Gate) and gate.action is action
    ]
    without = {path for path, proven in found if proven is None}
    assert len(found) == {Action.MANAGE_ACCOUNTS: 6, Action.ACCEPT_POLICY: 1, Action.DECIDE_REQUESTS: 2}[action]
    assert without == ({"/requests/{request}/refuse"} if action is Action.DECIDE_REQUESTS else set())
