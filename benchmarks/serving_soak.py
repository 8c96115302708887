"""`silotune serve` for long, under good, bad and oversized requests at 80 % load: `python -m benchmarks.serving_soak`.

Checked: no answer 500, memory flat, every good request answered (200, or 503 if it came when the queue was full), and no text in
the log. The status is 1 if one does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.harness import calm_environment, in_own_process
from benchmarks.serving import ask, make_models, texts_in
from server.serving.access.tokens import TokenFile

LOAD = 0.8
MARKER = "Zebrafink-4711"
_MOST_GROWTH = 0.05
_GONE = 0.02


@dataclass
class Seen:
    """What came back: statuses of good and of other requests, seconds of good ones, memory by time."""

    good: Counter[int] = field(default_factory=Counter)
    others: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)
    late: int = 0


def main() -> None:
    """Serve, ask, and say what was seen."""
    arguments = argparse.ArgumentParser(
        prog="python -m benchmarks.serving_soak", description=(__doc__ or "").split("\n")[0]
    )
    arguments.add_argument("--minutes", type=float, default=60)
    options = arguments.parse_args()
    calm_environment()
    with tempfile.TemporaryDirectory(prefix="silotune-soak-") as temporary:
        folder = Path(temporary)
        in_own_process(make_models, folder=str(folder))
        token = TokenFile(folder / "tokens.db", create=True).add("soak", scopes=("predict", "metrics"))
        with _served(folder) as (process, port):
            texts = [f"{text} {MARKER}" for text in texts_in(folder)]
            capacity = in_own_process(ask, port=port, seconds=10, connections=6, texts=texts, token=token)["texts"]
            print(f"capacity {capacity:.0f} texts/s; asking at {LOAD:.0%} for {options.minutes:g} minutes", flush=True)
            seen = asyncio.run(_soak(port, token, texts, LOAD * capacity, 60 * options.minutes, process.pid))
        sys.exit(_judge(seen, (folder / "log").read_text(encoding="utf-8")))


@contextmanager
def _served(folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, "-m", "cli", "serve", str(folder / "run"), "--port", "0"]
    command += ["--tokens", str(folder / "tokens.db"), "--texts", "64", "--body-bytes", "200000"]
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        with process:
            assert process.stdout is not None
            line = ""
            while "serving " not in line:
                line = process.stdout.readline()
                assert line, (folder / "log").read_text(encoding="utf-8")
            yield process, int(line.partition("127.0.0.1:")[2].partition("/")[0])
            process.terminate()


async def _soak(port: int, token: str, texts: list[str], rate: float, seconds: float, process: int) -> Seen:
    """Ask at `rate` texts a second, whether answers come or not."""
    seen, chosen, tasks = Seen(), random.Random(0), set[asyncio.Task[None]]()
    begin = time.monotonic()
    due, looked, told = begin, begin, begin
    while (now := time.monotonic()) < begin + seconds:
        if now < due:
            await asyncio.sleep(due - now)
            continue
        kind, count, request = _request(chosen, token, texts)
        due += chosen.expovariate(1.0) * count / rate
        if len(tasks) < 200:
            task = asyncio.ensure_future(_one(port, kind, request, seen, gone=chosen.random() < _GONE))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        else:
            seen.late += 1
        if now - looked >= 2:
            looked = now
            seen.megabytes.append(_megabytes(process))
        if now - told >= 30:
            told = now
            print(
                f"{now - begin:.0f} s: good {dict(seen.good)}, others {dict(seen.others)}, {seen.megabytes[-1]:.0f} MB",
                flush=True,
            )
    await asyncio.gather(*tasks)
    return seen


async def _one(port: int, kind: str, request: bytes, seen: Seen, *, gone: bool) -> None:
    began = time.monotonic()
    with suppress(OSError, asyncio.IncompleteReadError):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with suppress(OSError):  # refused before it was sent whole; the answer may still be there
            writer.write(request)
            await writer.drain()
        if not gone:
            head = await reader.readuntil(b"\r\n\r\n")
            status = int(head.split(b" ", 2)[1])
            (seen.good if kind == "good" else seen.others)[status] += 1
            if kind == "good":
                await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]))
                seen.seconds.append(time.monotonic() - began)
        writer.close()


def _request(chosen: random.Random, token: str, texts: list[str]) -> tuple[str, int, bytes]:
    """Return kind, number of texts that will be computed, and the request."""
    draw = chosen.random()
    if draw < 0.8:
        count = chosen.choice((1, 1, 2, 4, 8, 16))
        body = json.dumps({"texts": [_cut(chosen, text) for text in chosen.choices(texts, k=count)]}).encode()
        return "good", count, _raw(body, token)
    bad = [
        _raw(b'{"texts": ["' + MARKER.encode(), token),
        _raw(json.dumps({"texts": [MARKER, 3]}).encode(), token),
        _raw(json.dumps({"pairs": [[MARKER, MARKER]]}).encode(), token),
        _raw(json.dumps({"texts": [MARKER], "model": MARKER}).encode(), token),
        _raw(json.dumps({"texts": [MARKER]}).encode(), f"slt_{MARKER}"),
        _raw(json.dumps({"prompt": MARKER}).encode(), token, path="/v1/completions"),
        _raw(b"{}", token, path=f"/{MARKER}"),
        f"{MARKER} / HTTP/1.1\r\n{MARKER}\r\n\r\n".encode(),
    ]
    large = [
        _raw(json.dumps({"texts": [MARKER] * 65}).encode(), token),
        _raw(json.dumps({"texts": [MARKER * 10_000]}).encode(), token),
        _raw(json.dumps({"texts": [MARKER * 40_000]}).encode(), token),
    ]
    return "other", 1, chosen.choice(bad if draw < 0.93 else large)


def _cut(chosen: random.Random, text: str) -> str:
    words = text.split()
    return " ".join([*words[: chosen.randint(1, len(words))], MARKER])


def _raw(body: bytes, token: str, path: str = "/v1/predict") -> bytes:
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Authorization: Bearer {token}",
    ]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "Connection: close", "", ""]).encode() + body


def _megabytes(process: int) -> float:
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process}/status").read_text(encoding="ascii"))
    return int(found[1]) * 1024 / 1e6 if found else 0.0


def _judge(seen: Seen, log: str) -> int:
    parts = max(1, len(seen.megabytes) // 5)
    early, late = (statistics.median(part) for part in (seen.megabytes[parts : 2 * parts], seen.megabytes[-parts:]))
    ordered = sorted(seen.seconds)
    print(f"good: {dict(seen.good)}; others: {dict(seen.others)}; not sent, too many under way: {seen.late}")
    print(
        f"good requests: p50 {1000 * ordered[len(ordered) // 2]:.0f} ms, p99 {1000 * ordered[int(0.99 * len(ordered))]:.0f} ms"
    )
    print(f"memory: {early:.1f} MB in the second fifth, {late:.1f} MB in the last ({late / early - 1:+.1%})")
    checks = [
        ("no answer was 500", 500 not in {*seen.good, *seen.others}),
        ("every good request was answered", {*seen.good} <= {200, 503}),
        ("memory stayed", late <= early * (1 + _MOST_GROWTH)),
        ("no text is in the log", MARKER not in log),
    ]
    for what, holds in checks:
        print(f"{'held' if holds else 'FAILED'}: {what}")
    return int(not all(holds for _, holds in checks))


if __name__ == "__main__":
    main()
