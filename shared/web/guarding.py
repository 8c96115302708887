"""What stands before every page: whose name the browser called, how much it sends, and what its answer may do.

Formal guarantees (tests: tests/shared/web/test_guarding.py, tests/client/console/test_attacks.py)
    * Only requests for a name of this console are answered, so that no stranger's name that leads here can be used to read
      pages (DNS rebinding; test_another_host_is_refused).
    * Every answer, errors too, forbids scripts and styles that are not files of the console, frames, sniffing and referrers
      (test_every_answer_has_the_headers). An answer may ask for one other policy, `SANDBOXED`, and for nothing else
      (test_an_answer_chooses_between_two_policies).
    * A request of more than 64 KiB is refused before it is read (test_a_large_request_is_refused).
"""

from __future__ import annotations

from collections.abc import Collection

from fastapi import HTTPException
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from shared.http.asgi import App, Message, Receive, Send, is_named

MOST_BYTES = 64 << 10
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
        "base-uri 'none'",
    )
)
SANDBOXED = "; ".join(
    (
        "default-src 'none'",
        "style-src 'unsafe-inline'",
        "img-src data:",
        "font-src data:",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "base-uri 'none'",
        "sandbox",
    )
)
"""Of a document that is shown as it stands, such as a report: in an origin of its own, without scripts, forms or cookies."""
_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",  # with none at all, browsers would not say either which page sent a form
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
_ONE_YEAR = 31_536_000


class Guarded:
    """An application behind the guard.

    Args:
        app: what answers.
        names: the hosts by which this console may be called; `loopback` adds the machine's own names.
        secure: it is served over TLS.
    """

    def __init__(
        self,
        app: App,
        *,
        names: Collection[str],
        loopback: bool,
        secure: bool,
    ) -> None:
        self._app, self._names, self._loopback, self._secure = app, frozenset(names), loopback, secure

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer, or pass on; see ASGI."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        request, done = Request(scope), False

        async def guarded(message: Message) -> None:
            nonlocal done
            if message["type"] == "http.response.start":
                self._add_headers(MutableHeaders(scope=message))
            await send(message)
            done = message["type"] == "http.response.body" and not message.get("more_body", False)

        if (refused := self._refusal(request)) is not None:
            await refused(scope, receive, guarded)
            return
        try:
            await self._app(scope, _bounded(receive), guarded)
        except _TooLarge:
            await _plain(413, "the request is too large")(scope, receive, guarded)
        except Exception:
            # Starlette raises it on after the page that tells of it was sent; there its place was logged.
            if not done:
                raise ConnectionError("an answer broke off") from None

    def _refusal(self, request: Request) -> Response | None:
        hosts = request.headers.getlist("host")
        if len(hosts) != 1 or not is_named(hosts[0], self._names, loopback=self._loopback):
            return _plain(421, "this console is not called so; use the address that it printed when it started")
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MOST_BYTES:
            return _plain(413, "the request is too large")
        return None

    def _add_headers(self, headers: MutableHeaders) -> None:
        sandboxed = headers.get("content-security-policy") == SANDBOXED
        for name, value in _HEADERS.items():
            headers[name] = value
        if sandboxed:
            headers["content-security-policy"] = SANDBOXED
            del headers["cross-origin-opener-policy"]  # browsers refuse a document that has both
        headers.setdefault("cache-control", "no-store")
        if self._secure:
            headers["strict-transport-security"] = f"max-age={_ONE_YEAR}"


class _TooLarge(HTTPException):
    """More came than a request may hold. Of FastAPI's kind: any other error that ends the reading of a form is 400 to it."""

    def __init__(self) -> None:
        super().__init__(413)


def _bounded(receive: Receive) -> Receive:
    num_bytes = 0

    async def bounded() -> Message:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > MOST_BYTES:
            raise _TooLarge
        return message

    return bounded


def _plain(status: int, text: str) -> Response:
    return PlainTextResponse(f"{text}\n", status)
