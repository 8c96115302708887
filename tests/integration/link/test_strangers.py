"""Who may not be connected: strangers, the expelled, thieves of keys; and what floods of them cost."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import RecordDict

from client.link.client import Credentials
from server.link import admission, service
from server.link.admission import Admission
from server.link.grid import LinkGrid
from server.link.server import LinkServer
from shared.errors import RunError
from shared.link import frames, tls
from shared.link.frames import Chunk, Hello, Notice, Offer, Welcome, bytes_of, frame_of
from shared.link.line import new_id
from shared.trust import pki
from shared.trust.certificates import pem_bytes
from tests.integration.link.coordinator import CoordinatorProcess
from tests.integration.link.parts import HOST, Consortium, eventually, serving, site

ROOT = Path(__file__).parents[3]


@contextlib.contextmanager
def raw_stream(port: int, shown: Credentials, *first: bytes) -> Iterator[Any]:
    """A stream of a site that says what it likes."""
    credentials = grpc.ssl_channel_credentials(shown.ca, shown.key, shown.certificate)
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
    with grpc.secure_channel(f"localhost:{port}", credentials, options) as channel:
        over = False

        def said() -> Iterator[bytes]:
            yield from first
            while not over:
                time.sleep(0.05)

        call = channel.stream_stream(frames.METHOD)(said(), timeout=60)
        try:
            yield call
        finally:
            over = True
            call.cancel()


def ended(call: Any) -> tuple[grpc.StatusCode, str]:
    """Return how a stream ends."""
    with contextlib.suppress(grpc.RpcError):
        for _ in call:
            pass
    return call.code(), call.details() or ""


HELLO = bytes_of(Hello(new_id(), "test"))


# --- TLS ---


def handshake(port: int, *options: str) -> str:
    return subprocess.run(
        ["openssl", "s_client", "-connect", f"{HOST}:{port}", "-alpn", "h2", *options],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    ).stdout


def test_tls_1_2_is_refused_and_1_3_is_not(consortium: Consortium) -> None:
    with serving(consortium) as (server, _):
        assert "New, (NONE), Cipher is (NONE)" in handshake(server.port, "-tls1_2")
        assert "New, (NONE), Cipher is (NONE)" in handshake(server.port, "-tls1_2", "-cipher", "ALL:@SECLEVEL=0")
        assert "New, TLSv1.3" in handshake(server.port, "-tls1_3")


@pytest.mark.parametrize("first", ["grpc", "flwr.app"])
def test_no_server_starts_where_tls_1_2_would_be_accepted(first: str) -> None:
    """grpc reads the variable when it is imported; set afterwards it does nothing."""
    program = f"import {first}\nfrom shared.link import tls\ntls.check()"
    environment = {key: value for key, value in os.environ.items() if key != tls.VARIABLE}
    environment["PYTHONPATH"] = str(ROOT)

    def run(program: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program], env=environment | more, capture_output=True, text=True, check=False
        )

    late = run(program)
    assert late.returncode != 0
    assert "this process would accept TLS 1.2" in late.stderr
    if first == "flwr.app":
        return
    assert run(f"import server.link, client.link\n{program}").returncode == 0
    assert run(program, **{tls.VARIABLE: tls.NO_CIPHER_OF_1_2}).returncode == 0


def test_the_version_of_tls_is_checked_again_for_every_stream(
    consortium: Consortium, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = service._text
    monkeypatch.setattr(
        service, "_text", lambda facts, key: "TLSv1.2" if key == "ssl_tls_version" else real(facts, key)
    )
    with serving(consortium) as (server, _), raw_stream(server.port, consortium.credentials["a"], HELLO) as call:
        code, details = ended(call)
        assert (code, details) == (grpc.StatusCode.PERMISSION_DENIED, "the connection is TLSv1.2; TLSv1.3 only.")


# --- certificates ---


def self_signed(name: str) -> tuple[ec.EllipticCurvePrivateKey, bytes]:
    """A certificate like ours, of a CA of the stranger's own with our CA's name."""
    folder = Path(tempfile.mkdtemp())
    pki.create_ca(folder, name="consortium", passphrase=None)
    key, request = pki.make_request(name=name, role="site")
    return key, pem_bytes(pki.approve(folder, request, role="site", passphrase=None))


def test_without_a_certificate_of_the_ca_no_handler_runs(
    consortium: Consortium, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    monkeypatch.setattr(service.LinkService, "connect", lambda self, requests, context: calls.append(context))
    with serving(consortium) as (server, heard):
        context = ssl.create_default_context(cafile=str(consortium.trust / "ca.crt"))
        context.set_alpn_protocols(["h2"])
        with socket.create_connection((HOST, server.port), timeout=10) as plain:
            wrapped = context.wrap_socket(plain, server_hostname="localhost")
            wrapped.settimeout(10)
            with contextlib.suppress(OSError):
                wrapped.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00" * 9)
                assert wrapped.recv(100) == b""
        foreign = consortium.shown(*self_signed("a"))
        with raw_stream(server.port, foreign, HELLO) as call:
            assert ended(call)[0] == grpc.StatusCode.UNAVAILABLE
        with grpc.insecure_channel(f"localhost:{server.port}") as channel:
            plain_call = channel.stream_stream(frames.METHOD)(iter([HELLO]), timeout=10)
            assert ended(plain_call)[0] == grpc.StatusCode.UNAVAILABLE
        assert calls == []
        assert heard.events == []


def test_a_certificate_of_the_ca_is_not_enough(consortium: Consortium) -> None:
    """It must be a site's, lie in the trust store, and name the holder that it names there."""
    server_key, request = pki.make_request(name="other", role="server", hosts=["localhost"])
    certificate = pki.approve(consortium.ca, request, role="server", hosts=["localhost"], passphrase=None)
    of_a_server = consortium.shown(server_key, pem_bytes(certificate))
    not_admitted = consortium.shown(*consortium.certify("c"))
    with serving(consortium) as (server, heard):
        for shown, words in ((of_a_server, ""), (not_admitted, "does not lie in the coordinator's trust store")):
            with raw_stream(server.port, shown, HELLO) as call:
                code, details = ended(call)
            assert code in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAVAILABLE)
            assert words in details
        assert heard.of("connected") == []
        assert heard.of("refused")[-1][:2] == ("refused", "c")


# --- revocation ---


def test_a_revoked_site_loses_its_stream_at_once_though_it_says_nothing(consortium: Consortium) -> None:
    with serving(consortium) as (server, heard):
        grid = LinkGrid(server, 1)
        with (
            site(server.port, consortium.credentials["a"]) as (_, told),
            site(server.port, consortium.credentials["b"]),
        ):
            eventually(lambda: heard.open == {"a", "b"})
            node = next(node for node, name in grid.names().items() if name == "a")
            consortium.revoke("a")
            started = time.monotonic()
            eventually(lambda: "a" not in heard.open)
            assert time.monotonic() - started < 5.0  # a fifth of a second, where the machine has nothing else to do
            (_, kind, words), *_rest = eventually(lambda: told.of("trouble"))
            assert kind == "NotAdmitted"
            assert "was revoked" in words
            assert node not in grid.get_node_ids()
            assert heard.open == {"b"}


def test_a_revoked_site_cannot_answer_what_it_was_asked(
    consortium: Consortium, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its next message is refused, also before anybody has looked after it."""
    monkeypatch.setattr(service, "WATCH_SECONDS", 3600.0)
    asked: list[Offer] = []
    with serving(consortium) as (server, _):
        credentials = consortium.credentials["a"]
        channel_credentials = grpc.ssl_channel_credentials(credentials.ca, credentials.key, credentials.certificate)
        with grpc.secure_channel(f"localhost:{server.port}", channel_credentials) as channel:
            revoked: list[bool] = []

            def said() -> Iterator[bytes]:
                yield HELLO
                while not revoked:
                    time.sleep(0.01)
                yield bytes_of(Notice("still here"))
                time.sleep(30)

            call = channel.stream_stream(frames.METHOD)(said(), timeout=30)
            assert isinstance(frame_of(next(call)), Welcome)
            consortium.revoke("a")
            revoked.append(True)
            code, details = ended(call)
            assert (code, asked) == (grpc.StatusCode.PERMISSION_DENIED, [])
            assert "was revoked" in details


def test_a_site_that_is_taken_out_of_the_trust_store_is_expelled_and_can_come_back(consortium: Consortium) -> None:
    with serving(consortium) as (server, heard), site(server.port, consortium.credentials["a"]):
        eventually(lambda: heard.open == {"a"})
        (path,) = (consortium.trust / "sites").glob("a-*.crt")
        kept = path.read_bytes()
        path.unlink()
        eventually(lambda: not heard.open)
        path.write_bytes(kept)
        eventually(lambda: heard.open == {"a"})


def test_requests_to_an_expelled_site_are_given_up(consortium: Consortium) -> None:
    with serving(consortium) as (server, _):
        grid = LinkGrid(server, 1)
        with site(server.port, consortium.credentials["a"], lambda request, welcome: time.sleep(1)):
            (node,) = eventually(lambda: list(grid.get_node_ids()))
            identifiers = list(grid.push_messages([grid.create_message(RecordDict(), "train", node, "1")]))
            consortium.revoke("a")
            (reply,) = eventually(lambda: list(grid.pull_messages(identifiers)))
            assert "may not connect any more" in reply.error.reason


def test_while_the_trust_store_cannot_be_trusted_nobody_is_let_in(
    consortium: Consortium, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "GRACE_SECONDS", 0.5)
    with serving(consortium) as (server, heard), site(server.port, consortium.credentials["a"]):
        eventually(lambda: heard.open == {"a"})
        kept = (consortium.trust / "crl.pem").read_bytes()
        (consortium.trust / "crl.pem").unlink()
        eventually(lambda: not heard.open)
        assert any("has no crl.pem" in event[2] for event in heard.of("disconnected"))
        (consortium.trust / "crl.pem").write_bytes(kept)
        eventually(lambda: heard.open == {"a"})


def test_an_expired_certificate_ends_its_stream(consortium: Consortium) -> None:
    now = [datetime.now(UTC)]
    judge = Admission(consortium.trust, now=lambda: now[0])
    visitor = judge.visitor(consortium.credentials["a"].certificate)
    judge.check(visitor)
    now[0] += timedelta(days=366)
    with pytest.raises(Exception, match="not valid now"):
        judge.check(visitor)


# --- one key, one stream ---


def test_of_two_processes_with_one_key_the_newer_is_refused_and_both_hear_of_it(consortium: Consortium) -> None:
    with serving(consortium) as (server, heard), site(server.port, consortium.credentials["a"]) as (_, honest):
        eventually(lambda: heard.open == {"a"})
        with site(server.port, consortium.credentials["a"]) as (_, thief):
            (_, kind, words), *_rest = eventually(lambda: thief.of("trouble"))
            assert kind == "NotAdmitted"
            assert "is connected already" in words
            eventually(lambda: honest.of("noticed"))
            assert "another process with this site's key" in honest.of("noticed")[0][1]
            assert heard.of("twin") == [("twin", "a")]
            eventually(lambda: len(thief.of("trouble")) > 2)
            assert len(heard.of("twin")) == len(heard.of("refused")) == 1  # no log is filled
        assert thief.of("welcome") == []
        assert honest.of("trouble") == []
        assert heard.open == {"a"}


def test_two_keys_of_one_name_are_two_streams(consortium: Consortium) -> None:
    """While a site changes its key, both are valid."""
    new = consortium.admit("a", rotate=True)
    with serving(consortium) as (server, heard), site(server.port, consortium.credentials["a"]), site(server.port, new):
        grid = LinkGrid(server, 1)
        eventually(lambda: len(list(grid.get_node_ids())) == 2)
        assert [grid.names()[node] for node in grid.get_node_ids()] == ["a", "a"]
        assert heard.of("twin") == []


# --- what an admitted site may send ---


@pytest.mark.parametrize(
    ("first", "words"),
    [
        ((b"\xff\xff",), "no frame"),
        ((b"",), "holds 0 of the kinds"),
        ((bytes_of(Notice("hello")),), "no hello"),
        ((bytes_of(Hello(b"short", "1")),), "no hello"),
        ((HELLO, HELLO), "in the middle of a stream"),
        ((HELLO, bytes_of(Chunk(new_id(), 0, b"x"))), "not asked for"),
        ((HELLO, bytes_of(Offer(new_id(), b"", 10, b"h" * 32))), "answers none"),
        ((HELLO, b"\x1a\xff"), "no frame"),
    ],
)
def test_whoever_does_not_keep_to_the_protocol_is_cut_off_and_nobody_else(
    consortium: Consortium, first: tuple[bytes, ...], words: str
) -> None:
    with serving(consortium) as (server, heard), site(server.port, consortium.credentials["b"]):
        eventually(lambda: heard.open == {"b"})
        with raw_stream(server.port, consortium.credentials["a"], *first) as call:
            code, details = ended(call)
            assert code == grpc.StatusCode.INVALID_ARGUMENT
            assert words in details
        assert heard.open == {"b"}


def test_a_reply_to_what_another_site_was_asked_is_not_taken(consortium: Consortium) -> None:
    """Site A forges site B's update: it knows the id, and it does not help."""
    with serving(consortium) as (server, _):
        grid = LinkGrid(server, 1)
        node = next(node for node, name in eventually(grid.names).items() if name == "b")
        (identifier,) = grid.push_messages([grid.create_message(RecordDict(), "train", node, "1")])
        payload = b"forged"
        offer = Offer(new_id(), bytes.fromhex(identifier), len(payload), hashlib.sha256(payload).digest())
        with raw_stream(server.port, consortium.credentials["a"], HELLO, bytes_of(offer)) as call:
            assert isinstance(frame_of(next(call)), Welcome)
            # "Forget it": what is not this site's to answer is not fetched.
            assert frame_of(next(call)) == frames.Ack(offer.id, len(payload))
            assert list(grid.pull_messages([identifier])) == []


# --- floods; the server runs in a process of its own, so that its memory is its own ---


def test_floods_cost_little_memory_and_honest_sites_go_on(consortium: Consortium) -> None:
    with CoordinatorProcess(consortium.files.certificate.parent) as coordinator, contextlib.ExitStack() as stack:
        port, before = coordinator.port, coordinator.facts.memory_info().rss
        with site(port, consortium.credentials["a"]) as (_, told):
            eventually(lambda: told.of("welcome"))
            # 1. Idle connections that never say a word.
            for _ in range(800):
                stack.enter_context(socket.create_connection((HOST, port)))
            # 2. Calls of 400 MB, of an admitted site.
            for _ in range(3):
                with raw_stream(port, consortium.credentials["b"], HELLO, bytes(400_000_000)) as call:
                    assert ended(call)[0] != grpc.StatusCode.OK
            # 3. An honest site that comes now is let in.
            with site(port, consortium.credentials["b"]) as (_, late):
                eventually(lambda: late.of("welcome"), timeout=10)
            assert coordinator.facts.memory_info().rss - before < 100 * 2**20
            assert told.of("trouble") == []


@pytest.mark.endurance
def test_connections_that_say_nothing_are_closed(consortium: Consortium) -> None:
    with serving(consortium) as (server, _), contextlib.ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection((HOST, server.port))) for _ in range(100)]
        started = time.monotonic()
        for one in idle:
            one.settimeout(10.0)
            with contextlib.suppress(ConnectionResetError):
                while one.recv(4096):
                    pass
        assert time.monotonic() - started < 8.0


def test_the_port_cannot_be_shared(consortium: Consortium) -> None:
    with (
        CoordinatorProcess(consortium.files.certificate.parent) as coordinator,
        pytest.raises(RunError, match="the port"),
    ):
        LinkServer(f"{HOST}:{coordinator.port}", consortium.files).start()
