"""A graph of GPT-2: a language model with the keys and values of earlier tokens as inputs and outputs, or our head on it.

Tokens are numbered by the mask, so texts of a batch may be padded on the left, as for generation, or on the right.

Guarantee (tests: tests/shared/runtime/export/test_exports.py): outputs are those of the run's model in float32 to 1e-4, read at
once or token by token.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

from shared.runtime.export.folder import TensorSpec
from shared.runtime.export.graphs.builder import Graph
from shared.runtime.export.graphs.encoder import BATCH, LENGTH, add_head
from shared.runtime.export.graphs.encoder import specs as head_specs
from shared.runtime.export.parts import Parts

if TYPE_CHECKING:
    from onnx import ModelProto

PAST, ALL = "past_sequence", "past_and_sequence"


def specs(parts: Parts) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return inputs and outputs; those of the cache are called as Optimum calls them."""
    if parts.head is not None:
        return head_specs(parts)
    count = int(parts.config["n_head"])
    width, layers = int(parts.config["n_embd"]) // count, range(int(parts.config["n_layer"]))

    def cache(begin: str, length: str) -> list[TensorSpec]:
        shape = (BATCH, count, length, width)
        return [
            TensorSpec(name=f"{begin}.{i}.{one}", dtype="float32", shape=shape)
            for i in layers
            for one in ("key", "value")
        ]

    inputs = (
        TensorSpec(name="input_ids", dtype="int64", shape=(BATCH, LENGTH)),
        TensorSpec(name="attention_mask", dtype="int64", shape=(BATCH, ALL)),
        *cache("past_key_values", PAST),
    )
    logits = TensorSpec(name="logits", dtype="float32", shape=(BATCH, LENGTH, int(parts.config["vocab_size"])))
    return inputs, (logits, *cache("present", ALL))


def gpt2_graph(parts: Parts, temperature: float, *, share_embedding: bool) -> ModelProto:
    """Return the graph.

    Args:
        temperature: of a classifier's calibration; see `add_head`.
        share_embedding: store the token embedding once, also as the output's weights; without, it can be quantised there.
    """
    graph, weights, epsilon = Graph(), parts.weights, float(parts.config["layer_norm_epsilon"])
    table = graph.weight("wte", weights["wte.weight"])
    past = graph.whole(0) if parts.head is not None else graph.size("past_key_values.0.key", 2)
    seen = graph.add("Cast", "attention_mask", to=9)  # bool
    numbers = graph.add("Sub", graph.add("CumSum", "attention_mask", graph.whole(1)), graph.whole(1))
    numbers = graph.add("Max", _from(graph, numbers, past, axis=1), graph.whole(0))  # padding on the left has none
    places = graph.add("Gather", graph.weight("wpe", weights["wpe.weight"]), numbers)
    hidden = graph.add("Add", graph.add("Gather", table, "input_ids"), places)
    hidden_scores = _hidden_scores(graph, seen, past)
    for index in range(int(parts.config["n_layer"])):
        hidden = _layer(graph, parts, index, hidden, hidden_scores)
    hidden = graph.layer_norm(hidden, "ln_f", epsilon, weights["ln_f.weight"], weights["ln_f.bias"])
    if parts.head is not None:
        add_head(graph, parts, hidden, seen, temperature)
    else:
        turned = (
            graph.add("Transpose", table, perm=[1, 0])
            if share_embedding
            else graph.weight("lm_head", weights["wte.weight"].T)
        )
        graph.add("MatMul", hidden, turned, out="logits")
    return graph.model(*specs(parts))


def _from(graph: Graph, values: str, begin: str, *, axis: int) -> str:
    return graph.add("Slice", values, begin, graph.whole(2**62), graph.whole(axis))


def _hidden_scores(graph: Graph, seen: str, past: str) -> str:
    """Add what keeps a token from seeing padding and those to its right: [B, 1, T, past + T]."""
    total = graph.add("Squeeze", graph.size("attention_mask", 1), graph.whole(0))
    places = graph.add("Range", graph.scalar(0), total, graph.scalar(1))
    rows = graph.add("Unsqueeze", _from(graph, places, past, axis=0), graph.whole(1))
    left = graph.add("LessOrEqual", places, rows)
    return graph.hidden_scores(graph.add("And", graph.add("Unsqueeze", seen, graph.whole(1, 2)), left))


def _layer(graph: Graph, parts: Parts, index: int, hidden: str, hidden_scores: str) -> str:
    weights, epsilon, layer = parts.weights, float(parts.config["layer_norm_epsilon"]), f"h.{index}"

    def pair(name: str) -> tuple[Tensor, Tensor]:
        return weights[f"{layer}.{name}.weight"], weights[f"{layer}.{name}.bias"]

    def linear(inputs: str, name: str) -> str:
        return graph.linear(inputs, f"{layer}.{name}", *pair(name))

    normed = graph.layer_norm(hidden, f"{layer}.ln_1", epsilon, *pair("ln_1"))
    hidden = graph.add("Add", linear(_attention(graph, parts, index, normed, hidden_scores), "attn.c_proj"), hidden)
    normed = graph.layer_norm(hidden, f"{layer}.ln_2", epsilon, *pair("ln_2"))
    inner = graph.activation(linear(normed, "mlp.c_fc"), str(parts.config["activation_function"]))
    return graph.add("Add", linear(inner, "mlp.c_proj"), hidden)


def _attention(graph: Graph, parts: Parts, index: int, hidden: str, hidden_scores: str) -> str:
    config, name = parts.config, f"h.{index}.attn.c_attn"
    size, count = int(config["n_embd"]), int(config["n_head"])
    width = size // count
    weight, bias = parts.weights[f"{name}.weight"].clone(), parts.weights[f"{name}.bias"].clone()
    scale = 1 / math.sqrt(width) if config.get("scale_attn_weights", True) else 1.0
    scale /= index + 1 if config.get("scale_attn_by_inverse_layer_idx") else 1
    weight[:, :size] *= scale  # of the queries, once and for all
    bias[:size] *= scale
    joined = graph.linear(hidden, name, weight, bias)
    query, key, value = (graph.heads(part, count, width) for part in graph.parted(joined, size, 3))
    if parts.head is None:
        before = (f"past_key_values.{index}.key", f"past_key_values.{index}.value")
        key = graph.add("Concat", before[0], key, out=f"present.{index}.key", axis=2)
        value = graph.add("Concat", before[1], value, out=f"present.{index}.value", axis=2)
    scores = graph.add("MatMul", query, graph.add("Transpose", key, perm=[0, 1, 3, 2]))
    shares = graph.add("Softmax", graph.add("Add", scores, hidden_scores), axis=-1)
    return graph.joined(graph.add("MatMul", shares, value), size)
