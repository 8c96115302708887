"""What the processes of one site say to each other, and the group in which they add up.

    messages     over a socket pair that a worker inherits from rank 0, so nobody else can take part in it
    the group    `torch.distributed` over gloo, on loopback: trained values from rank 0 to all, sums from all to rank 0

gloo also on a machine with GPUs: sums are float64, or whole numbers, on the processor (`shared.privacy.mechanism`), so NCCL would
first move them to the GPUs.

Guarantees (tests: tests/client/training/test_processes.py)
    * No message and nothing in the group holds a source of randomness, and none is made from it.
    * gloo takes whoever connects. So each two members prove to each other, over the very connection on which they add up, that
      they know a secret from the socket pair, before anything else goes over it (test_a_stranger_in_the_group_is_refused).
    * A member that has gone is an error at all others; rank 0 waits for one that has stopped no longer than `_PATIENCE`.
"""

from __future__ import annotations

import hmac
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from client.training.trainer import SiteRecords
from shared.errors import ComputeError, SilotuneError
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.privacy.plan import PrivacyPlan

# Rank 0 enters a collective when all others have said that they are ready for it; they wait for as long as its own part takes,
# and end with it.
_PATIENCE, _PATIENCE_FOR_RANK_0 = timedelta(minutes=5), timedelta(days=7)
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Join:
    """The first message to a worker: its place in the group, and how it computes.

    Attributes:
        rank: 1-based; rank 0 is the site's own process.
        size: of the group, rank 0 included.
        store: a file in a private folder, in which members find each other.
        secret: known to the members alone.
        threads: of PyTorch, the same in all processes, since by it a library cuts its sums.
    """

    rank: int
    size: int
    store: Path
    secret: bytes
    threads: int
    compute: ComputeConfig


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Load and prove the model of a job, and keep this part of the site's records."""

    job: Job
    records: SiteRecords


@dataclass(frozen=True, kw_only=True)
class Begin:
    """Take a round's global adapter, and answer with a fingerprint (`client.training.independence`)."""

    start: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Step:
    """Add up the clipped gradients of these units, by their places in the part, at the values that the group is given."""

    number: int
    plan: PrivacyPlan
    drawn: list[list[int]]


@dataclass(frozen=True, kw_only=True)
class Added:
    """What a worker added up in a step, before it enters the reduction. Not private: it stays between the processes.

    Attributes:
        number: of the step.
        num_examples, num_clipped, num_non_finite: as of a `ClippedSum`.
        loss: sum over the records.
    """

    number: int
    num_examples: int
    num_clipped: int
    num_non_finite: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class Failed:
    """What failed in a worker: an error of the project, or the place of another one."""

    error: SilotuneError


def send(connection: Connection, message: object) -> None:
    """Send a message; as plain bytes, for `multiprocessing` would have PyTorch share its memory through files.

    Raises:
        OSError: the other end is gone.
    """
    connection.send_bytes(pickle.dumps(message))


def receive(connection: Connection) -> Any:
    """Wait for a message.

    Raises:
        EOFError, OSError: the other end is gone.
    """
    return pickle.loads(connection.recv_bytes())  # noqa: S301 (from a process that we started, or that started us)


class Group:
    """The processes of a site as a group of `torch.distributed`, for which nothing global is set."""

    def __init__(self, *, rank: int, size: int, store: Path, secret: bytes) -> None:
        """Meet the others.

        Raises:
            ComputeError: one does not come, or who comes does not know the secret.
        """
        gloo: Any = dist.ProcessGroupGloo  # of whose methods the stubs know few
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=_LOOPBACK)]
        options._timeout = _PATIENCE if rank == 0 else _PATIENCE_FOR_RANK_0
        with _all_there():
            self._group = gloo(FileStore(str(store), size), rank, size, options)
            for other in range(size):
                if other != rank:
                    self._check(rank, other, secret)

    def _check(self, rank: int, other: int, secret: bytes) -> None:
        """Prove to another member that this is one, and have it prove the same; no proof fits another place or direction."""
        came = torch.zeros(32, dtype=torch.uint8)
        # Bytes that are sent must live until they are: the name keeps them.
        sent = torch.frombuffer(bytearray(_proof(secret, rank, other)), dtype=torch.uint8)
        sending = self._group.send([sent], other, 0)
        self._group.recv([came], other, 0).wait()
        sending.wait()
        if not hmac.compare_digest(came.numpy().tobytes(), _proof(secret, other, rank)):
            raise ComputeError(
                "somebody else connected to the group of this site's processes, and was refused; nothing was computed. Find out "
                "which program of this machine connects to ports of 127.0.0.1."
            )

    def broadcast(self, values: Sequence[Tensor]) -> None:
        """Put rank 0's float32 `values` into everybody's, on whatever device."""
        flat = torch.cat([value.detach().flatten().cpu() for value in values])
        options = dist.BroadcastOptions()
        options.rootRank = 0
        with _all_there():
            self._group.broadcast([flat], options).wait()
        with torch.no_grad():
            for value, part in zip(values, torch.split(flat, [value.numel() for value in values]), strict=True):
                value.copy_(part.view(value.shape))

    def reduce(self, total: Tensor) -> None:
        """Add everybody's `total` to rank 0's, in place; elsewhere it is undefined afterwards."""
        options = dist.ReduceOptions()
        options.rootRank = 0
        with _all_there():
            self._group.reduce([total], options).wait()


def _proof(secret: bytes, sender: int, receiver: int) -> bytes:
    return hmac.digest(secret, b"%d to %d" % (sender, receiver), "sha256")


@contextmanager
def _all_there() -> Iterator[None]:
    """Raise `ComputeError` for what gloo raises where a member has gone, or does not come."""
    try:
        yield
    except RuntimeError as error:
        raise ComputeError(
            "one of the processes that compute for this site is gone; nothing was released. Look for what ended it (the system's "
            "log names a process that was killed for memory), or set compute.processes = 1. "
            f"({str(error).splitlines()[0]})"
        ) from error
