"""A graph of a network for images: pixel values as the job has them in, logits out.

The product reads a pixel as one of 65,536 steps of its range, the graph as it is: outputs differ by less than 1e-4 for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shared.errors import ConfigError
from shared.job.job import Job
from shared.models.images import ImageModel
from shared.runtime.export.folder import TensorSpec
from shared.runtime.export.graphs.builder import Graph

if TYPE_CHECKING:
    from onnx import ModelProto


def specs(job: Job) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return inputs and outputs."""
    pixels = TensorSpec(name="pixels", dtype="float32", shape=("batch", job.task.num_pixels))
    return (pixels,), (TensorSpec(name="logits", dtype="float32", shape=("batch", len(job.task.labels))),)


def image_graph(model: ImageModel, job: Job, temperature: float) -> ModelProto:
    """Return the graph; `temperature` of the calibration goes into the head's weights."""
    graph = Graph()
    assert job.task.pixel_range is not None  # noqa: S101 (checked by TaskConfig)
    low, high = job.task.pixel_range
    scaled = graph.add("Mul", graph.add("Sub", "pixels", graph.number(low)), graph.number(2 / (high - low)))
    hidden = graph.add("Sub", scaled, graph.number(1.0))
    shape: tuple[int, ...] = tuple(model.shape)
    hidden = graph.add("Reshape", hidden, graph.whole(-1, *shape))
    for number, layer in enumerate(model.features):
        hidden, shape = _layer(graph, f"features.{number}", layer, hidden, shape)
    head: Any = model.head
    weight, bias = head.weight.detach().double().cpu() / temperature, head.bias.detach().double().cpu() / temperature
    product = graph.add("MatMul", hidden, graph.weight("head.weight", weight.T))
    graph.add("Add", product, graph.weight("head.bias", bias), out="logits")
    return graph.model(*specs(job))


def _layer(
    graph: Graph, name: str, layer: nn.Module, hidden: str, shape: tuple[int, ...]
) -> tuple[str, tuple[int, ...]]:
    """Add a layer; `shape` is that of an image before it, and what is returned that behind it."""
    if isinstance(layer, nn.Conv2d):
        pads = [int(pad) for pad in layer.padding] * 2
        hidden = graph.add("Conv", hidden, graph.weight(f"{name}.weight", layer.weight.cpu()), pads=pads)
    elif isinstance(layer, nn.GroupNorm):
        hidden = _group_norm(graph, name, layer, hidden, shape)
    elif isinstance(layer, nn.Tanh):
        return graph.add("Tanh", hidden), shape
    elif isinstance(layer, nn.AvgPool2d):
        side = int(layer.kernel_size)  # type: ignore[arg-type]
        hidden = graph.add("AveragePool", hidden, kernel_shape=[side, side], strides=[side, side])
    elif isinstance(layer, nn.AdaptiveAvgPool2d):
        # The mean over a rectangle is the mean over its columns of the means over its rows.
        rows, columns = (_means(size, int(parts)) for size, parts in zip(shape[1:], layer.output_size, strict=True))  # type: ignore[arg-type]
        hidden = graph.add("MatMul", graph.weight(f"{name}.rows", rows), hidden)
        hidden = graph.add("MatMul", hidden, graph.weight(f"{name}.columns", columns.T))
    elif isinstance(layer, nn.Flatten):
        return graph.add("Flatten", hidden, axis=1), (shape[0] * shape[1] * shape[2],)
    else:
        raise ConfigError(f"the network has a layer {type(layer).__name__}, which a graph cannot have yet.")
    with torch.no_grad():
        return hidden, tuple(layer.cpu()(torch.zeros(1, *shape)).shape[1:])


def _group_norm(graph: Graph, name: str, layer: nn.GroupNorm, hidden: str, shape: tuple[int, ...]) -> str:
    ones, zeros = torch.ones(layer.num_groups), torch.zeros(layer.num_groups)
    parted = graph.add("Reshape", hidden, graph.whole(0, layer.num_groups, -1))
    normed = graph.add(
        "InstanceNormalization", parted, graph.weight("ones", ones), graph.weight("zeros", zeros), epsilon=layer.eps
    )
    back = graph.add("Reshape", normed, graph.whole(0, *shape))
    scaled = graph.add("Mul", back, graph.weight(f"{name}.weight", layer.weight.cpu()[:, None, None]))
    return graph.add("Add", scaled, graph.weight(f"{name}.bias", layer.bias.cpu()[:, None, None]))


def _means(size: int, parts: int) -> Tensor:
    """Return the matrix [parts, size] whose rows are the means that adaptive pooling takes along one side."""
    matrix = torch.zeros(parts, size)
    for part in range(parts):
        begin, end = part * size // parts, -(-(part + 1) * size // parts)
        matrix[part, begin:end] = 1 / (end - begin)
    return matrix
