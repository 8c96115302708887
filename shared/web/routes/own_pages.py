"""One's own account: password, sessions."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query
from fastapi.responses import RedirectResponse, Response

from shared.web.accounts.accounts import Refused
from shared.web.accounts.attempts import TooManyAttempts
from shared.web.accounts.passwords import LEAST_CHARACTERS, MOST_CHARACTERS, Unsuitable
from shared.web.asked import MOST_PLACE, Asked, Denied, Here, Routes, own_path
from shared.web.roles import Action
from shared.web.routes.sign_in_pages import Code, Password, Place

ROUTES = Routes()


@ROUTES.page("/account", Action.OWN_ACCOUNT)
def own(asked: Here) -> Response:
    """Show the account and its sessions."""
    return _shown(asked)


@ROUTES.page("/account/password", Action.OWN_ACCOUNT, method="POST")
def change_password(
    asked: Here, old: Password = "", password: Password = "", again: Password = "", totp: Code = ""
) -> Response:
    """Change the password; all sessions end, and this browser gets a new one."""
    account, accounts, texts = asked.me(), asked.console.accounts, asked.texts
    if account.elsewhere:
        raise Denied(404, "missing")
    if password != again:
        return _shown(asked, texts("welcome.differ"))
    try:
        accounts.prove(account, old, totp, address=asked.address, cookie=asked.device)
        accounts.change_password(account, password)
    except Refused:
        return _shown(asked, texts("own.refused"))
    except TooManyAttempts as error:
        return _shown(asked, texts("sign_in.wait", minutes=-(-error.seconds // 60)))
    except Unsuitable as error:
        return _shown(asked, texts(f"unsuitable.{error.key}", least=LEAST_CHARACTERS, most=MOST_CHARACTERS))
    answer = RedirectResponse("/account", 303)
    asked.begin_session(answer, account)
    return answer


@ROUTES.page("/account/prove", Action.OWN_ACCOUNT)
def prove_form(asked: Here, place: Annotated[str, Query(alias="next", max_length=MOST_PLACE)] = "/") -> Response:
    """Ask for password and code again, before what not everybody who finds an open browser shall do."""
    return asked.page("prove.html", place=own_path(place), problem=None)


@ROUTES.page("/account/prove", Action.OWN_ACCOUNT, method="POST")
def prove(asked: Here, password: Password = "", totp: Code = "", place: Place = "/") -> Response:
    """Note that the person of this session still is the account's."""
    account, texts = asked.me(), asked.texts
    if account.elsewhere:
        raise Denied(404, "missing")
    try:
        asked.console.accounts.prove(account, password, totp, address=asked.address, cookie=asked.device)
    except Refused:
        return asked.page("prove.html", status=422, place=own_path(place), problem=texts("own.refused"))
    except TooManyAttempts as error:
        problem = texts("sign_in.wait", minutes=-(-error.seconds // 60))
        return asked.page("prove.html", status=429, place=own_path(place), problem=problem)
    asked.console.sessions.prove(asked.visit)
    return asked.to(own_path(place))


@ROUTES.page("/account/sign-out-everywhere", Action.OWN_ACCOUNT, method="POST")
def sign_out_everywhere(asked: Here) -> Response:
    """End every session of the account, this one too."""
    asked.console.accounts.end_sessions(asked.me())
    answer = RedirectResponse("/sign-in", 303)
    asked.forget(answer, "session")
    return answer


def _shown(asked: Asked, problem: str | None = None) -> Response:
    sessions = asked.console.sessions.of(asked.me().id)
    status = 200 if problem is None else 422
    return asked.page(
        "own.html", status=status, sessions=sessions, problem=problem, least=LEAST_CHARACTERS, back="/account"
    )
