"""A small OpenID provider: Authlib's server side over real HTTP, with the faults that a test asks for."""

from __future__ import annotations

import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from authlib.oauth2 import AuthorizationServer, OAuth2Request
from authlib.oauth2.rfc6749 import ClientMixin, OAuth2Payload, grants
from authlib.oauth2.rfc6750 import BearerTokenGenerator
from authlib.oauth2.rfc7636 import CodeChallenge
from authlib.oidc.core import AuthorizationCodeMixin, UserInfo
from authlib.oidc.core.grants import OpenIDCode
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from joserfc import jwt
from joserfc.jwk import OctKey, RSAKey
from starlette.requests import Request

from shared.http.serving import listen, place_at

CLIENT, SECRET = "silotune console", "a secret of the client"


@dataclass
class Client(ClientMixin):
    """The console, as the provider knows it."""

    redirect_uris: list[str]

    def get_client_id(self) -> str:
        return CLIENT

    def get_default_redirect_uri(self) -> str:
        return self.redirect_uris[0]

    def get_allowed_scope(self, scope: str) -> str:
        return scope

    def check_redirect_uri(self, redirect_uri: str) -> bool:
        return redirect_uri in self.redirect_uris

    def check_client_secret(self, client_secret: str) -> bool:
        return client_secret == SECRET

    def check_endpoint_auth_method(self, method: str, endpoint: str) -> bool:
        return method == "client_secret_basic"

    def check_response_type(self, response_type: str) -> bool:
        return response_type == "code"

    def check_grant_type(self, grant_type: str) -> bool:
        return grant_type == "authorization_code"


@dataclass
class Code(AuthorizationCodeMixin):
    """A code that was given out."""

    code: str
    user: dict[str, Any]
    redirect_uri: str
    scope: str
    nonce: str | None
    code_challenge: str | None
    code_challenge_method: str | None
    auth_time: int = field(default_factory=lambda: int(time.time()))

    def get_redirect_uri(self) -> str:
        return self.redirect_uri

    def get_scope(self) -> str:
        return self.scope

    def get_nonce(self) -> str | None:
        return self.nonce

    def get_auth_time(self) -> int:
        return self.auth_time

    def get_acr(self) -> None:
        return None

    def get_amr(self) -> None:
        return None


class _Payload(OAuth2Payload):
    def __init__(self, values: dict[str, str]) -> None:
        self._values = values

    @property
    def data(self) -> dict[str, str]:
        return self._values

    @property
    def datalist(self) -> defaultdict[str, list[str]]:
        return defaultdict(list, {key: [value] for key, value in self._values.items()})


class _Asked(OAuth2Request):
    def __init__(self, request: Request, form: dict[str, str]) -> None:
        super().__init__(request.method, str(request.url), headers=request.headers)
        self.payload = _Payload({**request.query_params, **form})
        self._form, self._query = form, dict(request.query_params)

    @property
    def args(self) -> dict[str, str]:
        return self._query

    @property
    def form(self) -> dict[str, str]:
        return self._form


class OpenId(AuthorizationServer):
    """The provider.

    Attributes:
        user: claims of whoever is signed in there; `sub` and the rest.
        more: claims that take the place of the right ones in a token.
        sign_by: "own", "stranger" (a key that it does not publish), "none" or "secret" (HS256 by the client's secret).
        asked: queries of the authorization endpoint.
    """

    def __init__(self) -> None:
        super().__init__()
        self.address = ""
        self.named = ""
        self.client = Client([])
        self.user: dict[str, Any] = {}
        self.more: dict[str, Any] = {}
        self.sign_by = "own"
        self.asked: list[dict[str, str]] = []
        self.codes: dict[str, Code] = {}
        self.key = RSAKey.generate_key(2048, parameters={"kid": "1"})
        self.stranger = RSAKey.generate_key(2048, parameters={"kid": "1"})
        self.register_token_generator("default", BearerTokenGenerator(lambda *_, **__: secrets.token_urlsafe(20)))
        self.register_grant(_grant(self), [_openid(self), CodeChallenge(required=True)])

    def query_client(self, client_id: str) -> Client | None:
        return self.client if client_id == CLIENT else None

    def save_token(self, token: dict[str, Any], request: OAuth2Request) -> None:
        """It keeps none."""

    def send_signal(self, name: str, *args: Any, **kwargs: Any) -> None:
        """Nobody listens."""

    def create_oauth2_request(self, request: OAuth2Request) -> OAuth2Request:
        return request

    def handle_response(self, status: int, body: Any, headers: Any) -> Response:
        if isinstance(body, dict):
            return JSONResponse(body, status, headers=dict(headers))
        return Response(body, status, headers=dict(headers))


def _grant(server: OpenId) -> type:
    class CodeGrant(grants.AuthorizationCodeGrant):  # type: ignore[misc]
        TOKEN_ENDPOINT_AUTH_METHODS = ["client_secret_basic"]

        def save_authorization_code(self, code: str, request: OAuth2Request) -> None:
            data = request.payload.data
            server.codes[code] = Code(
                code,
                dict(request.user),
                data["redirect_uri"],
                data["scope"],
                data.get("nonce"),
                data.get("code_challenge"),
                data.get("code_challenge_method"),
            )

        def query_authorization_code(self, code: str, client: Client) -> Code | None:
            return server.codes.get(code)

        def delete_authorization_code(self, authorization_code: Code) -> None:
            del server.codes[authorization_code.code]

        def authenticate_user(self, authorization_code: Code) -> dict[str, Any]:
            return authorization_code.user

    return CodeGrant


def _openid(server: OpenId) -> OpenIDCode:
    class OpenIdToken(OpenIDCode):  # type: ignore[misc]
        def exists_nonce(self, nonce: str, request: OAuth2Request) -> bool:
            return False

        def generate_user_info(self, user: dict[str, Any], scope: str) -> UserInfo:
            return UserInfo(**user)

        def encode_id_token(self, token: dict[str, Any], request: OAuth2Request) -> str:
            now = int(time.time())
            claims = {"iss": server.named, "aud": CLIENT, "iat": now, "exp": now + 300}
            claims |= self.get_authorization_code_claims(request.authorization_code)
            claims |= self.generate_user_info(request.user, "") | server.more
            claims = {name: value for name, value in claims.items() if value is not None}
            if server.sign_by == "none":
                return jwt.encode({"alg": "none"}, claims, OctKey.import_key("x"), ["none"])
            if server.sign_by == "secret":
                return jwt.encode({"alg": "HS256"}, claims, OctKey.import_key(SECRET), ["HS256"])
            key = server.key if server.sign_by == "own" else server.stranger
            return jwt.encode({"alg": "RS256", "kid": "1"}, claims, key, ["RS256"])

    return OpenIdToken()


def _application(server: OpenId) -> FastAPI:
    app = FastAPI(openapi_url=None)

    @app.get("/.well-known/openid-configuration")
    def discovery() -> dict[str, str]:
        places = {"authorization_endpoint": "authorize", "token_endpoint": "token", "jwks_uri": "keys"}
        return {"issuer": server.named, **{name: f"{server.address}/{path}" for name, path in places.items()}}

    @app.get("/keys")
    def keys() -> dict[str, Any]:
        return {"keys": [server.key.as_dict(private=False)]}

    @app.get("/authorize")
    def authorize(request: Request) -> Response:
        server.asked.append(dict(request.query_params))
        asked = _Asked(request, {})
        return server.create_authorization_response(asked, grant_user=server.user)

    @app.post("/token")
    async def token(request: Request) -> Response:
        form = {key: str(value) for key, value in (await request.form()).items()}
        return server.create_token_response(_Asked(request, form))

    return app


@contextmanager
def provider() -> Iterator[OpenId]:
    """Run a provider on a free port of loopback."""
    server, place = OpenId(), place_at("127.0.0.1", 0, None, None)
    listener = listen(place)
    server.address = server.named = f"http://127.0.0.1:{listener.getsockname()[1]}"
    running = uvicorn.Server(uvicorn.Config(_application(server), log_config=None, lifespan="off"))
    thread = threading.Thread(target=lambda: running.run(sockets=[listener]), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        running.should_exit = True
        thread.join(20)
        listener.close()
