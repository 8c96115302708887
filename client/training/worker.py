"""A worker: a process that adds up the clipped gradients of its part of a site's records, for rank 0, which started it.

It holds the backbone and the records of its part. It draws nothing, adds no noise, keeps no account, and talks to nobody but the
processes of its site.

Guarantees (tests: tests/client/training/test_processes.py)
    * It proves its trainer and tries out its machine as rank 0 does, before it is given a step.
    * It ends when rank 0 ends, however that ends, also in the middle of a step (test_workers_end_with_the_site), and not before.
    * Whatever fails is told to rank 0 instead of a sum.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import sys
import threading
import warnings
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from client.training.independence import fingerprint, keep_settled
from client.training.proof import load_proven
from client.training.ranks import Added, Begin, Failed, Group, Join, Prepare, Step, receive, send
from client.training.trainer import SiteRecords, clipped_sums, per_example_hooks, pool_of
from shared.errors import ComputeError, SilotuneError, place_of
from shared.privacy.mechanism import ClippedSum
from shared.runtime.runtime import Runtime


class Worker:
    """What a worker holds, and its answers."""

    def __init__(self, connection: Connection, join: Join) -> None:
        """Say that this process has come up, and join the group."""
        send(connection, True)
        torch.set_num_threads(join.threads)
        if join.compute.device != "cpu" and torch.cuda.is_available():
            torch.cuda.set_device(join.rank % torch.cuda.device_count())
        self._connection, self._compute = connection, join.compute
        self._group = Group(rank=join.rank, size=join.size, store=join.store, secret=join.secret)
        self._runtime: Runtime | None = None
        self._records = SiteRecords(examples=())

    def answer(self, message: object) -> None:
        """Do what a message asks, and say that it is done."""
        if isinstance(message, Prepare):
            send(self._connection, self._prepare(message))
        elif isinstance(message, Begin):
            send(self._connection, self._begin(message))
        elif isinstance(message, Step):
            added, total = self._step(message)
            send(self._connection, added)
            self._group.reduce(total.flat)

    def _prepare(self, message: Prepare) -> bool:
        self._runtime, self._records = None, SiteRecords(examples=())
        runtime, records = load_proven(message.job, self._compute), message.records
        runtime.warm_cache([*records.examples, *records.views])
        self._runtime, self._records = runtime, records
        return True

    def _begin(self, message: Begin) -> str:
        runtime = self._ready()
        keep_settled(runtime)
        found = fingerprint(runtime, message.start)
        runtime.load(message.start)
        return found

    def _step(self, message: Step) -> tuple[Added, ClippedSum]:
        runtime, records = self._ready(), self._records
        if message.plan.records_per_person is None:  # under central DP, whoever's the records are
            records = replace(records, persons=None)
        self._group.broadcast(list(runtime.model.trainable().values()))
        with per_example_hooks(runtime.model) as hooks:
            (total,), (loss,) = clipped_sums(
                runtime, pool_of([records]), [records], [message.drawn], message.plan, hooks
            )
        added = Added(
            number=message.number,
            num_examples=total.num_examples,
            num_clipped=total.num_clipped,
            num_non_finite=total.num_non_finite,
            loss=loss,
        )
        return added, total

    def _ready(self) -> Runtime:
        if self._runtime is None:
            raise ComputeError("a process was asked for a step before it was prepared; start the site again.")
        return self._runtime


def serve(connection: Connection) -> None:
    """Answer rank 0 until it is gone; returns after a failure, which it told."""
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, inbox), name="rank 0", daemon=True).start()
    try:
        worker = Worker(connection, inbox.get())
        while True:
            worker.answer(inbox.get())
    except Exception as error:
        told = error if isinstance(error, SilotuneError) else ComputeError(f"a process failed: {place_of(error)}")
        with suppress(OSError):
            send(connection, Failed(error=told))


def _listen(connection: Connection, inbox: queue.SimpleQueue[Any]) -> None:
    """Take messages in a thread of its own, which notices that rank 0 is gone whatever the main thread does."""
    with suppress(EOFError, OSError):
        while True:
            inbox.put(receive(connection))
    os._exit(0)


def main() -> None:
    """Serve on the socket whose number is the last argument."""
    # A terminal or systemd tells all processes to stop: rank 0 finishes its round, and this one ends with it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.disable(logging.WARNING)  # rank 0 says the same
    warnings.simplefilter("ignore")
    serve(Connection(int(sys.argv[-1])))


if __name__ == "__main__":
    main()
