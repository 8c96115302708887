"""A graph of BERT or one of RoBERTa's kind with our head: tokens and mask in, logits or scores out.

Guarantee (tests: tests/shared/runtime/export/test_exports.py): outputs are those of the run's model in float32 to 1e-4,
whatever the length of the batch's longest text.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from shared.runtime.export.folder import TensorSpec
from shared.runtime.export.graphs.builder import Graph
from shared.runtime.export.parts import HEAD_EPSILON, Parts

if TYPE_CHECKING:
    from onnx import ModelProto

BATCH, LENGTH, HEAD = "batch", "sequence", "head.weight"


def specs(parts: Parts) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return inputs and outputs of a graph with a head."""
    text = (BATCH, LENGTH)
    names = ("input_ids", "attention_mask")
    assert parts.head is not None  # noqa: S101 (the caller's model has one)
    shape = (*(text if parts.by_token else text[:1]), len(parts.head[1]))
    return tuple(TensorSpec(name=name, dtype="int64", shape=text) for name in names), (
        TensorSpec(name="logits", dtype="float32", shape=shape),
    )


def encoder_graph(parts: Parts, temperature: float) -> ModelProto:
    """Return the graph; see `add_head` for the temperature."""
    graph, config, weights = Graph(), parts.config, parts.weights
    epsilon = float(config["layer_norm_eps"])

    def norm(inputs: str, name: str) -> str:
        return graph.layer_norm(inputs, name, epsilon, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def linear(inputs: str, name: str) -> str:
        return graph.linear(inputs, name, weights[f"{name}.weight"].T, weights[f"{name}.bias"])

    seen = graph.add("Cast", "attention_mask", to=9)  # bool
    hidden_scores = graph.hidden_scores(graph.add("Unsqueeze", seen, graph.whole(1, 2)))
    hidden = norm(_embedded(graph, parts), "embeddings.LayerNorm")
    for index in range(int(config["num_hidden_layers"])):
        layer = f"{parts.architecture.layers}.{index}"
        attended = _attention(graph, parts, f"{layer}.attention.self", hidden, hidden_scores)
        attended = linear(attended, f"{layer}.attention.output.dense")
        hidden = norm(graph.add("Add", attended, hidden), f"{layer}.attention.output.LayerNorm")
        inner = graph.activation(linear(hidden, f"{layer}.intermediate.dense"), str(config["hidden_act"]))
        hidden = norm(graph.add("Add", linear(inner, f"{layer}.output.dense"), hidden), f"{layer}.output.LayerNorm")
    add_head(graph, parts, hidden, seen, temperature)
    return graph.model(*specs(parts))


def add_head(graph: Graph, parts: Parts, hidden: str, seen: str, temperature: float) -> None:
    """Add pooling, normalisation and linear layer; the output is `logits`.

    Args:
        hidden: vectors of tokens, float [B, T, H].
        seen: which of them are not padding, bool [B, T].
        temperature: of the calibration; it goes into the weights.
    """
    if not parts.by_token:
        hidden = _pooled(graph, parts.job.model.pooling, hidden, seen)
    weight, bias = parts.answering(temperature)
    size = weight.shape[1]
    hidden = graph.layer_norm(hidden, "head.norm", HEAD_EPSILON, torch.ones(size), torch.zeros(size))
    product = graph.add("MatMul", hidden, graph.weight(HEAD, weight.T))
    graph.add("Add", product, graph.weight("head.bias", bias), out="logits")


def _embedded(graph: Graph, parts: Parts) -> str:
    """Add the sum of the embeddings of token, position and the one type of all tokens."""
    weights, begin = parts.weights, "embeddings."
    words = graph.add(
        "Gather", graph.weight("embeddings.words", weights[f"{begin}word_embeddings.weight"]), "input_ids"
    )
    # The type is the same for all: it is added to positions before.
    places = weights[f"{begin}position_embeddings.weight"] + weights[f"{begin}token_type_embeddings.weight"][:1]
    table = graph.weight("embeddings.positions", places)
    if parts.family == "bert":
        return graph.add(
            "Add", words, graph.add("Slice", table, graph.whole(0), graph.size("input_ids", 1), graph.whole(0))
        )
    # Models of RoBERTa's kind count the tokens that are not padding, from its number + 1.
    padding = int(parts.config["pad_token_id"])
    real = graph.add("Cast", graph.add("Not", graph.add("Equal", "input_ids", graph.whole(padding))), to=7)  # int64
    counted = graph.add("Mul", graph.add("CumSum", real, graph.whole(1)), real)
    return graph.add("Add", words, graph.add("Gather", table, graph.add("Add", counted, graph.whole(padding))))


def _attention(graph: Graph, parts: Parts, name: str, hidden: str, hidden_scores: str) -> str:
    """Add scaled dot-product attention; query, key and value are one product."""
    size, count = int(parts.config["hidden_size"]), int(parts.config["num_attention_heads"])
    width, weights = size // count, parts.weights
    three = ("query", "key", "value")
    weight = torch.cat([weights[f"{name}.{one}.weight"] for one in three]).T.clone()
    bias = torch.cat([weights[f"{name}.{one}.bias"] for one in three])
    weight[:, :size] /= math.sqrt(width)  # of the queries, once and for all
    bias[:size] /= math.sqrt(width)
    joined = graph.linear(hidden, name, weight, bias)
    query, key, value = graph.parted(joined, size, 3)
    scores = graph.add("MatMul", graph.heads(query, count, width), graph.heads(key, count, width, transposed=True))
    shares = graph.add("Softmax", graph.add("Add", scores, hidden_scores), axis=-1)
    return graph.joined(graph.add("MatMul", shares, graph.heads(value, count, width)), size)


def _pooled(graph: Graph, pooling: str, hidden: str, seen: str) -> str:
    """Add the mean over the tokens that are not padding, or the first token's vector: [B, H]."""
    if pooling == "first":
        first = graph.add("Slice", hidden, graph.whole(0), graph.whole(1), graph.whole(1))
        return graph.add("Squeeze", first, graph.whole(1))
    weights = graph.add("Unsqueeze", graph.add("Cast", seen, to=1), graph.whole(2))  # float
    total = graph.add("ReduceSum", graph.add("Mul", hidden, weights), graph.whole(1), keepdims=0)
    return graph.add("Div", total, graph.add("ReduceSum", weights, graph.whole(1), keepdims=0))
