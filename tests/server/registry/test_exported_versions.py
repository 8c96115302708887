"""A version is exported by its name, and what was exported becomes a version that names it as its parent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from server.registry.registry import Registry
from server.registry.verification import verify
from shared.files.json_files import read_object
from shared.trust.signed_file import sha256_and_size
from tests.conftest import Outcome


def test_from_a_version_to_an_export_to_a_version(
    silotune: Callable[..., Outcome], registry: Registry, key_files: dict[str, Path], tmp_path: Path
) -> None:
    where = ("--registry", registry.path)
    for number, (to, precision) in enumerate([("merged", "float32"), ("onnx", "int8")], start=3):
        out = tmp_path / to
        told = silotune("export", "films:2", "--to", to, "--precision", precision, "--out", out, *where)
        assert told.status == 0, told.err
        assert "exporting films:2" in told.err
        added = silotune("models", "add", out, "--name", "films", "--signer", key_files["sam"], "--json", *where)
        assert added.status == 0, added.err
        row = json.loads(added.out)
        assert (row["version"], row["format"], row["precision"]) == (number, to, precision)
        version = registry.version("films", number)  # the first two are the same model
        assert version.manifest.parent is not None
        assert version.manifest.parent.reference == "films:2"
        assert row["metric_text"].endswith(" of films:2")
        assert verify(version).summary.epsilon == registry.version("films", 1).manifest.summary.epsilon
    assert to == "onnx"
    _keep_a_weight_elsewhere(out)
    refused = silotune("models", "add", out, "--name", "films", "--signer", key_files["sam"], *where)
    assert refused.status == 1
    assert "keeps weights in '../outside.bin', which is no file of the model" in refused.err
    assert registry.numbers("films") == [1, 2, 3, 4]
    missing = silotune("export", "film", "--to", "onnx", "--out", tmp_path / "x", *where)
    assert missing.status == 2
    assert "did you mean 'films'" in missing.err


def _keep_a_weight_elsewhere(folder: Path) -> None:
    """Let a graph read a file outside its folder, and model.json name the graph as it is now."""
    import onnx

    graph = onnx.load(folder / "model.onnx")
    weight = graph.graph.initializer[0]
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="../outside.bin")
    (folder / "model.onnx").write_bytes(graph.SerializeToString())
    record = read_object(folder / "model.json")
    record["files"]["model.onnx"] = sha256_and_size(folder / "model.onnx")[0]
    (folder / "model.json").write_text(json.dumps(record))


def test_a_version_that_was_changed_is_not_exported(
    silotune: Callable[..., Outcome], registry: Registry, tmp_path: Path
) -> None:
    path = next((registry.path / "films" / "versions" / "1" / "model" / "adapter").glob("*.safetensors"))
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    told = silotune("export", "films:1", "--to", "merged", "--out", tmp_path / "out", "--registry", registry.path)
    assert told.status == 1
    assert "was changed" in told.err
    assert not (tmp_path / "out").exists()
