"""Frames as bytes: what `link.proto` says, and nothing that a peer sends does harm."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from hypothesis import given
from hypothesis import strategies as st

import shared.link
from shared.link import frames
from shared.link.frames import Ack, Array, Chunk, Envelope, Failure, Hello, LinkError, Notice, Offer, Record, Welcome

PROTO = Path(shared.link.__file__).parent / "link.proto"
EXAMPLES = [
    Hello(b"i" * 16, "1"),
    Welcome(2**63 - 1, "a", "1"),
    Offer(b"i" * 16, b"", 5, b"h" * 32),
    Ack(b"i" * 16, 5),
    Chunk(b"i" * 16, 0, b"data\x00"),
    Notice("späť"),
]
ENVELOPE = Envelope(
    1, "train", "3", 1.5, 60.0, [Record("a", "array", b"", [Array("w", "f", [2, 3], "s", b"x")])], [Failure(5, "no")]
)


def described(file: Any) -> dict[str, list[tuple[str, int, str, bool]]]:
    """Return message -> (field, number, type, repeated) of a file descriptor."""
    scalar = {4: "uint64", 1: "double", 9: "string", 12: "bytes"}
    return {
        message.name: [
            (f.name, f.number, f.type_name.rpartition(".")[2] or scalar[f.type], f.label == 3) for f in message.field
        ]
        for message in file.message_type
    }


def test_the_descriptors_are_those_of_the_proto_file() -> None:
    text = re.sub(r"//.*", "", PROTO.read_text(encoding="utf-8"))
    written = {
        name: [
            (field, int(number), kind, bool(repeated))
            for repeated, kind, field, number in re.findall(r"(repeated )?(\w+) (\w+) = (\d+);", body)
        ]
        for name, body in re.findall(r"message (\w+) \{(.*?)\}", text, flags=re.DOTALL)
    }
    assert len(written) == 11
    assert written == described(frames.file_descriptor())
    assert f"package {frames.PACKAGE};" in text
    assert "service Link {" in text
    assert "rpc Connect(stream Frame) returns (stream Frame);" in text


@pytest.mark.skipif(importlib.util.find_spec("grpc_tools") is None, reason="the protobuf compiler is not installed")
def test_the_compiler_makes_the_same_descriptors(tmp_path: Path) -> None:
    out = tmp_path / "set"
    compiler = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO.parent}", f"--descriptor_set_out={out}"]
    subprocess.run([*compiler, str(PROTO)], check=True)
    (compiled,) = FileDescriptorSet.FromString(out.read_bytes()).file
    compiled.name = frames.file_descriptor().name
    for message in compiled.message_type:
        for field in message.field:
            field.ClearField("json_name")
    assert compiled == frames.file_descriptor()


@pytest.mark.parametrize("frame", EXAMPLES, ids=lambda frame: type(frame).__name__)
def test_frames_come_back_as_they_were(frame: frames.Frame) -> None:
    assert frames.frame_of(frames.bytes_of(frame)) == frame


def test_envelopes_come_back_as_they_were() -> None:
    assert frames.message_of(Envelope, frames.bytes_of(ENVELOPE)) == ENVELOPE


@given(st.binary(max_size=200))
def test_bytes_of_a_stranger_are_a_frame_or_an_error(data: bytes) -> None:
    for read in (frames.frame_of, lambda data: frames.message_of(Envelope, data)):
        with contextlib.suppress(LinkError):
            read(data)


@given(st.sampled_from([*EXAMPLES, ENVELOPE]), st.data())
def test_damaged_bytes_are_a_frame_or_an_error(message: Any, data: st.DataObject) -> None:
    damaged = bytearray(frames.bytes_of(message))
    place = data.draw(st.integers(0, len(damaged) - 1))
    damaged[place] = data.draw(st.integers(0, 255))
    with contextlib.suppress(LinkError):
        frames.frame_of(bytes(damaged))


def test_an_empty_frame_is_refused() -> None:
    with pytest.raises(LinkError, match="holds 0 of the kinds"):
        frames.frame_of(b"")
