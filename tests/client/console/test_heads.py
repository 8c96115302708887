"""What comes instead of a request: it is refused as JSON, nothing of it is logged or counts, and it is not kept."""

from __future__ import annotations

import json
import logging
import socket
import time
from contextlib import suppress

import pytest

from tests.client.console.conftest import Serving

POST = b"POST /sign-in HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/x-www-form-urlencoded\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


def answered(serving: Serving, sent: bytes) -> bytes:
    """Send it; return everything that comes until the other side ends, or nothing more comes."""
    with socket.create_connection(("127.0.0.1", int(serving.address.rpartition(":")[2])), timeout=3) as connection:
        connection.sendall(sent)
        found = b""
        with suppress(OSError):
            while part := connection.recv(65536):
                found += part
        return found


@pytest.mark.parametrize(
    "sent",
    [
        POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
        POST + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\na=bcd",
        POST + b"Content-Length: +4\r\n\r\na=bc",
        POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        POST + b"Content-Length : 4\r\n\r\na=bc",
        POST + b"A: \x00\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 marker",
        b"marker\r\n\r\n",
    ],
)
def test_what_could_be_read_in_two_ways_is_no_request(
    serving: Serving, caplog: pytest.LogCaptureFixture, sent: bytes
) -> None:
    caplog.set_level(logging.WARNING)
    head, _, body = answered(serving, sent).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"connection: close" in head.lower()
    assert json.loads(body)["error"]["code"] == "malformed"
    assert not caplog.records, "strangers do not fill the log"


@pytest.mark.parametrize("part", [b"-1\r\n\r\n", b"1\r\nab\r\n", b"0x1\r\na\r\n"])
def test_a_body_that_is_none_ends_the_connection(serving: Serving, part: bytes) -> None:
    began = time.monotonic()
    assert answered(serving, CHUNKED + part)[:12] in (b"", b"HTTP/1.1 400")
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (b"GET / HTTP/1.1\r\n", b"a: " + b"b" * 8000 + b"\r\n"),
        (b"GET / HTTP/1.1\r\na: ", b"b" * 8000),
        (b"GET /", b"b" * 8000),
        (CHUNKED + b"1\r\na\r\n1;", b"b" * 8000),
        (CHUNKED + b"1\r\na\r\n0\r\n", b"a: " + b"b" * 8000 + b"\r\n"),
    ],
)
def test_what_stands_around_a_body_is_bounded(serving: Serving, first: bytes, then: bytes) -> None:
    port = int(serving.address.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(first)
        with pytest.raises(OSError):  # noqa: PT012 (which of them is refused depends on the system's buffers)
            for _ in range(100):
                connection.sendall(then)
                time.sleep(0.01)


def test_a_large_body_is_no_large_head(serving: Serving) -> None:
    parts = b"".join(b"10\r\n" + b"a" * 16 + b"\r\n" for _ in range(4000))
    assert b"malformed" not in answered(serving, CHUNKED + parts + b"0\r\n\r\n")


def test_headers_after_the_body_are_none(serving: Serving) -> None:
    """Who asks, and for whom, is judged by the head; a second Host there would be refused."""
    plain = answered(serving, CHUNKED + b"3\r\na=b\r\n0\r\n\r\n").split(b"\r\n")[0]
    assert answered(serving, CHUNKED + b"3\r\na=b\r\n0\r\nHost: elsewhere\r\n\r\n").split(b"\r\n")[0] == plain


@pytest.mark.parametrize(
    "lengths", [b"Content-Length: 3\r\n\r\na=b", b"Transfer-Encoding: chunked\r\n\r\n3\r\na=b\r\n0\r\n\r\n"]
)
@pytest.mark.parametrize("pause", [0.0, 0.2])
def test_who_offers_another_protocol_is_answered_in_this_one(serving: Serving, lengths: bytes, pause: float) -> None:
    """Java's client and `curl --http2` do; a body that was taken for the next request would be answered as one."""
    head, _, body = lengths.partition(b"\r\n\r\n")
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
    with socket.create_connection(("127.0.0.1", int(serving.address.rpartition(":")[2])), timeout=2) as connection:
        connection.sendall(POST + upgrade + head + b"\r\n\r\n")
        time.sleep(pause)
        connection.sendall(body)
        found = b""
        with suppress(OSError):
            while part := connection.recv(65536):
                found += part
    assert found.count(b"HTTP/1.1 ") == 1
    assert found.split(b"\r\n")[0] == answered(serving, POST + lengths).split(b"\r\n")[0]


def test_garbage_behind_a_request_spoils_no_answer(serving: Serving) -> None:
    found = answered(serving, b"GET /sign-in HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nmarker\r\n\r\n")
    assert found.startswith(b"HTTP/1.1 200 ")
    assert b"HTTP/1.1 400 " in found.partition(b"</html>")[2]
