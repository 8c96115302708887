"""One request to a console, and the gate that every route has: who asks, whether they may, whether they meant to.

Formal guarantees (tests: tests/shared/web/test_roles.py, tests/client/console/test_attacks.py)
    * A route without a declared action cannot be made by `Routes`, and an application with one from elsewhere does not start
      (test_no_route_is_without_an_action).
    * A request that changes something is refused unless the browser says that a page of this console sent it (Origin) and it
      has the token of this session (test_a_foreign_page_changes_nothing, test_a_request_without_its_token_changes_nothing).
    * What manages accounts, lets a job in or puts a policy into force needs password and code within the last five minutes, in
      this session, of whoever signs in elsewhere a sign-in there for this purpose (tests/client/console/test_proving.py,
      tests/client/console/test_oidc.py).
    * The role counts that the account has now, not the one at sign-in (test_a_role_counts_at_once).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Depends
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from shared.web.accounts.accounts import Account
from shared.web.accounts.sessions import Session
from shared.web.console import Console
from shared.web.languages import LANGUAGES, Texts, chosen
from shared.web.roles import Action, allowed

if TYPE_CHECKING:
    from shared.web.pages import Pages

_SAFE = ("GET", "HEAD")
_PREFERRED_SECONDS = 365 * 86_400
MOST_PLACE = 2_000
"""Characters of an address to come back to, with what was typed; sealed, it fits into a cookie while a provider is asked."""
NOT_DONE = "not-done"
"""Of the address of a page to which somebody comes back after proving who they are: what they had asked for was not done."""
THEMES = ("auto", "light", "dark")


class Denied(Exception):
    """A request is not answered as it was meant.

    Attributes:
        status: of HTTP.
        key: of the message in `texts/`, section `errors`.
    """

    def __init__(self, status: int, key: str) -> None:
        super().__init__(key)
        self.status, self.key = status, key


class NotSignedIn(Exception):
    """Whoever asks has to sign in first."""


class SessionEnded(Exception):
    """A form was sent by a page of a session that is over; nothing of it was done.

    Attributes:
        typed: what its person wrote, to be copied.
    """

    def __init__(self, typed: tuple[str, ...]) -> None:
        super().__init__("ended")
        self.typed = typed


class NotProven(Exception):
    """Whoever asks may do it, and has to prove first that they still are who signed in.

    Attributes:
        place: the page to come back to.
    """

    def __init__(self, place: str) -> None:
        super().__init__(place)
        self.place = place


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request that the gate let in.

    Attributes:
        request: as it came.
        console: that was asked.
        session, account: of whoever signed in; None before.
        texts: in their language.
        theme: "auto", "light" or "dark".
        visit: what the browser holds: the session's secret, or before sign-in a random number.
    """

    request: Request
    console: Console
    session: Session | None
    account: Account | None
    texts: Texts
    theme: str
    visit: str

    @property
    def address(self) -> str:
        """Where the request comes from."""
        return self.request.client.host if self.request.client else "unknown"

    @property
    def token(self) -> str:
        """What a form of this visit must hold; only who knows the cookie can compute it."""
        return token_of(self.visit)

    @property
    def held(self) -> str:
        """The secret of a session that the browser holds, whether or not it goes on; "" if it holds none."""
        return self.request.cookies.get(self.console.cookie("session"), "")

    @property
    def is_back(self) -> bool:
        """Whether somebody comes back from proving who they are, to do what was not done (`NOT_DONE`)."""
        return NOT_DONE in self.request.query_params

    @property
    def device(self) -> str:
        """The cookie by which this browser may be known; "" if it holds none."""
        return self.request.cookies.get(self.console.cookie("device"), "")

    @property
    def is_fragment(self) -> bool:
        """Whether htmx asks, for a part of a page."""
        return self.request.headers.get("hx-request") == "true"

    @property
    def is_proven(self) -> bool:
        """Whether the person proved to be the account's within the last minutes."""
        return self.session is not None and self.console.sessions.is_proven(self.session)

    def me(self) -> Account:
        """Return the account of whoever signed in, which the gate saw to."""
        if self.account is None:
            raise NotSignedIn
        return self.account

    def page(self, template: str, *, status: int = 200, **values: Any) -> Response:
        """Return a page; a browser that holds nothing yet gets the number that its forms need."""
        pages: Pages = self.request.app.state.pages
        answer = HTMLResponse(pages.render(template, self, **values), status)
        if self.account is None and self.request.cookies.get(self.console.cookie("visit")) != self.visit:
            self.keep(answer, "visit", self.visit)
        return answer

    def to(self, path: str) -> Response:
        """Return what leads the browser to another page of this console, after something was done."""
        if self.is_fragment:
            return Response(status_code=204, headers={"HX-Redirect": path})
        return RedirectResponse(path, 303)

    def preferring(self, language: str, theme: str) -> Asked:
        """Return the same request, of somebody who prefers another language or theme."""
        texts: Mapping[str, Texts] = self.request.app.state.texts
        return replace(self, texts=texts.get(language, self.texts), theme=theme if theme in THEMES else self.theme)

    def prefer(self, answer: Response, language: str, theme: str) -> Response:
        """Let the browser hold language and theme, where they are ones; return the answer."""
        if language in LANGUAGES:
            self.keep(answer, "language", language, preferred=True)
        if theme in THEMES:
            self.keep(answer, "theme", theme, preferred=True)
        return answer

    def keep(self, answer: Response, name: str, value: str, *, preferred: bool = False) -> None:
        """Let the browser hold a value: until it is closed, or a year for what somebody prefers."""
        answer.set_cookie(
            self.console.cookie(name),
            value,
            max_age=_PREFERRED_SECONDS if preferred else None,
            path="/",
            secure=self.console.secure,
            httponly=True,
            samesite="strict",
        )

    def forget(self, answer: Response, name: str) -> None:
        """Let the browser forget a value."""
        answer.delete_cookie(
            self.console.cookie(name), path="/", secure=self.console.secure, httponly=True, samesite="strict"
        )

    def begin_session(self, answer: Response, account: Account, *, proven: int | None = None) -> None:
        """Sign in: a new session takes the place of whatever the browser held; `proven` as of `Sessions.begin`."""
        if held := self.request.cookies.get(self.console.cookie("session")):
            self.console.sessions.end(held)
        browser = self.request.headers.get("user-agent", "")
        secret = self.console.sessions.begin(account.id, address=self.address, browser=browser, proven=proven)
        self.keep(answer, "session", secret)
        if not account.elsewhere:
            self.keep(answer, "device", self.console.accounts.known(account, self.device), preferred=True)
        self.forget(answer, "visit")


class Gate:
    """Lets in who may do `action`; the dependency of every route.

    Args:
        proven: only within minutes after password and code were given; the path of the page to come back to after that.
        carried: fields of the form that this page can begin with; its address is then in the browser's history.
        written: fields of the form that people write much into; if their session is over by then, they are given it back.
    """

    def __init__(
        self,
        action: Action,
        *,
        proven: str | None = None,
        carried: tuple[str, ...] = (),
        written: tuple[str, ...] = (),
    ) -> None:
        self.action, self.proven, self.carried, self.written = action, proven, carried, written

    async def __call__(self, request: Request) -> None:
        """Judge a request.

        Raises:
            NotSignedIn: it needs an account.
            Denied: the account's role does not allow it, or a page of this console did not send it.
            SessionEnded: a page did, of a session of this browser that is over.
            NotProven: it is too long ago that its person proved to be the account's.
        """
        asked = await run_in_threadpool(asked_by, request)
        if request.method not in _SAFE:
            _check_origin(request)
            form = await request.form(max_files=0, max_fields=100)
            given = request.headers.get("x-csrf-token") or form.get("csrf_token")
            if not _is_token(given, asked.visit):
                if asked.account is None and _is_token(given, asked.held):
                    raise SessionEnded(tuple(_fields(form, self.written).values()))
                raise Denied(403, "stale")
        if not allowed(asked.account.role if asked.account else None, self.action):
            if asked.account is None:
                raise NotSignedIn
            raise Denied(403, "forbidden")
        if self.proven is not None and not asked.is_proven:
            raise NotProven(await self._place(request, self.proven))
        request.state.asked = asked

    async def _place(self, request: Request, path: str) -> str:
        form = await request.form(max_files=0, max_fields=100) if request.method not in _SAFE else {}
        place, _, part = path.format(**request.path_params).partition("#")
        typed = _fields(form, self.carried) | {NOT_DONE: "yes"}
        return address_of(place, part, **typed)


class Routes(APIRouter):
    """Routes of which each declares what it does."""

    def page(
        self,
        path: str,
        action: Action,
        *,
        method: str = "GET",
        proven: str | None = None,
        carried: tuple[str, ...] = (),
        written: tuple[str, ...] = (),
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Return a decorator that makes a function the answer to `method` at `path` for those who may do `action`; see `Gate`."""
        return self.api_route(
            path,
            methods=[method],
            dependencies=[Depends(Gate(action, proven=proven, carried=carried, written=written))],
            response_class=HTMLResponse,
            response_model=None,
            tags=[action.value],
        )


async def _let_in(request: Request) -> Asked:
    asked: Asked = request.state.asked
    return asked


Here = Annotated[Asked, Depends(_let_in)]
"""What a route's function gets."""


def asked_by(request: Request) -> Asked:
    """Return a request with whoever sent it, judged by nothing yet."""
    console: Console = request.app.state.console
    texts: Mapping[str, Texts] = request.app.state.texts
    cookies = request.cookies
    secret = cookies.get(console.cookie("session"), "")
    session = console.sessions.find(secret, noted=not _by_itself(request)) if secret else None
    account = console.accounts.find(session.account) if session else None
    theme = cookies.get(console.cookie("theme"), "auto")
    language = chosen(cookies.get(console.cookie("language")), request.headers.get("accept-language"))
    visit = cookies.get(console.cookie("visit"), "")
    return Asked(
        request=request,
        console=console,
        session=session if account else None,
        account=account,
        texts=texts[language],
        theme=theme if theme in THEMES else "auto",
        visit=secret if account else visit if len(visit) >= 40 else secrets.token_urlsafe(32),
    )


def token_of(visit: str) -> str:
    """Return the token against forged requests that belongs to what a browser holds."""
    return hmac.new(visit.encode(errors="replace"), b"silotune console form", hashlib.sha256).hexdigest()


def _is_token(given: object, visit: str) -> bool:
    return isinstance(given, str) and hmac.compare_digest(given.encode(), token_of(visit).encode())


def _fields(form: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, str]:
    """Return what was typed into some fields, those left empty not."""
    return {name: value for name in names if isinstance(value := form.get(name), str) and value}


def address_of(path: str, part: str = "", **typed: str) -> str:
    """Return the address of a page, or of a part of it, that begins with what was typed; without, if that is too much."""
    query = urlencode({name: value for name, value in typed.items() if value})
    whole = f"{path}?{query}" if query else path
    return (whole if len(whole) < MOST_PLACE - 100 else path) + (f"#{part}" if part else "")


def own_path(text: str | None) -> str:
    """Return a path of this console to go on with after sign-in; "/" for anything that could lead elsewhere."""
    if not text or len(text) > MOST_PLACE or not text.startswith("/") or text.startswith("//"):
        return "/"
    return text if all("!" <= c <= "~" and c not in '\\"<>^`{|}' for c in text) else "/"


def _by_itself(request: Request) -> bool:
    """Return whether a page that follows what happens asks, and no person."""
    return "x-live" in request.headers or request.headers.get("accept") == "text/event-stream"


def _check_origin(request: Request) -> None:
    """Raise `Denied` unless the browser says that a page of this console sent a request."""
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
    own = f"{request.url.scheme}://{request.headers.get('host', '')}"
    if origin is None and site is None:
        raise Denied(403, "elsewhere")
    if (origin is not None and origin.lower() != own.lower()) or site not in (None, "same-origin"):
        raise Denied(403, "elsewhere")
