"""Signing in and out, taking an invitation, and the switches for language and theme."""

from __future__ import annotations

from typing import Annotated

from fastapi import Form, Query
from fastapi.responses import RedirectResponse, Response
from markupsafe import Markup

from shared.web.accounts import codes
from shared.web.accounts.accounts import Gone, Refused
from shared.web.accounts.attempts import TooManyAttempts
from shared.web.accounts.passwords import LEAST_CHARACTERS, MOST_CHARACTERS, Unsuitable
from shared.web.asked import MOST_PLACE, Asked, Here, Routes, own_path
from shared.web.roles import Action, allowed

ROUTES = Routes()

Name = Annotated[str, Form(max_length=200)]
Password = Annotated[str, Form(max_length=1000)]
Code = Annotated[str, Form(max_length=40)]
Place = Annotated[str, Form(alias="next", max_length=MOST_PLACE)]


@ROUTES.page("/", Action.OWN_ACCOUNT)
def home(asked: Here) -> Response:
    """Lead to the first page that the account may see."""
    for entry in asked.console.navigation:
        if allowed(asked.me().role, entry.action) and entry.path in _paths(asked):
            return RedirectResponse(entry.path, 303)
    return RedirectResponse("/account", 303)


@ROUTES.page("/sign-in", Action.BE_A_GUEST)
def sign_in_form(asked: Here, place: Annotated[str, Query(alias="next", max_length=MOST_PLACE)] = "/") -> Response:
    """Show the form."""
    if asked.account is not None:
        return RedirectResponse("/", 303)
    return asked.page("sign-in.html", place=own_path(place), name="", problem=None)


@ROUTES.page("/sign-in", Action.BE_A_GUEST, method="POST")
def sign_in(asked: Here, name: Name = "", password: Password = "", code: Code = "", place: Place = "/") -> Response:
    """Sign in, or show the form again with one text for whatever was wrong."""
    try:
        account = asked.console.accounts.sign_in(name, password, code, address=asked.address, cookie=asked.device)
    except Refused:
        problem = asked.texts("sign_in.refused")
        return asked.page("sign-in.html", status=401, place=own_path(place), name=name, problem=problem)
    except TooManyAttempts as error:
        return _wait(asked, "sign-in.html", error, place=own_path(place), name=name)
    answer = RedirectResponse(own_path(place), 303)
    asked.begin_session(answer, account)
    return answer


@ROUTES.page("/sign-out", Action.OWN_ACCOUNT, method="POST")
def sign_out(asked: Here) -> Response:
    """End this session."""
    asked.console.accounts.record(asked.me().name, "sign-out", {"address": asked.address})
    asked.console.sessions.end(asked.visit)
    answer = RedirectResponse("/sign-in", 303)
    asked.forget(answer, "session")
    return answer


@ROUTES.page("/welcome", Action.BE_A_GUEST)
def welcome_form(asked: Here) -> Response:
    """Ask for the code of an invitation."""
    return asked.page("welcome.html", problem=None)


@ROUTES.page("/welcome", Action.BE_A_GUEST, method="POST")
def welcome(asked: Here, code: Code = "") -> Response:
    """Show what an invitation needs: a password and an authenticator."""
    return _enrolment(asked, code, name="", problem=None)


@ROUTES.page("/welcome/take", Action.BE_A_GUEST, method="POST")
def take(
    asked: Here,
    code: Code = "",
    name: Name = "",
    password: Password = "",
    again: Password = "",
    totp: Code = "",
) -> Response:
    """Take an invitation and sign in."""
    if password != again:
        return _enrolment(asked, code, name=name, problem=asked.texts("welcome.differ"))
    try:
        account = asked.console.accounts.take(code, name=name, password=password, totp=totp, address=asked.address)
    except Unsuitable as error:
        text = asked.texts(f"unsuitable.{error.key}", least=LEAST_CHARACTERS, most=MOST_CHARACTERS)
        return _enrolment(asked, code, name=name, problem=text)
    except Refused:
        return _enrolment(asked, code, name=name, problem=asked.texts("welcome.totp_wrong"))
    except (Gone, TooManyAttempts) as error:
        return _no_invitation(asked, error)
    answer = RedirectResponse("/", 303)
    asked.begin_session(answer, account)
    return answer


@ROUTES.page("/preferences", Action.BE_A_GUEST, method="POST")
def prefer(asked: Here, language: Name = "", theme: Name = "", place: Place = "/") -> Response:
    """Switch language or theme in this browser."""
    return asked.prefer(RedirectResponse(own_path(place), 303), language, theme)


def _enrolment(asked: Asked, code: str, *, name: str, problem: str | None) -> Response:
    try:
        invited = asked.console.accounts.invitation(code, address=asked.address)
    except (Gone, TooManyAttempts) as error:
        return _no_invitation(asked, error)
    # Authenticators show which console a code is for.
    issuer = f"Silotune {asked.console.owner}".replace(":", " ")
    shown = invited.name or name or asked.texts("roles.administrator")
    address, picture = codes.enrolment(invited.secret, name=shown, issuer=issuer)
    return asked.page(
        "enrol.html",
        status=200 if problem is None else 422,
        invited=invited,
        code=code,
        name=name,
        problem=problem,
        address=address,
        picture=Markup(picture),  # noqa: S704 - an SVG of rectangles, made here
        least=LEAST_CHARACTERS,
    )


def _no_invitation(asked: Asked, error: Gone | TooManyAttempts) -> Response:
    if isinstance(error, TooManyAttempts):
        return _wait(asked, "welcome.html", error)
    return asked.page("welcome.html", status=404, problem=asked.texts("welcome.gone"))


def _wait(asked: Asked, template: str, error: TooManyAttempts, **values: str) -> Response:
    minutes = -(-error.seconds // 60)
    answer = asked.page(template, status=429, problem=asked.texts("sign_in.wait", minutes=minutes), **values)
    answer.headers["retry-after"] = str(error.seconds)
    return answer


def _paths(asked: Asked) -> set[str]:
    return {route.path for route in asked.request.app.routes}
