"""Everybody's accounts, for administrators."""

from __future__ import annotations

from typing import Annotated

from fastapi import Form, Path
from fastapi.responses import Response

from shared.web.accounts.accounts import Gone
from shared.web.accounts.passwords import LEAST_CHARACTERS, MOST_CHARACTERS, Unsuitable
from shared.web.asked import Asked, Denied, Here, Routes
from shared.web.roles import Action, Role
from shared.web.routes.sign_in_pages import Name

ROUTES = Routes()

Id = Annotated[str, Path(max_length=64)]
GivenRole = Annotated[str, Form(max_length=20)]


@ROUTES.page("/accounts", Action.MANAGE_ACCOUNTS)
def accounts(asked: Here) -> Response:
    """Show all accounts."""
    return _shown(asked)


@ROUTES.page("/accounts", Action.MANAGE_ACCOUNTS, method="POST", proven=True)
def invite(asked: Here, name: Name = "", role: GivenRole = "") -> Response:
    """Invite somebody; the code is shown once."""
    try:
        code = asked.console.accounts.invite(name, _role(role), by=asked.me())
    except Unsuitable as error:
        return _shown(asked, problem=error, name=name)
    return _shown(asked, code=code, invited=name)


@ROUTES.page("/accounts/{account}/role", Action.MANAGE_ACCOUNTS, method="POST", proven=True)
def change_role(asked: Here, account: Id, role: GivenRole = "") -> Response:
    """Give an account another role."""
    return _changed(asked, account, role=_role(role))


@ROUTES.page("/accounts/{account}/disable", Action.MANAGE_ACCOUNTS, method="POST", proven=True)
def disable(asked: Here, account: Id) -> Response:
    """Let an account sign in no more."""
    return _changed(asked, account, disabled=True)


@ROUTES.page("/accounts/{account}/enable", Action.MANAGE_ACCOUNTS, method="POST", proven=True)
def enable(asked: Here, account: Id) -> Response:
    """Let it sign in again."""
    return _changed(asked, account, disabled=False)


@ROUTES.page("/accounts/{account}/reset", Action.MANAGE_ACCOUNTS, method="POST", proven=True)
def reset(asked: Here, account: Id) -> Response:
    """Invite the person of an account anew, who lost password or authenticator."""
    try:
        code = asked.console.accounts.invite_again(account, by=asked.me())
        (name,) = [one.name for one in asked.console.accounts.all() if one.id == account]
    except Unsuitable as error:
        return _shown(asked, problem=error)
    except Gone:
        raise Denied(404, "missing") from None
    return _shown(asked, code=code, invited=name)


def _changed(asked: Asked, account: str, *, role: Role | None = None, disabled: bool | None = None) -> Response:
    try:
        asked.console.accounts.change(account, by=asked.me(), role=role, disabled=disabled)
    except Unsuitable as error:
        return _shown(asked, problem=error)
    except Gone:
        raise Denied(404, "missing") from None
    return asked.to("/accounts")


def _role(text: str) -> Role:
    if text not in set(Role):
        raise Denied(422, "wrong")
    return Role(text)


def _shown(
    asked: Asked, *, problem: Unsuitable | None = None, name: str = "", code: str | None = None, invited: str = ""
) -> Response:
    text = None
    if problem is not None:
        text = asked.texts(f"unsuitable.{problem.key}", least=LEAST_CHARACTERS, most=MOST_CHARACTERS)
    return asked.page(
        "accounts.html",
        status=200 if problem is None else 422,
        accounts=asked.console.accounts.all(),
        roles=list(Role),
        problem=text,
        name=name,
        code=code,
        invited=invited,
    )
