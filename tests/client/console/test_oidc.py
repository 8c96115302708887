"""Signing in by an OpenID provider that runs beside the console: the way there and back, and every token that must not count."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
import tomli_w
from joserfc.jwk import KeySet

from shared.errors import ConfigError
from shared.trust.audit_log import read
from shared.web.accounts.sessions import PROVEN_SECONDS
from shared.web.oidc.provider import Provider
from shared.web.oidc.settings import OidcConfig, load_settings
from shared.web.roles import Role
from tests.client.console.conftest import Browser, Serving
from tests.client.console.homes import make_home
from tests.client.console.openid import CLIENT, SECRET, OpenId, provider

os.environ.setdefault("AUTHLIB_INSECURE_TRANSPORT", "1")  # of the provider's side: it speaks plain HTTP on loopback

OLGA = "Olga Nowak (07514449)"
"""Her name there, and digits of her subject: a name alone could look like another's."""


@pytest.fixture(scope="module")
def openid() -> Iterator[OpenId]:
    with provider() as running:
        yield running


@pytest.fixture(scope="module")
def serving(openid: OpenId, serve: Callable[..., Serving], tmp_path_factory: pytest.TempPathFactory) -> Serving:
    home = make_home(tmp_path_factory.mktemp("oidc"))
    folder = home.path / "console"
    folder.mkdir(mode=0o700)
    (folder / "client.secret").write_text(SECRET)
    (folder / "client.secret").chmod(0o600)
    oidc = {
        "issuer": openid.named,
        "client_id": CLIENT,
        "client_secret_file": "client.secret",
        "title": "the hospital",
        "roles": {"dpo": "officer", "it": "engineer", "admins": "administrator"},
    }
    (folder / "console.toml").write_text(tomli_w.dumps({"oidc": oidc}))
    serving = serve(home)
    serving.clock.seconds = int(time.time())  # tokens are of now
    openid.client.redirect_uris.append(f"{serving.address}/sign-in/elsewhere/back")
    return serving


@pytest.fixture(autouse=True)
def _somebody(openid: OpenId, serving: Serving) -> None:
    openid.user = {"sub": "7", "preferred_username": "Olga Nowak", "groups": ["staff", "dpo", "it"]}
    openid.more, openid.sign_by, openid.named = {}, "own", openid.address
    serving.clock.seconds = int(time.time())


def go(browser: Browser, openid: OpenId, **query: str) -> str:
    """Begin a sign-in and go through the provider; return the address that it leads back to."""
    begun = browser.get("/sign-in/elsewhere", params=query)
    assert begun.status_code == 303, begun.text
    there = httpx.get(begun.headers["location"])
    assert there.status_code == 302, there.text
    return str(there.headers["location"])


def test_somebody_with_a_group_comes_in(serving: Serving, openid: OpenId) -> None:
    browser = serving.browser()
    assert "Sign in with the hospital" in browser.get("/sign-in").text
    answer = browser.get(go(browser, openid, next="/releases"))
    assert (answer.status_code, 'content="0;url=/releases"' in answer.text) == (200, True)
    assert browser.get("/releases").status_code == 200
    assert "You sign in elsewhere" in browser.get("/account").text
    (account,) = [one for one in serving.console.accounts.all() if one.elsewhere]
    assert (account.name, account.role) == (OLGA, Role.OFFICER)
    told = [entry.details for entry in read(serving.home.audit) if entry.details.get("action") == "sign-in"][-1]
    assert (told["account"], told["action"], told["issuer"]) == (OLGA, "sign-in", openid.named)
    asked = openid.asked[-1]
    assert asked["code_challenge_method"] == "S256"
    assert len(asked["state"]) == len(asked["nonce"]) == 43
    # Another group, another role; it is the same account.
    openid.user["groups"] = "it"
    again = serving.browser()
    again.get(go(again, openid))
    assert [one.role for one in serving.console.accounts.all() if one.elsewhere] == [Role.ENGINEER]
    assert browser.get("/releases").status_code == 303, "the session of the other role ended"


@pytest.mark.parametrize("groups", [["staff"], [], None, "dpoo", {"dpo": 1}, 7])
def test_somebody_without_a_group_does_not(serving: Serving, openid: OpenId, groups: Any) -> None:
    openid.user |= {"sub": "8", "groups": groups}
    browser = serving.browser()
    answer = browser.get(go(browser, openid))
    assert (answer.status_code, "none of your groups" in answer.text) == (403, True)
    assert browser.get("/budget").status_code == 303


def test_a_name_that_another_account_has(serving: Serving, openid: OpenId) -> None:
    openid.user |= {"sub": "9", "preferred_username": "Viewer"}
    browser = serving.browser()
    assert browser.get(go(browser, openid)).status_code == 200
    assert "Viewer (43503287)" in browser.get("/account").text


def test_a_name_that_looks_like_another_ones(serving: Serving, openid: OpenId) -> None:
    openid.user |= {"sub": "11", "preferred_username": "V\u0456ewer"}
    browser = serving.browser()
    assert browser.get(go(browser, openid)).status_code == 200
    assert "account 11" in browser.get("/account").text


FAULTS: dict[str, dict[str, Any]] = {
    "another issuer": {"iss": "https://evil.example"},
    "another audience": {"aud": "another client"},
    "for several, handed to another": {"aud": [CLIENT, "another client"], "azp": "another client"},
    "expired": {"exp": int(time.time()) - 400},
    "of another sign-in": {"nonce": "another"},
    "without a nonce": {"nonce": None},
    "without a subject": {"sub": None},
}


@pytest.mark.parametrize("fault", [*FAULTS, "stranger", "none", "secret"])
def test_tokens_that_are_not_for_this_sign_in(serving: Serving, openid: OpenId, fault: str) -> None:
    if fault in FAULTS:
        openid.more = FAULTS[fault]
    else:
        openid.sign_by = fault
    before, browser = serving.console.accounts.all(), serving.browser()
    answer = browser.get(go(browser, openid))
    assert answer.status_code == 503
    assert "evil" not in answer.text
    assert browser.get("/budget").status_code == 303
    assert serving.console.accounts.all() == before


def test_an_answer_of_another_browser(serving: Serving, openid: OpenId) -> None:
    browser, victim = serving.browser(), serving.browser()
    back = go(browser, openid)
    assert "not begun in this browser" in victim.get(back).text
    go(victim, openid)  # has one of its own, for another state
    assert victim.get(back).status_code == 403
    state = parse_qs(urlsplit(back).query)["state"][0]
    assert browser.get(back.replace(state, "x" * 43)).status_code == 403
    serving.clock.seconds += 601
    assert browser.get(back).status_code == 403, "too late"


def test_a_code_counts_once(serving: Serving, openid: OpenId) -> None:
    browser = serving.browser()
    back, kept = go(browser, openid), dict(browser.http.cookies)
    assert browser.get(back).status_code == 200
    again = serving.browser(cookies=kept)
    assert again.get(back).status_code == 503


def test_a_provider_that_names_another(serving: Serving, openid: OpenId) -> None:
    serving.console.provider._kept = None  # type: ignore[union-attr]
    openid.named = "https://evil.example"
    answer = serving.browser().get("/sign-in/elsewhere")
    assert answer.status_code == 503
    openid.named = openid.address
    assert serving.browser().get("/sign-in/elsewhere").status_code == 503, "a failure is remembered"
    serving.clock.seconds += 31
    assert serving.browser().get("/sign-in/elsewhere").status_code == 303
    serving.console.provider._failed = None  # type: ignore[union-attr]


@pytest.fixture
def officer(serving: Serving, openid: OpenId) -> Browser:
    browser = serving.browser()
    assert browser.get(go(browser, openid)).status_code == 200
    return browser


@pytest.fixture
def silent(serving: Serving, officer: Browser, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A provider that takes connections and says nothing, in the place of the real one."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
        issuer = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = serving.console.provider.config.model_copy(update={"issuer": issuer})  # type: ignore[union-attr]
        real = serving.console.provider
        object.__setattr__(serving.console, "provider", Provider(config, secret=None, now=serving.clock))
        monkeypatch.setattr("shared.web.oidc.provider._SECONDS", 3.0)
        yield listener
        object.__setattr__(serving.console, "provider", real)


def test_a_silent_provider_shuts_nobody_out(serving: Serving, officer: Browser, silent: socket.socket) -> None:
    told = list[int]()
    guests = [
        threading.Thread(target=lambda: told.append(serving.browser().get("/sign-in/elsewhere").status_code))
        for _ in range(45)
    ]
    for guest in guests:
        guest.start()
    kept, _ = silent.accept()
    began = time.monotonic()
    assert officer.get("/account").status_code == 200
    assert time.monotonic() - began < 2.5, "threads are left for everybody else"
    for guest in guests:
        guest.join(20)
    assert told == [503] * 45
    assert serving.console.provider._failed is not None  # type: ignore[union-attr]
    kept.close()


def test_old_keys_count_while_new_ones_are_read(serving: Serving, silent: socket.socket) -> None:
    provider = serving.console.provider
    assert provider is not None
    told = {"authorization_endpoint": "https://id.example/there"}
    provider._kept = (serving.clock() - 4000, told, KeySet([]))
    reads = threading.Thread(target=lambda: serving.browser().get("/sign-in/elsewhere"))
    reads.start()
    kept, _ = silent.accept()
    assert serving.browser().get("/sign-in/elsewhere").headers["location"].startswith("https://id.example/there")
    kept.close()
    reads.join(20)


@pytest.fixture
def administrator(openid: OpenId) -> dict[str, str]:
    openid.user |= {"sub": "11", "preferred_username": "Ada", "groups": ["admins"]}
    return {"name": "somebody", "role": "viewer"}


def invites(browser: Browser, form: dict[str, str]) -> bool:
    """Return whether a browser may change accounts; whoever may not is led to the proof."""
    answer = browser.post("/accounts", page="/accounts", **form)
    assert answer.status_code in (200, 303, 422)
    return answer.status_code != 303


def test_being_known_elsewhere_proves_nothing(serving: Serving, openid: OpenId, administrator: dict[str, str]) -> None:
    """Whoever finds an open browser can sign in by a provider that still knows its person, and change no account."""
    browser = serving.browser()
    assert browser.get(go(browser, openid)).status_code == 200
    assert "max_age" not in openid.asked[-1]
    assert not invites(browser, administrator)
    assert 'href="/sign-in/elsewhere?prove=1&amp;next=/accounts"' in browser.get("/account/prove?next=/accounts").text
    now = serving.clock.seconds
    for at in (now - PROVEN_SECONDS, None, str(now), True, now + 3600):
        openid.more = {"auth_time": at}
        answer = browser.get(go(browser, openid, prove="1", next="/accounts"))
        assert (answer.status_code, "auth_time" in answer.text) == (403, True), at
        assert not invites(browser, administrator)
    openid.more = {"auth_time": now - PROVEN_SECONDS + 60}
    assert browser.get(go(browser, openid, prove="1", next="/accounts")).status_code == 200
    assert (openid.asked[-1]["max_age"], openid.asked[-1]["prompt"]) == ("0", "login")
    assert invites(browser, administrator)
    serving.clock.seconds += 60
    assert not invites(browser, administrator), "it counts from the sign-in there, not from the way back"


def test_a_disabled_account_stays_out(serving: Serving, openid: OpenId) -> None:
    openid.user |= {"sub": "10", "preferred_username": "Pia"}
    browser = serving.browser()
    assert browser.get(go(browser, openid)).status_code == 200
    accounts = serving.console.accounts
    administrator, pia = (
        next(one for one in accounts.all() if one.name.startswith(name)) for name in ("administrator", "Pia")
    )
    accounts.change(pia.id, by=administrator, disabled=True)
    assert browser.get("/budget").status_code == 303
    assert browser.get(go(browser, openid)).status_code == 403


def test_settings(tmp_path: Path) -> None:
    assert load_settings(tmp_path).oidc is None

    def written(**changes: Any) -> Any:
        oidc = {"issuer": "https://id.example", "client_id": "c", "roles": {"g": "viewer"}} | changes
        (tmp_path / "console.toml").write_text(tomli_w.dumps({"oidc": oidc}))
        return load_settings(tmp_path).oidc

    assert isinstance(written(), OidcConfig)
    for fault in ({"issuer": "http://id.example"}, {"roles": {"g": "king"}}, {"roles": {}}, {"isuer": "x"}):
        with pytest.raises(ConfigError):
            written(**fault)


def test_without_a_provider_there_is_no_way(serve: Callable[..., Serving], tmp_path: Path) -> None:
    browser = serve(make_home(tmp_path)).browser()
    assert browser.get("/sign-in/elsewhere").status_code == 404
    assert "Sign in with" not in browser.get("/sign-in").text
