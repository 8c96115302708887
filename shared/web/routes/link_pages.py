"""Signing in by the link that the terminal printed."""

from __future__ import annotations

from typing import Annotated

from fastapi import Form, Path
from fastapi.responses import RedirectResponse, Response

from shared.web.asked import Denied, Here, Routes
from shared.web.roles import Action, Role

ROUTES = Routes()

_ISSUER = "the terminal"


@ROUTES.page("/link/{code}", Action.BE_A_GUEST)
def follow(asked: Here, code: Annotated[str, Path(max_length=100)]) -> Response:
    """Show the button that uses a link; whether it is one is told then."""
    return asked.page("link.html", code=code)


@ROUTES.page("/link", Action.BE_A_GUEST, method="POST")
def use(asked: Here, code: Annotated[str, Form(max_length=400)] = "") -> Response:
    """Use up a link, or its last part, and sign in the researcher in front of the terminal."""
    link = asked.console.link
    if link is None:
        raise Denied(404, "missing")
    if not link.use(code.strip().rpartition("/")[2]):
        return asked.page("sign-in.html", status=401, place="/", name="", problem=asked.texts("link.refused"))
    account = asked.console.accounts.from_issuer(
        issuer=_ISSUER, subject=_ISSUER, name="researcher", role=Role.RESEARCHER, address=asked.address
    )
    answer = RedirectResponse("/", 303)
    asked.begin_session(answer, account)
    return answer
