"""The application of a console: its routes behind the gate, its errors as pages, nothing that was not declared.

Guarantee (tests: tests/client/console/test_attacks.py, `test_a_defect_shows_no_trace`): no answer holds a trace or a text of an
unexpected error; the log has its place, not its text, which may quote a record.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable
from typing import Annotated
from urllib.parse import urlencode

from fastapi import FastAPI, Path
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import BaseRoute

from shared.errors import SilotuneError, place_of
from shared.http.asgi import App
from shared.version import silotune_version
from shared.web.asked import Denied, Gate, NotProven, NotSignedIn, Routes, SessionEnded, asked_by, own_path
from shared.web.console import Console
from shared.web.guarding import Guarded
from shared.web.languages import load_texts
from shared.web.pages import HERE, Pages, StaticFiles
from shared.web.roles import Action
from shared.web.routes import account_pages, elsewhere_pages, link_pages, own_pages, sign_in_pages

log = logging.getLogger("silotune.console")

_KEYS = {400: "wrong", 404: "missing", 405: "method", 422: "wrong"}


def make_application(console: Console, own: Iterable[Routes]) -> tuple[App, FastAPI]:
    """Return a console's application for a server, and the same without its guard, for tests that look into it.

    Args:
        own: the routes of its own pages.

    Raises:
        AssertionError: a route has no gate.
    """
    app = FastAPI(
        title="Silotune",
        version=silotune_version(),
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    static = StaticFiles([HERE / "static", *(folder / "static" for folder in console.folders)])
    for routes in (
        sign_in_pages.ROUTES,
        elsewhere_pages.ROUTES,
        own_pages.ROUTES,
        account_pages.ROUTES,
        *([link_pages.ROUTES] if console.link else []),
        _static_routes(static),
        *own,
    ):
        app.router.routes.extend(routes.routes)
    check_gates(app.routes)
    app.state.console = console
    app.state.texts = load_texts([folder / "texts" for folder in (HERE, *console.folders)])
    paths = frozenset(route.path for route in app.routes if isinstance(route, APIRoute))
    app.state.pages = Pages([*console.folders, HERE], static=static, filters=console.filters, paths=paths)
    for kind, answer in _ANSWERS.items():
        app.add_exception_handler(kind, answer)
    return Guarded(app, names=console.names, loopback=console.loopback, secure=console.secure), app


def check_gates(routes: Iterable[BaseRoute]) -> None:
    """Raise `AssertionError` unless every route declares what it does."""
    for route in routes:
        gates = [d.dependency for d in route.dependencies] if isinstance(route, APIRoute) else []
        if not any(isinstance(gate, Gate) for gate in gates):
            raise AssertionError(
                f"the route {getattr(route, 'path', route)} declares no action; make it by Routes.page"
            )


def _static_routes(static: StaticFiles) -> Routes:
    routes = Routes()

    @routes.page("/static/{name}", Action.BE_A_GUEST)
    def static_file(name: Annotated[str, Path(max_length=100)]) -> Response:
        """Return a style sheet or a script."""
        answer = static.answer(name)
        if answer is None:
            raise Denied(404, "missing")
        return answer

    return routes


# --- errors ---


def error_page(request: Request, status: int, key: str, *, text: str = "", number: str = "") -> Response:
    """Return the page that tells of an error; of one status it looks the same whatever is there."""
    if request.headers.get("accept", "").startswith("application/json"):
        return JSONResponse({"error": key}, status)
    return asked_by(request).page("error.html", status=status, status_code=status, key=key, text=text, number=number)


def _denied(request: Request, error: Exception) -> Response:
    assert isinstance(error, Denied)  # noqa: S101 (this handler's own kind)
    return error_page(request, error.status, error.key)


def _not_signed_in(request: Request, _error: Exception) -> Response:
    asked = asked_by(request)
    back = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    place = "/sign-in"
    if request.method == "GET" and not asked.is_fragment and own_path(back) != "/":
        place += f"?{urlencode({'next': own_path(back)}, safe='/')}"
    if asked.is_fragment:
        return Response(status_code=401, headers={"HX-Redirect": "/sign-in"})
    if request.headers.get("accept", "").startswith("application/json"):
        return JSONResponse({"error": "signed-out"}, 401)
    return RedirectResponse(place, 303)


def _session_ended(request: Request, error: Exception) -> Response:
    """Say that nothing was done, and give back what was written: it stands nowhere else."""
    assert isinstance(error, SessionEnded)  # noqa: S101 (this handler's own kind)
    asked = asked_by(request)
    if asked.is_fragment or request.headers.get("accept", "").startswith("application/json"):
        return _not_signed_in(request, error)
    return asked.page("ended.html", status=403, typed=error.typed)


def _not_proven(request: Request, error: Exception) -> Response:
    """Lead to where it is proved, and from there back to the page; what was asked for is not done."""
    assert isinstance(error, NotProven)  # noqa: S101 (this handler's own kind)
    place = own_path(error.place)
    return asked_by(request).to(f"/account/prove?{urlencode({'next': place})}")


def _http(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 400)
    answer = error_page(request, status, _KEYS.get(status, "wrong"))
    if status == 405:  # which of a path's routes was asked is not known here, so what each of them takes is told
        answer.headers["allow"] = ", ".join(sorted(_methods(request)))
    return answer


def _methods(request: Request) -> set[str]:
    """Return with what a path may be asked."""
    routes = [route for route in request.app.routes if isinstance(route, APIRoute)]
    return {method for route in routes if route.path_regex.match(request.url.path) for method in route.methods or ()}


def _not_valid(request: Request, _error: Exception) -> Response:
    return error_page(request, 422, "wrong")


def _ours(request: Request, error: Exception) -> Response:
    """Tell what a person here can mend, if the console shows it to accounts at all; a guest sees nothing of it."""
    log.error("%s %s: %s", request.method, request.url.path, error)
    asked = asked_by(request)
    return error_page(request, 503, "trouble", text=str(error) if asked.account and asked.console.shows_errors else "")


def _defect(request: Request, error: Exception) -> Response:
    """Tell of a defect by a number; the log has its place, not its text, which may quote a record."""
    number = secrets.token_hex(4)
    log.error("defect %s at %s %s: %s", number, request.method, request.url.path, place_of(error))
    try:
        return error_page(request, 500, "defect", number=number)
    except Exception:  # where the database is what fails, there is no page
        return HTMLResponse(f"<!doctype html><title>500</title><p>500 {number}</p>", 500)


_ANSWERS = {
    Denied: _denied,
    NotSignedIn: _not_signed_in,
    NotProven: _not_proven,
    SessionEnded: _session_ended,
    HTTPException: _http,
    RequestValidationError: _not_valid,
    SilotuneError: _ours,
    Exception: _defect,
}
