"""Everybody's accounts, for administrators."""

from __future__ import annotations

from typing import Annotated

from fastapi import Form, Path, Query
from fastapi.responses import Response

from shared.names import look_key, name_key
from shared.web.accounts.accounts import Gone
from shared.web.accounts.passwords import LEAST_CHARACTERS, MOST_CHARACTERS, Unsuitable
from shared.web.asked import Asked, Denied, Here, Routes
from shared.web.roles import Action, Role
from shared.web.routes.sign_in_pages import Name

ROUTES = Routes()

Id = Annotated[str, Path(max_length=64)]
GivenRole = Annotated[str, Form(max_length=20)]
TypedName = Annotated[str, Query(alias="name", max_length=200)]
TypedRole = Annotated[str, Query(alias="role", max_length=20)]


@ROUTES.page("/accounts", Action.MANAGE_ACCOUNTS)
def accounts(asked: Here, name: TypedName = "", role: TypedRole = "") -> Response:
    """Show all accounts; the form begins with what was typed before one had to prove something."""
    return _shown(asked, name=name, role=role)


@ROUTES.page("/accounts", Action.MANAGE_ACCOUNTS, method="POST", proven="/accounts", carried=("name", "role"))
def invite(asked: Here, name: Name = "", role: GivenRole = "") -> Response:
    """Invite somebody; the code is shown once."""
    try:
        code = asked.console.accounts.invite(name, _role(role), by=asked.me())
    except Unsuitable as error:
        return _shown(asked, problem=error, name=name, role=role)
    return _shown(asked, code=code, invited=name)


@ROUTES.page("/accounts/{account}/role", Action.MANAGE_ACCOUNTS, method="POST", proven="/accounts")
def change_role(asked: Here, account: Id, role: GivenRole = "") -> Response:
    """Give an account another role."""
    return _changed(asked, account, role=_role(role))


@ROUTES.page("/accounts/{account}/disable", Action.MANAGE_ACCOUNTS, method="POST", proven="/accounts")
def disable(asked: Here, account: Id) -> Response:
    """Let an account sign in no more."""
    return _changed(asked, account, disabled=True)


@ROUTES.page("/accounts/{account}/enable", Action.MANAGE_ACCOUNTS, method="POST", proven="/accounts")
def enable(asked: Here, account: Id) -> Response:
    """Let it sign in again."""
    return _changed(asked, account, disabled=False)


@ROUTES.page("/accounts/{account}/reset", Action.MANAGE_ACCOUNTS, method="POST", proven="/accounts")
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


@ROUTES.page("/accounts/{account}/end-sessions", Action.MANAGE_ACCOUNTS, method="POST", proven="/accounts")
def sign_out(asked: Here, account: Id) -> Response:
    """End every session and known browser of an account."""
    try:
        asked.console.accounts.sign_out(account, by=asked.me())
    except Gone:
        raise Denied(404, "missing") from None
    return asked.to("/accounts")


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
    asked: Asked,
    *,
    problem: Unsuitable | None = None,
    name: str = "",
    role: str = "",
    code: str | None = None,
    invited: str = "",
) -> Response:
    text = None
    if problem is not None:
        text = asked.texts(f"unsuitable.{problem.key}", least=LEAST_CHARACTERS, most=MOST_CHARACTERS)
    return asked.page(
        "accounts.html",
        status=200 if problem is None else 422,
        accounts=(everybody := asked.console.accounts.all()),
        alike=[one.name for one in everybody if code and _is_like(one.name, invited)],
        roles=list(Role),
        problem=text,
        name=name,
        role=role if role in set(Role) else Role.VIEWER,
        code=code,
        invited=invited,
        back="/accounts",
    )


def _is_like(name: str, other: str) -> bool:
    """Return whether two accounts are easily taken for one another."""
    return name_key(name) != name_key(other) and look_key(name) == look_key(other)
