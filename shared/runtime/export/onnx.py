"""ONNX: `model.onnx` for runtimes that know nothing of PyTorch, in float32 or with weights in int8.

int8 is dynamic quantisation: weights are whole numbers with one scale for each output of a layer (for each token, in an
embedding), and activations are quantised as they come, so nothing has to be calibrated and no record is read. ONNX Runtime
takes one scale for all activations of a batch; each token's are divided by their largest one before, so that an outlier in
one token costs others no precision. Softmax, normalisations, products of activations and the head stay in float32.

Guarantee (tests: tests/shared/runtime/export/test_exports.py): float32 outputs are those of the run's model to 1e-4;
docs/using-a-model.md says what int8 costs.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.errors import ConfigError
from shared.job.job import Job
from shared.models.families import ARCHITECTURES
from shared.models.images import ImageModel
from shared.runtime.export.folder import Precision, TensorSpec
from shared.runtime.export.graphs import encoder, gpt2, image
from shared.runtime.export.graphs.builder import OPSET as OPSET
from shared.runtime.export.parts import Parts

if TYPE_CHECKING:
    from onnx import ModelProto

GRAPH_FILE = "model.onnx"
GRAPHS = tuple(row.name for row in ARCHITECTURES.values() if row.has_graph)
"""Families of which graphs are made."""
_MOST_BYTES = 1_900_000_000
"""Of weights inside `model.onnx`, whose format ends at 2 GiB; more lie in a file beside it."""


def require_onnx() -> None:
    """Raise `ConfigError` if the optional libraries are missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(f"--to onnx needs the package {error.name}: pip install 'silotune[export]'") from None


def write_graph(
    folder: Path, parts: Parts, temperature: float, precision: Precision
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Write `model.onnx` of a language model into `folder`; return its inputs and outputs.

    Args:
        temperature: of the calibration; it goes into the head's weights.

    Raises:
        ConfigError: if the backbone has something that a graph cannot have.
    """
    check_graph(parts)
    if parts.family == "gpt2":
        model = gpt2.gpt2_graph(parts, temperature, share_embedding=precision == "float32")
    else:
        model = encoder.encoder_graph(parts, temperature)
    _save(quantised(model) if precision == "int8" else model, folder / GRAPH_FILE)
    return gpt2.specs(parts) if parts.family == "gpt2" else encoder.specs(parts)


def check_graph(parts: Parts) -> None:
    """Raise `ConfigError` if nothing here makes a graph of such a backbone."""
    row = parts.architecture
    if row.has_graph and parts.output is None:
        return
    what = row.name if not row.has_graph else f"a {row.name} with an output matrix of its own"
    merges = row.merges_labels or parts.head is None
    raise ConfigError(
        f"no graph is made of {what}; {', '.join(sorted(GRAPHS))} have one. "
        + ("Export it with --to merged." if merges else "Its adapter stands in the run, for Silotune and for PEFT.")
    )


def write_image_graph(
    folder: Path, model: ImageModel, job: Job, temperature: float
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Write `model.onnx` of a network for images into `folder`; return its inputs and outputs."""
    _save(image.image_graph(model, job, temperature), folder / GRAPH_FILE)
    return image.specs(job)


def new_session(path: Path, threads: int = 0) -> Any:
    """Return a session of ONNX Runtime for the graph at `path`, on the processor.

    Args:
        threads: for one batch; 0 is one for each core.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads wait busily within a run, where that is faster; between two runs somebody else may want the core.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Only int8 graphs get this fusion, and its kernel takes a quarter of their time, several times that of what it replaces.
    options.add_session_config_entry("optimization.disable_specified_optimizers", "SkipLayerNormFusion")
    if _may_overflow():
        options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _may_overflow() -> bool:
    """True on x86 without VNNI: it adds two products of int8 in 16 bits, where ONNX Runtime has a slower way that is exact."""
    try:
        known = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx2" in known and "vnni" not in known


def quantised(model: ModelProto) -> ModelProto:
    """Return the model with weights in int8; `model` itself is changed."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    _embeddings_by_row(model)
    products = _products_by_token(model)
    with tempfile.TemporaryDirectory(prefix="silotune-") as folder, _quiet():
        path = Path(folder, GRAPH_FILE)
        quantize_dynamic(
            model,
            path,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=products,
            per_channel=True,
            # Eight bits: seven, for processors without VNNI, cost several times as much accuracy; see `new_session`.
            reduce_range=False,
            weight_type=QuantType.QInt8,
            use_external_data_format=model.ByteSize() > _MOST_BYTES,
        )
        return onnx.load(path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what ONNX Runtime advises of graphs that were traced."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def _products_by_token(model: ModelProto) -> list[str]:
    """Divide what enters a product with weights by its largest value, token by token, and multiply by it again, in place.

    Returns:
        the names of these products; the head's, which is small and decides, is none of them.
    """
    from onnx import helper, numpy_helper

    graph, weights = model.graph, {weight.name for weight in model.graph.initializer}
    nodes: list[Any] = []
    names: list[str] = []
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[1] not in weights or node.input[1] == encoder.HEAD:
            nodes.append(node)
            continue
        (values, weight), out = node.input, node.output[0]
        names.append(node.name)
        steps = [
            ("Abs", [values], "size"),
            ("ReduceMax", [f"{out}.size", "last_axis"], "row"),
            ("Max", [f"{out}.row", "least"], "largest"),  # of a token that is 0 throughout
            ("Div", [values, f"{out}.largest"], "scaled"),
        ]
        nodes += [
            helper.make_node(operator, given, [f"{out}.{end}"], name=f"{out}.{end}") for operator, given, end in steps
        ]
        nodes.append(helper.make_node("MatMul", [f"{out}.scaled", weight], [f"{out}.product"], name=node.name))
        nodes.append(helper.make_node("Mul", [f"{out}.product", f"{out}.largest"], [out], name=f"{out}.unscaled"))
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.append(numpy_helper.from_array(np.asarray([-1], np.int64), "last_axis"))
    graph.initializer.append(numpy_helper.from_array(np.asarray(np.finfo(np.float32).tiny, np.float32), "least"))
    return names


def _embeddings_by_row(model: ModelProto) -> None:
    """Put tables of `Gather` into int8 with one scale a row, in place."""
    from onnx import helper, numpy_helper

    graph, weights = model.graph, {weight.name: weight for weight in model.graph.initializer}
    nodes: list[Any] = []
    found: dict[str, Any] = {}
    for node in graph.node:
        table = weights.get(node.input[0]) if node.op_type == "Gather" else None
        if table is None or len(table.dims) != 2:
            nodes.append(node)
            continue
        values = numpy_helper.to_array(table)
        scales = np.maximum(np.abs(values).max(axis=1, keepdims=True) / 127, np.finfo(np.float32).tiny).astype(
            np.float32
        )
        whole, scale = f"{table.name}.int8", f"{table.name}.scales"
        found[whole] = numpy_helper.from_array(np.rint(values / scales).astype(np.int8), whole)
        found[scale] = numpy_helper.from_array(scales, scale)
        out, places = node.output[0], node.input[1]
        nodes += [
            helper.make_node("Gather", [whole, places], [f"{out}.int8"], name=f"{out}.int8"),
            helper.make_node("Cast", [f"{out}.int8"], [f"{out}.float"], name=f"{out}.float", to=1),
            helper.make_node("Gather", [scale, places], [f"{out}.scale"], name=f"{out}.scale"),
            helper.make_node("Mul", [f"{out}.float", f"{out}.scale"], [out], name=out),
        ]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(found.values())
    used = {name for node in graph.node for name in node.input}
    kept = [weight for weight in graph.initializer if weight.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _save(model: ModelProto, path: Path) -> None:
    import onnx

    if large := model.ByteSize() > _MOST_BYTES:
        onnx.save_model(model, path, save_as_external_data=large, location=f"{path.name}.data", size_threshold=1 << 20)
    else:
        onnx.save_model(model, path)
