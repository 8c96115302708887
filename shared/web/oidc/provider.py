"""An OpenID provider: its discovery, the way there, and what the token that comes back says.

Formal guarantees (tests: tests/client/console/test_oidc.py, against a real provider)
    * A token counts only if the provider signed it with a key of its own (no symmetric one, not "none"), for this console, not
      expired, with the nonce of this very sign-in (test_tokens_that_are_not_for_this_sign_in).
    * An answer counts only in the browser that began the sign-in, once, within ten minutes (test_an_answer_of_another_browser).
    * The provider is spoken to over TLS only, its discovery names itself, and no redirect is followed
      (test_a_provider_that_names_another).
    * A provider that keeps silent keeps nobody else waiting: few requests wait for it, and none for half a minute after it
      failed (test_a_silent_provider_shuts_nobody_out).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from shared.errors import SilotuneError
from shared.web.oidc.settings import OidcConfig, is_protected
from shared.web.turns import Busy, Places, Turn

if TYPE_CHECKING:  # authlib, httpx and joserfc are imported where they are used: few consoles have a provider
    from joserfc.jwk import KeySet

_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
_SECONDS = 10.0
_KEPT_SECONDS, _FAILED_SECONDS = 3600, 30
_MOST_WAITING = 4
_LEEWAY = 60  # seconds between clocks


class ProviderError(SilotuneError):
    """The provider cannot be reached, or what it says does not hold."""


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A sign-in on its way: what the browser keeps, sealed, until it comes back.

    Attributes:
        state, nonce, verifier: random, of 256 bits each.
        proving: the person shall prove to be the account's, not just be known to the provider.
    """

    state: str
    nonce: str
    verifier: str
    proving: bool


class Provider:
    """One OpenID provider; safe to use from several threads.

    Args:
        config: see `OidcConfig`.
        secret: of this console as its client; None: it has none.
        now: whole seconds since 1970.
    """

    def __init__(self, config: OidcConfig, *, secret: str | None, now: Callable[[], int]) -> None:
        self.config, self.title = config, config.title
        self._secret, self._now = secret, now
        self._places = Places(_MOST_WAITING)
        self._reading = Turn(places=self._places)
        self._kept: tuple[int, Mapping[str, Any], KeySet] | None = None
        self._failed: tuple[int, str] | None = None

    def begin(self, back: str, *, proving: bool = False) -> tuple[str, Begun]:
        """Return where to send the browser, which shall come back to `back`, and what to keep until then.

        Args:
            proving: the person shall sign in there anew, also if they did not long ago.

        Raises:
            ProviderError: it cannot be reached.
        """
        from authlib.oauth2.rfc7636 import create_s256_code_challenge

        told, _ = self._discovered()
        begun = Begun(
            state=secrets.token_urlsafe(32),
            nonce=secrets.token_urlsafe(32),
            verifier=secrets.token_urlsafe(48),
            proving=proving,
        )
        asked = {
            "response_type": "code",
            "client_id": self.config.client_id,
            "redirect_uri": back,
            "scope": " ".join(self.config.scopes),
            "state": begun.state,
            "nonce": begun.nonce,
            "code_challenge": create_s256_code_challenge(begun.verifier),
            "code_challenge_method": "S256",
        }
        if proving:
            asked |= {"prompt": "login", "max_age": "0"}  # with the second a token says when the person signed in
        address = told["authorization_endpoint"]
        return f"{address}{'&' if '?' in address else '?'}{urlencode(asked)}", begun

    def finish(self, begun: Begun, *, code: str, back: str) -> Mapping[str, Any]:
        """Return the claims of the token that a code stands for, checked.

        Raises:
            ProviderError: the provider does not take the code, or its token does not hold.
        """
        from authlib.integrations.httpx_client import OAuth2Client

        told, _ = self._discovered()
        try:
            with (
                self._places,
                OAuth2Client(
                    self.config.client_id,
                    self._secret,
                    token_endpoint_auth_method="client_secret_basic" if self._secret else "none",
                    timeout=_SECONDS,
                    follow_redirects=False,
                ) as client,
            ):
                found = client.fetch_token(
                    told["token_endpoint"],
                    grant_type="authorization_code",
                    code=code,
                    redirect_uri=back,
                    code_verifier=begun.verifier,
                )
        except Busy:
            raise
        except Exception as error:  # of authlib, httpx, or JSON; their texts may hold the code
            raise ProviderError(f"the provider did not take the code ({type(error).__name__}).") from None
        return self._checked(found.get("id_token"), begun.nonce)

    def proven_at(self, claims: Mapping[str, Any]) -> int | None:
        """Return when the person of a checked token gave their password to the provider; None if it does not say so."""
        at = claims.get("auth_time")
        if not isinstance(at, int) or isinstance(at, bool) or at > self._now() + _LEEWAY:
            return None
        return min(at, self._now())

    def _checked(self, token: object, nonce: str) -> Mapping[str, Any]:
        from joserfc import jwt
        from joserfc.errors import JoseError

        if not isinstance(token, str):
            raise ProviderError("the provider gave no token that says who came.")
        registry = jwt.JWTClaimsRegistry(
            now=self._now,
            leeway=_LEEWAY,
            iss={"essential": True, "value": self.config.issuer},
            aud={"essential": True, "value": self.config.client_id},
            exp={"essential": True},
            iat={"essential": True},
            sub={"essential": True},
            nonce={"essential": True, "value": nonce},
        )
        for fresh in (False, True):  # it may sign with a key that is newer than those that were read
            _, keys = self._discovered(anew=fresh)
            try:
                claims = jwt.decode(token, keys, algorithms=list(_ALGORITHMS)).claims
                registry.validate(claims)
            except (JoseError, ValueError) as error:
                if fresh or (isinstance(error, JoseError) and error.error in ("invalid_claim", "expired_token")):
                    raise ProviderError(
                        f"the provider's token does not hold ({type(error).__name__}: {error})."
                    ) from None
                continue
            audience = claims["aud"]
            if isinstance(audience, list) and len(audience) > 1 and claims.get("azp") != self.config.client_id:
                raise ProviderError("the provider's token is for several, and not handed to this console.")
            return dict(claims)
        raise AssertionError("unreachable")

    def _discovered(self, *, anew: bool = False) -> tuple[Mapping[str, Any], KeySet]:
        kept = self._kept
        if kept is not None and not anew and (self._reading.taken or self._now() - kept[0] <= _KEPT_SECONDS):
            return kept[1], kept[2]  # what is old counts while another request reads what is new
        with self._reading:
            if self._kept is None or self._kept is kept:
                self._kept = self._read()
            return self._kept[1], self._kept[2]

    def _read(self) -> tuple[int, Mapping[str, Any], KeySet]:
        from joserfc.errors import JoseError
        from joserfc.jwk import KeySet

        if self._failed is not None and 0 <= self._now() - self._failed[0] < _FAILED_SECONDS:
            raise ProviderError(self._failed[1])
        try:
            told = self._told()
            try:
                keys = KeySet.import_key_set(_fetched(told["jwks_uri"]))  # type: ignore[arg-type]
            except (JoseError, ValueError, TypeError, KeyError):
                raise ProviderError("the provider's keys cannot be read.") from None
        except ProviderError as error:
            self._failed = (self._now(), str(error))
            raise
        return self._now(), told, keys

    def _told(self) -> Mapping[str, Any]:
        issuer = self.config.issuer.rstrip("/")
        told = _fetched(f"{issuer}/.well-known/openid-configuration")
        if told.get("issuer") != self.config.issuer:
            raise ProviderError(
                f"what answers at {issuer} calls itself {str(told.get('issuer'))[:200]!r}; the issuer in "
                "console.toml must be written exactly so."
            )
        for name in ("authorization_endpoint", "token_endpoint", "jwks_uri"):
            if not (isinstance(told.get(name), str) and is_protected(told[name])):
                raise ProviderError(f"the provider's {name} is no https:// address.")
        return told


def _fetched(address: str) -> dict[str, Any]:
    import httpx

    try:
        answer = httpx.get(address, timeout=_SECONDS, follow_redirects=False).raise_for_status()
        found = answer.json()
    except (httpx.HTTPError, ValueError) as error:
        raise ProviderError(
            f"the provider does not answer at {address} ({type(error).__name__}); try again later."
        ) from None
    if not isinstance(found, dict):
        raise ProviderError(f"what the provider says at {address} is not understood.")
    return found
