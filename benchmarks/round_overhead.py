"""What a round costs beyond training: our site node beside Flower's own SuperNode, with the same ClientApp.

Both run the same small job on the embedded encoder, with the same keys, policies and coordinator, in blocks that alternate.
The stock SuperNode starts a process for each message (subprocess isolation) and executes the code that a bundle holds; it is
here for comparison only. Prints a table and one JSON line.

    python -m benchmarks.round_overhead [--blocks 2] [--rounds 6] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from rich.console import Console
from rich.table import Table

from client.node.fleet import TlsFacts
from shared.job.job import Job
from shared.job.parsing import parse
from shared.trust.node_keys import load_private_key
from shared.version import silotune_version
from simulations.federation.processes import HOST, Federation, round_overheads

SITES = ("site-1", "site-2", "site-3")
_TEXTS = ("a warm and clever film", "a dull and lifeless story", "a joy from start to end", "it drags and it bores")


def main() -> None:
    """Run the comparison."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--blocks", type=int, default=2, help="alternating blocks of each kind")
    arguments.add_argument("--rounds", type=int, default=6, help="rounds of a block")
    arguments.add_argument("--out", type=Path, help="JSON file to write")
    options = arguments.parse_args()
    facts: list[TlsFacts] = []
    result = compare(
        options.blocks, options.rounds, tell=lambda what: print(what, file=sys.stderr, flush=True), facts=facts
    )
    show(result)
    line = {
        "round_overhead_seconds": result,
        "sites": len(SITES),
        "tls_version": facts[0].tls_version,
        "alpn": facts[0].alpn,
        "machine": {"system": platform.platform(), "cpu_count": os.cpu_count()},
        "version": silotune_version(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    print(json.dumps(line))
    if options.out:
        options.out.write_text(json.dumps(line, indent=2) + "\n", encoding="utf-8")


def compare(
    blocks: int, rounds: int, *, tell: Callable[[str], None], facts: list[TlsFacts] | None = None
) -> dict[str, dict[str, float]]:
    """Return median, smallest and largest overhead of a round by kind of node.

    Args:
        blocks: alternating blocks of each kind.
        rounds: rounds of a block; the first is not counted.
        tell: told before every block.
        facts: where to put what the connection was.
    """
    folder = Path(tempfile.mkdtemp(prefix="silotune-rounds-"))
    federation = Federation(folder, environment={"OMP_NUM_THREADS": "1"})
    found: dict[str, list[float]] = {"silotune node": [], "stock supernode": []}
    try:
        federation.found()
        for index, name in enumerate(SITES):
            federation.join(name, records(index), epsilon=50.0, composition="adaptive")
        federation.start_coordinator()
        for block in range(blocks):
            for kind, start in (("silotune node", Federation.start_site), ("stock supernode", start_stock)):
                tell(f"block {block + 1}, {kind}")
                found[kind] += measure(federation, f"{kind.replace(' ', '-')}-{block}", start, rounds)
        if facts is not None:
            facts.append(federation.tls())
    finally:
        federation.stop()
        shutil.rmtree(folder, ignore_errors=True)
    return {
        kind.replace(" ", "_"): {
            "median": round(statistics.median(values), 3),
            "min": round(min(values), 3),
            "max": round(max(values), 3),
            "runs": len(values),
        }
        for kind, values in found.items()
    }


def measure(federation: Federation, name: str, start: Any, rounds: int) -> list[float]:
    """Run one job with sites that `start` starts, and return the overhead of its rounds but the first, in seconds."""
    for site in SITES:
        start(federation, site)
    submission = federation.submit(small_job(name, rounds), records(9))
    state = federation.wait(submission, timeout=1800)
    for site in SITES:
        process = federation.processes.pop(site)
        process.terminate()
        process.wait(timeout=60)
    if state["state"] != "completed":
        raise SystemExit(f"{submission.name} {state['state']}: {state.get('problem')}")
    # The first round also pays what a process does once.
    return round_overheads(federation, submission, SITES)[1:]


def start_stock(federation: Federation, name: str) -> None:
    """Start Flower's own SuperNode with a site's key and folder."""
    home = federation.site(name)
    key = load_private_key(home.key, None)
    private = federation.folder / f"{name}.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    private.chmod(0o600)
    index = SITES.index(name)
    command = [
        str(Path(sys.executable).parent / "flower-supernode"),
        "--superlink", f"{HOST}:{federation.fleet_port}",
        "--root-certificates", str(federation.ca / "ca.crt"),
        "--auth-supernode-private-key", str(private),
        "--isolation", "subprocess",
        "--port", str(federation.fleet_port + 100 + index),
    ]  # fmt: skip
    settings = {
        "SILOTUNE_SITE_HOME": str(home.path),
        "FLWR_HOME": str(federation.folder / f"{name}-flower"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    with (federation.folder / f"{name}-stock.log").open("ab") as log:
        federation.processes[name] = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **federation.environment, **settings},
        )


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


def show(result: dict[str, dict[str, float]]) -> None:
    """Print the table."""
    table = Table("seconds a round beyond training", "median", "min", "max", "rounds", box=None)
    for kind, row in result.items():
        table.add_row(kind.replace("_", " "), *(f"{row[key]:g}" for key in ("median", "min", "max", "runs")))
    Console(stderr=True).print(table)


if __name__ == "__main__":
    main()
