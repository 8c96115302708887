"""Signing in by an OpenID provider: the way there, and the way back."""

from __future__ import annotations

import hashlib
import hmac
import json
from dataclasses import asdict
from typing import Annotated

from fastapi import Query
from fastapi.responses import RedirectResponse, Response

from shared.errors import TrustError
from shared.web.accounts.accounts import Account, Refused
from shared.web.accounts.attempts import TooManyAttempts
from shared.web.accounts.passwords import Unsuitable
from shared.web.accounts.sessions import PROVEN_SECONDS
from shared.web.asked import MOST_PLACE, Asked, Denied, Here, Routes, own_path
from shared.web.oidc.provider import Begun, Provider, ProviderError
from shared.web.roles import Action, Role

ROUTES = Routes()

_BACK = "/sign-in/elsewhere/back"
_SECONDS = 600
_CONTEXT = "sign-in elsewhere"

Text = Annotated[str, Query(max_length=4096)]


@ROUTES.page("/sign-in/elsewhere", Action.BE_A_GUEST)
def leave(
    asked: Here, place: Annotated[str, Query(alias="next", max_length=MOST_PLACE)] = "/", prove: bool = False
) -> Response:
    """Send the browser to the provider; to prove something, its person signs in there anew."""
    address, begun = _provider(asked).begin(_back(asked), proving=prove)
    answer = RedirectResponse(address, 303)
    kept = asdict(begun) | {"place": own_path(place), "until": asked.console.now() + _SECONDS}
    sealed = asked.console.accounts.seal.seal(json.dumps(kept).encode(), context=_CONTEXT).hex()
    # The provider's page leads back here, so this one cookie has to come along from another site.
    answer.set_cookie(
        asked.console.cookie("elsewhere"),
        sealed,
        max_age=_SECONDS,
        path="/",
        secure=asked.console.secure,
        httponly=True,
        samesite="lax",
    )
    return answer


@ROUTES.page(_BACK, Action.BE_A_GUEST)
def come_back(asked: Here, code: Text = "", state: Text = "") -> Response:
    """Sign in whoever the provider vouches for, if they have a role here."""
    provider, accounts = _provider(asked), asked.console.accounts
    begun, place = _begun(asked, state)
    try:
        accounts.attempts.begin(account=None, address=asked.address, purpose="elsewhere")
        claims = provider.finish(begun, code=code, back=_back(asked))
        role = provider.config.role_of(claims)
        if role is None:
            raise Denied(403, "no_role")
        # Whom the provider just knows from before has proved nothing: the browser may have been left open.
        proven = provider.proven_at(claims) if begun.proving else 0
        if proven is None or (begun.proving and asked.console.now() - proven >= PROVEN_SECONDS):
            raise Denied(403, "not_proven")
        account = _account(asked, provider, claims, role)
        accounts.attempts.succeeded(account=None, address=asked.address, purpose="elsewhere")
    except TooManyAttempts:
        raise Denied(429, "wait") from None
    except Refused:
        raise Denied(403, "no_role") from None
    # A page, not a redirect: cookies of SameSite=Strict come along only from a page of this console.
    answer = asked.page("signed-in.html", place=place)
    asked.begin_session(answer, account, proven=proven)
    asked.forget(answer, "elsewhere")
    return answer


def _account(asked: Asked, provider: Provider, claims: object, role: Role) -> Account:
    found = dict(claims)  # type: ignore[call-overload]
    subject = str(found["sub"])[:300]
    name = str(found.get("preferred_username") or found.get("name") or found.get("email") or subject)[:40]
    # Whoever may choose a name there can choose one that looks like another's; digits belong to every alphabet.
    number = int(hashlib.sha256(subject.encode()).hexdigest(), 16) % 10**8
    last: Unsuitable | None = None
    for shown in (f"{name} ({number:08})", f"account {subject[:32]}"):
        try:
            return asked.console.accounts.from_issuer(
                issuer=provider.config.issuer, subject=subject, name=shown, role=role, address=asked.address
            )
        except Unsuitable as error:  # another account has the name, or it is none
            last = error
    raise ProviderError(f"the provider gives a name that cannot be used ({last}).")


def _begun(asked: Asked, state: str) -> tuple[Begun, str]:
    """Return the sign-in that this browser began, and where it wanted to go."""
    try:
        sealed = bytes.fromhex(asked.request.cookies.get(asked.console.cookie("elsewhere"), ""))
        kept = json.loads(asked.console.accounts.seal.open(sealed, context=_CONTEXT))
    except (TrustError, ValueError):
        raise Denied(403, "not_begun") from None
    if kept.pop("until") <= asked.console.now() or not hmac.compare_digest(kept["state"].encode(), state.encode()):
        raise Denied(403, "not_begun")
    place = kept.pop("place")
    return Begun(**kept), place


def _provider(asked: Asked) -> Provider:
    if asked.console.provider is None:
        raise Denied(404, "missing")
    return asked.console.provider


def _back(asked: Asked) -> str:
    scheme = "https" if asked.console.secure else "http"
    return f"{scheme}://{asked.request.headers['host']}{_BACK}"
