"""Both ends of the link on loopback, with real certificates: messages pass whole, once, and whatever is cut goes on."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from flwr.app import ConfigRecord, Message, Metadata, RecordDict
from grpc_health.v1 import health_pb2, health_pb2_grpc

from client.link.answering import answering
from client.link.client import Credentials
from server.coordinator.supervisor import POLL_SECONDS
from server.link import mailroom
from server.link.grid import LinkGrid
from server.link.server import LinkServer
from shared.errors import RunError, TrustError
from shared.link import options
from shared.link.frames import Failure, Welcome, bytes_of
from shared.link.line import Parcel
from shared.link.options import CHUNK_BYTES
from shared.trust import pki
from shared.trust.certificates import pem_bytes
from shared.trust.node_keys import load_server_key, save_server_key
from tests.integration.link.parts import HOST, Consortium, eventually, serving, site
from tests.integration.link.relay import ConnectProxy, Relay


def same(message: Message, node: int, waited: float) -> Message:
    return Message(message.content, reply_to=message)


def ask(grid: LinkGrid, node: int, data: bytes = b"x", ttl: float | None = None) -> Message:
    return grid.create_message(RecordDict({"x": ConfigRecord({"data": data})}), "train", node, "1", ttl=ttl)


def pulled(grid: LinkGrid, identifiers: set[str], timeout: float = 30.0) -> dict[str, Message]:
    """Return the replies by the request that they answer."""
    replies: dict[str, Message] = {}

    def all_here() -> bool:
        for message in grid.pull_messages(identifiers):
            assert message.metadata.reply_to_message_id not in replies
            replies[message.metadata.reply_to_message_id] = message
        return replies.keys() == identifiers

    eventually(all_here, timeout=timeout)
    return replies


def data_of(message: Message) -> object:
    return message.content.config_records["x"]["data"]


def test_a_question_reaches_every_site_and_every_answer_names_its_node(consortium: Consortium) -> None:
    with (
        serving(consortium) as (server, heard),
        site(server.port, consortium.credentials["a"], answering(same)),
        site(server.port, consortium.credentials["b"], answering(same)) as (_, told),
    ):
        grid = LinkGrid(server, 7)
        eventually(lambda: len(list(grid.get_node_ids())) == 2)
        assert sorted(grid.names().values()) == ["a", "b"]
        assert set(grid.get_node_ids()) == grid.names().keys()
        for size in (0, 1, CHUNK_BYTES, 300_000):
            asked = [ask(grid, node, bytes([node % 251]) * size) for node in grid.get_node_ids()]
            replies = list(grid.send_and_receive(asked, timeout=30))
            assert {reply.metadata.src_node_id for reply in replies} == grid.names().keys()
            for reply in replies:
                assert data_of(reply) == bytes([reply.metadata.src_node_id % 251]) * size
                assert (reply.metadata.run_id, reply.metadata.message_type) == (7, "train")
        assert told.of("welcome") == [("welcome", "b")]
    assert {event[1] for event in heard.of("disconnected")} == {"a", "b"}


def test_a_request_waits_for_a_site_that_is_not_there_yet(consortium: Consortium) -> None:
    with serving(consortium) as (server, _):
        grid = LinkGrid(server, 1)
        node = next(node for node, name in grid_names(grid).items() if name == "a")
        assert list(grid.get_node_ids()) == []
        (identifier,) = grid.push_messages([ask(grid, node, b"early")])
        with site(server.port, consortium.credentials["a"], answering(same)):
            assert data_of(pulled(grid, {identifier})[identifier]) == b"early"


def grid_names(grid: LinkGrid) -> dict[int, str]:
    return eventually(grid.names)  # type: ignore[no-any-return]


def test_a_site_that_does_not_come_back_is_given_up(consortium: Consortium, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailroom, "LOST_SECONDS", 0.5)
    monkeypatch.setattr(mailroom, "AWAY_SECONDS", 0.2)
    with serving(consortium) as (server, _):
        grid = LinkGrid(server, 1)
        with site(server.port, consortium.credentials["a"], lambda request, welcome: None):
            (node,) = eventually(lambda: list(grid.get_node_ids()))
            (identifier,) = grid.push_messages([ask(grid, node)])
            time.sleep(1.0)
            assert list(grid.pull_messages([identifier])) == []  # it is there, and may take its time
        reply = pulled(grid, {identifier})[identifier]
        assert (reply.has_error(), reply.error.code) == (True, mailroom.LOST)
        assert "not been connected" in (reply.error.reason or "")
        assert list(grid.get_node_ids()) == []


def test_whoever_looks_is_told_at_once_that_a_site_is_gone_and_a_round_waits_for_it(consortium: Consortium) -> None:
    with serving(consortium) as (server, heard):
        grid = LinkGrid(server, 1)
        nodes = {name: node for node, name in grid_names(grid).items()}
        with site(server.port, consortium.credentials["a"]):
            eventually(lambda: server.sites()[0]["a"].online)
        eventually(lambda: not heard.open)
        grid.push_messages([ask(grid, nodes["b"])])  # which was never here
        told, _ = server.sites()
        assert (told["a"].online, told["b"].online, told["b"].seen_before) == (False, False, None)
        assert nodes["a"] in grid.get_node_ids()


def test_the_limits_keep_what_the_guide_promises() -> None:
    """A silent death is in the status within ten seconds, and all sites are back five seconds after its kill."""
    for end in (options.SERVER, options.CLIENT):
        patience = max(int(end["grpc.keepalive_timeout_ms"]), int(end["grpc.http2.ping_timeout_ms"]))
        noticed = (int(end["grpc.keepalive_time_ms"]) + patience) / 1000
        assert noticed + POLL_SECONDS < 9.0  # the rest is for a busy machine
    assert options.LONGEST_BACKOFF_SECONDS < 2.5  # and a start of the coordinator


def test_an_expired_request_is_answered_with_an_error(consortium: Consortium) -> None:
    with serving(consortium) as (server, _):
        grid = LinkGrid(server, 1)
        node = next(iter(grid_names(grid)))
        (identifier,) = grid.push_messages([ask(grid, node, ttl=0.1)])
        assert pulled(grid, {identifier})[identifier].error.code == mailroom.EXPIRED


@pytest.mark.parametrize("garbage", [b"\xff" * 100, b"", "Failure"], ids=["bytes", "nothing", "another-message"])
def test_garbage_of_a_site_is_its_own_trouble(consortium: Consortium, garbage: bytes | str) -> None:
    """Not the job's, whose round goes on without it."""
    payload = bytes_of(Failure(2**63, "x")) if isinstance(garbage, str) else garbage or b"\n\x00"
    with (
        serving(consortium) as (server, _),
        site(server.port, consortium.credentials["a"], lambda request, welcome: payload),
        site(server.port, consortium.credentials["b"], answering(same)),
    ):
        grid = LinkGrid(server, 1)
        eventually(lambda: len(list(grid.get_node_ids())) == 2)
        replies = {
            grid.names()[reply.metadata.src_node_id]: reply
            for reply in grid.send_and_receive([ask(grid, node) for node in grid.get_node_ids()], timeout=30)
        }
        assert data_of(replies["b"]) == b"x"
        assert replies["a"].has_error() or replies["a"].content == RecordDict()


def test_garbage_of_the_coordinator_is_not_answered_and_ends_no_site(consortium: Consortium) -> None:
    with (
        serving(consortium) as (server, _),
        site(server.port, consortium.credentials["a"], answering(same)) as (_, told),
    ):
        grid = LinkGrid(server, 1)
        (node,) = eventually(lambda: list(grid.get_node_ids()))
        good = ask(grid, node)
        facts = good.metadata
        bad = Metadata(1, "ff" * 16, 1, node, "", "1", facts.created_at, 5.0, "train")
        for size in (1, 3 * CHUNK_BYTES):
            server.call(server.mailroom.send, node, Parcel(bytes([size % 250]) * 16, b"", b"\xff" * size), bad)
        assert [data_of(reply) for reply in grid.send_and_receive([good], timeout=30)] == [b"x"]
        assert told.of("trouble") == []


def test_a_reply_that_is_far_too_long_is_not_taken(consortium: Consortium, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailroom, "REPLY_SLACK_BYTES", 1000)
    with (
        serving(consortium) as (server, heard),
        site(server.port, consortium.credentials["a"], lambda request, welcome: b"x" * 5000),
    ):
        grid = LinkGrid(server, 1)
        (node,) = eventually(lambda: list(grid.get_node_ids()))
        (reply,) = grid.send_and_receive([ask(grid, node)], timeout=30)
        assert "a reply of 5000 bytes, at most" in (reply.error.reason or "")
        assert heard.of("disconnected") == []  # it would only come back and offer the same again


def test_cuts_in_the_middle_of_messages_lose_nothing_and_repeat_nothing(consortium: Consortium) -> None:
    """The connection is cut again and again at some byte; each request is handled once, each reply comes once."""
    handled: list[bytes] = []

    def note(request: Parcel, welcome: Welcome) -> bytes:
        handled.append(request.id)
        return answering(same)(request, welcome) or b""

    with (
        serving(consortium) as (server, _),
        Relay(server.port) as relay,
        site(relay.port, consortium.credentials["a"], note),
    ):
        grid = LinkGrid(server, 1)
        (node,) = eventually(lambda: list(grid.get_node_ids()))
        asked = [ask(grid, node, bytes([n]) * 1_000_000) for n in range(3)]
        relay.cut_after(400_000)  # bytes of either direction, again and again
        identifiers = set(grid.push_messages(asked))
        replies = pulled(grid, identifiers, timeout=60)
        assert [data_of(replies[one.metadata.message_id]) for one in asked] == [
            bytes([n]) * 1_000_000 for n in range(3)
        ]
        assert len(handled) == len(set(handled)) == 3
        assert relay.cuts >= 10
        # What had arrived before a cut was not sent again, or 400,000 bytes would never do for a megabyte.
        assert relay.carried < 1.5 * 6_000_000


def test_a_site_through_a_proxy(consortium: Consortium) -> None:
    """By CONNECT, as a named setting; a proxy of the environment is not used."""
    with (
        serving(consortium) as (server, _),
        ConnectProxy() as proxy,
        site(
            server.port, consortium.credentials["a"], answering(same), proxy=f"http://user:secret@{HOST}:{proxy.port}"
        ),
    ):
        grid = LinkGrid(server, 1)
        (node,) = eventually(lambda: list(grid.get_node_ids()))
        assert [data_of(reply) for reply in grid.send_and_receive([ask(grid, node)], timeout=30)] == [b"x"]
        (head,) = proxy.heads
        assert head.startswith(f"CONNECT localhost:{server.port} HTTP/1.1\r\n")
        assert "Proxy-Authorization: Basic" in head


def test_a_proxy_of_the_environment_is_not_used(consortium: Consortium, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "http_proxy", "grpc_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with serving(consortium) as (server, heard), site(server.port, consortium.credentials["a"]):
        eventually(lambda: heard.open == {"a"})


def test_stopping_a_site_waits_for_the_answer_at_hand(consortium: Consortium) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(message: Message, node: int, waited: float) -> Message:
        begun.set()
        go_on.wait(30)
        return same(message, node, waited)

    with serving(consortium) as (server, _):
        grid = LinkGrid(server, 1)
        with site(server.port, consortium.credentials["a"], answering(slow)) as (client, _):
            (node,) = eventually(lambda: list(grid.get_node_ids()))
            (identifier,) = grid.push_messages([ask(grid, node)])
            begun.wait(30)
            client.stop()
            time.sleep(1.5)
            go_on.set()
            assert data_of(pulled(grid, {identifier})[identifier]) == b"x"


def test_the_health_service_answers_whoever_holds_a_certificate(consortium: Consortium) -> None:
    with serving(consortium) as (server, _):
        shown = consortium.credentials["a"]
        credentials = grpc.ssl_channel_credentials(shown.ca, shown.key, shown.certificate)
        with grpc.secure_channel(f"localhost:{server.port}", credentials) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for name in ("", "silotune.link.v1.Link"):
                status = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=10).status
                assert status == health_pb2.HealthCheckResponse.SERVING
            # A stream would keep open the connection of a site that was revoked since.
            with pytest.raises(grpc.RpcError, match="ask by Check"):
                next(stub.Watch(health_pb2.HealthCheckRequest(), timeout=10))


def test_a_certificate_that_is_exchanged_serves_the_next_connection(consortium: Consortium) -> None:
    with serving(consortium) as (server, heard), site(server.port, consortium.credentials["a"]):
        eventually(lambda: heard.open == {"a"})
        key, request = pki.make_request(name="coordinator", role="server", hosts=["localhost"])
        certificate = pki.approve(
            consortium.ca, request, role="server", hosts=["localhost"], passphrase=None, rotate=True
        )
        pki.revoke(consortium.ca, "coordinator", passphrase=None)
        consortium.files.key.unlink()
        save_server_key(consortium.files.key, key, None)
        consortium.files.certificate.write_bytes(pem_bytes(certificate))
        context = ssl.create_default_context(cafile=str(consortium.trust / "ca.crt"))
        with (
            socket.create_connection((HOST, server.port)) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as wrapped,
        ):
            shown = wrapped.getpeercert(binary_form=True)
        assert shown == certificate.public_bytes(Encoding.DER)
        with site(server.port, consortium.credentials["b"]):
            eventually(lambda: heard.open == {"a", "b"})  # and nobody was disturbed
        assert [event for event in heard.of("disconnected") if event[1] == "a"] == []


def test_a_server_key_under_a_passphrase_is_opened_in_memory(consortium: Consortium) -> None:
    plain = consortium.files.key.read_bytes()
    key = load_server_key(consortium.files.key, None)
    words, others = "correct horse", "battery staple"
    save_server_key(consortium.files.key, key, words)
    consortium.files = replace(consortium.files, passphrase=words)
    with serving(consortium) as (server, heard), site(server.port, consortium.credentials["a"]):
        eventually(lambda: heard.open == {"a"})
        assert plain not in {path.read_bytes() for path in consortium.files.key.parent.iterdir() if path.is_file()}
    assert words not in repr(consortium.files)
    with pytest.raises(TrustError, match="the passphrase is wrong"):
        LinkServer(f"{HOST}:0", replace(consortium.files, passphrase=others)).start()


def test_what_cannot_be_started_says_why(consortium: Consortium) -> None:
    with serving(consortium) as (server, _), pytest.raises(RunError, match="another process may use the port"):
        LinkServer(f"{HOST}:{server.port}", consortium.files).start()
    consortium.files.certificate.unlink()
    with pytest.raises(TrustError, match="cannot be read"):
        LinkServer(f"{HOST}:0", consortium.files).start()
    server = LinkServer(f"{HOST}:0", consortium.files)
    with pytest.raises(RunError, match="does not run"):
        server.call(len, [])


@pytest.fixture
def nobody() -> Iterator[int]:
    with socket.socket() as held:
        held.bind((HOST, 0))
        yield int(held.getsockname()[1])


def test_every_failure_to_connect_has_clear_words(consortium: Consortium, tmp_path: Path, nobody: int) -> None:
    other = Consortium(tmp_path / "other")
    mine = consortium.credentials["a"]
    foreign = Credentials(ca=mine.ca, certificate=other.credentials["a"].certificate, key=other.credentials["a"].key)
    distrusting = Credentials(ca=other.credentials["a"].ca, certificate=mine.certificate, key=mine.key)
    key, certificate = consortium.certify("c")
    unknown = consortium.shown(key, certificate)

    def trouble(port: int, credentials: Credentials, **options: object) -> tuple[str, ...]:
        with site(port, credentials, **options) as (_, told):  # type: ignore[arg-type]
            return eventually(lambda: told.of("trouble"))[0]  # type: ignore[no-any-return]

    with serving(consortium) as (server, _), Relay(None) as deaf:
        for found, kind, words in (
            (trouble(nobody, mine), "Unreachable", "check the address, that the coordinator runs"),
            (trouble(server.port, foreign), "NotAdmitted", "probably this site's certificate is not admitted"),
            (trouble(server.port, distrusting), "TrustError", "Check that ca.crt is the consortium's"),
            (trouble(server.port, unknown), "NotAdmitted", "does not lie in the coordinator's trust store"),
            (
                trouble(server.port, mine, proxy=f"http://u:secret@{HOST}:{nobody}"),
                "Unreachable",
                "through the proxy http://127",
            ),
            (trouble(deaf.port, mine), "NotAdmitted", "or a firewall cuts the connection"),
        ):
            assert found[1] == kind, found
            assert words in found[2], found
            assert "secret" not in found[2]
