"""Requests whose bytes are odd: answered in the shape of all errors, and their connections end."""

from __future__ import annotations

import json
import logging
import socket
from typing import Any

import pytest

from shared.http import problems
from shared.service.logs import sparing
from tests.server.serving.live import Live

HEAD = b"POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
BODY = b'{"texts": ["a"]}'
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
SMUGGLED = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


def told(films: Live, sent: bytes) -> tuple[list[bytes], bytes]:
    """Send bytes; return the status lines of all answers until the connection ends, and the last body."""
    with socket.create_connection(("127.0.0.1", films.port), timeout=10) as connection:
        connection.sendall(sent)
        found = b""
        while data := connection.recv(4096):
            found += data
    return [line for line in found.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")], found.rpartition(b"\r\n\r\n")[2]


@pytest.mark.parametrize("case", ["CL.TE", "TE.CL", "GET"])
def test_two_lengths_are_refused(case: str, films: Live) -> None:
    lengths = [b"Content-Length: %d\r\n" % len(CHUNKED), b"Transfer-Encoding: chunked\r\n"]
    head = HEAD.replace(b"POST /v1/predict", b"GET /v1/models") if case == "GET" else HEAD
    first = b"".join(lengths[:: -1 if case == "TE.CL" else 1])
    statuses, body = told(films, head + first + b"\r\n" + CHUNKED + SMUGGLED)
    assert statuses == [b"HTTP/1.1 400 Bad Request"], "what follows is answered by nobody"
    assert json.loads(body)["error"]["code"] == "malformed"


NO_REQUESTS = {
    "no HTTP": b"hello\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "a length that is none": HEAD + b"Content-Length: ten\r\n\r\n",
    "two lengths that differ": HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\na",
    "a chunk that is none": HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
    "a head without an end": HEAD + b"X: " + b"a" * 20_000,
}


@pytest.mark.parametrize("case", NO_REQUESTS)
def test_what_is_no_request_is_told_in_json(case: str, films: Live) -> None:
    statuses, body = told(films, NO_REQUESTS[case] + (b"\r\n\r\n" if case == "TLS" else b""))
    assert len(statuses) == 1
    assert b" 4" in statuses[0]
    error = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


def test_the_next_one_is_answered(films: Live) -> None:
    told(films, b"hello\r\n\r\n")
    assert films.ask("GET", "/healthz").status_code == 200
    assert b"Content-Length: %d\r\n" % len(problems.malformed("why").partition(b"\r\n\r\n")[2]) in problems.malformed(
        "why"
    )


def test_strangers_fill_no_log(caplog: pytest.LogCaptureFixture) -> None:
    log, now = logging.getLogger("silotune.test-of-sparing"), [0.0]
    sparing(log, lambda: now[0])
    sparing(log, lambda: now[0])

    def lines(count: int, *given: Any) -> list[str]:
        caplog.clear()
        for _ in range(count):
            log.warning(*given)
        return [record.getMessage() for record in caplog.records]

    assert lines(1000, "bad") == ["bad"]
    now[0] = 59
    assert lines(10, "bad") == []
    now[0] = 60
    assert lines(2, "bad") == ["bad (and 1,009 more like it since the last line)"]
    caplog.clear()
    for number in range(1000):
        log.warning("of %d", number)
    assert len(caplog.records) == 255
    now[0] = 120
    assert lines(1, "of 999") == ["of 999"]
    log.info("what nobody outside causes is told")
    assert len(caplog.records) == 1 or caplog.records[-1].levelname == "INFO"
