"""Weights of a graph lie in files of its model, or it is not taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.errors import ModelError
from shared.runtime.export.graph_file import check_graphs, external_files

onnx = pytest.importorskip("onnx")


def tensor(location: str | None, name: str = "w") -> Any:
    """Return a tensor whose data lies elsewhere, or does not say where."""
    found = onnx.TensorProto(name=name, dims=[1], data_type=onnx.TensorProto.FLOAT)
    found.data_location = onnx.TensorProto.EXTERNAL
    if location is not None:
        found.external_data.add(key="location", value=location)
        found.external_data.add(key="offset", value="0")
    return found


def model(*initializers: Any, **parts: Any) -> Any:
    """Return a model that computes nothing."""
    graph = onnx.helper.make_graph(parts.pop("nodes", []), "g", [], [], initializer=list(initializers))
    return onnx.helper.make_model(graph, **parts)


def in_attribute(location: str) -> Any:
    node = onnx.helper.make_node("Constant", [], ["c"], value=tensor(location))
    return model(nodes=[node])


def in_branch(location: str) -> Any:
    branch = onnx.helper.make_graph([], "then", [], [], initializer=[tensor(location)])
    return model(nodes=[onnx.helper.make_node("If", ["x"], ["y"], then_branch=branch)])


def in_function(location: str) -> Any:
    node = onnx.helper.make_node("Constant", [], ["c"], value=tensor(location))
    function = onnx.helper.make_function("d", "f", [], ["c"], [node], [onnx.helper.make_opsetid("", 18)])
    return model(functions=[function])


def in_sparse(location: str) -> Any:
    found = model()
    sparse = found.graph.sparse_initializer.add()
    sparse.values.CopyFrom(tensor(location))
    return found


def in_training(location: str) -> Any:
    found = model()
    found.training_info.add().algorithm.initializer.append(tensor(location))
    return found


PLACES: dict[str, Callable[[str], Any]] = {
    "initializer": lambda location: model(tensor(location)),
    "attribute": in_attribute,
    "branch": in_branch,
    "function": in_function,
    "sparse": in_sparse,
    "training": in_training,
}


@pytest.mark.parametrize("place", PLACES)
def test_every_tensor_is_found(place: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(PLACES[place]("elsewhere.bin").SerializeToString())
    assert external_files(path) == ["elsewhere.bin"]


@pytest.mark.parametrize(
    "location", ["../outside", "/etc/passwd", "unlisted.data", "", "a/../../x", "..\\x", "./model.onnx/../../y"]
)
def test_what_is_outside_or_not_listed_is_refused(location: str, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(model(tensor(location)).SerializeToString())
    with pytest.raises(ModelError, match="no file of the model"):
        check_graphs(tmp_path, ["model.onnx", "model.json"])


def test_a_tensor_that_does_not_say_where_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(model(tensor(None)).SerializeToString())
    with pytest.raises(ModelError, match="keeps weights in ''"):
        check_graphs(tmp_path, ["model.onnx"])


def test_one_location_of_several_is_enough(tmp_path: Path) -> None:
    twice = tensor("../outside")
    twice.external_data.add(key="location", value="model.onnx.data")
    (tmp_path / "model.onnx").write_bytes(model(twice).SerializeToString())
    with pytest.raises(ModelError, match=r"\.\./outside"):
        check_graphs(tmp_path, ["model.onnx", "model.onnx.data"])


@pytest.mark.parametrize("place", [in_branch, in_function])
def test_a_graph_inside_a_graph_is_refused(place: Callable[[str], Any], tmp_path: Path) -> None:
    """A loop of 2^62 turns passes every other check, and is still in its first answer minutes later."""
    (tmp_path / "model.onnx").write_bytes(place("model.onnx.data").SerializeToString())
    with pytest.raises(ModelError, match="graphs or functions inside its graph"):
        check_graphs(tmp_path, ["model.onnx", "model.onnx.data"])


def test_what_lies_beside_and_is_listed_is_taken(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(model(tensor("model.onnx.data")).SerializeToString())
    check_graphs(tmp_path, ["model.onnx", "model.onnx.data"])


@pytest.mark.parametrize(
    "content", [b"", b"\x08", b"\x3a\xff\xff\xff\x7f", b"\x0b", b"\xff" * 40, b"\x3a\x02\x0a\x05"], ids=range(6)
)
def test_what_is_malformed_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ModelError, match="no ONNX file"):
        external_files(tmp_path / "model.onnx")


def test_nests_end(tmp_path: Path) -> None:
    content = b""
    for _ in range(60):
        for tag in (0x32, 0x2A, 0x0A):  # a graph of an attribute of a node, of the graph before
            size = len(content)
            content = bytes([tag, size & 127 | 128, size >> 7 & 127 | 128, size >> 14]) + content
    size = len(content)
    (tmp_path / "model.onnx").write_bytes(bytes([0x3A, size & 127 | 128, size >> 7 & 127 | 128, size >> 14]) + content)
    with pytest.raises(ModelError, match="no ONNX file"):
        external_files(tmp_path / "model.onnx")
