"""Aggregation of many sites' updates of 1 MB: peak memory and time, against Flower's FedAvg formula in NumPy.

Both sides get one update after the other, as they arrive; making them is not timed. Flower's formula keeps all of them.
"""

from __future__ import annotations

import io
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.harness import Findings, PeakMemory, Tell, in_own_process
from server.aggregation import WeightedMean
from shared.tensors import adapters

SHAPES = {f"layer.{index}.lora_B.weight": torch.Size([250, 100]) for index in range(10)}
"""250,000 float32 values: 1 MB."""

COUNTS = (10, 100, 1000)


def run(tell: Tell, *, runs: int = 5, counts: tuple[int, ...] = COUNTS) -> Findings:
    """Measure all counts `runs` times on both sides, each time in a process of its own."""
    found: dict[str, list[dict[str, dict[str, float]]]] = {"ours": [], "NumPy": []}
    for number in range(runs):
        tell(f"pair {number + 1} of {runs}")
        for side in ("NumPy", "ours") if number % 2 == 0 else ("ours", "NumPy"):
            found[side].append(in_own_process(measure, side=side, counts=list(counts)))
    details: dict[str, Any] = {}
    for count in counts:
        rows = {side: [row[str(count)] for row in measured] for side, measured in found.items()}
        details[f"{count:,} sites"] = {
            **{f"{side}, {key}": [row[key] for row in rows[side]] for side in rows for key in rows[side][0]},
            **{
                f"ours / NumPy, {key}": [a[key] / b[key] for a, b in zip(rows["ours"], rows["NumPy"], strict=True)]
                for key in ("seconds", "seconds with decoding")
            },
        }
    largest = details[f"{counts[-1]:,} sites"]
    headlines = {}
    if counts[-1] == COUNTS[-1]:
        headlines = {
            "aggregate_1000_peak_mb": largest["ours, peak MB with decoding"],
            "aggregate_vs_numpy": [1 / ratio for ratio in largest["ours / NumPy, seconds"]],
        }
    return Findings(headlines, details)


def measure(side: str, counts: list[int]) -> dict[str, dict[str, float]]:
    """Return time and peak memory of one side by number of sites."""
    torch.set_num_threads(1)
    base = {name: torch.randn(shape, generator=torch.Generator().manual_seed(0)) for name, shape in SHAPES.items()}
    decoded, encoded, decoding = _SIDES[side]
    result = {}
    decoding(Arrivals(base, 2, encoded))
    for count in counts:
        arrivals = Arrivals(base, count, encoded)
        with PeakMemory() as memory:
            full = arrivals.timed(decoding)
        without = Arrivals(base, count, dict).timed(decoded)
        result[str(count)] = {
            "seconds": without,
            "seconds with decoding": full,
            "peak MB with decoding": memory.megabytes,
        }
    return result


class Arrivals:
    """Updates that come in one by one, each different; `timed` leaves out the time that making them takes."""

    def __init__(self, base: Mapping[str, Tensor], count: int, pack: Callable[[dict[str, Tensor]], Any]) -> None:
        self._base, self._count, self._pack = base, count, pack
        self._making = 0.0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        for index in range(self._count):
            started = time.perf_counter()
            update = self._pack({name: value * (1 + index / 1000) for name, value in self._base.items()})
            self._making += time.perf_counter() - started
            yield update

    def timed(self, consume: Callable[[Arrivals], object]) -> float:
        """Return the seconds of `consume` beyond the making of updates."""
        started = time.perf_counter()
        consume(self)
        return time.perf_counter() - started - self._making


def ours_decoded(arrivals: Arrivals) -> list[NDArray[np.float32]]:
    """Return the mean as the coordinator computes it; the only place here that knows how."""
    mean = WeightedMean(SHAPES, len(arrivals))
    for update in arrivals:
        mean.add(update)
    found = mean.result()
    return [found[name].numpy() for name in SHAPES]


def ours_encoded(arrivals: Arrivals) -> list[NDArray[np.float32]]:
    """The same from bytes."""
    return ours_decoded(_Decoded(arrivals, lambda data: adapters.decode(data, SHAPES)))


def numpy_decoded(arrivals: Arrivals) -> list[NDArray[Any]]:
    """Return the mean by Flower's own formula."""
    from flwr.server.strategy.aggregate import aggregate as fedavg

    return fedavg([([value.numpy() for value in update.values()], 64) for update in arrivals])


def numpy_encoded(arrivals: Arrivals) -> list[NDArray[Any]]:
    """The same from bytes, as Flower serialises arrays."""
    from flwr.server.strategy.aggregate import aggregate as fedavg

    return fedavg([([np.load(io.BytesIO(data), allow_pickle=False) for data in update], 64) for update in arrivals])


class _Decoded(Arrivals):
    """Arrivals, decoded on the way."""

    def __init__(self, arrivals: Arrivals, decode: Callable[[Any], Any]) -> None:
        self._arrivals, self._decode = arrivals, decode

    def __len__(self) -> int:
        return len(self._arrivals)

    def __iter__(self) -> Iterator[Any]:
        return map(self._decode, self._arrivals)


def _silotune_bytes(update: dict[str, Tensor]) -> bytes:
    return adapters.encode(update, salt=secrets.token_hex(16))


def _numpy_bytes(update: dict[str, Tensor]) -> list[bytes]:
    parts = []
    for value in update.values():
        buffer = io.BytesIO()
        np.save(buffer, value.numpy(), allow_pickle=False)
        parts.append(buffer.getvalue())
    return parts


_SIDES: dict[str, tuple[Any, Any, Any]] = {
    "ours": (ours_decoded, _silotune_bytes, ours_encoded),
    "NumPy": (numpy_decoded, _numpy_bytes, numpy_encoded),
}
