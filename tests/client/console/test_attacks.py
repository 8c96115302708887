"""What an attacker would try against a site's console, over real HTTP."""

from __future__ import annotations

import itertools
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute

from client.console import policy_pages
from shared.errors import DataError
from shared.trust.audit_log import AuditLog, Event
from shared.trust.signing import load_signing_key
from shared.web.guarding import POLICY
from shared.web.roles import Role
from tests.client.console.conftest import PASSWORD, Browser, Serving
from tests.client.console.homes import charge, make_home

MARKS = "\"><script>alert(1)</script><img src=x onerror=alert(1)>'; DROP TABLE accounts; --"
SQL = ("' OR '1'='1'; --", '" OR ""="\\%', "a\x00b", "’" + "\U0001f600" * 10)
_COUNTER = itertools.count()


def forms(serving: Serving) -> list[tuple[str, str]]:
    """Return every route that changes something."""
    return sorted(
        {(next(iter(route.methods)), route.path) for route in serving.app.routes if "GET" not in route.methods}
    )


def with_ids(path: str, found: str = "0" * 32) -> str:
    return re.sub(r"\{\w+\}", found, path)


# --- forged requests ---


def test_there_are_forms(serving: Serving) -> None:
    assert len(forms(serving)) >= 14


def test_a_foreign_page_changes_nothing(serving: Serving) -> None:
    browser = serving.signed_in("administrator")
    token, before = browser.token("/account"), serving.console.accounts.all()
    own = serving.address
    foreign: list[dict[str, str]] = [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": own.replace("http:", "https:")},
        {"origin": own.rpartition(":")[0]},
        {"origin": f"{own}.evil.example"},
        {"origin": own, "sec-fetch-site": "cross-site"},
        {"origin": own, "sec-fetch-site": "same-site"},
        {},
    ]
    for method, path in forms(serving):
        for headers in foreign:
            answer = browser.http.request(method, with_ids(path), data={"csrf_token": token}, headers=headers)
            assert (answer.status_code, "Refused" in answer.text) == (403, True), (path, headers)
    assert serving.console.accounts.all() == before
    assert browser.get("/budget").status_code == 200, "still signed in"


def test_a_request_without_its_token_changes_nothing(serving: Serving) -> None:
    browser, other = serving.signed_in("administrator"), serving.signed_in("officer")
    for method, path in forms(serving):
        for token in ("", "0" * 64, other.token("/account"), "\u00e9" * 64):
            answer = browser.http.request(
                method, with_ids(path), data={"csrf_token": token}, headers={"origin": serving.address}
            )
            assert (answer.status_code, "out of date" in answer.text) == (403, True), (path, token)


def test_the_token_may_come_as_a_header(serving: Serving) -> None:
    browser = serving.signed_in("viewer")
    headers = {"x-csrf-token": browser.token("/account"), "origin": serving.address}
    assert browser.http.post("/preferences", data={"theme": "dark"}, headers=headers).status_code == 303
    assert 'data-theme="dark"' in browser.get("/account").text


# --- sessions ---


def test_a_session_that_was_planted_is_not_taken_over(serving: Serving) -> None:
    browser = serving.browser()
    planted = dict.fromkeys(("session", "visit"), "planted-by-somebody-else-and-long-enough-to-be-taken")
    for name, value in planted.items():
        browser.http.cookies.set(serving.console.cookie(name), value, domain="127.0.0.1")
    assert browser.sign_in("viewer", PASSWORD, serving.code("viewer")).status_code == 303
    held = browser.http.cookies.get(serving.console.cookie("session"), domain="127.0.0.1")
    assert held != planted["session"]
    thief = serving.browser()
    thief.http.cookies.set(serving.console.cookie("session"), planted["session"])
    assert thief.get("/budget").status_code == 303


def test_signing_in_again_ends_the_session_before(serving: Serving) -> None:
    browser = serving.signed_in("viewer")
    (before,) = [c.value for c in browser.http.cookies.jar if c.name == serving.console.cookie("session")]
    browser.sign_in("viewer", PASSWORD, serving.code("viewer"), csrf_token=browser.token("/account"))
    old = serving.browser()
    old.http.cookies.set(serving.console.cookie("session"), before or "")
    assert old.get("/budget").status_code == 303
    assert browser.get("/budget").status_code == 200


def test_cookies_are_out_of_reach(serving: Serving) -> None:
    browser = serving.browser()
    answer = browser.sign_in("viewer", PASSWORD, serving.code("viewer"))
    set_cookies = answer.headers.get_list("set-cookie")
    assert len(set_cookies) == 3, "session, device, and the visit that ends"
    for cookie in set_cookies:
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        assert "Path=/" in cookie
        assert "Domain" not in cookie


def test_signing_out_ends_it(serving: Serving) -> None:
    browser = serving.signed_in("viewer")
    held = dict(browser.http.cookies)
    assert browser.post("/sign-out").status_code == 303
    again = serving.browser(cookies=held)
    assert again.get("/budget").status_code == 303


@pytest.mark.parametrize(
    "place",
    [
        "https://evil.example/",
        "//evil.example",
        "/\\evil.example",
        "\\\\evil.example",
        "/\t/evil.example",
        "javascript:alert(1)",
        "/%0d%0aset-cookie:x=1",
        "/a\r\nset-cookie: x=1",
        "http:evil.example",
        "",
    ],
)
def test_sign_in_leads_nowhere_else(serving: Serving, place: str) -> None:
    browser = serving.browser()
    shown = browser.get("/sign-in", params={"next": place})
    assert (
        "evil" not in re.sub(r"action=\"[^\"]*\"", "", shown.text) or 'value="/' not in shown.text.split("evil")[0][-8:]
    )
    answer = browser.sign_in("viewer", PASSWORD, serving.code("viewer"), next=place)
    assert answer.status_code == 303
    assert answer.headers["location"] in ("/", "/%0d%0aset-cookie:x=1")
    assert "x" not in {cookie.name for cookie in browser.http.cookies.jar}


def test_sign_in_leads_back_to_the_page_that_was_asked(serving: Serving) -> None:
    browser = serving.browser()
    answer = browser.get("/health")
    assert (answer.status_code, answer.headers["location"]) == (303, "/sign-in?next=/health")
    fragment = browser.get("/health", headers={"hx-request": "true"})
    assert (fragment.status_code, fragment.headers["hx-redirect"]) == (401, "/sign-in")


# --- signing in ---


def test_a_code_of_an_authenticator_cannot_be_sent_twice(serving: Serving) -> None:
    code = serving.code("officer")
    assert serving.browser().sign_in("officer", PASSWORD, code).status_code == 303
    assert serving.browser().sign_in("officer", PASSWORD, code).status_code == 401


def test_answers_do_not_tell_who_has_an_account(serve: Callable[..., Serving], tmp_path: Path) -> None:
    serving = serve(make_home(tmp_path))
    told = {}
    for name in ("viewer", "nobody"):
        browser = serving.browser()
        answers = [browser.sign_in(name, "not the right one", "123456") for _ in range(7)]
        told[name] = [
            (answer.status_code, re.sub(r"[0-9a-f]{64}", "", answer.text).replace(name, "NAME")) for answer in answers
        ]
    assert told["viewer"] == told["nobody"]
    assert [status for status, _ in told["viewer"]] == [401] * 5 + [429] * 2
    assert "retry-after" in answers[-1].headers
    # Held back, the right password does not help either, and the audit log tells of it.
    assert serving.browser().sign_in("viewer", PASSWORD, serving.code("viewer")).status_code == 303, "a minute later"
    text = "".join(path.read_text() for path in serving.home.audit.glob("*.jsonl"))
    assert text.count('"action":"sign-in.blocked"') == 2
    assert "nobody" not in text


# --- what pages may do ---


def test_every_answer_has_the_headers(serving: Serving) -> None:
    browser = serving.signed_in("officer")
    answers = [
        browser.get(path)
        for path in ("/budget", "/", "/nothing", "/accounts", "/static/console.css", "/static/nothing", "/releases/log")
    ]
    answers.append(browser.http.post("/sign-out", headers={"origin": "null"}))
    answers.append(httpx.get(serving.address, headers={"host": "evil.example"}))
    assert [answer.status_code for answer in answers] == [200, 303, 404, 403, 200, 404, 200, 403, 421]
    for answer in answers:
        assert answer.headers["content-security-policy"] == POLICY
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "same-origin"
        assert answer.headers["cross-origin-opener-policy"] == "same-origin"
        assert "permissions-policy" in answer.headers
        assert "server" not in answer.headers
        kept = "immutable" in answer.headers["cache-control"]
        assert kept == (answer.request.url.path == "/static/console.css" and answer.status_code == 200)
        assert kept or answer.headers["cache-control"] == "no-store"
    assert "frame-ancestors 'none'" in POLICY
    assert "unsafe" not in POLICY
    assert "http" not in POLICY


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1", ""])
def test_another_host_is_refused(serving: Serving, host: str) -> None:
    assert httpx.get(f"{serving.address}/sign-in", headers={"host": host}).status_code in (400, 421)


def test_own_hosts_are_answered(serving: Serving) -> None:
    port = serving.address.rpartition(":")[2]
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "LOCALHOST"):
        assert httpx.get(f"{serving.address}/sign-in", headers={"host": host}).status_code == 200


def test_two_hosts_are_none(serving: Serving) -> None:
    address, port = serving.address.removeprefix("http://").split(":")
    with socket.create_connection((address, int(port)), 10) as connection:
        connection.sendall(
            b"GET /sign-in HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
        )
        assert connection.recv(4096).split(b" ")[1] in (b"400", b"421")


def test_a_large_request_is_refused(serving: Serving) -> None:
    browser = serving.signed_in("viewer")
    assert browser.post("/preferences", theme="x" * 70_000).status_code == 413

    def chunks() -> Any:
        for _ in range(20):
            yield b"x" * 8192

    answer = browser.http.post(
        "/preferences",
        content=chunks(),
        headers={"origin": serving.address, "content-type": "application/x-www-form-urlencoded"},
    )
    assert answer.status_code == 413


def test_no_page_has_anything_inline_or_from_elsewhere(serving: Serving) -> None:
    browsers = [serving.browser(), serving.signed_in("administrator"), serving.signed_in("officer")]
    paths = (
        "/sign-in",
        "/welcome",
        "/requests",
        "/budget",
        "/releases",
        "/releases/log",
        "/policy",
        "/health",
        "/accounts",
        "/account",
        *(
            f"/requests/{one.request.id}{end}"
            for one in serving.console.content.requests.all()
            for end in ("", "/facts")
        ),
    )
    for browser, path in itertools.product(browsers, paths):
        page = browser.get(path).text
        assert not re.search(r"<style|\sstyle=|<script(?![^>]*\ssrc=\"/static/)|\son\w+=|javascript:", page), path
        links = re.findall(r"(?:src|href|action|hx-get|data-chart)=\"([^\"]*)\"", page)
        assert all(link.startswith(("/", "#")) and not link.startswith("//") for link in links), links


# --- texts that a stranger chose ---


@pytest.fixture(scope="module")
def planted(serve: Callable[..., Serving], tmp_path_factory: pytest.TempPathFactory) -> Serving:
    """A site whose jobs, log and policy hold texts of an attacker."""
    home = make_home(tmp_path_factory.mktemp("planted"))
    charge(home, jobs=[MARKS], rounds=3)
    log = AuditLog(home.audit, seal_head=load_signing_key(home.log_key, None))
    log.append(Event.REQUEST_REFUSED, job=MARKS, round=0, code=MARKS, reason=MARKS)
    log.append(Event.RELEASE_STORED, job=MARKS, round=1, sha256=MARKS, bytes=1, epsilon_spent=0.5)
    home.policy.write_text(
        home.policy.read_text() + f"\n# {MARKS}\n[evil]\n'''{MARKS.replace(chr(39), '')}''' = 1\n".replace("'''", "'")
    )
    home.status.write_text('{"pid": 1, "state": "<script>alert(1)</script>", "updated": "<script>"}')
    serving = serve(home)
    administrator = next(one for one in serving.console.accounts.all() if one.role is Role.ADMINISTRATOR)
    serving.console.accounts.invite(MARKS[:60], Role.VIEWER, by=administrator)
    return serving


def test_marks_in_names_are_shown_and_do_nothing(planted: Serving) -> None:
    officer, administrator = planted.signed_in("officer"), planted.signed_in("administrator")
    account = planted.console.content.budgets.all()[0].id
    asked = [
        (officer, "/budget"),
        (officer, f"/budget/{account}/jobs"),
        (officer, "/releases"),
        (officer, "/releases/log"),
        (officer, "/policy"),
        (officer, "/health"),
        (administrator, "/accounts"),
    ]
    shown = ""
    for browser, path in asked:
        page = browser.get(path)
        assert page.status_code == 200, path
        assert "<script>alert" not in page.text
        assert "<img" not in page.text
        shown += page.text
    assert shown.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 6
    for path in ("/releases", "/releases/log"):
        page = officer.get(path, params={"q": MARKS, "event": MARKS})
        assert "<script>alert" not in page.text


def test_marks_that_somebody_types_do_nothing(serving: Serving) -> None:
    browser = serving.browser()
    page = browser.sign_in(MARKS, MARKS, MARKS[:40])
    assert "<script>alert" not in page.text
    assert "&lt;script&gt;" in page.text
    page = browser.post("/welcome", page="/welcome", code=MARKS[:40])
    assert "<script>alert" not in page.text


# --- ids, paths, queries ---


def test_ids_of_nothing_all_look_alike(serving: Serving) -> None:
    """What is there and may not be seen, and what is not there, give one answer each."""
    administrator, viewer = serving.signed_in("administrator"), serving.signed_in("viewer")
    account = serving.console.accounts.all()[0].id
    ids = ("0" * 32, "..", "%2e%2e%2f", "%00", "' OR 1=1 --", "a" * 63, "\u2603")
    for path in (
        "/accounts/{}/role",
        "/accounts/{}/disable",
        "/accounts/{}/reset",
        "/accounts/{}/enable",
        "/accounts/{}/end-sessions",
    ):
        told = {administrator.post(path.format(one), role="viewer").status_code for one in ids}
        assert told == {404}, path
        told = {viewer.post(path.format(one), role="viewer").status_code for one in (account, "0" * 32)}
        assert told == {403}, path
    pages_of = {
        re.sub(r"[0-9a-f]{64}|value=\"/[^\"]*\"", "", viewer.get(f"/budget/{one}/jobs").text)
        for one in ids
        if one.isprintable() and not one.startswith((".", "%2e"))
    }
    assert len(pages_of) == 1
    for one in ids:
        assert viewer.get(f"/budget/{one}/line.json").status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "/static/../console/content.py",
        "/static/..%2f..%2faccounts.py",
        "/static/%2e%2e/%2e%2e/etc/passwd",
        "/static//etc/passwd",
        "/static/....//console.css",
        "/static/console.css%00.js",
        "/releases/export./etc/passwd",
        "/releases/export.py",
    ],
)
def test_paths_lead_to_no_file(serving: Serving, path: str) -> None:
    address, port = serving.address.removeprefix("http://").split(":")
    browser = serving.signed_in("officer")
    cookies = "; ".join(f"{cookie.name}={cookie.value}" for cookie in browser.http.cookies.jar)
    with socket.create_connection((address, int(port)), 10) as connection:
        head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nCookie: {cookies}\r\nConnection: close\r\n\r\n"
        connection.sendall(head.encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.split(b" ")[1] == b"404"
    assert b"root:" not in answer
    assert b"import" not in answer


def test_sql_in_every_field_is_text(serving: Serving) -> None:
    browser, before = serving.signed_in("administrator"), serving.console.accounts.all()
    token = browser.token("/account")
    for route in serving.app.routes:
        assert isinstance(route, APIRoute)
        names = [field.alias for field in (*route.dependant.query_params, *route.dependant.body_params)]
        if route.path in ("/sign-in", "/welcome", "/welcome/take", "/sign-out", "/account/sign-out-everywhere"):
            continue  # attempts are counted; see the test of signing in
        for value in SQL:
            given = dict.fromkeys(names, value[:20])
            if "GET" in route.methods:
                answer = browser.get(with_ids(route.path, "x"), params=given)
            else:
                answer = browser.post(with_ids(route.path, "x"), **(given | {"csrf_token": token}))
            assert answer.status_code < 500 or answer.status_code == 503, (route.path, value, answer.text)
            assert answer.status_code != 503, (route.path, value, answer.text)
    names_after = {one.name for one in serving.console.accounts.all()}
    assert {one.name for one in before} <= names_after


def test_sql_at_the_door_is_text(serve: Callable[..., Serving], tmp_path: Path) -> None:
    serving = serve(make_home(tmp_path))
    for value in SQL:
        answer = serving.browser().sign_in(value, value, value[:20])
        assert answer.status_code in (401, 429)
        answer = serving.browser().post("/welcome", page="/welcome", code=value[:20])
        assert answer.status_code in (404, 429)


# --- defects ---


def test_a_defect_shows_no_trace(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: object) -> None:
        raise ZeroDivisionError("the record of Mrs Haddad")

    monkeypatch.setattr(policy_pages, "policy_text", fail)
    answer = serving.signed_in("officer").get("/policy")
    assert answer.status_code == 500
    assert "Haddad" not in answer.text
    assert "ZeroDivision" not in answer.text
    assert "Traceback" not in answer.text
    (number,) = re.findall(r"<code>([0-9a-f]{8})</code>", answer.text)
    assert f"defect {number} at GET /policy: ZeroDivisionError" in caplog.text
    assert "Haddad" not in caplog.text


def test_what_a_person_can_mend_is_told_to_them_alone(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise DataError("the disk is full; make room.")

    browser, guest = serving.signed_in("officer"), serving.browser()
    token = guest.token("/sign-in")
    monkeypatch.setattr(policy_pages, "policy_text", fail)
    answer = browser.get("/policy")
    assert (answer.status_code, "the disk is full; make room." in answer.text) == (503, True)
    monkeypatch.setattr(type(serving.console.accounts), "sign_in", fail)
    answer = guest.post("/sign-in", name="a", csrf_token=token)
    assert (answer.status_code, "the disk is full" in answer.text) == (503, False)


def test_a_role_counts_at_once(serving: Serving) -> None:
    accounts = serving.console.accounts
    administrator = next(one for one in accounts.all() if one.role is Role.ADMINISTRATOR)
    engineer = next(one for one in accounts.all() if one.name == "engineer")
    browser: Browser = serving.signed_in("engineer")
    assert browser.get("/policy").status_code == 200
    accounts.change(engineer.id, by=administrator, role=Role.VIEWER)
    assert browser.get("/policy").status_code == 303, "its session ended"
    browser = serving.signed_in("engineer")
    assert browser.get("/policy").status_code == 403
    accounts.change(engineer.id, by=administrator, role=Role.ENGINEER)


def test_other_methods_are_told_to_be_wrong(serving: Serving) -> None:
    browser = serving.signed_in("officer")
    for method, path, allowed in (
        ("PUT", "/requests", "GET"),
        ("DELETE", "/requests", "GET"),
        ("HEAD", "/requests", "GET"),
        ("PATCH", "/policy/edit", "GET, POST"),
        ("GET", "/sign-out", "POST"),
    ):
        answer = browser.http.request(method, path)
        assert (answer.status_code, answer.headers["allow"]) == (405, allowed), (method, path)
        assert answer.headers["content-security-policy"] == POLICY
    assert browser.http.request("PUT", "/nothing").status_code == 404


def test_a_browser_that_signed_in_before_is_not_kept_out(serving: Serving) -> None:
    browser = serving.signed_in("engineer")
    name = serving.console.cookie("device")
    answer = browser.sign_in("engineer", PASSWORD, serving.code("engineer"))
    (kept,) = [one for one in answer.headers.get_list("set-cookie") if one.startswith(f"{name}=")]
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= {part.strip() for part in kept.split(";")}
    stranger, code = serving.browser(), serving.code("engineer")
    told = [stranger.sign_in("engineer", "a guess", "000000").status_code for _ in range(7)]
    assert told[-1] == 429
    assert stranger.sign_in("engineer", PASSWORD, code).status_code == 429
    known = serving.browser(cookies={name: browser.http.cookies[name]})
    assert known.sign_in("engineer", PASSWORD, code).status_code == 303
