"""What all sections share: alternating pairs, statistics, peak memory, processes of their own, table and JSON.

A ratio is computed within a pair of neighbouring measurements and only then summarised, so that a machine that drifts, or
is shared, slows both sides of a ratio alike. The order within a pair changes from run to run.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from shared.files.atomic import write_json

Summary = dict[str, float | int]
Tell = Callable[[str], None]
Measure = Callable[[], float]

MEANINGS: dict[str, str] = {
    "dp_step_time_ratio": "seconds of our DP step / of a plain PEFT step without privacy; float32, 64 x 48 tokens, train B",
    "dp_step_time_ratio_bfloat16": "the same in bfloat16 on both sides; only where the processor has it",
    "dp_step_memory_ratio": "peak memory above the loaded model, our DP step / plain PEFT step; float32",
    "epoch_speedup_vs_opacus": "seconds of a slice of an epoch, Opacus hooks (float32, padded to 128) / ours (compute.precision "
    "auto); LoRA in the last layer on both sides, as in the demo; two epochs, ours fills its cache on the way",
    "epoch_speedup_all_layers": "the same, with LoRA in all layers on both sides: nothing to cache",
    "epoch_speedup_as_the_demo": "Opacus with LoRA in all layers (PEFT's default) / ours with LoRA in the last, as the demo "
    "trains: not the same model",
    "prefix_cache_speedup": "seconds of our epoch with LoRA in all layers / of a later epoch with LoRA in the last 2 of 6 and "
    "the prefix cache warm",
    "prefix_cache_speedup_same_layers": "the same later epoch without the cache / with it",
    "simulation_speedup_vs_ray": "seconds of Flower's Ray simulation, a model per client (LoRA in all layers, PEFT's default) "
    "/ of our in-process simulation as the demo trains (last layer)",
    "simulation_speedup_same_last_layer": "the same, with LoRA in the last layer on both sides",
    "many_client_time_ratio": "seconds of many small clients / of one client with all their records and gradients",
    "uplink_bytes_ratio": "bytes of a site's encoded update / of the float32 PEFT state of A, B and head",
    "aggregate_1000_peak_mb": "MB above idle while 1,000 encoded updates of 1 MB are decoded and aggregated",
    "aggregate_vs_numpy": "speed of our aggregation / of Flower's NumPy FedAvg in memory, 1,000 decoded updates of 1 MB",
    "secure_sum_100_seconds": "seconds of a round of secure aggregation in one process with two threads: 100 sites, 37,000 words",
    "plan_seconds": "seconds of one privacy plan",
    "serving_speedup_vs_torch": "texts a second of `silotune serve`, asked by another process / of PyTorch one by one, on the "
    "same cores; MiniLM, float32, 25 tokens",
    "serving_p99_ms": "milliseconds in which 99 of 100 requests (1 to 16 texts) are answered that come at random times, at 4 "
    "times the texts a second of PyTorch one by one",
    "serving_vs_bare_onnxruntime": "texts a second of `silotune serve`, asked by another process / of ONNX Runtime alone on the "
    "same batches and cores",
    "serving_int8_speedup": "processor time of a text by `silotune serve` in float32 / in int8",
    "compression_speedup": "processor seconds of the tuned MiniLM / of half its layers (`silotune compress`); ONNX Runtime, "
    "float32, one thread, 16 texts of 25 tokens",
    "compression_points_lost_demo": "points of accuracy that half the layers lose on the demo's evaluation records",
    "compression_points_lost_banking77": "the same on the bank's questions",
}
"""The headline figures in the order in which they are shown, and what is divided by what."""

_LIBRARIES = ("torch", "transformers", "peft", "opacus", "flwr", "ray", "numpy", "dp-accounting", "silotune")


@dataclass
class Findings:
    """What one section found.

    Attributes:
        headlines: values by headline key, not yet summarised.
        details: finer results; lists of numbers in it are summarised.
    """

    headlines: dict[str, list[float]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pairs:
    """Measurements of one peer and of us, side by side."""

    peer: list[float]
    ours: list[float]

    def ours_over_peer(self) -> list[float]:
        """Return one ratio per pair; below 1 we need less."""
        return [mine / theirs for theirs, mine in zip(self.peer, self.ours, strict=True)]

    def peer_over_ours(self) -> list[float]:
        """Return one ratio per pair; above 1 the peer needs more."""
        return [theirs / mine for theirs, mine in zip(self.peer, self.ours, strict=True)]


def alternate(peers: Mapping[str, Measure], ours: Measure, *, runs: int, tell: Tell) -> dict[str, Pairs]:
    """Measure every peer and us in turns, each peer with a measurement of ours of its own.

    Args:
        peers: measurements by name; each returns its result, seconds or bytes.
        ours: our measurement.
        runs: pairs per peer.
        tell: told before every pair.
    """
    found = {name: Pairs([], []) for name in peers}
    for run in range(runs):
        for name, peer in peers.items():
            tell(f"{name}, pair {run + 1} of {runs}")
            if run % 2:
                mine, theirs = ours(), peer()
            else:
                theirs, mine = peer(), ours()
            found[name].peer.append(theirs)
            found[name].ours.append(mine)
    return found


def seconds(action: Callable[[], object], repetitions: int = 1) -> float:
    """Return the seconds of one of `repetitions` calls in a row."""
    gc.collect()
    started = time.perf_counter()
    for _ in range(repetitions):
        action()
    return (time.perf_counter() - started) / repetitions


def summarize(values: Sequence[float]) -> Summary:
    """Return median, smallest, largest and number of `values`.

    Raises:
        ValueError: if there are none.
    """
    if not values:
        raise ValueError("nothing was measured")
    return {
        "median": _rounded(statistics.median(values)),
        "min": _rounded(min(values)),
        "max": _rounded(max(values)),
        "runs": len(values),
    }


def summarized(details: Any) -> Any:
    """Return `details` with every list of numbers summarised."""
    if isinstance(details, Mapping):
        return {key: summarized(value) for key, value in details.items()}
    if isinstance(details, list) and details and all(isinstance(value, int | float) for value in details):
        return summarize(details)
    return details


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


class PeakMemory:
    """Peak resident memory of this process above what it held when the block began, in MB (10^6 bytes).

    The kernel's high-water mark is reset first; a child inherits its parent's `ru_maxrss`, so that would not do.
    """

    megabytes = 0.0

    def __enter__(self) -> PeakMemory:
        gc.collect()
        # What an earlier block freed would be used again unseen.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._idle = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.megabytes = (_status("VmHWM") - self._idle) / 1000


def _status(key: str) -> float:
    """Return a figure of /proc/self/status in thousands of bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1.024
    raise RuntimeError(f"this kernel does not tell {key}")


def in_own_process(function: Callable[..., Any], **arguments: Any) -> Any:
    """Call a module's function with JSON arguments in a fresh interpreter and return its JSON result.

    Raises:
        RuntimeError: if it failed, with the end of what it printed.
    """
    module = function.__module__
    if module == "__main__":
        raise ValueError("a section is run through `python -m benchmarks`, not as a script")
    with tempfile.TemporaryDirectory(prefix="silotune-bench-") as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "benchmarks.worker", module, function.__qualname__]
        command += [json.dumps(arguments), str(answer)]
        # This package is not installed: children, and what they start, find it by the path.
        path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode or not answer.exists():
            raise RuntimeError(f"{module}.{function.__qualname__} failed:\n{(done.stdout + done.stderr)[-3000:]}")
        return json.loads(answer.read_text(encoding="utf-8"))


def calm_environment() -> None:
    """Set what the libraries read when they are imported: nothing is reported home or fetched."""
    for name, value in {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)
    # Of the libraries that are measured, about their own future.
    warnings.filterwarnings("ignore", module=r"(opacus|transformers|torch)\b")


@contextmanager
def progress(section: str, console: Console) -> Iterator[Tell]:
    """Yield what shows the state of a long section: a spinner in a terminal, else plain lines."""
    started = time.monotonic()

    def text(what: str) -> str:
        return f"{section}: {what} ({time.monotonic() - started:.0f} s)"

    if console.is_terminal:
        with console.status(f"{section} …") as status:
            yield lambda what: status.update(text(what))
    else:
        yield lambda what: console.print(text(what), highlight=False)


def merge(path: Path, section: str, findings: Findings, *, wall_seconds: float) -> dict[str, Any]:
    """Put a section's findings into the JSON file, which keeps what other sections found, and return it."""
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for key in MEANINGS:
        results.setdefault(key, None)
    if unknown := sorted(findings.headlines.keys() - MEANINGS.keys()):
        raise ValueError(f"section {section} has the headline {unknown[0]!r}, which no meaning is given for")
    now = datetime.now(UTC)
    results |= {key: summarize(values) for key, values in findings.headlines.items()}
    results["details"] = {**results.get("details", {}), section: summarized(findings.details)}
    about = {
        "date": now.isoformat(timespec="seconds"),
        "seconds": round(wall_seconds, 1),
        "load_average": round(os.getloadavg()[0], 2),
    }
    results["sections"] = {**results.get("sections", {}), section: about}
    results |= {"meaning": MEANINGS, "machine": machine(), "versions": versions(), "date": now.date().isoformat()}
    write_json(path, results)
    return results


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    import torch

    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = (line for line in info.read_text(encoding="utf-8").splitlines() if line.startswith("model name"))
        model = next(names, model).rpartition(": ")[2]
    return {
        "system": platform.platform(),
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16_in_hardware": torch.cpu._is_avx512_bf16_supported(),
        "cuda": torch.cuda.is_available(),
    }


def versions() -> dict[str, str]:
    """Return the versions of everything that was measured."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def show(results: Mapping[str, Any], sections: Sequence[str], console: Console) -> None:
    """Print the headline figures, then the details of `sections`."""
    table = Table("figure", "median", "min", "max", "runs", "meaning", title="Silotune beside its peers")
    for column in table.columns[1:5]:
        column.justify = "right"
    for key, meaning in MEANINGS.items():
        if results.get(key) is not None:
            table.add_row(key, *_cells(results[key]), meaning)
    console.print(table)
    for section in sections:
        details = Table(section, "median", "min", "max", "runs", box=None)
        for name, value in _leaves(results["details"].get(section, {})):
            details.add_row(name, *(_cells(value) if _is_summary(value) else (str(value), "", "", "")))
        console.print(details)


def _cells(summary: Mapping[str, float]) -> tuple[str, ...]:
    return (*(f"{summary[key]:,.4g}" for key in ("median", "min", "max")), str(summary["runs"]))


def _is_summary(value: Any) -> bool:
    return isinstance(value, Mapping) and value.keys() == {"median", "min", "max", "runs"}


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and not _is_summary(value):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name} | {key}" if name else str(key))
    else:
        yield name, value
