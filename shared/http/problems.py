"""What whoever asks is told of a request that cannot be answered: one shape, that of OpenAI, so that its client understands it.

Guarantees (tests: tests/server/serving/test_framing.py)
    * A request of which two readers could see different ends is refused and its connection closed (RFC 9112, 6.1;
      test_two_lengths_are_refused).
    * A request that is none of HTTP is answered in the same shape (test_what_is_no_request_is_told_in_json).
"""

from __future__ import annotations

import json

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
