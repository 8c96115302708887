"""What a round costs beyond training: send, wait, check, aggregate and make durable, with real processes over the link.

A coordinator and three sites run a small job on the embedded encoder. Prints a table and one JSON line.

    python -m benchmarks.round_overhead [--blocks 4] [--rounds 6] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from client.link.handshake import TlsFacts
from shared.job.job import Job
from shared.job.parsing import parse
from shared.version import silotune_version
from simulations.federation.processes import Federation, round_overheads

SITES = ("site-1", "site-2", "site-3")
_TEXTS = ("a warm and clever film", "a dull and lifeless story", "a joy from start to end", "it drags and it bores")


def main() -> None:
    """Run the comparison."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--blocks", type=int, default=4, help="jobs, one after another")
    arguments.add_argument("--rounds", type=int, default=6, help="rounds of a job")
    arguments.add_argument("--out", type=Path, help="JSON file to write")
    options = arguments.parse_args()
    result, facts = measured(options.blocks, options.rounds, tell=lambda what: print(what, file=sys.stderr, flush=True))
    show(result)
    line = {
        "round_overhead_seconds": result,
        "sites": len(SITES),
        "tls_version": facts.tls_version,
        "alpn": facts.alpn,
        "machine": {"system": platform.platform(), "cpu_count": os.cpu_count()},
        "version": silotune_version(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    print(json.dumps(line))
    if options.out:
        options.out.write_text(json.dumps(line, indent=2) + "\n", encoding="utf-8")


def measured(blocks: int, rounds: int, *, tell: Callable[[str], None]) -> tuple[dict[str, float], TlsFacts]:
    """Return median, smallest and largest overhead of a round, and what the connection was.

    Args:
        blocks: jobs, one after another.
        rounds: rounds of a job; the first is not counted.
        tell: told before every job.
    """
    folder = Path(tempfile.mkdtemp(prefix="silotune-rounds-"))
    federation = Federation(folder, environment={"OMP_NUM_THREADS": "1"})
    found: list[float] = []
    try:
        federation.found()
        for index, name in enumerate(SITES):
            federation.join(name, records(index), epsilon=50.0, composition="adaptive")
        federation.start_coordinator()
        facts = federation.tls()
        for name in SITES:
            federation.start_site(name)
        for block in range(blocks):
            tell(f"job {block + 1} of {blocks}")
            found += measure(federation, f"rounds-{block}", rounds)
    finally:
        federation.stop()
        shutil.rmtree(folder, ignore_errors=True)
    row = {"median": statistics.median(found), "min": min(found), "max": max(found)}
    return {key: round(value, 3) for key, value in row.items()} | {"runs": len(found)}, facts


def measure(federation: Federation, name: str, rounds: int) -> list[float]:
    """Run one job and return the overhead of its rounds but the first, in seconds."""
    submission = federation.submit(small_job(name, rounds), records(9))
    state = federation.wait(submission, timeout=1800)
    if state["state"] != "completed":
        raise SystemExit(f"{submission.name} {state['state']}: {state.get('problem')}")
    # The first round also pays what a process does once.
    return round_overheads(federation, submission, SITES)[1:]


def small_job(name: str, rounds: int) -> Job:
    """Return a job whose training is short, on the embedded encoder."""
    raw = {
        "name": name,
        "model": {"max_length": 16},
        "task": {"kind": "sequence_classification", "labels": ["bad", "good"]},
        "training": {"rounds": rounds, "local_steps": 1, "learning_rate": 0.01},
        "privacy": {"sample_rate": 0.1, "noise_multiplier": 2.0},
        "federation": {"min_sites": len(SITES)},
    }
    return parse(Job, raw, source="the benchmark")


def records(index: int) -> list[dict[str, str]]:
    """Return 64 short records."""
    return [
        {"text": f"{_TEXTS[(i + index) % 4]} {_TEXTS[i // 4 % 4]}", "label": ("good", "bad")[(i + index) % 2]}
        for i in range(64)
    ]


def show(result: dict[str, float]) -> None:
    """Print the table."""
    table = Table("seconds a round beyond training", "median", "min", "max", "rounds", box=None)
    table.add_row("link", *(f"{result[key]:g}" for key in ("median", "min", "max", "runs")))
    Console(stderr=True).print(table)


if __name__ == "__main__":
    main()
