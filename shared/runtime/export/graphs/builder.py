"""One graph of ONNX, written node by node: small files with names one can read, and nothing traced.

Only operators of the standard set `OPSET`, so that any runtime of ONNX reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import ConfigError
from shared.runtime.export.folder import TensorSpec
from shared.version import silotune_version

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 20
"""Of the operators: the first one with Gelu, and LayerNormalization is from 17."""
LEAST = float(np.finfo(np.float32).min)
"""What is added to the score of a token that is not to be seen."""


class Graph:
    """Nodes and weights so far; every method that adds some returns the name of their output."""

    def __init__(self) -> None:
        import onnx

        self._onnx = onnx
        self._nodes: list[Any] = []
        self._weights: dict[str, Any] = {}
        self._count = 0

    def add(self, operator: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        """Add one node; `out` names its output where a graph ends or others should find it."""
        self._count += 1
        name = out or f"{operator.lower()}_{self._count}"
        self._nodes.append(self._onnx.helper.make_node(operator, [*inputs], [name], name=name, **attributes))
        return name

    def weight(self, name: str, values: Tensor) -> str:
        """Add a weight, float32."""
        return self._constant(name, values.detach().float().contiguous().numpy())

    def whole(self, *values: int) -> str:
        """Return a row of whole numbers."""
        return self._constant(
            "_".join(["int", *(str(value).replace("-", "m") for value in values)]), np.asarray(values, np.int64)
        )

    def scalar(self, value: int) -> str:
        """Return a whole number without axes."""
        return self._constant(f"scalar_{value}", np.asarray(value, np.int64))

    def parted(self, inputs: str, size: int, count: int) -> list[str]:
        """Part the last of three axes into `count` parts of `size` each."""
        return [
            self.add("Slice", inputs, self.whole(i * size), self.whole((i + 1) * size), self.whole(2))
            for i in range(count)
        ]

    def number(self, value: float) -> str:
        """Return a single number."""
        return self._constant(f"float_{value!r}", np.asarray(value, np.float32))

    def _constant(self, name: str, values: NDArray[Any]) -> str:
        if name not in self._weights:
            self._weights[name] = self._onnx.numpy_helper.from_array(values, name)
        return name

    def linear(self, inputs: str, name: str, weight: Tensor, bias: Tensor | None) -> str:
        """Add x · W + b, `weight` being [in, out]."""
        product = self.add("MatMul", inputs, self.weight(f"{name}.weight", weight))
        return product if bias is None else self.add("Add", product, self.weight(f"{name}.bias", bias))

    def layer_norm(self, inputs: str, name: str, epsilon: float, weight: Tensor, bias: Tensor) -> str:
        """Add a normalisation over the last axis."""
        scale, shift = self.weight(f"{name}.weight", weight), self.weight(f"{name}.bias", bias)
        return self.add("LayerNormalization", inputs, scale, shift, axis=-1, epsilon=epsilon)

    def activation(self, inputs: str, name: str) -> str:
        """Add the non-linearity that transformers calls `name`; `ConfigError` for one that is not known here."""
        known: dict[str, tuple[str, dict[str, Any]]] = {
            "gelu": ("Gelu", {}),
            "gelu_new": ("Gelu", {"approximate": "tanh"}),
            "gelu_pytorch_tanh": ("Gelu", {"approximate": "tanh"}),
            "relu": ("Relu", {}),
            "tanh": ("Tanh", {}),
        }
        if name not in known:
            raise ConfigError(f"the backbone's activation is {name!r}; a graph can have {', '.join(sorted(known))}.")
        operator, attributes = known[name]
        return self.add(operator, inputs, **attributes)

    def heads(self, inputs: str, count: int, size: int, *, transposed: bool = False) -> str:
        """Part [B, T, count · size] into [B, count, T, size], or [B, count, size, T]."""
        parted = self.add("Reshape", inputs, self.whole(0, 0, count, size))
        return self.add("Transpose", parted, perm=[0, 2, 3, 1] if transposed else [0, 2, 1, 3])

    def joined(self, inputs: str, hidden_size: int) -> str:
        """Take back `heads`."""
        return self.add("Reshape", self.add("Transpose", inputs, perm=[0, 2, 1, 3]), self.whole(0, 0, hidden_size))

    def size(self, inputs: str, axis: int) -> str:
        """Return the length of an axis, [1]."""
        return self.add("Shape", inputs, start=axis, end=axis + 1)

    def hidden_scores(self, seen: str) -> str:
        """Return what is added to scores: 0 where `seen` is true."""
        return self.add("Where", seen, self.number(0.0), self.number(LEAST))

    def model(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> ModelProto:
        """Return the graph as a model of ONNX."""
        helper = self._onnx.helper
        types = {"int64": self._onnx.TensorProto.INT64, "float32": self._onnx.TensorProto.FLOAT}

        def values(specs: Sequence[TensorSpec]) -> list[Any]:
            return [helper.make_tensor_value_info(spec.name, types[spec.dtype], spec.shape) for spec in specs]

        graph = helper.make_graph(self._nodes, "silotune", values(inputs), values(outputs), [*self._weights.values()])
        return helper.make_model(  # type: ignore[no-any-return]
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=9,  # that came with the opset; newer ones are refused by older runtimes
            producer_name="silotune",
            producer_version=silotune_version(),
        )
