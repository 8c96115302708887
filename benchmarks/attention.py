"""PyTorch's attention on a processor in bfloat16 and in float32: why `shared.models.packing` computes it in float32.

Forward and backward pass of one call on texts of equal length, 12 heads of 32 as in MiniLM-L6, casts included.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.harness import Findings, Tell, alternate, seconds

HEADS, WIDTH = 12, 32
SHAPES = ((8, 12), (16, 24), (64, 48), (32, 128))
"""Texts of a call and tokens of each."""
_REPETITIONS = 10


def run(tell: Tell, *, runs: int = 5) -> Findings:
    """Measure every shape; above 1 bfloat16 is slower."""
    details = {}
    for texts, tokens in SHAPES:
        half, cast = attention(texts, tokens, in_float32=False), attention(texts, tokens, in_float32=True)
        half(), cast()
        pair = alternate(
            {"bfloat16": lambda act=half: seconds(act, _REPETITIONS)},  # type: ignore[misc]
            lambda act=cast: seconds(act, _REPETITIONS),  # type: ignore[misc]
            runs=runs,
            tell=tell,
        )["bfloat16"]
        details[f"{texts} x {tokens} tokens"] = {
            "bfloat16, seconds": pair.peer,
            "float32 between casts, seconds": pair.ours,
            "bfloat16 / float32": pair.peer_over_ours(),
        }
    return Findings({}, details)


def attention(texts: int, tokens: int, *, in_float32: bool) -> Callable[[], None]:
    """Return a forward and backward pass from bfloat16 inputs to a bfloat16 output."""
    inputs = [
        torch.randn(texts, tokens, HEADS, WIDTH, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for _ in range(3)
    ]

    def act() -> None:
        query, key, value = [tensor.float() for tensor in inputs] if in_float32 else inputs
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value).to(torch.bfloat16)
        output.backward(torch.ones_like(output))  # type: ignore[no-untyped-call]

    return act
