"""Requests that are not answered: one shape for all, that of OpenAI, so that its client understands them."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import Response

from shared.http.problems import problem


class Refused(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        code: one word of a short list, for programs.
        message: what was found, what was expected, what to do; for whoever asked, and for no log.
        param: which key of the request it is about.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(code)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> bytes:
        """As JSON."""
        return problem(self.status, self.code, self.message, self.param)

    def response(self) -> Response:
        """Return the answer."""
        return Response(self.body, self.status, self.headers, media_type="application/json")


def busy(code: str, message: str, seconds: int, status: int = 503) -> Refused:
    """Return a refusal with the time to come again."""
    return Refused(status, code, message, headers={"retry-after": str(seconds)})
