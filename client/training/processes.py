"""A site's gradients, computed by several processes: by the site's own, which is rank 0, and by workers that it starts.

Rank 0 alone draws, adds noise, keeps optimiser and account, and talks to the coordinator. In a step it gives out the trained
values and, to each worker, the units of its part that were drawn; every rank clips and adds up its own, and rank 0 gets the sum.

Formal guarantees (tests: tests/client/training/test_processes.py)
    * The sum is that of one process, to the last bit: a unit, with all its records and views, is clipped whole on one rank;
      clipped vectors lie on a grid, on which float64 sums are exact (`shared.privacy.mechanism`); and no round begins unless all
      ranks compute the same gradients, to the last bit, of public probes at the round's own adapter
      (test_several_processes_compute_what_one_does, test_a_rank_that_computes_other_numbers_is_refused).
    * Sampling and noise stay where they are, in `client.training.trainer` on rank 0. Workers have no source of randomness
      (test_fault_noise_twice, test_fault_drawn_twice).
    * A step either has exactly the units that were drawn, once each, or is not released: each rank checks it for its part, and
      rank 0 what came (test_fault_a_rank_drops_a_micro_batch, test_a_worker_that_is_killed_ends_the_round).
    * After any failure all workers are gone; the next round starts new ones.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from client.training.independence import fingerprint
from client.training.per_example import PerExampleHooks
from client.training.ranks import Added, Begin, Failed, Group, Join, Prepare, Step, receive, send
from client.training.trainer import Drawn, SiteRecords, clipped_sums
from shared.errors import ComputeError, ConfigError, PrivacyError
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.models.batches import Example
from shared.privacy.mechanism import ClippedSum
from shared.privacy.plan import PrivacyPlan
from shared.runtime.runtime import Runtime

_LOG = logging.getLogger("silotune.site")
_WORKER = ("-m", "client.training.worker")
_SECRET = re.compile("PASS|SECRET|TOKEN(?!IZ)|KEY|CREDENTIAL", re.IGNORECASE)  # in the name of a variable
_MOMENT_SECONDS = 2.0
# For a backbone from a slow disk; for all else, and on top ten times rank 0's own.
_LOAD_SECONDS, _ANSWER_SECONDS = 1800.0, 300.0


class Processes:
    """Rank 0's hold on the workers of a site, which run from the first job on until `close`, or until this process ends."""

    def __init__(self, count: int, compute: ComputeConfig, *, program: Sequence[str] = _WORKER) -> None:
        """Start nothing yet, but share the processors: from here on this process computes with its part of the threads.

        Args:
            count: processes, this one included; 2 at least.
            compute: speed settings of every process.
            program: what Python runs as a worker; tests plant faults here.

        Raises:
            ConfigError: this PyTorch cannot do it.
        """
        if not (dist.is_available() and dist.is_gloo_available()):
            raise ConfigError(
                "compute.processes is above 1, but this PyTorch was built without torch.distributed and gloo; install one that "
                "has them, or set compute.processes = 1."
            )
        self._count, self._compute, self._program = count, compute, program
        self._workers: list[_Process] = []
        self._group: Group | None = None
        self._prepared: tuple[Runtime, SiteRecords] | None = None
        self._rank_of, self._place_of = np.zeros(0, np.intp), np.zeros(0, np.intp)
        self._number = 0
        # Not more threads than one process has now, nor than there are processors.
        self._threads = min(torch.get_num_threads(), max(1, num_processors() // count))
        torch.set_num_threads(self._threads)

    @property
    def pids(self) -> list[int]:
        """The workers' process ids."""
        return [worker.pid for worker in self._workers]

    def prepare(self, runtime: Runtime, job: Job, records: SiteRecords) -> None:
        """Give each worker its part of the records of a job, and compute what is frozen of rank 0's; at no cost if it was done.

        A unit of privacy belongs to a rank by its number, so that no rank caches what another needs.

        Raises:
            ComputeError: a worker ended or failed.
        """
        if any(worker.ended for worker in self._workers):  # while nothing was asked of it
            self.close()
        if self._group is not None and self._prepared is not None:
            before, earlier = self._prepared
            if before is runtime and earlier.examples is records.examples and earlier.views is records.views:
                return
        self._prepared = None
        with self._all_or_none():
            self._start()
            units = np.arange(len(records.examples)) if records.persons is None else records.persons.owners
            self._rank_of = units % self._count
            self._place_of = np.zeros_like(self._rank_of)
            parts = []
            for rank in range(self._count):
                rows = np.flatnonzero(self._rank_of == rank)
                self._place_of[rows] = np.arange(len(rows))
                parts.append(records.part(rows.tolist()))
            for worker, part in zip(self._workers, parts[1:], strict=True):
                worker.send(Prepare(job=job, records=part))
            began = time.monotonic()
            runtime.warm_cache([*parts[0].examples, *parts[0].views])
            self._receive(_LOAD_SECONDS, began)
        self._prepared = runtime, records

    def begin(self, runtime: Runtime, start: dict[str, torch.Tensor]) -> None:
        """Give every worker a round's global adapter, and make sure that all compute the same with it.

        Raises:
            ComputeError: a worker ended or failed, or its gradients of public probes differ from rank 0's.
        """
        with self._all_or_none():
            for worker in self._workers:
                worker.send(Begin(start=start))
            began = time.monotonic()
            own = fingerprint(runtime, start)
            if any(other != own for other in self._receive(_ANSWER_SECONDS, began)):
                raise ComputeError(
                    "the processes of this site do not compute the same gradients to the last bit, so a sum would depend on who "
                    "computed what; no gradient of a record was taken. Give them GPUs of one kind, or set compute.processes = 1."
                )

    def sums(
        self,
        runtime: Runtime,
        pool: Sequence[Example],
        works: Sequence[SiteRecords],
        drawn: Drawn,
        plan: PrivacyPlan,
        hooks: PerExampleHooks,
    ) -> tuple[list[ClippedSum], list[float]]:
        """`clipped_sums` of one site, computed by all ranks.

        Raises:
            ComputeError: a worker ended or failed.
            PrivacyError: what came is not the sum over the units that were drawn.
        """
        (groups,) = drawn
        given: list[list[Sequence[int]]] = [[] for _ in range(self._count)]
        for group in groups:
            given[self._rank_of[group[0]]].append(group)
        self._number += 1
        with self._all_or_none():
            group_of_all = self._joined()
            for worker, part in zip(self._workers, given[1:], strict=True):
                places = [self._place_of[list(group)].tolist() for group in part]
                worker.send(Step(number=self._number, plan=plan, drawn=places))
            group_of_all.broadcast(list(runtime.model.trainable().values()))
            began = time.monotonic()
            (total,), (loss,) = clipped_sums(runtime, pool, works, [given[0]], plan, hooks)
            # All of them before any reduction begins: a part that fails is no part of a sum.
            came = self._receive(_ANSWER_SECONDS, began)
            added = [self._checked(one, part) for one, part in zip(came, given[1:], strict=True)]
            group_of_all.reduce(total.flat)
            for one in added:
                total.count(
                    num_examples=one.num_examples, num_clipped=one.num_clipped, num_non_finite=one.num_non_finite
                )
            total.check()
        return [total], [loss + sum(one.loss for one in added)]

    def _checked(self, added: Added, given: Sequence[object]) -> Added:
        if (added.number, added.num_examples) != (self._number, len(given)):
            raise PrivacyError(
                f"a process was given {len(given):,} units of step {self._number} and added {added.num_examples:,} in step "
                f"{added.number}; nothing was released."
            )
        return added

    def _receive(self, seconds: float, began: float) -> list[Any]:
        """Return every worker's answer; they have so long, and ten times as long as rank 0 took since it `began`."""
        patience = seconds + 10 * (time.monotonic() - began)
        return [worker.receive(patience) for worker in self._workers]

    def _joined(self) -> Group:
        if self._group is None:
            raise ComputeError("the processes of this site were not prepared for a round; start the site again.")
        return self._group

    def close(self) -> None:
        """End the workers, and wait until they are gone."""
        for worker in self._workers:
            worker.end()
        self._workers, self._group, self._prepared = [], None, None

    def _start(self) -> None:
        if self._workers:
            return
        secret = secrets.token_bytes(32)
        with _private_folder() as folder:
            store = Path(folder) / "store"
            self._workers = [_Process(self._program) for _ in range(1, self._count)]
            for rank, worker in enumerate(self._workers, start=1):
                worker.send(
                    Join(
                        rank=rank,
                        size=self._count,
                        store=store,
                        secret=secret,
                        threads=self._threads,
                        compute=self._compute,
                    )
                )
            self._receive(_ANSWER_SECONDS, time.monotonic())  # else who came up would wait in vain for who did not
            self._group = Group(rank=0, size=self._count, store=store, secret=secret)
        pids = ", ".join(map(str, self.pids))
        _LOG.info(
            "a step is computed by %d processes, %d threads each: %s beside this one", self._count, self._threads, pids
        )

    @contextmanager
    def _all_or_none(self) -> Iterator[None]:
        """End all workers if anything in the block fails."""
        try:
            yield
        except (EOFError, OSError) as error:
            ended = [code for worker in self._workers if (code := worker.exit_code()) is not None]
            self.close()
            raise ComputeError(
                f"a process that computes beside the site's own ended by itself, with exit code "
                f"{', '.join(map(str, ended)) or 'unknown'} (-9: killed, as a rule for memory); nothing was released. Give the "
                "machine more memory, or set compute.processes = 1."
            ) from error
        except BaseException:
            self.close()
            raise


class _Process:
    """One worker, as rank 0 has it."""

    def __init__(self, program: Sequence[str]) -> None:
        self._connection, theirs = Pipe()
        # It opens no key, and imports from where this process does, not from the working folder.
        environment = {name: value for name, value in os.environ.items() if not _SECRET.search(name)}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        with theirs:  # once only the worker holds it, its end is seen here
            try:
                self._process = subprocess.Popen(  # noqa: S603 (our own program)
                    [sys.executable, "-P", *program, str(theirs.fileno())],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                )
            except OSError as error:
                raise ComputeError(
                    f"no further process can be started ({error.strerror}); see what this user may use, or set "
                    "compute.processes = 1."
                ) from error

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def send(self, message: object) -> None:
        send(self._connection, message)

    def receive(self, seconds: float) -> Any:
        """Return what it answers within so many seconds, or raise what it failed with."""
        if not self._connection.poll(seconds):
            raise ComputeError(
                f"a process that computes beside the site's own has not answered for {seconds:.0f} s, and was ended; nothing was "
                "released. See whether something stopped it, or set compute.processes = 1."
            )
        answer = receive(self._connection)
        if isinstance(answer, Failed):
            raise answer.error
        return answer

    def exit_code(self) -> int | None:
        """Wait a moment for it to end; None if it does not."""
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(_MOMENT_SECONDS)
        return None

    def end(self) -> None:
        """Kill it: it holds nothing that is to be saved."""
        self._connection.close()
        self._process.kill()
        self._process.wait()


def _private_folder() -> tempfile.TemporaryDirectory[str]:
    """Make a temporary folder for this user alone."""
    try:
        return tempfile.TemporaryDirectory(prefix="silotune-")
    except OSError as error:
        raise ComputeError(
            f"no temporary folder can be made ({error.strerror}), in which the processes of this site find each other; name one "
            "in TMPDIR that this user may write to."
        ) from error


def num_processors() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
