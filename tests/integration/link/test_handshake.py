"""What `silotune site check` finds out about the connection before a node uses it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from pathlib import Path

import pytest

from client.link.client import NotAdmitted, Unreachable, welcome
from client.link.handshake import split_address, tls_facts
from client.site.config import SiteConfig
from shared.errors import ConfigError, RunError, TrustError
from shared.job.parsing import parse
from simulations.federation.processes import free_port
from tests.integration.eventually import eventually
from tests.integration.link.parts import HOST, Consortium, serving, site
from tests.integration.link.relay import ConnectProxy


@pytest.fixture
def consortium(tmp_path: Path) -> Consortium:
    return Consortium(tmp_path)


def test_tls_1_3_and_http_2_with_and_without_a_proxy(consortium: Consortium) -> None:
    ca = consortium.credentials["a"].ca
    with serving(consortium) as (server, _), ConnectProxy() as proxy:
        address = f"localhost:{server.port}"
        for through in (None, f"http://us%40er:se%3Acret@{HOST}:{proxy.port}"):
            facts = tls_facts(address, ca, proxy=through)
            assert (facts.tls_version, facts.alpn) == ("TLSv1.3", "h2")
        (head,) = proxy.heads
        assert head.startswith(f"CONNECT {address} HTTP/1.1\r\n")
        assert "Proxy-Authorization: Basic dXNAZXI6c2U6Y3JldA==\r\n" in head  # us@er:se:cret


def test_who_is_admitted_is_welcomed_and_who_is_not_is_told_why(consortium: Consortium) -> None:
    with serving(consortium) as (server, heard):
        address, mine = f"localhost:{server.port}", consortium.credentials["a"]
        assert welcome(address, mine).site == "a"
        eventually(lambda: not heard.open)
        with site(server.port, mine):
            eventually(lambda: heard.open == {"a"})
            with pytest.raises(NotAdmitted, match="a process with the key of a is connected already"):
                welcome(address, mine)
        key, certificate = consortium.certify("stranger")
        with pytest.raises(NotAdmitted, match="does not lie in the coordinator's trust store"):
            welcome(address, consortium.shown(key, certificate))
    with pytest.raises(Unreachable, match="check the address, that the coordinator runs"):
        welcome(f"localhost:{free_port()}", mine)


def test_a_server_of_another_ca_or_for_another_host_is_not_talked_to(consortium: Consortium, tmp_path: Path) -> None:
    other = Consortium(tmp_path / "other")
    with serving(consortium, host="0.0.0.0") as (server, _):  # noqa: S104
        with pytest.raises(TrustError, match=r"the certificate of .* does not hold.*consortium's"):
            tls_facts(f"localhost:{server.port}", other.credentials["a"].ca)
        with pytest.raises(TrustError, match="the address is one the certificate was made for"):
            tls_facts(f"127.0.0.2:{server.port}", consortium.credentials["a"].ca)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""])
def test_what_does_not_speak_tls_is_said_so(consortium: Consortium, answer: bytes) -> None:
    with _answers(answer) as port, pytest.raises(Unreachable, match=r"does not speak TLS|cannot be reached"):
        tls_facts(f"localhost:{port}", consortium.credentials["a"].ca)


def test_a_proxy_that_refuses_is_quoted_without_its_password(consortium: Consortium) -> None:
    with _answers(b"HTTP/1.1 403 Forbidden\r\n\r\n") as port:
        with pytest.raises(Unreachable) as refused:
            tls_facts("localhost:9", consortium.credentials["a"].ca, proxy=f"http://user:secret@{HOST}:{port}")
        assert "through the proxy 127.0.0.1 (it answered 'HTTP/1.1 403 Forbidden')" in str(refused.value)
        assert "secret" not in str(refused.value)


def test_a_proxy_that_drips_its_answer_has_one_deadline(consortium: Consortium) -> None:
    with _answers(b"HTTP/1.1 200 OK\r\n\r\n", apart=0.1) as port:
        began = time.monotonic()
        with pytest.raises(Unreachable, match="timed out"):
            tls_facts("localhost:9", consortium.credentials["a"].ca, proxy=f"http://{HOST}:{port}", timeout=0.3)
        assert time.monotonic() - began < 1.0


@pytest.mark.parametrize(
    "address",
    [
        "",
        "host",
        "host:",
        ":1",
        "host:port",
        "host:0",
        "host:65536",
        "host:1²",
        "host:-1",
        "a b:1",
        "::1:9092",
        "http://a:1",
    ],
)
def test_an_address_is_host_and_port(address: str) -> None:
    with pytest.raises(RunError, match="is not of the form host:port"):
        split_address(address)
    assert split_address("[::1]:9092") == ("::1", 9092)


def site_config(proxy: object) -> SiteConfig:
    raw = {"name": "a", "dataset": "d", "data": {"path": "x.csv", "columns": {"text": "t"}}, "budget": {"epsilon": 1}}
    return parse(SiteConfig, raw | {"proxy": proxy}, source="site.toml")


@pytest.mark.parametrize(
    "proxy", ["proxy:3128", "https://proxy:3128", "http://proxy", "http://:3128", "http://pro xy:1", "http://[x:1", 7]
)
def test_a_proxy_that_cannot_be_one_is_refused_in_site_toml(proxy: object) -> None:
    with pytest.raises(ConfigError, match="proxy"):
        site_config(proxy)


@pytest.mark.parametrize("proxy", ["https://me:secret@proxy:3128", ["http://me:secret@proxy:1"], {"me": "secret"}])
def test_a_proxy_with_a_password_is_refused_without_showing_it(proxy: object) -> None:
    with pytest.raises(ConfigError, match="proxy") as refused:
        site_config(proxy)
    assert "secret" not in str(refused.value)
    assert "secret" not in repr(site_config("http://me:secret@proxy:1"))


def test_a_proxy_of_site_toml_is_taken_as_it_stands() -> None:
    assert site_config("http://user:pass@proxy.example.org:3128").proxy == "http://user:pass@proxy.example.org:3128"


class _answers:  # noqa: N801 (reads as a function)
    """A server that reads a little, says the same to everybody, so many seconds between two bytes, and hangs up."""

    def __init__(self, answer: bytes, apart: float = 0.0) -> None:
        self._answer, self._apart = answer, apart
        self._listener = socket.create_server((HOST, 0))

    def __enter__(self) -> int:
        threading.Thread(target=self._serve, daemon=True).start()
        return int(self._listener.getsockname()[1])

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            with peer:
                peer.settimeout(5)
                peer.recv(65536)  # what is left unread would reset the connection
                with contextlib.suppress(OSError):  # who has heard enough hangs up first
                    for byte in self._answer:
                        peer.sendall(bytes([byte]))
                        time.sleep(self._apart)
