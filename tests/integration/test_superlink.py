"""Contract with Flower: the non-public parts that `client.node.fleet` and `server.coordinator.superlink` use, against a real
SuperLink."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.proto.fleet_pb2 import PullMessagesRequest, RegisterNodeFleetRequest, UnregisterNodeFleetRequest
from flwr.proto.node_pb2 import Node

from client.node import fleet
from client.node.fleet import FleetConnection, NotAdmitted, RunOver, Unreachable, tls_facts
from server.coordinator.superlink import Control, KeyRemembered, SuperLink, public_key_bytes, pull_promptly
from server.store.home import CoordinatorHome
from shared.errors import RunError, TrustError
from shared.trust.node_keys import write_plain_pem_key
from shared.trust.pki import approve, create_ca, make_request, publish
from simulations.federation.processes import free_port
from tests.integration.bundles import bundle_with_code
from tests.integration.eventually import eventually

# Larger than the chunks of 5 MB into which Flower cuts arrays.
BUFFER = bytes(range(256)) * 25_000

SERVER_APP = """
import json, time
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client_app = ClientApp()
server_app = ServerApp()

@server_app.main()
def main(grid, context):
    while not (nodes := [node.node_id for node in grid.get_nodes() if node.name == "worker"]):
        time.sleep(0.05)
    assert set(nodes) <= set(grid.get_node_ids())
    data = bytes(range(256)) * 25_000
    content = RecordDict({
        "greeting": ConfigRecord({"text": "hello"}),
        "large": ArrayRecord({"bytes": Array(dtype="uint8", shape=(len(data),), stype="test", data=data)}),
    })
    request = Message(content, dst_node_id=nodes[0], message_type="query.contract")
    waiting, replies = set(grid.push_messages([request])), []
    while not replies:
        replies = list(grid.pull_messages(waiting))
        time.sleep(0.05)
    reply = replies[0]
    found = {
        "node": str(nodes[0]),
        "source": str(reply.metadata.src_node_id),
        "answered": reply.metadata.reply_to_message_id in waiting,
        "text": reply.content["answer"]["text"],
        "same_bytes": reply.content["large"]["bytes"].data == data[::-1],
    }
    out = Path(str(context.run_config["out"]))
    out.with_suffix(".part").write_text(json.dumps(found))
    out.with_suffix(".part").rename(out)
    while not out.with_suffix(".end").exists():
        time.sleep(0.05)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> CoordinatorHome:
    folder = tmp_path_factory.mktemp("superlink")
    made = CoordinatorHome(folder / "home")
    create_ca(folder / "ca", name="Contract", passphrase=None)
    publish(folder / "ca", made.trust)
    key, request = make_request(name="coordinator", role="server", hosts=["localhost", "127.0.0.1"])
    write_plain_pem_key(made.server_key, key)
    certificate = approve(folder / "ca", request, role="server", hosts=["localhost", "127.0.0.1"], passphrase=None)
    made.server_certificate.write_bytes(certificate.public_bytes(Encoding.PEM))
    return made


@pytest.fixture(scope="module")
def address() -> str:
    return f"127.0.0.1:{free_port()}"


@pytest.fixture(scope="module")
def superlink(home: CoordinatorHome, address: str) -> Iterator[SuperLink]:
    everywhere = f"0.0.0.0:{address.rpartition(':')[2]}"
    link = SuperLink(home, fleet_address=everywhere, control_port=free_port())
    link.start()
    yield link
    link.stop()


@pytest.fixture(scope="module")
def control(superlink: SuperLink) -> Iterator[Control]:
    with superlink.control() as client:
        yield client


@pytest.fixture
def connect(home: CoordinatorHome, address: str) -> Iterator[Callable[..., FleetConnection]]:
    """Return an opener of connections; all are closed at the end."""
    made: list[FleetConnection] = []

    def opened(key: ec.EllipticCurvePrivateKey, *, to: str = address, ca: bytes | None = None) -> FleetConnection:
        trusted = home.ca_certificate.read_bytes() if ca is None else ca
        made.append(FleetConnection(to, ca_certificate=trusted, private_key=key))
        return made[-1]

    yield opened
    for connection in made:
        connection.close()


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


# --- the SuperLink's command line ---


def test_tls_and_authentication_cannot_be_left_out(home: CoordinatorHome) -> None:
    command = SuperLink(home, fleet_address="0.0.0.0:9092", control_port=8000).command()
    assert "--insecure" not in command
    assert "--enable-supernode-auth" in command
    assert command[command.index("--host") + 1] == "127.0.0.1"
    for option in ("--ssl-certfile", "--ssl-keyfile", "--ssl-ca-certfile"):
        assert option in command
    assert set(inspect.signature(SuperLink).parameters) == {"home", "fleet_address", "control_port"}


def test_the_control_api_refuses_plain_http(superlink: SuperLink) -> None:
    command = superlink.command()
    port = int(command[command.index("--port") + 1])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with pytest.raises((ConnectionError, AssertionError)):
            assert plain.recv(100).startswith(b"HTTP/1.1 200")


# --- who may connect ---


def test_a_registered_key_is_listed_connects_and_is_online(
    control: Control, connect: Callable[..., FleetConnection]
) -> None:
    key = new_key()
    node_id = control.register("north", key.public_key())

    def listed() -> Any:
        return next(node for node in control.nodes() if node.node_id == node_id)

    assert (listed().name, listed().public_key) == ("north", public_key_bytes(key.public_key()))
    assert not listed().online
    connection = connect(key)
    assert connection.activate() == connection.node_id == node_id
    assert listed().online
    assert connection.heartbeat()
    assert connection.pull() is None
    connection.close()
    assert not listed().online


def test_a_key_is_registered_once(control: Control) -> None:
    key = new_key()
    control.register("twice", key.public_key())
    with pytest.raises(RunError, match="already in use"):
        control.register("twice", key.public_key())


def test_a_key_connects_once_at_a_time_and_again_after_it_left(
    control: Control, connect: Callable[..., FleetConnection]
) -> None:
    key = new_key()
    control.register("once", key.public_key())
    first, second = connect(key), connect(key)
    node_id = first.activate()
    with pytest.raises(NotAdmitted, match="a node with the same key is connected"):
        second.activate()
    first.close()
    assert connect(key).activate() == node_id


def test_a_key_that_nobody_registered_is_refused(connect: Callable[..., FleetConnection]) -> None:
    connection = connect(new_key())
    with pytest.raises(NotAdmitted, match="does not admit this site's key"):
        connection.activate()
    for call in (connection.heartbeat, connection.pull):
        with pytest.raises(NotAdmitted, match="never registered; ask the coordinator"):
            call()


def test_a_revoked_key_is_refused_from_its_next_call_on(
    control: Control, connect: Callable[..., FleetConnection]
) -> None:
    key, other = new_key(), new_key()
    node_id = control.register("revoked", key.public_key())
    control.register("other", other.public_key())
    connection, neighbour = connect(key), connect(other)
    connection.activate()
    neighbour.activate()
    assert connection.pull() is None
    control.unregister(node_id)
    for call in (connection.pull, connection.heartbeat):
        with pytest.raises(NotAdmitted, match=r"does not admit this site's key any more.*revoked"):
            call()
    with pytest.raises(NotAdmitted, match="was revoked"):
        connect(key).activate()
    assert "revoked" not in [node.name for node in control.nodes()]
    assert neighbour.pull() is None


def test_a_key_that_never_connected_can_be_unregistered(
    control: Control, connect: Callable[..., FleetConnection]
) -> None:
    key = new_key()
    control.unregister(control.register("absent", key.public_key()))
    assert "absent" not in [node.name for node in control.nodes()]
    with pytest.raises(NotAdmitted):
        connect(key).activate()


def test_a_node_that_nobody_knows_cannot_be_unregistered_twice(control: Control) -> None:
    node_id = control.register("gone", new_key().public_key())
    control.unregister(node_id)
    control.unregister(node_id)
    assert "gone" not in [node.name for node in control.nodes()]


def test_a_site_cannot_act_as_another(control: Control, connect: Callable[..., FleetConnection]) -> None:
    key, victim = new_key(), new_key()
    control.register("thief", key.public_key())
    connection = connect(key)
    connection.activate()
    own, connection.node_id = connection.node_id, control.register("victim", victim.public_key())
    with pytest.raises(NotAdmitted, match="Invalid node ID"):
        connection.pull()
    connection.node_id = own


def test_nobody_can_register_through_the_fleet_api(control: Control, connect: Callable[..., FleetConnection]) -> None:
    connection, key = connect(new_key()), new_key()
    request = RegisterNodeFleetRequest(public_key=public_key_bytes(key.public_key()))
    with pytest.raises(grpc.RpcError):
        connection._stub.RegisterNode(request)
    assert public_key_bytes(key.public_key()) not in [node.public_key for node in control.nodes()]
    known = control.register("stays", key.public_key())
    with pytest.raises(grpc.RpcError):
        connection._stub.UnregisterNode(UnregisterNodeFleetRequest(node_id=known))
    assert known in [node.node_id for node in control.nodes()]


def test_an_unsigned_call_is_refused(home: CoordinatorHome, address: str, superlink: SuperLink) -> None:
    from flwr.proto.fleet_pb2_grpc import FleetStub

    credentials = grpc.ssl_channel_credentials(home.ca_certificate.read_bytes())
    with grpc.secure_channel(address, credentials) as channel, pytest.raises(grpc.RpcError) as refused:
        FleetStub(channel).PullMessages(PullMessagesRequest(node=Node(node_id=1)), timeout=10)
    assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


# --- TLS ---


def test_the_fleet_api_speaks_tls_1_3_and_http_2(home: CoordinatorHome, address: str, superlink: SuperLink) -> None:
    facts = tls_facts(address, home.ca_certificate.read_bytes())
    assert (facts.tls_version, facts.alpn) == ("TLSv1.3", "h2")


def test_a_server_of_another_ca_is_not_talked_to(
    superlink: SuperLink, address: str, connect: Callable[..., FleetConnection], tmp_path: Path
) -> None:
    create_ca(tmp_path / "other", name="Another", passphrase=None)
    other = (tmp_path / "other" / "ca.crt").read_bytes()
    with pytest.raises(TrustError, match=r"the certificate of .* does not hold.*consortium's"):
        tls_facts(address, other)
    with pytest.raises(TrustError, match=r"the certificate of .* does not hold"):
        connect(new_key(), ca=other).activate()


def test_a_server_whose_certificate_names_another_host_is_not_talked_to(
    superlink: SuperLink, address: str, home: CoordinatorHome
) -> None:
    port = address.rpartition(":")[2]
    with pytest.raises(TrustError, match="the address is one the certificate was made for"):
        tls_facts(f"127.0.0.2:{port}", home.ca_certificate.read_bytes())


def test_a_server_without_tls_is_not_talked_to(home: CoordinatorHome, connect: Callable[..., FleetConnection]) -> None:
    def hang_up() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            with peer:
                peer.settimeout(5)
                peer.recv(1)
                peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=hang_up, daemon=True).start()
        plain = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(Unreachable, match="does not speak TLS"):
            tls_facts(plain, home.ca_certificate.read_bytes())
        with pytest.raises(Unreachable, match=r"does not speak TLS|cannot be reached"):
            connect(new_key(), to=plain).activate()


def test_nobody_at_the_address_is_said_so(home: CoordinatorHome, connect: Callable[..., FleetConnection]) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    with pytest.raises(Unreachable, match="check the address and that the firewall"):
        tls_facts(nowhere, home.ca_certificate.read_bytes())
    with pytest.raises(Unreachable, match="check the address and that the firewall"):
        connect(new_key(), to=nowhere).activate()


# --- messages ---


def test_a_message_travels_both_ways_whole(
    control: Control, connect: Callable[..., FleetConnection], tmp_path: Path
) -> None:
    key, out = new_key(), tmp_path / "found.json"
    node_id = control.register("worker", key.public_key())
    connection = connect(key)
    connection.activate()
    run_id = control.start_run(bundle_with_code("contract_app", SERVER_APP, {"out": ""}), {"out": str(out)})
    message = eventually(connection.pull)
    assert message.metadata.message_type == "query.contract"
    assert message.metadata.run_id == run_id
    assert message.content["greeting"]["text"] == "hello"
    assert message.content["large"]["bytes"].data == BUFFER

    def reply() -> Message:
        data = BUFFER[::-1]
        large = ArrayRecord({"bytes": Array(dtype="uint8", shape=(len(data),), stype="test", data=data)})
        content = RecordDict({"answer": ConfigRecord({"text": "good day"}), "large": large})
        return Message(content, reply_to=message)

    assert connection.push(reply()) > len(BUFFER)
    eventually(out.exists)
    assert json.loads(out.read_text()) == {
        "node": str(node_id),
        "source": str(node_id),
        "answered": True,
        "text": "good day",
        "same_bytes": True,
    }
    run = control.run(run_id)
    assert run is not None
    assert run.status == "running"
    out.with_suffix(".end").touch()
    eventually(lambda: (found := control.run(run_id)) and found.status == "finished:completed")
    with pytest.raises(RunOver):
        connection.push(reply())


def test_a_run_that_nobody_started_is_not_known(control: Control) -> None:
    assert control.run(4711) is None


def test_the_site_calls_nothing_that_fetches_code() -> None:
    tree = ast.parse(inspect.getsource(fleet))
    called = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute) and node.value.attr == "_stub"
    }
    assert called == {
        "ActivateNode",
        "DeactivateNode",
        "SendNodeHeartbeat",
        "PullMessages",
        "PullObject",
        "ConfirmMessageReceived",
        "PushMessages",
        "PushObject",
    }


def test_replies_that_are_still_on_their_way_are_asked_for_again_soon() -> None:
    from flwr.supercore.inflatable import inflatable_utils
    from flwr.superlink.grid import http_grid

    before = http_grid.pull_objects
    try:
        http_grid.pull_objects = inflatable_utils.pull_objects
        pull_promptly()
        patched = http_grid.pull_objects
        assert isinstance(patched, functools.partial)
        assert patched.func is inflatable_utils.pull_objects
        assert patched.keywords.keys() <= inspect.signature(inflatable_utils.pull_objects).parameters.keys()
        assert patched.keywords["initial_backoff"] < 0.1
        pull_promptly()
        assert http_grid.pull_objects is patched
        # The Grid looks the function up in its module, with the very keyword that is set here.
        assert "pull_objects(" in inspect.getsource(http_grid.HttpGrid.pull_messages)
    finally:
        http_grid.pull_objects = before


# --- the process; these come last, for they end it ---


def test_a_key_that_was_unregistered_needs_a_superlink_that_is_started_anew(
    superlink: SuperLink, control: Control, connect: Callable[..., FleetConnection]
) -> None:
    key, other = new_key(), new_key()
    control.register("other", other.public_key())
    control.unregister(control.register("renewed", key.public_key()))
    with pytest.raises(KeyRemembered, match="the key of site renewed was removed before"):
        control.register("renewed", key.public_key())
    superlink.stop()
    assert not superlink.alive()
    superlink.start()
    with superlink.control() as again:
        assert again.nodes() == []
        node_id = again.register("renewed", key.public_key())
        assert connect(key).activate() == node_id
        with pytest.raises(NotAdmitted):  # until it is registered, too
            connect(other).activate()


def test_a_superlink_that_cannot_start_says_why(home: CoordinatorHome, superlink: SuperLink, address: str) -> None:
    second = SuperLink(home, fleet_address=address, control_port=free_port())
    with pytest.raises(RunError, match="the SuperLink did not start; its log ends with"):
        second.start()
