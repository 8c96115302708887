"""What it costs to add updates one by one, against a textbook FedAvg that holds all of them.

    python -m benchmarks.aggregation [updates] [repeats]

Both add the same updates of a megabyte, in turns. The textbook one is the loop that tutorials show: a list of weighted layers for
every site, then the sum over the list. Its first turn pays for a gigabyte of new memory, later ones find it there.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from server.strategies import WeightedMean
from shared.adapters import encode, shapes_of
from shared.updates import decode_update, encode_update

DISTINCT = 40  # updates in memory; they come again and again


def make_updates() -> list[dict[str, Tensor]]:
    """Rank 8 on query and value of twelve layers of width 768, a head, and the rest up to 2**18 numbers."""
    shapes = {f"layer.{i:02}.{name}.lora_B.weight": (768, 8) for i in range(12) for name in ("query", "value")}
    shapes |= {"head.weight": (2, 768), "head.bias": (2,)}
    shapes["rest"] = (2**18 - sum(int(np.prod(shape)) for shape in shapes.values()),)
    generator = torch.Generator().manual_seed(0)
    return [{n: torch.randn(s, generator=generator) * 1e-3 for n, s in shapes.items()} for _ in range(DISTINCT)]


def textbook(updates: list[dict[str, Tensor]], number: int) -> object:
    results = [([layer.numpy() for layer in updates[i % DISTINCT].values()], 1) for i in range(number)]
    total = sum(weight for _, weight in results)
    weighted = [[layer * weight for layer in layers] for layers, weight in results]
    return [reduce(np.add, layers) / total for layers in zip(*weighted, strict=True)]


def ours(updates: list[dict[str, Tensor]], number: int) -> object:
    mean = WeightedMean(shapes_of(updates[0]), number)
    for i in range(number):
        mean.add(updates[i % DISTINCT])
    return mean.result()


def milliseconds(act: Callable[[], object], number: int) -> float:
    started = time.perf_counter()
    act()
    return (time.perf_counter() - started) / number * 1e3


def told(name: str, values: list[float]) -> str:
    return f"{name:28} median {statistics.median(values):.3f}  from {min(values):.3f} to {max(values):.3f} ms an update"


def main(number: int = 1000, repeats: int = 5) -> None:
    updates = make_updates()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ours(updates, number)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    turns = [
        (milliseconds(lambda: textbook(updates, number), number), milliseconds(lambda: ours(updates, number), number))
        for _ in range(repeats)
    ]
    print(f"{number} updates of 1 MiB, {repeats} turns; memory of ours grew by {grown:.0f} MiB")
    print(told("textbook, first turn", [turns[0][0]]))
    print(told("textbook, later turns", [theirs for theirs, _ in turns[1:]] or [turns[0][0]]))
    print(told("ours", [own for _, own in turns]))
    shapes = shapes_of(updates[0])
    print(
        told(
            "decode float32",
            [milliseconds(lambda u=u: decode_update(u, shapes, "float32"), 1) for u in map(encode, updates)],
        )
    )
    for dtype in ("bfloat16", "int8"):
        data = [encode_update(update, dtype).data for update in updates]
        print(
            told(f"decode {dtype}", [milliseconds(lambda u=u, d=dtype: decode_update(u, shapes, d), 1) for u in data])
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
