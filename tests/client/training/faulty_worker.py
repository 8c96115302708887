"""A worker with a planted fault, run as a program: its name, and the number of the socket."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from client.training import ranks, worker
from shared.privacy.randomness import SiteRandomness
from shared.runtime.runtime import Runtime

_sums, _batches = worker.clipped_sums, Runtime.grouped_batches


def _noise_twice(*arguments: Any) -> Any:
    """Adds the step's noise to its own part, too."""
    totals, losses = _sums(*arguments)
    noise = SiteRandomness.injected("worker").stream("noise", round_number=1, step=0)
    for part, noisy in zip(totals[0].sums, arguments[4].add_noise(totals[0].sums, noise), strict=True):
        part.copy_(noisy)
    return totals, losses


def _drawn_twice(*arguments: Any) -> Any:
    """Tosses a coin of its own for each unit that it was given."""
    runtime, pool, works, (groups,), plan, hooks = arguments
    again = plan.sample(len(groups), SiteRandomness.injected("worker").stream("sampling", round_number=1, step=0))
    return _sums(runtime, pool, works, [[groups[place] for place in again]], plan, hooks)


def _drop_a_batch(self: Runtime, *arguments: Any) -> Iterator[Any]:
    batches = _batches(self, *arguments)
    next(batches, None)
    yield from batches


def _busy(connection: Connection, message: object) -> None:
    worker.send(connection, True)
    time.sleep(600)


def main(arguments: Sequence[str]) -> None:
    fault = arguments[1]
    if fault in ("noise_twice", "drawn_twice"):
        worker.clipped_sums = globals()[f"_{fault}"]
    elif fault == "drop_a_batch":
        Runtime.grouped_batches = _drop_a_batch  # type: ignore[method-assign]
    elif fault == "busy":
        worker.Worker = _busy  # type: ignore[assignment,misc]
    elif fault == "impatient":
        ranks._PATIENCE = timedelta(seconds=1)
    worker.main()


if __name__ == "__main__":
    main(sys.argv)
