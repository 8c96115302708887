"""The link that the terminal prints: once, from a page of this console, and impossible to guess."""

from __future__ import annotations

import re

from shared.web.accounts.links import OneTimeLink
from shared.web.roles import Role
from tests.simulations.console.conftest import Serving


def test_it_signs_in_a_researcher(serving: Serving) -> None:
    browser = serving.signed_in()
    page = browser.page("/account")
    assert "researcher" in page
    assert 'name="password"' not in page, "there is none"
    assert {account.role for account in serving.console.accounts.all()} == {Role.RESEARCHER}
    assert browser.get("/accounts").status_code == 403


def test_a_link_counts_once(serving: Serving) -> None:
    link = serving.links[-1]
    assert serving.browser().follow(link).status_code == 303
    assert serving.links[-1] != link, "the terminal shows another"
    late = serving.browser()
    answer = late.follow(link)
    assert answer.status_code == 401
    assert "does not count, or not any more" in answer.text
    assert late.get("/runs").status_code == 303
    assert late.follow(serving.links[-1]).status_code == 303
    assert late.get("/runs").status_code == 200


def test_a_guess_is_refused(serving: Serving) -> None:
    browser, link = serving.browser(), serving.links[-1]
    for guess in ("", "link/", link[:-1], link + "A", "link/" + "A" * 43, "é" * 43, "../" + link[:-2]):
        answer = browser.follow("link/x")
        token = re.search(r'name="csrf_token" value="([0-9a-f]{64})"', answer.text)
        assert token
        sent = {"csrf_token": token[1], "code": guess}
        answer = browser.http.post("/link", data=sent, headers={"origin": serving.address})
        assert answer.status_code == 401, guess
    assert browser.get("/runs").status_code == 303
    assert serving.links[-1] == link, "no guess uses it up"


def test_every_link_is_of_256_bits() -> None:
    said: list[str] = []
    link = OneTimeLink(said.append)
    assert not link.use(""), "none counts before there is one"
    for _ in range(50):
        link.begin()
    assert len({*said}) == 50
    assert all(re.fullmatch(r"link/[\w-]{43}", one) for one in said)


def test_looking_at_a_link_does_not_use_it(serving: Serving) -> None:
    link = serving.links[-1]
    for _ in range(3):
        assert serving.browser().get(f"/{link}").status_code == 200
    assert serving.browser().get("/link/wrong").status_code == 200, "and does not tell whether it is one"
    assert serving.links[-1] == link


def test_another_origin_cannot_use_it(serving: Serving) -> None:
    link, browser = serving.links[-1], serving.browser()
    for headers in (
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"origin": serving.address.rpartition(":")[0]},
    ):
        assert browser.follow(link, **headers).status_code == 403, headers
    assert browser.http.post("/link", data={"code": link}, headers={"origin": serving.address}).status_code == 403
    assert serving.links[-1] == link


def test_it_may_be_pasted(serving: Serving) -> None:
    browser = serving.browser()
    token = re.search(r'name="csrf_token" value="([0-9a-f]{64})"', browser.page("/sign-in"))
    assert token
    whole = f" {serving.address}/{serving.links[-1]} "
    answer = browser.http.post(
        "/link", data={"csrf_token": token[1], "code": whole}, headers={"origin": serving.address}
    )
    assert answer.status_code == 303


def test_a_password_opens_nothing(serving: Serving) -> None:
    browser = serving.browser()
    assert 'name="password"' not in browser.page("/sign-in")
    token = re.search(r'name="csrf_token" value="([0-9a-f]{64})"', browser.page("/sign-in"))
    assert token
    sent = {"csrf_token": token[1], "name": "researcher", "password": "", "code": ""}
    assert browser.http.post("/sign-in", data=sent, headers={"origin": serving.address}).status_code == 401
