"""What whoever asks is told of a request that cannot be answered: one shape, that of OpenAI, so that its client understands it.

Guarantees (tests: tests/server/serving/test_framing.py)
    * A request of which two readers could see different ends is refused and its connection closed (RFC 9112, 6.1), by whatever
      parser it was read (test_two_lengths_are_refused).
    * A request that is none of HTTP is answered in the same shape (test_what_is_no_request_is_told_in_json).
"""

from __future__ import annotations

import json

from shared.http.asgi import App, Message, Receive, Send

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def problem(status: int, code: str, message: str, param: str | None = None) -> bytes:
    """Return the body of an error.

    Args:
        status: of HTTP.
        code: one word of a short list, for programs.
        message: for people.
        param: which key of the request it is about.
    """
    kind = "server_error" if status >= 500 else _TYPES.get(status, "invalid_request_error")
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}}).encode()


def malformed(reason: str) -> bytes:
    """Return the whole answer to what is no request of HTTP, or could be read as two.

    Args:
        reason: of the parser.
    """
    message = (
        f"this is no request of HTTP/1.1 that can be read ({reason.rstrip('.')}); check the client, or what is between."
    )
    body = problem(400, "malformed", message)
    head = (
        "HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nCache-Control: no-store\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


def framed(app: App) -> App:
    """Return the application; a request that states its length twice, in two ways, is answered here."""

    async def checked(scope: Message, receive: Receive, send: Send) -> None:
        names = {name for name, _ in scope.get("headers", ())}
        if not {b"content-length", b"transfer-encoding"} <= names:
            await app(scope, receive, send)
            return
        body = problem(
            400,
            "malformed",
            "the request has Content-Length and Transfer-Encoding; send one of them (RFC 9112, 6.1).",
        )
        headers = [
            (b"content-type", b"application/json"),
            (b"cache-control", b"no-store"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        await send({"type": "http.response.start", "status": 400, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return checked
