"""Silotune beside its peers, measured in one run: `python -m benchmarks [SECTION ...] [--all] [--out FILE]`.

Without arguments it runs what takes about 40 minutes on two cores, an hour where they have no bfloat16. A section that is named
is run alone; the JSON file keeps what the others found, each with its own date.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import harness
from benchmarks.harness import Findings, Tell

RESULTS = Path(__file__).with_name("results.json")


def _module(name: str, function: str = "run") -> Callable[[Tell], Findings]:
    """Return a section that is imported when it runs: most need PyTorch, and one process should not hold them all."""

    def run(tell: Tell) -> Findings:
        found: Findings = getattr(importlib.import_module(f"benchmarks.{name}"), function)(tell)
        return found

    return run


def _plan(tell: Tell) -> Findings:
    if importlib.util.find_spec("benchmarks.accountant") is None:
        tell("benchmarks.accountant is not there; left out")
        return Findings()
    measured = importlib.import_module("benchmarks.accountant").measure(runs=5)
    return Findings({"plan_seconds": [float(value) for value in measured]})


def _rounds(tell: Tell) -> Findings:
    from benchmarks.round_overhead import measured

    return Findings({}, {"seconds a round beyond training": {"link": measured(blocks=4, rounds=6, tell=tell)[0]}})


SECTIONS: dict[str, Callable[[Tell], Findings]] = {
    "step": _module("step"),
    "epoch": _module("epoch"),
    "simulation": _module("simulation"),
    "many-clients": _module("simulation", "run_many"),
    "wire": _module("wire"),
    "aggregation": _module("aggregation"),
    "secure-sum": _module("secure_sum"),
    "plan": _plan,
}
"""What runs without arguments."""

LONG: dict[str, Callable[[Tell], Findings]] = {
    "step-bfloat16": _module("step", "run_bfloat16"),
    "attention": _module("attention"),
    "accuracy": _module("accuracy"),
    "accuracy-demo": _module("accuracy", "run_as_the_demo"),
    "simulation-pairs": _module("simulation", "run_pairs"),
    "rounds": _rounds,
    "serving": _module("serving"),
    "compression": _module("compression"),
}
"""What runs by name or with --all."""


def main() -> None:
    """Run the chosen sections, write the JSON file after each, and print the table."""
    every = {**SECTIONS, **LONG}
    arguments = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").split("\n")[0])
    arguments.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(every)}")
    arguments.add_argument("--all", action="store_true", help=f"also {', '.join(LONG)}")
    arguments.add_argument("--out", type=Path, default=RESULTS, help="JSON file to write or to merge into")
    options = arguments.parse_args()
    if unknown := [name for name in options.sections if name not in every]:
        arguments.error(f"unknown section {unknown[0]!r}; there are {', '.join(every)}")
    chosen = options.sections or list(every if options.all else SECTIONS)

    harness.calm_environment()
    console = Console(stderr=True)
    results: dict[str, Any] = {}
    for name in chosen:
        started = time.monotonic()
        with harness.progress(name, console) as tell:
            findings = partial(every[name], tell)()
        results = harness.merge(options.out, name, findings, wall_seconds=time.monotonic() - started)
    harness.show(results, chosen, Console())


if __name__ == "__main__":
    main()
