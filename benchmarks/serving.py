"""`silotune serve` under load from another process, beside PyTorch one by one and bare ONNX Runtime, in one run.

Every figure is measured in a process of its own, one at a time, with all cores for everybody: the service shares them with who
asks. Texts have 25 tokens; requests have 1 to 16 texts. Bare ONNX Runtime computes the very batches that the service made, and
nothing else, on all cores, which the service has to share with who asks; so what it costs in processor time stands beside texts a
second. A core whose neighbour works is slower, so the processor time of the bare runtime is taken beside who asks, too: of a
process that answers at once. Latency is that of a load that does not wait for answers, as users do not, at a multiple of what
PyTorch does alone.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Self

from benchmarks.harness import Findings, Tell, calm_environment, in_own_process

TOKENS, SECONDS, RUNS = 25, 3.0, 12
THREADS = 0
"""Of whatever computes; 0 is one for each core."""
SIZES = (1, 2, 4, 8, 16)
CONNECTIONS = 3
"""That ask at the same time; each waits for its answer, then asks again."""
_ASK_WARM_SECONDS = 1.0
PACE, PACED_SECONDS, PACED_CONNECTIONS = 4.0, 8.0, 64
"""Latency is measured at so many times PyTorch's texts a second: 1 request in 100 must be some requests."""
_WORDS = "the film is a quiet joy from start to end and a dull plot what bright funny cast warm clever very well made"


def run(tell: Tell) -> Findings:
    """Measure; every ratio is of neighbours in time, whose order changes."""
    with tempfile.TemporaryDirectory(prefix="silotune-bench-") as temporary, ExitStack() as open_ones:
        folder = Path(temporary)
        tell("making a MiniLM classifier")
        in_own_process(make_models, folder=str(folder))
        # All processes stay, and one at a time has work.
        services = {one: open_ones.enter_context(_Service(folder, one)) for one in ("float32", "int8")}
        asking, torch_alone = (open_ones.enter_context(_Worker()) for _ in range(2))
        at_once = open_ones.enter_context(_AtOnce())
        bare = {one: open_ones.enter_context(_Worker()) for one in services}
        rounds = _Rounds(folder, services, bare, asking, torch_alone, at_once)
        rounds.measure(-1)  # everything is loaded and warm then
        rounds.found.clear()
        rounds.details.clear()
        for number in range(RUNS):
            tell(f"round {number + 1} of {RUNS}")
            rounds.measure(number)
        return Findings(rounds.found, {"texts of 25 tokens": rounds.details})


@dataclass
class _Rounds:
    """What is measured in turns, and what was found."""

    folder: Path
    services: Mapping[str, _Service]
    bare: Mapping[str, _Worker]
    asking: _Worker
    torch_alone: _Worker
    at_once: _AtOnce
    found: dict[str, list[float]] = field(default_factory=dict)
    details: dict[str, list[float]] = field(default_factory=dict)

    def measure(self, number: int) -> None:
        """Measure everything once; in odd rounds in the other order, but a replay needs its batches first."""
        order = list(self.services) if number % 2 == 0 else list(self.services)[::-1]
        one_by_one = self._torch() if number % 2 else 0.0
        served, bare = dict[str, dict[str, float]](), dict[str, dict[str, float]]()
        for precision in order:
            served[precision], shapes = self._served(precision)
            bare[precision] = self._bare(precision, shapes)
            with self._asked_beside(served[precision]["texts"]):
                beside = self._bare(precision, shapes, _threads_of_each_batch())
            bare[precision] |= {f"{name}, beside who asks, threads as served": value for name, value in beside.items()}
        one_by_one = one_by_one or self._torch()
        paced = self._asked("float32", PACED_SECONDS, PACED_CONNECTIONS, rate=PACE * one_by_one)
        float32, int8 = served["float32"], served["int8"]
        for key, value in {
            "serving_speedup_vs_torch": float32["texts"] / one_by_one,
            "serving_p99_ms": paced["p99_ms"],
            "serving_vs_bare_onnxruntime": float32["texts"] / bare["float32"]["texts"],
            "serving_int8_speedup": float32["processor ms a text"] / int8["processor ms a text"],
        }.items():
            self.found.setdefault(key, []).append(value)
        for name, value in {
            "PyTorch one by one, texts/s": one_by_one,
            **{f"served {one}, {name}": value for one, values in served.items() for name, value in values.items()},
            **{f"bare {one}, {name}": value for one, values in bare.items() for name, value in values.items()},
            **{f"float32 at {PACE:g} times PyTorch, {name}": value for name, value in paced.items()},
            "processor ms a text, bare beside who asks, threads as served / served, float32": bare["float32"][
                "processor ms a text, beside who asks, threads as served"
            ]
            / float32["processor ms a text"],
            "texts/s, served / bare, int8": int8["texts"] / bare["int8"]["texts"],
            "texts/s, int8 / float32, served": int8["texts"] / float32["texts"],
            "texts/s, int8 / float32, bare": bare["int8"]["texts"] / bare["float32"]["texts"],
        }.items():
            self.details.setdefault(name, []).append(value)

    def _served(self, precision: str) -> tuple[dict[str, float], list[list[int]]]:
        service = self.services[precision]
        service.new_batches()
        used = service.processor_seconds
        found = self._asked(precision, SECONDS, CONNECTIONS)
        used = service.processor_seconds - used
        shapes = service.new_batches()
        texts = sum(count for count, _ in shapes)
        found |= {"texts a batch": texts / len(shapes), "processor ms a text": 1000 * used / texts}
        return found, shapes

    def _bare(self, precision: str, shapes: list[list[int]], threads: int = THREADS) -> dict[str, float]:
        worker = self.bare[precision]
        used = worker.processor_seconds
        found: list[float] = worker.call(
            bare_runtime, folder=str(self.folder / precision), shapes=shapes, seconds=SECONDS, threads=threads
        )
        count, seconds = found
        return {"texts": count / seconds, "processor ms a text": 1000 * (worker.processor_seconds - used) / count}

    @contextmanager
    def _asked_beside(self, rate: float) -> Iterator[None]:
        """Ask another process meanwhile, so many texts a second by as many connections."""
        arguments = {"port": self.at_once.port, "texts": texts_in(self.folder), "rate": rate}
        with ThreadPoolExecutor(1) as beside:
            asked = beside.submit(self.asking.call, ask, seconds=SECONDS, connections=CONNECTIONS, **arguments)
            time.sleep(_ASK_WARM_SECONDS)
            yield
            asked.result()

    def _asked(self, precision: str, seconds: float, connections: int, rate: float = 0.0) -> dict[str, float]:
        port, texts = self.services[precision].port, texts_in(self.folder)
        found: dict[str, float] = self.asking.call(
            ask, port=port, seconds=seconds, connections=connections, texts=texts, rate=rate
        )
        return found

    def _torch(self) -> float:
        arguments = {"folder": str(self.folder / "run"), "seconds": SECONDS, "threads": THREADS}
        return float(self.torch_alone.call(torch_one_by_one, **arguments))


class _Process:
    """A process of this module's own that answers lines with lines, until the block ends."""

    def __init__(self, function: str, *arguments: str) -> None:
        self._command = [sys.executable, "-c", f"from benchmarks.serving import {function}; {function}()", *arguments]

    def __enter__(self) -> Self:
        path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    @property
    def processor_seconds(self) -> float:
        """What it used so far; unlike seconds, this hardly depends on what else the machine does."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._command[2]} ended before its answer")
        return line


class _Worker(_Process):
    """Calls functions of this module in a process of its own, which keeps what they load."""

    def __init__(self) -> None:
        super().__init__("work")

    def call(self, function: Callable[..., Any], **arguments: Any) -> Any:
        """Return what the function returns, as JSON has it."""
        assert self._process.stdin is not None
        print(json.dumps([function.__name__, arguments]), file=self._process.stdin, flush=True)
        return json.loads(self._line())


class _Service(_Process):
    """A service, and the shapes of its batches."""

    def __init__(self, folder: Path, precision: str) -> None:
        self._batches, self._read = folder / f"{precision}.batches", 0
        super().__init__("serve_watched", str(folder / precision), str(self._batches), str(THREADS))

    def __enter__(self) -> Self:
        super().__enter__()
        self.port = int(self._line())
        return self

    def new_batches(self) -> list[list[int]]:
        """Return number and longest of the texts of each batch since the last call."""
        lines = self._batches.read_text(encoding="ascii").splitlines()
        new, self._read = lines[self._read :], len(lines)
        return [json.loads(line) for line in new]


class _AtOnce(_Process):
    """A process that answers every request at once: what who asks does to the cores, without a service."""

    def __init__(self) -> None:
        super().__init__("answer_at_once")

    def __enter__(self) -> Self:
        super().__enter__()
        self.port = int(self._line())
        return self


def work() -> None:
    """Answer calls of `_Worker`."""
    calm_environment()
    for line in sys.stdin:
        name, arguments = json.loads(line)
        print(json.dumps(globals()[name](**arguments)), flush=True)


def serve_watched() -> None:
    """Serve the model folder argv[1] with argv[3] threads, and write the shapes of its batches to argv[2]."""
    from server.serving.application import Application
    from server.serving.engine import Batching
    from server.serving.limits import Limits
    from server.serving.models import Plan
    from server.serving.serving import ROUTES, Start, close, open_service
    from shared.http.serving import listen, make_server, place_at, serve
    from shared.models.batches import Example

    # It ends with whoever started it, however that ends.
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    model, batches, plan = Path(sys.argv[1]), Path(sys.argv[2]), Plan(threads=int(sys.argv[3]))
    place, limits = place_at("127.0.0.1", 0, None, None), Limits()
    start = Start(
        reference=str(model), registry=model / "none", policy=None, place=place, plan=plan, limits=limits, tokens=None
    )
    with batches.open("w", buffering=1) as shapes, listen(place) as listener:
        service = open_service(start)
        assert isinstance(service.engine, Batching)

        def note(batch: list[Example]) -> None:
            shapes.write(f"{[len(batch), max(one.length for one in batch)]}\n")  # a whole line: several threads write

        service.engine.watch = note
        port = listener.getsockname()[1]
        serve(
            make_server(Application(service, ROUTES), place), listener, ready=lambda: print(port, flush=True), again=""
        )
        close(service)


def answer_at_once() -> None:
    """Answer each request with an empty body, until whoever started it ends."""
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await reader.readexactly(_body_size(await reader.readuntil(b"\r\n\r\n")))
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async def listen() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()

    asyncio.run(listen())


def _body_size(head: bytes) -> int:
    return int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])


def ask(
    port: int, seconds: float, connections: int, texts: list[str], token: str = "", rate: float = 0.0
) -> dict[str, float]:
    """Ask from so many connections at once; return texts a second, and quantiles of the milliseconds of a request.

    Args:
        rate: texts a second, by requests that come at random, independent times, whether or not others are answered; their wait
            for a connection counts. 0: each connection asks again as soon as it has its answer.
    """
    bodies = [_request(texts, size, seed, token) for seed in range(8) for size in SIZES]
    latencies: list[float] = []
    answered, due, times = 0, 0.0, random.Random(port)

    async def next_time() -> float:
        nonlocal due
        now = time.perf_counter()
        if not rate:
            return now
        due = (due or now) + times.expovariate(rate * len(SIZES) / sum(SIZES))
        own = due
        await asyncio.sleep(max(0.0, own - now))
        return own

    async def one(number: int, begin: float, end: float) -> None:
        nonlocal answered
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        chosen = random.Random(number)
        while (now := await next_time()) < end:
            size, body = chosen.choice(bodies)
            writer.write(body)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            await reader.readexactly(_body_size(head))
            if now >= begin and (done := time.perf_counter()) < end:
                latencies.append(done - now)
                answered += size
        writer.close()

    async def all_of_them() -> None:
        begin = time.perf_counter() + _ASK_WARM_SECONDS
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


def bare_runtime(folder: str, shapes: list[list[int]], seconds: float, threads: int) -> list[float]:
    """Compute the same batches with ONNX Runtime alone, from the begin again if there is time; return texts and seconds."""
    import numpy as np

    session, draw = _session(folder, threads), np.random.default_rng(0)
    feeds = {
        shape: {"input_ids": draw.integers(1000, 20000, shape), "attention_mask": np.ones(shape, np.int64)}
        for shape in {(count, length) for count, length in shapes}
    }
    for shape in feeds.keys() - _warm:
        session.run(None, feeds[shape])
        _warm.add(shape)
    texts, began = 0, time.perf_counter()
    while True:
        for count, length in shapes:
            session.run(None, feeds[count, length])
            texts += count
            if (passed := time.perf_counter() - began) > seconds:
                return [texts, passed]


_warm = set[tuple[int, int]]()
"""Shapes of batches that this process computed already."""


@cache
def _threads_of_each_batch() -> int:
    from server.serving.models import Plan

    return Plan(threads=THREADS).threads_of_each


@cache
def _session(folder: str, threads: int) -> Any:
    from shared.runtime.export.onnx import GRAPH_FILE, new_session

    return new_session(Path(folder) / GRAPH_FILE, threads)


def torch_one_by_one(folder: str, seconds: float, threads: int) -> float:
    """Label one text after another with PyTorch, as `silotune predict` does, on all cores; return texts a second."""
    from shared.runtime.inference import predict

    runtime, texts = _runtime(folder, threads), texts_in(Path(folder).parent)
    predict(runtime, texts[:4])
    count, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds:
        predict(runtime, [texts[count % len(texts)]])
        count += 1
    return count / passed


@cache
def _runtime(folder: str, threads: int) -> Any:
    import torch

    from shared.job.compute import ComputeConfig
    from shared.job.job_file import load_job
    from shared.runtime.inference import load_tuned

    torch.set_num_threads(threads or os.cpu_count() or 1)
    path = Path(folder)
    return load_tuned(path, load_job(path), ComputeConfig(device="cpu", precision="float32"))


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
