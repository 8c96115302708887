"""What is answered over HTTP: predictions, continuations, models, health, numbers for monitoring.

Formal guarantees (tests: tests/server/serving/test_routes.py, test_texts_stay.py)
    * Without a token that counts, for this scope and this model, nothing is read of a request but its head
      (test_every_scope_on_every_route).
    * No text, label or token of anybody enters a log, whatever fails: errors are logged by kind and place
      (test_no_text_is_in_any_log).
    * A body is bounded before it is read, all bodies at hand together, too (test_large_bodies_are_refused).
    * What was booked and not answered is taken back (test_what_is_not_answered_is_not_billed).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from server.serving.access.accounts import Accounts, Booked, TooFast
from server.serving.access.tokens import QuotaExceeded, Scope, Token, Use
from server.serving.asking import Desk
from server.serving.completing import Completing
from server.serving.engine import Batching, Failed, QueueFull
from server.serving.following import Following
from server.serving.limits import Limits
from server.serving.models import Model
from server.serving.monitoring.drift import Drift
from server.serving.monitoring.metrics import Counts, page
from server.serving.refusals import Refused, busy
from server.serving.schemas import PredictRequest, openapi, read
from shared.errors import SilotuneError, place_of
from shared.http.asgi import Message, Receive, Send, is_named

if TYPE_CHECKING:
    from server.serving.explaining import Explaining

log = logging.getLogger("silotune.serving")

_BODIES_AT_ONCE = 16
"""All bodies at hand together are bounded by so many of the largest."""


@dataclass
class Service:
    """Everything that answers need.

    Attributes:
        accounts: None: whoever reaches it may ask; it is on loopback then.
        names: the hosts by which it may be called without tokens, beside the machine's own.
        drift: counts labels; None: nobody wants them.
        explaining: says why; None: nobody may ask.
        warning: what somebody should look at, though it answers; None: nothing.
        began: seconds since 1970.
    """

    following: Following
    engine: Batching | Completing
    desk: Desk
    limits: Limits
    accounts: Accounts | None
    names: frozenset[str] = frozenset()
    drift: Drift | None = None
    explaining: Explaining | None = None
    warning: Callable[[], str | None] = lambda: None
    counts: Counts = field(default_factory=Counts)
    began: float = field(default_factory=time.time)

    @property
    def troubles(self) -> list[str]:
        """What somebody should look at; while there is something that keeps it from answering, it is not healthy."""
        found = [self.following.withdrawn, None if self.engine.alive else "the engine's thread ended"]
        if self.accounts is not None and self.accounts.trouble() is not None:
            found.append("the token file cannot be used; the log says why")
        return [trouble for trouble in found if trouble is not None]

    def model(self) -> Model:
        """Return the model that answers now; `Refused` (503) if it was withdrawn."""
        if self.following.withdrawn is not None:
            raise Refused(503, "model_withdrawn", f"{self.following.withdrawn}; no other version takes its place yet.")
        return self.following.model


@dataclass
class Asked:
    """A request on its way.

    Attributes:
        token: whose it is; None without tokens.
        body: that came.
        gone: done once whoever asks is gone.
        booked: what is billed for it, once it is.
    """

    request: Request
    send: Send
    token: Token | None
    body: bytes
    gone: asyncio.Task[None]
    booked: Booked | None = None


T = TypeVar("T")
Handler = Callable[[Service, Asked], Awaitable[Response | None]]


@dataclass(frozen=True)
class Route:
    """Who may ask, and what answers; a handler that returns None has answered by itself."""

    method: str
    handler: Handler
    scope: Scope | None = None
    open: bool = False


class Application:
    """See the module."""

    def __init__(self, service: Service, routes: Mapping[str, Route]) -> None:
        self._service, self._routes, self._bytes = service, routes, 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request; see ASGI."""
        if scope["type"] != "http":
            return
        request, service = Request(scope, receive), self._service
        path, began = str(scope["path"]), time.perf_counter()
        status = 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(message["status"])
            await send(message)

        try:
            await self._answer(path, request, counted)
        except (ClientDisconnect, OSError):
            status = status or 499
        finally:
            service.counts.add(path if path in self._routes else "other", status, time.perf_counter() - began)

    async def _answer(self, path: str, request: Request, send: Send) -> None:
        sent = False

        async def noting(message: Message) -> None:
            nonlocal sent
            sent = True
            await send(message)

        try:
            response = await self._handled(path, request, noting)
        except Refused as refused:
            response = refused.response()
        except ClientDisconnect:
            raise
        except Exception as error:
            log.error(
                "a request to %s failed: %s", path if path in self._routes else "an unknown path", place_of(error)
            )
            response = Refused(500, "defect", "this is a defect of the service; its log says where.").response()
        if response is not None and not sent:
            response.headers["cache-control"] = "no-store"
            response.headers["x-content-type-options"] = "nosniff"
            async with asyncio.timeout(self._service.limits.answer_seconds):  # whoever asks may read slowly
                await response(request.scope, request.receive, noting)

    async def _handled(self, path: str, request: Request, send: Send) -> Response | None:
        service = self._service
        route = self._routes.get(path)
        if route is None:
            raise Refused(404, "no_such_path", f"there are {', '.join(self._routes)}.")
        if request.method not in (route.method, "HEAD" if route.method == "GET" else ""):
            raise Refused(405, "method_not_allowed", f"ask by {route.method}.", headers={"allow": route.method})
        self._check_host(request)
        token = None if route.open else self._token(request, route)
        body = b"" if route.method == "GET" else await self._body(request)
        try:
            gone = asyncio.ensure_future(_gone(request))
            asked = Asked(request, send, token, body, gone)
            try:
                return await route.handler(service, asked)
            finally:
                gone.cancel()
                if (
                    asked.booked is not None and service.accounts is not None
                ):  # it was not settled: nothing was answered
                    service.accounts.settle(asked.booked, Use())
        finally:
            self._bytes -= len(body)

    def _check_host(self, request: Request) -> None:
        """Refuse names that a stranger's DNS could give to this machine, where no token is asked for."""
        hosts, service = request.headers.getlist("host"), self._service
        if service.accounts is None and not (len(hosts) == 1 and is_named(hosts[0], service.names, loopback=True)):
            raise Refused(421, "wrong_host", "this service is not called so; use the address that it printed.")

    def _token(self, request: Request, route: Route) -> Token | None:
        accounts = self._service.accounts
        if accounts is None:
            return None
        kind, _, secret = request.headers.get("authorization", "").partition(" ")
        try:
            token = accounts.find(secret.strip()) if kind.lower() == "bearer" else None
        except SilotuneError as error:
            log.error("%s", error)
            raise busy("tokens_unreadable", "tokens cannot be looked up at the moment; try again.", 5) from None
        if token is None:
            raise Refused(
                401,
                "invalid_token",
                "show a token that was not revoked: Authorization: Bearer slt_...",
                headers={"www-authenticate": "Bearer"},
            )
        if route.scope is not None and not token.may(route.scope):
            raise Refused(403, "out_of_scope", f"this token is not for {route.scope}; ask for one with that scope.")
        if route.method == "POST":
            if not token.may_ask(self._service.following.base):
                raise Refused(403, "model_not_allowed", "this token is for other models; ask for one with this model.")
            try:
                accounts.check_rate(token)
            except TooFast as error:
                raise busy("too_fast", f"{error}.", error.seconds, 429) from None
        return token

    async def _body(self, request: Request) -> bytes:
        """Read the body; it counts in `self._bytes` until the answer is out."""
        limits = self._service.limits
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "no_json", "send JSON, with Content-Type: application/json.")
        declared = request.headers.get("content-length", "0")
        if not declared.isdecimal() or len(declared) > 15 or int(declared) > limits.body_bytes:
            raise _too_large(limits)
        parts: list[bytes] = []
        size = 0
        try:
            async for part in request.stream():
                parts.append(part)
                size, self._bytes = size + len(part), self._bytes + len(part)
                if size > limits.body_bytes:
                    raise _too_large(limits)
                if self._bytes > _BODIES_AT_ONCE * limits.body_bytes:
                    raise busy("too_many_bytes", "too many requests are being read; try again.", 1)
        except BaseException:
            self._bytes -= size
            raise
        return b"".join(parts)


def _too_large(limits: Limits) -> Refused:
    return Refused(413, "too_large", f"the request is larger than {limits.body_bytes:,} bytes; send several.")


async def _gone(request: Request) -> None:
    """Return once whoever asks is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def before_gone(asked: Asked, work: Awaitable[T], seconds: float) -> T:
    """Return what `work` gives, unless whoever asks is gone, or it takes too long; then it is cancelled."""
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait({task, asked.gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            return task.result()
    finally:
        if not task.done():
            task.cancel()
            with contextlib.suppress(BaseException):
                await task
    if asked.gone in done:
        raise ClientDisconnect
    raise Refused(504, "took_too_long", f"the answer was not there within {seconds:g} s; try again, or ask for less.")


async def book(service: Service, asked: Asked, use: Use) -> None:
    """Book what a request may use; `Refused` (429) if that is beyond the token's quota."""
    if service.accounts is None or asked.token is None:
        return
    try:
        asked.booked = await service.accounts.charge(asked.token, service.following.base, use)
    except QuotaExceeded as error:
        raise busy("insufficient_quota", f"{error}.", error.seconds, status=429) from None
    except SilotuneError:
        raise busy("tokens_unreadable", "use cannot be booked at the moment; try again.", 5) from None


def settle(service: Service, asked: Asked, used: Use) -> None:
    """Bill what was used, and no more."""
    if service.accounts is not None and asked.booked is not None:
        service.accounts.settle(asked.booked, used)
        asked.booked = None


def check_model(service: Service, model: Model, wanted: str | None) -> None:
    """Raise `Refused` (404) unless the model that is to answer is called so; another may have taken over meanwhile."""
    if wanted not in (None, service.following.name, model.version):
        raise Refused(404, "model_not_found", f"this service has the model {service.following.name!r}.", param="model")


def refused_of(error: SilotuneError) -> Refused:
    """Return what the error of an engine is to whoever asked."""
    if isinstance(error, QueueFull):
        return busy("queue_full", f"{error}.", error.seconds)
    if isinstance(error, Failed):
        return Refused(500, "failed", f"{error}.")
    raise error


async def predict(service: Service, asked: Asked) -> Response:
    """Answer `/v1/predict`."""
    model, wanted = service.model(), read(PredictRequest, asked.body)
    check_model(service, model, wanted.model)
    question = await service.desk.question(model, wanted)
    used = Use(requests=1, read_tokens=question.tokens)
    await book(service, asked, used)
    assert isinstance(service.engine, Batching)  # noqa: S101 (its model labels texts)
    try:
        future = asyncio.wrap_future(service.engine.submit(model, question.examples))
        outputs = await before_gone(asked, future, service.limits.answer_seconds)
    except (QueueFull, Failed) as error:
        raise refused_of(error) from None
    answers = await service.desk.answers(question, outputs)
    settle(service, asked, used)
    if service.drift is not None:
        await service.drift.count(service.following.model, model, answers)
    found = {
        "model": service.following.name,
        "version": model.version,
        "predictions": answers,
        "usage": {"tokens": question.tokens},
    }
    return Response(json.dumps(found, allow_nan=False), media_type="application/json")


async def models(service: Service, asked: Asked) -> Response:
    """Answer `/v1/models`: what the token may ask."""
    model, following = service.following.model, service.following
    entry = {
        "id": following.name,
        "object": "model",
        "created": int(service.began),
        "owned_by": "silotune",
        "version": model.version,
        "task": model.kind,
    }
    hidden = asked.token is not None and not asked.token.may_ask(following.base)
    found = {"object": "list", "data": [] if hidden else [entry]}
    return Response(json.dumps(found), media_type="application/json")


async def healthz(service: Service, asked: Asked) -> Response:
    """Answer `/healthz`: 503 while it cannot answer; anybody may ask."""
    found = service.troubles
    told = {
        "healthy": not found,
        "model": service.following.name,
        "version": service.following.model.version,
        "troubles": found,
        "warning": service.warning(),
    }
    return Response(json.dumps(told), 503 if found else 200, media_type="application/json")


async def metrics(service: Service, asked: Asked) -> Response:
    """Answer `/metrics`."""
    content_type, content = page(service)
    return Response(content, media_type=None, headers={"content-type": content_type})


async def document(service: Service, asked: Asked) -> Response:
    """Answer `/openapi.json`."""
    return Response(json.dumps(openapi()), media_type="application/json")
