"""Answers that nobody reads: their connections end, so that they keep nobody else from asking."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from server.serving.models import Plan
from shared.http import serving as served
from shared.http.asgi import Message, Receive, Send
from shared.http.serving import listen, make_server, place_at
from tests.server.serving.live import live

ASK = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n%s\r\n"


def never_ending(port: int) -> None:
    """Ask on and on, and read nothing."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", port))
        connection.settimeout(0.5)
        end = time.monotonic() + 30
        while time.monotonic() < end:
            try:
                connection.sendall(ASK % b"" * 100)
            except TimeoutError:
                continue
            except OSError:
                return
    raise AssertionError("it was still waited for")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[served._Connection]:
    """All connections that are made."""
    found: list[served._Connection] = []
    real = served._Connection.connection_made

    def noted(self: served._Connection, transport: object) -> None:
        found.append(self)
        real(self, transport)  # type: ignore[arg-type]

    monkeypatch.setattr(served._Connection, "connection_made", noted)
    return found


def wait_for(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("answer_seconds", [1, 30], ids=["the answer takes too long", "the reader does"])
def test_whoever_reads_nothing_is_cut_off(
    writer_run: Path, made: list[served._Connection], answer_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.serving.application.openapi", lambda: "x" * (1 << 20))
    bounds = {"answer_seconds": answer_seconds, "request_seconds": 1}
    with live(str(writer_run), writer_run.parent, plan=Plan("torch"), **bounds) as found:
        never_ending(found.port)
        assert found.ask("GET", "/healthz").status_code == 200
        wait_for(lambda: made[0] not in made[0].connections)


def test_a_last_answer_that_nobody_reads_is_waited_for_no_longer(
    writer_run: Path, made: list[served._Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.serving.application.openapi", lambda: "x" * (16 << 20))
    with (
        live(str(writer_run), writer_run.parent, plan=Plan("torch"), request_seconds=1) as found,
        socket.create_connection(("127.0.0.1", found.port)) as connection,
    ):
        connection.sendall(ASK % b"Connection: close\r\n")
        wait_for(lambda: bool(made) and made[0].transport is not None and made[0].transport.is_closing())
        wait_for(lambda: made[0] not in made[0].connections)


def test_whoever_reads_slowly_reads_to_the_end(writer_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 24 << 20
    monkeypatch.setattr("server.serving.application.openapi", lambda: "x" * size)
    with (
        live(str(writer_run), writer_run.parent, plan=Plan("torch"), request_seconds=2) as found,
        socket.create_connection(("127.0.0.1", found.port)) as connection,
    ):
        connection.sendall(ASK % b"Connection: close\r\n")
        read, end = 0, time.monotonic() + 3
        while part := connection.recv(64 << 10):
            read += len(part)
            if time.monotonic() < end:
                time.sleep(0.01)
    assert read > size


def test_whoever_read_slowly_once_is_not_cut_off_later() -> None:
    """A long stream: the wait for a slow reader ends when it has read on."""
    size, ended = 32 << 20, b"the end"

    async def stream(scope: Message, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"connection", b"close")]})
        await send({"type": "http.response.body", "body": b"x" * size, "more_body": True})
        await send({"type": "http.response.body", "body": b"y", "more_body": True})  # when it was read
        await asyncio.sleep(2)
        await send({"type": "http.response.body", "body": ended})

    place = place_at("127.0.0.1", 0, None, None)
    bounds = served.Connections(of_an_address=10, together=10, request_seconds=0.5)
    with listen(place) as listener:
        server = make_server(stream, place, connections=bounds)
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
        thread.start()
        try:
            with socket.create_connection(listener.getsockname()[:2], timeout=20) as connection:
                connection.sendall(ASK % b"")
                read, slow = b"", time.monotonic() + 0.8
                while part := connection.recv(256 << 10):
                    read += part
                    if time.monotonic() < slow:
                        time.sleep(0.02)
        finally:
            server.should_exit = True
            thread.join(20)
    assert len(read) > size
    assert ended in read[-100:]
