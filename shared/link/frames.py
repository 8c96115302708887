"""Frames and envelopes as Python sees them, and as bytes: `link.proto` without a compiler.

The protobuf compiler is no dependency of this project, so the descriptors are built here from the fields of the dataclasses:
their order gives the numbers. Append only; a test compares with `link.proto` (tests/shared/link/test_frames.py).

Guarantee: `frame_of` and `message_of` raise `LinkError` on bytes that are not one frame, whatever they are; nothing else.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from shared.errors import RunError

PACKAGE = "silotune.link.v1"
SERVICE = f"{PACKAGE}.Link"
METHOD = f"/{SERVICE}/Connect"


class LinkError(RunError):
    """The other end does not keep to the protocol, or is of another version; the stream ends."""


@dataclass(frozen=True)
class Hello:
    """See `link.proto`, as for the others."""

    instance: bytes
    software: str


@dataclass(frozen=True)
class Welcome:
    """The coordinator's answer."""

    node: int
    site: str
    software: str


@dataclass(frozen=True)
class Offer:
    """A message that could be sent."""

    id: bytes
    reply_to: bytes
    num_bytes: int
    sha256: bytes


@dataclass(frozen=True)
class Ack:
    """So many bytes of a message are here."""

    id: bytes
    offset: int


@dataclass(frozen=True)
class Chunk:
    """Some bytes of a message."""

    id: bytes
    offset: int
    data: bytes


@dataclass(frozen=True)
class Notice:
    """Words."""

    text: str


@dataclass(frozen=True)
class Array:
    """One array of a record."""

    name: str
    dtype: str
    shape: list[int]
    stype: str
    data: bytes


@dataclass(frozen=True)
class Record:
    """One of Flower's records."""

    name: str
    kind: str
    body: bytes
    arrays: list[Array]


@dataclass(frozen=True)
class Failure:
    """What Flower calls an error."""

    code: int
    reason: str


@dataclass(frozen=True)
class Envelope:
    """The payload of a message."""

    run_id: int
    message_type: str
    group_id: str
    created_at: float
    ttl: float
    records: list[Record]
    failure: list[Failure]


Frame = Hello | Welcome | Offer | Ack | Chunk | Notice
FRAMES: tuple[type[Any], ...] = typing.get_args(Frame)
MESSAGES: tuple[type[Any], ...] = (*FRAMES, Envelope, Record, Array, Failure)

MessageT = TypeVar("MessageT")

_FIELD = descriptor_pb2.FieldDescriptorProto
_SCALARS = {int: _FIELD.TYPE_UINT64, float: _FIELD.TYPE_DOUBLE, str: _FIELD.TYPE_STRING, bytes: _FIELD.TYPE_BYTES}


def file_descriptor() -> Any:
    """Return the `FileDescriptorProto` of `link.proto`."""
    file = descriptor_pb2.FileDescriptorProto(name="silotune/link/v1/link.proto", package=PACKAGE, syntax="proto3")
    frame = file.message_type.add(name="Frame")
    for kind in FRAMES:
        _add_field(frame, kind.__name__.lower(), kind)
    for message in MESSAGES:
        described = file.message_type.add(name=message.__name__)
        hints = typing.get_type_hints(message)
        for field in fields(message):
            _add_field(described, field.name, hints[field.name])
    service = file.service.add(name="Link")
    service.method.add(
        name="Connect",
        input_type=f".{PACKAGE}.Frame",
        output_type=f".{PACKAGE}.Frame",
        client_streaming=True,
        server_streaming=True,
    )
    return file


def _add_field(message: Any, name: str, kind: Any) -> None:
    field = message.field.add(name=name, number=len(message.field) + 1, label=_FIELD.LABEL_OPTIONAL)
    if typing.get_origin(kind) is list:
        field.label, kind = _FIELD.LABEL_REPEATED, typing.get_args(kind)[0]
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type, field.type_name = _FIELD.TYPE_MESSAGE, f".{PACKAGE}.{kind.__name__}"


_POOL = descriptor_pool.DescriptorPool()
_POOL.Add(file_descriptor())
_CLASSES = {
    name: message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"{PACKAGE}.{name}"))
    for name in ("Frame", *(message.__name__ for message in MESSAGES))
}
_LISTS = {
    (message, name): typing.get_args(kind)[0]
    for message in MESSAGES
    for name, kind in typing.get_type_hints(message).items()
    if typing.get_origin(kind) is list
}


def bytes_of(message: object) -> bytes:
    """Return a frame or an envelope as bytes."""
    proto = _to_proto(message)
    if isinstance(message, FRAMES):
        proto = _CLASSES["Frame"](**{type(message).__name__.lower(): proto})
    return bytes(proto.SerializeToString())


def frame_of(data: bytes) -> Frame:
    """Return the frame in `data`.

    Raises:
        LinkError: if it is none.
    """
    proto = _parsed("Frame", data)
    present = [kind for kind in FRAMES if proto.HasField(kind.__name__.lower())]
    if len(present) != 1:
        raise LinkError(f"a frame holds {len(present)} of the kinds that are known; expected one.")
    frame: Frame = _from_proto(getattr(proto, present[0].__name__.lower()), present[0])
    return frame


def message_of(kind: type[MessageT], data: bytes) -> MessageT:
    """Return the message in `data`.

    Raises:
        LinkError: if it is none.
    """
    return _from_proto(_parsed(kind.__name__, data), kind)


def _parsed(name: str, data: bytes) -> Any:
    try:
        return _CLASSES[name].FromString(data)
    except DecodeError:
        raise LinkError(f"{len(data)} bytes came that are no {name.lower()}.") from None


def _to_proto(message: Any) -> Any:
    values = {field.name: getattr(message, field.name) for field in fields(message)}
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = [item if isinstance(item, int) else _to_proto(item) for item in value]
    return _CLASSES[type(message).__name__](**values)


def _from_proto(proto: Any, kind: type[MessageT]) -> MessageT:
    values: dict[str, Any] = {}
    for field in fields(kind):  # type: ignore[arg-type]  # all are dataclasses
        value = getattr(proto, field.name)
        item = _LISTS.get((kind, field.name))
        if item is not None:
            value = list(value) if item is int else [_from_proto(one, item) for one in value]
        values[field.name] = value
    return kind(**values)
