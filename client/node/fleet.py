"""Flower's Fleet API over gRPC and TLS, from the site's side; the only file of `client` that touches non-public Flower.

The stock SuperNode downloads and executes whatever Python a run's bundle holds and starts a process for each message.
This connection pulls messages and pushes replies, and has no way to fetch a bundle at all (contract test against a
real SuperLink: tests/integration/test_superlink.py).
"""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.client.grpc_rere_client.node_auth_client_interceptor import NodeAuthClientInterceptor
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    pull_and_inflate_object_from_tree,
    push_objects,
)
from flwr.supercore.interceptors import RuntimeVersionClientInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.task_identity import TaskIdentity

from shared.errors import RunError, TrustError

log = logging.getLogger("silotune.node")

# The SuperLink takes a node for gone after twice this; 10 s is the shortest that it accepts.
HEARTBEAT_SECONDS = 10.0
RPC_TIMEOUT_SECONDS = 30.0
_MOST_OBJECTS = 2048
_MOST_MESSAGE_BYTES = 2**30
_LARGEST_RPC_BYTES = 64 * 2**20  # Flower cuts arrays into chunks of 5 MB
_FIRST_BACKOFF_SECONDS = 0.02


class Unreachable(RunError):
    """The coordinator cannot be reached now; trying again later may help."""


class NotAdmitted(TrustError):
    """The coordinator does not let this key in now: not registered, revoked, or connected already."""


class RunOver(RunError):
    """The run that a message belonged to has ended; the message can be forgotten."""


@dataclass(frozen=True, kw_only=True)
class TlsFacts:
    """What a TLS handshake with the Fleet API showed: evidence for the log."""

    tls_version: str
    alpn: str | None
    cipher: str


class FleetConnection:
    """One authenticated gRPC channel of one site.

    Every call is signed with the site's key, which never leaves this process.

    Attributes:
        node_id: the number that the coordinator knows this key by; 0 before `activate`.
    """

    def __init__(self, address: str, *, ca_certificate: bytes, private_key: ec.EllipticCurvePrivateKey) -> None:
        self.address = address
        self.node_id = 0
        self._ca_certificate = ca_certificate
        self._public_key = public_key_to_bytes(private_key.public_key())
        self._channel = grpc.intercept_channel(
            grpc.secure_channel(
                address,
                grpc.ssl_channel_credentials(ca_certificate),
                options=[
                    # A proxy of the environment would be a second destination that nobody named.
                    ("grpc.enable_http_proxy", 0),
                    ("grpc.max_send_message_length", _LARGEST_RPC_BYTES),
                    ("grpc.max_receive_message_length", _LARGEST_RPC_BYTES),
                    # After a network cut, gRPC's own waiting would grow to two minutes.
                    ("grpc.initial_reconnect_backoff_ms", 200),
                    ("grpc.max_reconnect_backoff_ms", 2000),
                    ("grpc.keepalive_time_ms", 60_000),
                    ("grpc.keepalive_timeout_ms", 10_000),
                ],
            ),
            RuntimeVersionClientInterceptor(component_name="SuperNode"),
            NodeAuthClientInterceptor(private_key, private_key.public_key()),
        )
        self._stub = _TimedStub(FleetStub(self._channel))

    def activate(self) -> int:
        """Log in and return the node id.

        Raises:
            NotAdmitted: the key is not registered, was revoked, or is connected already.
            TrustError: the server's certificate or one of the two clocks is wrong.
            Unreachable: nobody answers.
        """
        request = ActivateNodeRequest(public_key=self._public_key, heartbeat_interval=HEARTBEAT_SECONDS)
        with self._explained():
            self.node_id = self._stub.ActivateNode(request).node_id
        # Flower stamps every message with the identity of the process that makes it.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, 0, self.node_id
        return self.node_id

    def heartbeat(self) -> bool:
        """Tell the coordinator that this node lives; returns False if it no longer knows the node."""
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_SECONDS)
        with self._explained():
            return bool(self._stub.SendNodeHeartbeat(request).success)

    def pull(self) -> Message | None:
        """Return the next message for this node, or None.

        Raises:
            Unreachable, NotAdmitted, TrustError: as for `activate`.
            RunOver: the message's run ended before it was read in full.
        """
        with self._explained():
            response = self._stub.PullMessages(PullMessagesRequest(node=self._node))
            if not response.messages_list:
                return None
            run_id = message_from_proto(response.messages_list[0]).metadata.run_id
            return self._inflate(response.message_object_trees[0], run_id)

    def _inflate(self, tree: Any, run_id: int) -> Message:
        if sum(1 for _ in iterate_object_tree(tree)) > _MOST_OBJECTS:
            raise RunOver(f"a message of more than {_MOST_OBJECTS} objects was left unread.")
        pull_object = make_pull_object_fn_protobuf(self._stub.PullObject, self._node, run_id)
        received = 0

        def bounded_pull(object_id: str) -> bytes:
            nonlocal received
            data = pull_object(object_id)
            received += len(data)
            if received > _MOST_MESSAGE_BYTES:
                raise ObjectPullError(object_id, "the message is too large")
            return data

        try:
            message = pull_and_inflate_object_from_tree(
                tree,
                bounded_pull,
                make_confirm_message_received_fn_protobuf(self._stub.ConfirmMessageReceived, self._node, run_id),
                return_type=Message,
                initial_backoff=_FIRST_BACKOFF_SECONDS,
                max_time=RPC_TIMEOUT_SECONDS,
            )
        except (ObjectPullError, ValueError, TypeError, KeyError) as error:
            raise RunOver(f"a message could not be read in full ({type(error).__name__}).") from None
        message.metadata.__dict__["_message_id"] = tree.object_id
        return message

    def push(self, reply: Message) -> int:
        """Send a reply, made with `reply_to`, and return the bytes that left.

        How long its making took is not told, though Flower has a field for it: it depends on the records.

        Raises:
            RunOver: the coordinator no longer waits for this reply.
            Unreachable, NotAdmitted, TrustError: as for `activate`.
        """
        reply.metadata.__dict__["_message_id"] = reply.object_id
        objects = get_all_nested_objects(reply)
        tree = get_object_tree(reply)
        run_id = reply.metadata.run_id
        request = PushMessagesRequest(
            node=self._node,
            messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=[tree],
            clientapp_runtime_list=[0.0],
        )
        with self._explained():
            response = self._stub.PushMessages(request)
            wanted = set(response.objects_to_push)
            push_object = make_push_object_fn_protobuf(self._stub.PushObject, self._node, run_id, response.session_id)
            sizes: dict[str, int] = {}

            def counted_push(object_id: str, data: bytes) -> None:
                push_object(object_id, data)
                sizes[object_id] = len(data)

            try:
                push_objects(objects, counted_push, object_ids_to_push=wanted)
            except ObjectPushError as error:
                raise RunOver(f"the coordinator refused a part of the reply ({type(error).__name__}).") from None
        return sum(sizes.values())

    def close(self) -> None:
        """Log out, if the coordinator can be told, and close the channel."""
        with contextlib.suppress(Exception):
            self._stub.DeactivateNode(DeactivateNodeRequest(node_id=self.node_id), timeout=2.0)
        self._channel.close()

    @property
    def _node(self) -> Node:
        return Node(node_id=self.node_id)

    @contextlib.contextmanager
    def _explained(self) -> Any:
        try:
            yield
        except grpc.RpcError as error:
            self._explain(error)

    def _explain(self, error: Any) -> NoReturn:
        """Turn gRPC's error into one that says what to mend."""
        code, details = error.code(), str(error.details() or "")
        flower = FlowerError.from_json(details)
        if flower is not None and flower.code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
            raise NotAdmitted(
                f"the coordinator at {self.address} does not admit this site's key. Either it is not registered, was "
                "revoked or has expired (ask the coordinator), or a node with the same key is connected or stopped less "
                f"than {2 * HEARTBEAT_SECONDS:.0f} seconds ago."
            ) from None
        if flower is not None:
            raise RunOver(f"the coordinator refused: {flower.message} (code {flower.code}).") from None
        if code == grpc.StatusCode.UNAUTHENTICATED and "timestamp" in details:
            raise TrustError(
                f"the coordinator at {self.address} refuses this site's time stamp: one of the two clocks is wrong by more than "
                "five minutes, or this one is fast. Compare `date -u` on both machines and mend NTP."
            ) from None
        if code == grpc.StatusCode.UNAUTHENTICATED:
            raise NotAdmitted(
                f"the coordinator at {self.address} does not admit this site's key any more ({details}). It was revoked, "
                "has expired, or was never registered; ask the coordinator."
            ) from None
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
            if "CERTIFICATE_VERIFY_FAILED" in details or "certificate" in details.lower():
                tls_facts(self.address, self._ca_certificate)  # says what is wrong with the certificate
            raise _unreachable(self.address, details or code.name) from None
        raise Unreachable(f"the coordinator at {self.address} answered {code.name}: {details[:200]}") from None


def tls_facts(address: str, ca_certificate: bytes, *, timeout: float = 10.0) -> TlsFacts:
    """Make one TLS handshake with the Fleet API, as gRPC does, and return what was agreed.

    Raises:
        TrustError: the certificate does not hold: another CA, expired, another host.
        Unreachable: no connection, or no TLS on the other side.
    """
    host, port = split_address(address)
    context = ssl.create_default_context(cadata=ca_certificate.decode("ascii"))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, port), timeout=timeout) as plain,
            context.wrap_socket(plain, server_hostname=host) as wrapped,
        ):
            cipher = wrapped.cipher()
            return TlsFacts(
                tls_version=wrapped.version() or "none",
                alpn=wrapped.selected_alpn_protocol(),
                cipher=cipher[0] if cipher else "none",
            )
    except ssl.SSLCertVerificationError as error:
        raise TrustError(
            f"the certificate of {address} does not hold: {error.verify_message}. Check that ca.crt is the consortium's, that "
            "the address is one the certificate was made for, and this machine's clock."
        ) from None
    except ssl.SSLError as error:
        raise Unreachable(f"{address} does not speak TLS as expected ({error.reason}).") from None
    except OSError as error:
        raise _unreachable(address, error.strerror or str(error)) from None


def _unreachable(address: str, reason: str) -> Unreachable:
    return Unreachable(
        f"the coordinator at {address} cannot be reached ({reason}); check the address and that the firewall lets this machine "
        "open connections to it."
    )


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of "host:port" or "[v6]:port".

    Raises:
        RunError: if it is neither.
    """
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdigit():
        raise RunError(f"the address {address!r} is not of the form host:port, for example fl.example.org:9092.")
    return host.strip("[]"), int(port)


class _TimedStub:
    """A stub whose calls have a deadline: gRPC's default is to wait for ever."""

    def __init__(self, stub: Any) -> None:
        self._stub = stub

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = getattr(self._stub, name)

        def timed(request: Any, timeout: float = RPC_TIMEOUT_SECONDS) -> Any:
            return call(request, timeout=timeout)

        return timed
