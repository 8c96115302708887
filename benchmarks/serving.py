"""`silotune serve` under load from another process, beside PyTorch one by one and bare ONNX Runtime, in one run.

Every figure is measured in a process of its own with all cores for everybody: the service shares them with whoever asks. Texts
have 25 tokens; requests have 1 to 16 texts. Bare ONNX Runtime computes the very batches that the service made, and nothing else.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness import Findings, Tell, in_own_process

TOKENS, SECONDS, RUNS = 25, 8.0, 5
SIZES = (1, 2, 4, 8, 16)
CONNECTIONS = {"float32": 6, "int8": 6}
"""That ask at the same time; each waits for its answer, then asks again."""
_WORDS = "the film is a quiet joy from start to end and a dull plot what bright funny cast warm clever very well made"


def run(tell: Tell) -> Findings:
    """Measure; every ratio is of neighbours, whose order changes."""
    with tempfile.TemporaryDirectory(prefix="silotune-bench-") as temporary:
        folder = Path(temporary)
        tell("making a MiniLM classifier")
        in_own_process(make_models, folder=str(folder))
        found: dict[str, list[float]] = {}
        details: dict[str, list[float]] = {}
        for number in range(RUNS):
            tell(f"round {number + 1} of {RUNS}")
            _round(folder, number, found, details)
    return Findings(found, {"texts of 25 tokens, two cores": details})


def _round(folder: Path, number: int, found: dict[str, list[float]], details: dict[str, list[float]]) -> None:
    served: dict[str, dict[str, Any]] = {}
    bare: dict[str, float] = {}
    one_by_one = 0.0

    def serve(precision: str) -> Callable[[], None]:
        return lambda: served.__setitem__(precision, measure_service(folder, precision))

    def replay(precision: str) -> Callable[[], None]:
        return lambda: bare.__setitem__(
            precision,
            in_own_process(
                bare_runtime, folder=str(folder / precision), shapes=served[precision]["shapes"], seconds=SECONDS
            ),
        )

    def torch_alone() -> None:
        nonlocal one_by_one
        one_by_one = in_own_process(torch_one_by_one, folder=str(folder / "run"), seconds=SECONDS)

    steps = [serve("float32"), replay("float32"), serve("int8"), replay("int8"), torch_alone]
    if number % 2:  # a replay needs the batches first
        steps = [torch_alone, serve("int8"), replay("int8"), serve("float32"), replay("float32")]
    for step in steps:
        step()
    rates = {precision: one["texts"] for precision, one in served.items()}
    for key, value in {
        "serving_speedup_vs_torch": rates["float32"] / one_by_one,
        "serving_p99_ms": served["float32"]["p99_ms"],
        "serving_vs_bare_onnxruntime": rates["float32"] / bare["float32"],
        "serving_int8_speedup": rates["int8"] / rates["float32"],
    }.items():
        found.setdefault(key, []).append(value)
    for name, value in {
        "PyTorch one by one, texts/s": one_by_one,
        **{f"served {p}, texts/s": rates[p] for p in rates},
        **{f"served {p}, p50 ms": served[p]["p50_ms"] for p in served},
        **{f"served {p}, p99 ms": served[p]["p99_ms"] for p in served},
        **{f"served {p}, texts a batch": served[p]["batch"] for p in served},
        **{f"bare ONNX Runtime {p}, texts/s": bare[p] for p in bare},
        "int8 / float32, bare": bare["int8"] / bare["float32"],
        "int8 served / bare": rates["int8"] / bare["int8"],
    }.items():
        details.setdefault(name, []).append(value)


def measure_service(folder: Path, precision: str) -> dict[str, Any]:
    """Serve a model in a process, ask it from another, and return what both saw."""
    with _service(folder / precision, folder / "batches.json") as port:
        asked: dict[str, Any] = in_own_process(
            ask, port=port, seconds=SECONDS, connections=CONNECTIONS[precision], texts=texts_in(folder)
        )
    shapes = json.loads((folder / "batches.json").read_text(encoding="utf-8"))
    return {**asked, "shapes": shapes, "batch": sum(count for count, _ in shapes) / len(shapes)}


@contextmanager
def _service(model: Path, batches: Path) -> Iterator[int]:
    command = [
        sys.executable,
        "-c",
        "from benchmarks.serving import serve_watched; serve_watched()",
        str(model),
        str(batches),
    ]
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]))
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    ) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def serve_watched() -> None:
    """Serve the model folder argv[1], and write the shapes of its batches to argv[2] at the end."""
    from server.serving.application import Application
    from server.serving.engine import Batching
    from server.serving.limits import Limits
    from server.serving.models import Plan
    from server.serving.serving import ROUTES, Start, close, open_service
    from shared.http.serving import listen, make_server, place_at, serve

    model, batches = map(Path, sys.argv[1:])
    place, limits = place_at("127.0.0.1", 0, None, None), Limits()
    start = Start(
        reference=str(model), registry=model / "none", policy=None, place=place, plan=Plan(), limits=limits, tokens=None
    )
    shapes: list[tuple[int, int]] = []
    with listen(place) as listener:
        service = open_service(start)
        assert isinstance(service.engine, Batching)
        service.engine.watch = lambda examples: shapes.append((len(examples), max(one.length for one in examples)))
        port = listener.getsockname()[1]
        serve(
            make_server(Application(service, ROUTES), place), listener, ready=lambda: print(port, flush=True), again=""
        )
        close(service)
    batches.write_text(json.dumps(shapes), encoding="utf-8")


def ask(port: int, seconds: float, connections: int, texts: list[str], token: str = "") -> dict[str, float]:
    """Ask from so many connections at once; return texts a second, and quantiles of the milliseconds of a request."""
    bodies = [_request(texts, size, seed, token) for seed in range(8) for size in SIZES]
    latencies: list[float] = []
    answered = 0

    async def one(number: int, begin: float, end: float) -> None:
        nonlocal answered
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        chosen = random.Random(number)
        while (now := time.perf_counter()) < end:
            size, body = chosen.choice(bodies)
            writer.write(body)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]))
            if now >= begin and (done := time.perf_counter()) < end:
                latencies.append(done - now)
                answered += size
        writer.close()

    async def all_of_them() -> None:
        begin = time.perf_counter() + 1.0
        await asyncio.gather(*(one(number, begin, begin + seconds) for number in range(connections)))

    asyncio.run(all_of_them())
    ordered = sorted(latencies)
    return {
        "texts": answered / seconds,
        "p50_ms": 1000 * ordered[len(ordered) // 2],
        "p99_ms": 1000 * ordered[int(0.99 * len(ordered))],
    }


def _request(texts: list[str], size: int, seed: int, token: str) -> tuple[int, bytes]:
    body = json.dumps({"texts": random.Random(seed).choices(texts, k=size)}).encode()
    lines = (
        "POST /v1/predict HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Authorization: Bearer {token}",
        f"Content-Length: {len(body)}",
    )
    return size, "\r\n".join((*lines, "", "")).encode() + body


def bare_runtime(folder: str, shapes: list[tuple[int, int]], seconds: float) -> float:
    """Compute the same batches with ONNX Runtime alone, from the begin again if there is time; return texts a second."""
    import numpy as np

    from shared.runtime.export.onnx import GRAPH_FILE, new_session

    session, draw = new_session(Path(folder) / GRAPH_FILE), np.random.default_rng(0)
    feeds = {
        shape: {"input_ids": draw.integers(1000, 20000, shape), "attention_mask": np.ones(shape, np.int64)}
        for shape in {(count, length) for count, length in shapes}
    }
    for feed in feeds.values():
        session.run(None, feed)
    texts, began = 0, time.perf_counter()
    while True:
        for count, length in shapes:
            session.run(None, feeds[count, length])
            texts += count
            if (passed := time.perf_counter() - began) > seconds:
                return texts / passed


def torch_one_by_one(folder: str, seconds: float) -> float:
    """Label one text after another with PyTorch, as `silotune predict` loads it, on all cores; return texts a second."""
    import torch

    from shared.job.compute import ComputeConfig
    from shared.job.job_file import load_job
    from shared.runtime.inference import load_tuned, predict

    torch.set_num_threads(os.cpu_count() or 1)
    path = Path(folder)
    runtime = load_tuned(path, load_job(path), ComputeConfig(device="cpu", precision="float32"))
    texts = texts_in(path.parent)
    predict(runtime, texts[:4])
    count, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds:
        predict(runtime, [texts[count % len(texts)]])
        count += 1
    return count / passed


def make_models(folder: str) -> None:
    """Write a run of MiniLM with a drawn adapter (speed does not depend on values), and its graphs."""
    import torch

    from shared.files.atomic import write_json, write_text
    from shared.job.compute import ComputeConfig
    from shared.runtime.export.exporting import export
    from shared.runtime.export.folder import ModelFolder
    from shared.runtime.export.peft import save_peft_folder
    from shared.runtime.runtime import load_runtime
    from simulations.scenario import load_scenario

    root = Path(folder)
    job = load_scenario(Path(__file__).resolve().parents[1] / "simulations" / "demo.toml").job
    runtime = load_runtime(job, ComputeConfig(device="cpu", precision="float32"))
    drawn = torch.Generator().manual_seed(0)
    state = {name: 0.05 * torch.randn(shape, generator=drawn) for name, shape in runtime.global_shapes(False).items()}
    save_peft_folder(root / "run" / "adapter", runtime, job, state, temperature=1.0)
    write_text(root / "run" / "job.json", job.canonical_json())
    write_json(root / "run" / "run.json", {"status": "completed"})
    for precision in ("float32", "int8"):
        export(ModelFolder.read(root / "run"), root / precision, "onnx", precision)
    write_json(root / "texts.json", _texts_of(runtime))


def _texts_of(runtime: Any) -> list[str]:
    """Return texts of exactly `TOKENS` tokens, the tokenizer's own marks included."""
    draw, found = random.Random(0), list[str]()
    while len(found) < 200:
        text = " ".join(draw.choices(_WORDS.split(), k=TOKENS - 2))
        if runtime.encode([{"text": text}])[0].length == TOKENS:
            found.append(text)
    return found


def texts_in(folder: Path) -> list[str]:
    """Return the texts that `make_models` wrote."""
    found: list[str] = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
    return found
