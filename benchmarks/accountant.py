"""How long one planning answer takes: calibration of the demo's job at epsilon 8, and the epsilon of what was found.

Every run starts with empty caches, as a command line does; imports are not counted.

    python -m benchmarks.accountant [--runs 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from importlib.resources import files
from pathlib import Path

from shared.privacy import accounting
from shared.privacy.accounting import GaussianSteps, calibrate_noise_multiplier, compose_epsilon

EPSILON = 8.0
# n, B, E of published settings, at delta = 1 / n^1.1: the least and the most steps among them.
OTHERS = {"n 2,000, B 1,024, 10 epochs": (2_000, 1_024, 10), "n 50,000, B 512, 10 epochs": (50_000, 512, 10)}


def measure(runs: int) -> list[float]:
    """Return the seconds of `runs` answers for the demo's job."""
    return _measure(runs, *_demo())


def _demo() -> tuple[float, int, float]:
    """Return rate, steps and delta of the demo's job."""
    from simulations.scenario import load_scenario

    job = load_scenario(Path(str(files("simulations"))) / "demo.toml").job
    return job.privacy.sample_rate, job.training.planned_steps, job.privacy.delta


def _measure(runs: int, rate: float, steps: int, delta: float) -> list[float]:
    found = []
    for _ in range(runs):
        _forget()
        start = time.perf_counter()
        sigma = calibrate_noise_multiplier(epsilon=EPSILON, delta=delta, sample_rate=rate, steps=steps)
        epsilon = compose_epsilon([GaussianSteps(noise_multiplier=sigma, sample_rate=rate, steps=steps)], delta)
        found.append(time.perf_counter() - start)
        assert epsilon <= EPSILON
    return found


def _forget() -> None:
    for function in vars(accounting).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def main() -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table

    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--runs", type=int, default=5)
    runs = arguments.parse_args().runs
    settings = {"the demo's job": _demo()}
    settings |= {name: (b / n, round(e * n / b), n**-1.1) for name, (n, b, e) in OTHERS.items()}
    table = Table("noise for epsilon 8, and its epsilon", title=f"seconds, {runs} runs each", title_justify="left")
    for title in ("median", "smallest", "largest"):
        table.add_column(title, justify="right")
    for name, (rate, steps, delta) in settings.items():
        seconds = _measure(runs, rate, steps, delta)
        table.add_row(name, *(f"{f(seconds):.3f}" for f in (statistics.median, min, max)))
    Console().print(table)


if __name__ == "__main__":
    main()
