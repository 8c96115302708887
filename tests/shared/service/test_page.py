"""Pages over real sockets: what is answered, to whom, and that nothing ends or fills the process."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from pydantic import BaseModel, ValidationError

import shared.service.page as page_module
from shared.service.page import Listen, Page, Pages

HERE = "127.0.0.1"


class Served:
    """Pages on a free port of loopback; a test says what is made."""

    def __init__(self) -> None:
        self.made = 0
        self.make: Callable[[], Page] = lambda: Page(200, "text/plain", b"all well\n")
        self.pages = Pages(f"{HERE}:0", {"/metrics": self._made})
        assert self.pages.told is not None
        self.port = int(self.pages.told.removesuffix("/metrics").rpartition(":")[2])

    def _made(self) -> Page:
        self.made += 1
        return self.make()

    def connect(self) -> socket.socket:
        return socket.create_connection((HERE, self.port), timeout=10)

    def send(self, request: bytes) -> bytes:
        """Return all that comes back."""
        with self.connect() as connection:
            connection.sendall(request)
            answer = b""
            with contextlib.suppress(ConnectionError):
                while part := connection.recv(65536):
                    answer += part
            return answer

    def get(self, path: str = "/metrics", *, host: str = "localhost", method: str = "GET") -> tuple[int, bytes]:
        head, _, body = self.send(f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()).partition(b"\r\n\r\n")
        return int(head.split(b" ")[1]), body


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(page_module, "_REQUEST_SECONDS", 0.5)
    made = Served()
    yield made
    made.pages.close()


def test_a_page_is_answered_with_its_length_and_the_connection_closed(served: Served) -> None:
    head, _, body = served.send(b"GET /metrics?x=1 HTTP/1.1\r\nHost: localhost:1\r\n\r\n").partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "HTTP/1.1 200 OK"
    assert {"Content-Length: 9", "Connection: close", "Cache-Control: no-store"} <= set(lines)
    assert body == b"all well\n"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9492", "127.0.0.1:1", "127.3.2.1", "[::1]:9492", "[::1]"])
def test_loopback_is_called_by_its_names(served: Served, host: str) -> None:
    assert served.get(host=host)[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example:9492",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "10.0.0.1",
        "",
        "[::2]",
        "169.254.169.254",
    ],
)
def test_a_name_that_a_strangers_dns_may_give_to_this_machine_is_not_answered(served: Served, host: str) -> None:
    assert served.get(host=host)[0] == 421
    assert served.made == 0


@pytest.mark.parametrize(
    ("request_line", "status"),
    [("POST /metrics", 405), ("HEAD /metrics", 405), ("GET /", 404), ("GET /metrics/..", 404), ("GET /jobs", 404)],
)
def test_nothing_else_is_there(served: Served, request_line: str, status: int) -> None:
    method, _, path = request_line.partition(" ")
    assert served.get(path, method=method)[0] == status
    assert served.made == 0


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /metrics\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
        b"GET /metrics HTTP/2\r\nHost: localhost\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"Host: localhost\r\n\r\n",
    ],
)
def test_what_is_no_request_is_refused(served: Served, request_bytes: bytes) -> None:
    assert served.send(request_bytes).startswith(b"HTTP/1.1 400 ")


def test_a_request_without_end_and_one_that_never_comes_are_dropped(served: Served) -> None:
    assert served.send(b"GET /metrics HTTP/1.1\r\n" + b"x" * 30_000) == b""
    started = time.monotonic()
    with served.connect() as slow, served.connect() as silent:
        for connection in (slow, silent):
            connection.settimeout(5)
        for byte in b"GET /metrics HTTP/1.1\r\nHost: localhost":  # each byte is no new time
            try:
                slow.sendall(bytes([byte]))
            except ConnectionError:
                break
            time.sleep(0.02)
        with contextlib.suppress(ConnectionError):  # its end may be a reset
            assert slow.recv(100) == b""
        assert silent.recv(100) == b""
    assert time.monotonic() - started < 3
    assert served.get()[0] == 200


@pytest.mark.parametrize("said", [b"", b"GET /metrics HTTP/1.1\r\nHost: local"])
def test_who_says_nothing_holds_nobody_up(served: Served, monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    """More of them than connections are kept; each would be waited for for a minute."""
    monkeypatch.setattr(page_module, "_REQUEST_SECONDS", 60.0)
    silent = []
    for number in range(3 * page_module._WAITING):
        silent.append(served.connect())
        silent[-1].sendall(said)
        if number % 16 == 15:
            started = time.monotonic()
            assert served.get() == (200, b"all well\n")
            assert time.monotonic() - started < 2
    silent[-1].sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"[len(said) :])
    assert silent[-1].recv(100).startswith(b"HTTP/1.1 200 "), "who came last is still listened to"
    with contextlib.suppress(ConnectionError):
        assert silent[0].recv(100) == b"", "who has waited longest was dropped"
    for connection in silent:
        connection.close()


def test_who_does_not_read_holds_nobody_up_for_longer_than_a_request_may_take(served: Served) -> None:
    served.make = lambda: Page(200, "text/plain", b"x" * 30_000_000)
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            deaf = stack.enter_context(served.connect())
            deaf.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(0.1)
        started = time.monotonic()
        assert served.get("/")[0] == 404
        assert time.monotonic() - started < 3


def test_pages_that_are_closed_leave_no_thread(served: Served) -> None:
    silent = served.connect()
    assert served.get()[0] == 200
    served.pages.close()
    assert silent.recv(100) == b""
    silent.close()
    deadline = time.monotonic() + 10
    while [one for one in threading.enumerate() if one.name.startswith("metrics")] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [one.name for one in threading.enumerate() if one.name.startswith("metrics")]


def test_many_who_ask_take_a_few_threads_and_one_page(served: Served) -> None:
    before = threading.active_count()
    silent = [served.connect() for _ in range(30)]
    assert threading.active_count() == before
    for connection in silent:
        connection.close()
    answers = [served.get()[0] for _ in range(20)]
    assert set(answers) == {200}
    assert served.made <= 5, "it is made at most once a second"


def test_a_page_that_cannot_be_made_ends_nothing(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> Page:
        raise ZeroDivisionError

    good, served.make = served.make, broken
    assert [served.get()[0] for _ in range(3)] == [500] * 3
    assert caplog.text.count("a page could not be made") == 1
    served.make = good
    assert served.get() == (200, b"all well\n")


def test_a_busy_port_is_said_and_ends_nothing(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    second = Pages(f"{HERE}:{served.port}", {})
    assert second.told is not None
    assert second.told.startswith(
        f"not served: 127.0.0.1 port {served.port} cannot be listened on (Address already in use"
    )
    assert f"metrics are {second.told}" in caplog.text
    second.close()
    assert served.get()[0] == 200


def test_a_closed_port_is_free_at_once(served: Served) -> None:
    assert served.get()[0] == 200
    served.pages.close()
    again = Pages(f"{HERE}:{served.port}", {})
    assert again.told == served.pages.told
    again.close()


def test_pages_that_are_off_listen_nowhere() -> None:
    pages = Pages("off", {})
    assert pages.told is None
    pages.close()


def test_an_address_beyond_loopback_is_warned_of_and_answers_to_every_name(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    pages = Pages("0.0.0.0:0", {"/metrics": lambda: Page(200, "text/plain", b"x")})
    try:
        assert "whoever reaches that port reads them, without a password" in caplog.text
        assert pages.told is not None
        port = int(pages.told.removesuffix("/metrics").rpartition(":")[2])
        with socket.create_connection((HERE, port), timeout=10) as connection:
            connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: monitor.example.org\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
    finally:
        pages.close()


def test_a_process_without_descriptors_goes_on_answering_when_it_has_some(served: Served) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    client = socket.socket()
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 5, hard))
    taken = []
    with contextlib.suppress(OSError):
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    try:
        client.settimeout(10)
        client.connect((HERE, served.port))  # the kernel takes it; the process cannot
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        before = time.process_time()
        time.sleep(0.2)
        assert time.process_time() - before < 0.15, "it does not spin"
    finally:
        for handle in taken:
            os.close(handle)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert client.recv(100).startswith(b"HTTP/1.1 200 ")
    client.close()


class _Config(BaseModel):
    listen: Listen


@pytest.mark.parametrize("text", ["off", "127.0.0.1:9492", "127.0.0.1:0", "[::1]:9492", "0.0.0.0:65535"])
def test_addresses_and_off_are_settings(text: str) -> None:
    assert _Config(listen=text).listen == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "9492",
        "127.0.0.1",
        "localhost:9492",
        "::1:9492",
        "127.0.0.1:65536",
        "127.0.0.1:-1",
        "127.0.0.1:١",
        "[1.2.3.4]:1",
    ],
)
def test_anything_else_is_no_setting(text: str) -> None:
    with pytest.raises(ValidationError, match="expected ADDRESS:PORT"):
        _Config(listen=text)
