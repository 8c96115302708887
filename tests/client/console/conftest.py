"""A site's console that answers over real HTTP, and browsers without a screen."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pyotp
import pytest
import uvicorn
from argon2 import PasswordHasher

from client.console.start import ROUTES, open_console
from client.site.home import SiteHome
from shared.http.serving import Place, listen, make_server, place_at
from shared.web.accounts import passwords
from shared.web.application import make_application
from shared.web.console import Console
from shared.web.roles import Role
from tests.client.console.homes import ask, charge, make_home, say

PASSWORD = "a long sentence of mine"  # noqa: S105
ROLES = list(Role)


@dataclass
class Clock:
    """Whole seconds that go on when a test says so; they begin at the real ones."""

    seconds: int

    def __call__(self) -> int:
        return self.seconds


@dataclass
class Serving:
    """A console that is served.

    Attributes:
        secrets: of the authenticators of the accounts, by name; there is one account for each role, named as it.
    """

    home: SiteHome
    console: Console
    app: Any
    address: str
    clock: Clock
    secrets: dict[str, str] = field(default_factory=dict)

    def browser(self, **options: Any) -> Browser:
        """Return a browser that holds nothing yet."""
        return Browser(self, httpx.Client(base_url=self.address, timeout=20, **options))

    def code(self, name: str) -> str:
        """Return an authenticator's next code."""
        self.clock.seconds += 60
        return pyotp.TOTP(self.secrets[name]).at(self.clock.seconds)

    def signed_in(self, name: str) -> Browser:
        """Return a browser in which an account is signed in."""
        browser = self.browser()
        answer = browser.sign_in(name, PASSWORD, self.code(name))
        assert answer.status_code == 303, answer.text
        return browser


@dataclass
class Browser:
    """Sends forms as a browser does: with the token of the page and its origin."""

    serving: Serving
    http: httpx.Client

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.http.get(path, **options)

    def token(self, path: str = "/sign-in") -> str:
        """Return the token that forms of a page hold."""
        page = self.get(path, follow_redirects=True)
        found = re.search(r'name="csrf_token" value="([0-9a-f]{64})"', page.text)
        assert found, page.text
        return found[1]

    def post(
        self, path: str, *, page: str | None = None, headers: dict[str, str] | None = None, **data: str
    ) -> httpx.Response:
        token = data.pop("csrf_token", None) or self.token(page or "/account")
        sent = {"origin": self.serving.address} | (headers or {})
        return self.http.post(path, data={"csrf_token": token, **data}, headers=sent)

    def sign_in(self, name: str, password: str, code: str, **more: str) -> httpx.Response:
        return self.post("/sign-in", page="/sign-in", name=name, password=password, code=code, **more)


@pytest.fixture(scope="module", autouse=True)
def _cheap_hashes() -> Iterator[None]:
    """What a hash costs is tested in tests/shared/web; here it would only take time."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(passwords, "_HASHER", PasswordHasher(time_cost=1, memory_cost=64, parallelism=1))
        yield


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Serving]]:
    """Return a function that serves the console of a home, with an account for each role."""
    ends: list[Callable[[], None]] = []

    def begin(home: SiteHome, place: Place | None = None, **options: Any) -> Serving:
        place = place or place_at("127.0.0.1", 0, None, None)
        listener = listen(place)
        port = listener.getsockname()[1]
        clock = Clock(1_800_000_000)
        console = open_console(home, place=place, port=port, passphrase=None, now=clock, **options)
        guarded, app = make_application(console, ROUTES)
        server = make_server(guarded, place)
        thread = threading.Thread(target=_run, args=(server, listener), daemon=True)
        thread.start()

        def end() -> None:
            server.should_exit = True
            thread.join(20)
            console.accounts.database.close()

        ends.append(end)
        serving = Serving(home, console, app, f"http://127.0.0.1:{port}", clock)
        make_accounts(serving)
        return serving

    yield begin
    for end in ends:
        end()


@pytest.fixture(scope="module")
def serving(serve: Callable[..., Serving], tmp_path_factory: pytest.TempPathFactory) -> Serving:
    """The console of a site with a past."""
    home = make_home(tmp_path_factory.mktemp("site"))
    charge(home)
    say(home)
    ask(home)
    return serve(home)


def _run(server: uvicorn.Server, listener: Any) -> None:
    server.run(sockets=[listener])


def make_accounts(serving: Serving) -> None:
    accounts = serving.console.accounts
    first = accounts.invite_first()
    assert first is not None
    administrator = take(serving, first, Role.ADMINISTRATOR.value)
    for role in ROLES:
        if role is not Role.ADMINISTRATOR:
            take(serving, accounts.invite(role.value, role, by=administrator), role.value)


def take(serving: Serving, code: str, name: str) -> Any:
    """Take an invitation: the account then signs in by `Serving.signed_in`."""
    accounts = serving.console.accounts
    secret = accounts.invitation(code, address="a").secret
    serving.secrets[name] = secret
    totp = pyotp.TOTP(secret).at(serving.clock.seconds)
    return accounts.take(code, name=name, password=PASSWORD, totp=totp, address="a")


def text_of(page: str) -> str:
    """Return the words of a page."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))


def files_of(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, but for what the console itself keeps."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "console" not in path.parts
    }
