"""An OpenID provider: its discovery, the way there, and what the token that comes back says.

Formal guarantees (tests: tests/client/console/test_oidc.py, against a real provider)
    * A token counts only if the provider signed it with a key of its own (no symmetric one, not "none"), for this console, not
      expired, with the nonce of this very sign-in (test_tokens_that_are_not_for_this_sign_in).
    * An answer counts only in the browser that began the sign-in, once, within ten minutes (test_an_answer_of_another_browser).
    * The provider is spoken to over TLS only, its discovery names itself, and no redirect is followed
      (test_a_provider_that_names_another).
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import httpx
from authlib.integrations.httpx_client import OAuth2Client
from authlib.oauth2.rfc7636 import create_s256_code_challenge
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet

from shared.errors import SilotuneError
from shared.web.oidc.settings import OidcConfig, is_protected

_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
_SECONDS = 10.0
_KEPT_SECONDS = 3600
_LEEWAY = 60  # seconds between clocks


class ProviderError(SilotuneError):
    """The provider cannot be reached, or what it says does not hold."""


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A sign-in on its way: what the browser keeps, sealed, until it comes back.

    Attributes:
        state, nonce, verifier: random, of 256 bits each.
    """

    state: str
    nonce: str
    verifier: str


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
        self._lock = threading.Lock()
        self._kept: tuple[int, Mapping[str, Any], KeySet] | None = None

    def begin(self, back: str) -> tuple[str, Begun]:
        """Return where to send the browser, which shall come back to `back`, and what to keep until then.

        Raises:
            ProviderError: it cannot be reached.
        """
        told, _ = self._discovered()
        begun = Begun(
            state=secrets.token_urlsafe(32), nonce=secrets.token_urlsafe(32), verifier=secrets.token_urlsafe(48)
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
        address = told["authorization_endpoint"]
        return f"{address}{'&' if '?' in address else '?'}{urlencode(asked)}", begun

    def finish(self, begun: Begun, *, code: str, back: str) -> Mapping[str, Any]:
        """Return the claims of the token that a code stands for, checked.

        Raises:
            ProviderError: the provider does not take the code, or its token does not hold.
        """
        told, _ = self._discovered()
        try:
            with OAuth2Client(
                self.config.client_id,
                self._secret,
                token_endpoint_auth_method="client_secret_basic" if self._secret else "none",
                timeout=_SECONDS,
                follow_redirects=False,
            ) as client:
                found = client.fetch_token(
                    told["token_endpoint"],
                    grant_type="authorization_code",
                    code=code,
                    redirect_uri=back,
                    code_verifier=begun.verifier,
                )
        except Exception as error:  # of authlib, httpx, or JSON; their texts may hold the code
            raise ProviderError(f"the provider did not take the code ({type(error).__name__}).") from None
        return self._checked(found.get("id_token"), begun.nonce)

    def _checked(self, token: object, nonce: str) -> Mapping[str, Any]:
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
        with self._lock:
            if anew or self._kept is None or self._now() - self._kept[0] > _KEPT_SECONDS:
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
                try:
                    keys = KeySet.import_key_set(_fetched(told["jwks_uri"]))  # type: ignore[arg-type]
                except (JoseError, ValueError, TypeError, KeyError):
                    raise ProviderError("the provider's keys cannot be read.") from None
                self._kept = (self._now(), told, keys)
            return self._kept[1], self._kept[2]


def _fetched(address: str) -> dict[str, Any]:
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
