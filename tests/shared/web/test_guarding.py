"""By which names a console may be called."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.responses import Response

from shared.http.asgi import Message, is_named
from shared.web.asked import own_path
from shared.web.guarding import POLICY, SANDBOXED, Guarded

NAMES = {"console.hospital.example", "*.ward.example", "10.0.0.5"}


@pytest.mark.parametrize(
    "host", ["console.hospital.example", "CONSOLE.hospital.example:8470", "a.ward.example", "10.0.0.5:8470"]
)
def test_names_of_the_certificate(host: str) -> None:
    assert is_named(host, NAMES, loopback=False)


@pytest.mark.parametrize(
    "host", ["hospital.example", "ward.example", "a.b.ward.example", "localhost", "127.0.0.1", "[::1]", "", "*"]
)
def test_other_names(host: str) -> None:
    assert not is_named(host, NAMES, loopback=False)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:80", "127.8.9.1", "[::1]:80", "[::1]"])
def test_names_of_this_machine(host: str) -> None:
    assert is_named(host, (), loopback=True)
    assert not is_named(f"{host.partition(':')[0]}.evil.example", (), loopback=True)


@pytest.mark.parametrize("path", ["/", "/budget", "/releases/log?q=a%20b&page=2", "/a-b_c.d/~"])
def test_own_paths(path: str) -> None:
    assert own_path(path) == path


@pytest.mark.parametrize(
    "path", [None, "", "budget", "//x", "/\\x", "/ x", "/\nx", "http://x", "/" + "x" * 2500, "/é", "/<script>", "/\x00"]
)
def test_paths_that_may_lead_elsewhere(path: str | None) -> None:
    assert own_path(path) == "/"


@pytest.mark.parametrize("asked", [None, SANDBOXED, "default-src *", f"{SANDBOXED} allow-scripts", f"{SANDBOXED}, x"])
def test_an_answer_chooses_between_two_policies(asked: str | None) -> None:
    headers = {} if asked is None else {"content-security-policy": asked}
    sent: list[Any] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"localhost")]}
    guarded = Guarded(Response("x", headers=headers), names=(), loopback=True, secure=False)
    asyncio.run(guarded(scope, receive, send))
    told = [(name.decode(), value.decode()) for name, value in sent[0]["headers"]]
    chosen = SANDBOXED if asked == SANDBOXED else POLICY
    assert [value for name, value in told if name == "content-security-policy"] == [chosen]
    assert ("cross-origin-opener-policy" in dict(told)) is (chosen is POLICY)
