"""Which other files a graph of ONNX reads, and whether it ends: told from its bytes, without a library that would read them.

A tensor may lie in another file, by any path. ONNX is Protocol Buffers (https://protobuf.dev/programming-guides/encoding/), of
which so much is walked here as leads to tensors; field numbers are those of onnx.proto of ONNX 1.20.

Guarantee (tests: tests/shared/runtime/export/test_graph_file.py): every file that `onnx` would read is found, wherever the tensor
stands; a graph that reads one outside its model, or one that is not listed, is refused, and one with graphs or functions inside:
a model of ours computes each of its operators once, and a loop need not end.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath

from shared.errors import ModelError, excerpt

_MOST_DEPTH, _MOST_FIELDS = 50, 5_000_000
_TENSOR = "TensorProto"
_INSIDE: Mapping[str, Mapping[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: _TENSOR, 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: _TENSOR,
        6: "GraphProto",
        10: _TENSOR,
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: _TENSOR, 2: _TENSOR},
}
"""By its number, which message stands in which."""
_COMPUTED = ("GraphProto", "FunctionProto")
_EXTERNAL_DATA, _DATA_LOCATION, _EXTERNAL = 13, 14, 1


def check_graphs(folder: Path, names: Collection[str]) -> None:
    """Refuse a graph that reads what is no file of its model.

    Args:
        names: of all files of the model, by their places below `folder`.

    Raises:
        ModelError: saying what the graph reads.
    """
    for name in sorted(names):
        if not name.endswith(".onnx"):
            continue
        walk = _walked(folder / name)
        if walk.branches:
            raise ModelError(
                f"{folder / name} holds graphs or functions inside its graph, such as of a loop, which may never end; no model "
                "that Silotune makes does. Do not use it; make it anew."
            )
        for location in sorted(walk.found):
            place = PurePosixPath(name).parent / location
            if place.is_absolute() or ".." in place.parts or "\\" in location or place.as_posix() not in names:
                raise ModelError(
                    f"{folder / name} keeps weights in {excerpt(location)}, which is no file of the model: whatever lies there "
                    "would be taken for them. Do not use the model; make it anew."
                )


def external_files(path: Path) -> list[str]:
    """Return the files that the graph at `path` reads beside itself, by the names that it gives them, sorted.

    Raises:
        ModelError: if it is no ONNX file.
    """
    return sorted(_walked(path).found)


def _walked(path: Path) -> _Walk:
    walk = _Walk()
    try:
        with path.open("rb") as file:
            walk.message(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)), "ModelProto", 0)
    except (ValueError, IndexError, OSError):
        raise ModelError(f"{path} is no ONNX file that can be read; restore it, or make the model anew.") from None
    return walk


class _Walk:
    """Through a message and all that stands in it.

    Attributes:
        found: where tensors lie that are not in the file; "" where one does not say it.
        branches: whether there is a graph or a function inside the graph.
    """

    def __init__(self) -> None:
        self.found: set[str] = set()
        self.branches = False
        self._fields_left = _MOST_FIELDS

    def message(self, data: memoryview, kind: str, depth: int) -> None:
        """Go through one message; ValueError or IndexError if it is malformed."""
        if depth > _MOST_DEPTH:
            raise ValueError("nested too deep")
        inside = _INSIDE.get(kind, {})
        locations, is_external = set[str](), False
        for number, value in self._fields(data):
            if kind == _TENSOR and number == _DATA_LOCATION:
                is_external = value == _EXTERNAL
            if not isinstance(value, memoryview):
                continue
            if kind == _TENSOR and number == _EXTERNAL_DATA:
                entry = {key: bytes(text).decode() for key, text in self._fields(value) if isinstance(text, memoryview)}
                locations |= {entry.get(2, "")} if entry.get(1) == "location" else set()
            elif number in inside:
                self.branches |= (kind != "ModelProto" and inside[number] == "GraphProto") or inside[
                    number
                ] == "FunctionProto"
                self.message(value, inside[number], depth + 1)
        self.found |= locations or ({""} if is_external else set())

    def _fields(self, data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
        """Yield number and value of each field; of values of fixed width, which nothing here needs, 0."""
        at = 0
        while at < len(data):
            self._fields_left -= 1
            if self._fields_left < 0:
                raise ValueError("more fields than any graph has")
            tag, at = _varint(data, at)
            number, wire = tag >> 3, tag & 7
            if wire == 0:
                value, at = _varint(data, at)
                yield number, value
            elif wire == 2:
                length, at = _varint(data, at)
                if length > len(data) - at:
                    raise ValueError("cut short")
                yield number, data[at : at + length]
                at += length
            elif wire in (1, 5):
                at += 8 if wire == 1 else 4
                yield number, 0
            else:
                raise ValueError("an unknown kind of field")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("too long a number")
