"""Connections on which nothing comes, or slowly, or too many: nobody else is shut out."""

from __future__ import annotations

import resource
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from shared.http import serving as served
from shared.http.serving import place_at
from shared.service.machine import raise_descriptor_limit
from shared.web.accounts.accounts import Accounts
from tests.client.console.conftest import Serving
from tests.client.console.homes import make_home
from tests.client.console.test_start import certificate

HEAD = b"GET /sign-in HTTP/1.1\r\nHost: 127.0.0.1\r\n"
FORM = b"POST /sign-in HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n"


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("REQUEST_SECONDS", 0.6), ("HANDSHAKE_SECONDS", 0.6), ("MOST_OF_AN_ADDRESS", 10)):
        monkeypatch.setattr(served, name, value)


@pytest.fixture
def connect(serving: Serving) -> Iterator[Callable[..., socket.socket]]:
    opened = []
    port = int(serving.address.rpartition(":")[2])

    def connect(port: int = port, source: str = "127.0.0.1") -> socket.socket:
        opened.append(socket.create_connection(("127.0.0.1", port), timeout=10, source_address=(source, 0)))
        return opened[-1]

    yield connect
    for one in opened:
        one.close()


def ended(connection: socket.socket) -> bool:
    """Wait for the other side to end a connection, without an answer that counts."""
    try:
        while connection.recv(4096):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


def test_idle_connections_shut_nobody_out(serving: Serving, connect: Callable[..., socket.socket]) -> None:
    """All who come through one gateway, or one ssh -L, are one address; who asks has a place before who only holds one."""
    with httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.3"), base_url=serving.address) as client:
        assert client.get("/sign-in").status_code == 200
        held = [connect(source="127.0.0.3") for _ in range(15)]
        assert client.get("/sign-in").status_code == 200, "a connection that was used stays"
        with httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.3"), base_url=serving.address) as other:
            assert other.get("/sign-in").status_code == 200
    assert all(ended(one) for one in held[:6])


def test_an_address_has_so_many_connections(serving: Serving, connect: Callable[..., socket.socket]) -> None:
    held = [connect(source="127.0.0.2") for _ in range(40)]
    assert serving.browser().get("/sign-in").status_code == 200, "another address is not shut out"
    began = time.monotonic()
    assert all(ended(one) for one in held[10:])
    assert time.monotonic() - began < 5
    assert all(ended(one) for one in held), "the others end when no request comes"
    with httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.2"), base_url=serving.address) as client:
        assert client.get("/sign-in").status_code == 200, "and then the address has places again"


@pytest.mark.parametrize("first", [b"", HEAD, FORM, HEAD + b"\r\n"])
def test_a_slow_request_ends(connect: Callable[..., socket.socket], first: bytes) -> None:
    """Byte by byte, in its head, its body, or after an answer, the deadline is not put off."""
    connection, began = connect(), time.monotonic()
    connection.sendall(first)
    with suppress(ConnectionError):
        while time.monotonic() < began + 5:
            connection.sendall(b"a")
            time.sleep(0.1)
    assert time.monotonic() - began < 5


def test_an_answer_may_take_longer(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    sign_in, browser = Accounts.sign_in, serving.browser()
    token = browser.token()

    def slow(*args: Any, **options: Any) -> object:
        time.sleep(1)
        return sign_in(*args, **options)

    monkeypatch.setattr(Accounts, "sign_in", slow)
    assert browser.post("/sign-in", csrf_token=token, name="x", code="1").status_code == 401


def test_tls_that_is_not_begun_ends(
    serve: Callable[..., Serving], connect: Callable[..., socket.socket], tmp_path: Path
) -> None:
    place = place_at("127.0.0.1", 0, *certificate(tmp_path, "127.0.0.1"))
    port = int(serve(make_home(tmp_path), place).address.rpartition(":")[2])
    assert ended(connect(port))
    trusting = ssl.create_default_context(cafile=str(tmp_path / "console.crt"))
    assert httpx.get(f"https://127.0.0.1:{port}/sign-in", verify=trusting).status_code == 200


def test_all_descriptors_are_used() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, soft), hard))
    try:
        raise_descriptor_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
