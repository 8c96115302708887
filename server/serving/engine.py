"""The engine: threads that compute, a bounded queue before them, and batches of texts of similar length.

A few threads compute a batch each, on their part of the cores, instead of one batch on all of them: the threads of one batch wait
for each other many times a millisecond, and busily, also for one whose core somebody else has, such as who asks.

Guarantees (tests: tests/server/serving/test_engine.py)
    * What is taken on is answered by the model that was in use when it came, or fails with an error; nothing is lost.
    * A text whose request is gone is not computed, unless its batch has begun.
    * The queue never holds more texts than `Limits.queue`; what does not fit is refused at once, with a time to come again.
"""

from __future__ import annotations

import bisect
import contextlib
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor

from server.serving.limits import Limits
from server.serving.models import Model
from shared.errors import SilotuneError, panics_as_errors, place_of
from shared.models.batches import Example

log = logging.getLogger("silotune.serving")

_MOST_SORTED = 1024
"""Of the texts that wait longest, so many are looked through for company of similar length."""


class QueueFull(SilotuneError):
    """More texts wait than may; `seconds` is when to come again."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"too many texts wait to be answered; try again in {seconds} s")
        self.seconds = seconds


class Failed(SilotuneError):
    """The model could not compute an answer; the log says where."""


@dataclass
class Told:
    """What an engine counts, for monitoring.

    Attributes:
        batches, texts, tokens: computed; tokens without padding.
        padded: tokens, padding included.
        seconds: of computing.
    """

    batches: int = 0
    texts: int = 0
    tokens: int = 0
    padded: int = 0
    seconds: float = 0.0


class Engine(ABC):
    """Threads that work off what waits, until `close`."""

    def __init__(self, limits: Limits, threads: int = 1) -> None:
        self.limits, self.told = limits, Told()
        self.waiting = 0
        self._changed = threading.Condition()
        self._closed = False
        self._rate = 0.0
        self._idle = 0
        self._threads = [
            threading.Thread(target=self._work, name=f"engine-{number}", daemon=True) for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def alive(self) -> bool:
        """Whether every thread works."""
        return all(thread.is_alive() for thread in self._threads)

    def close(self) -> None:
        """Stop after the batches at hand; whatever waits then fails."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _take_on(self, count: int) -> None:
        """Count what comes; the caller holds the lock.

        Raises:
            QueueFull: if it does not fit.
        """
        if self._closed or self.waiting + count > self.limits.queue:
            raise QueueFull(min(60, max(1, round(self.waiting / self._rate))) if self._rate else 1)
        self.waiting += count
        self._changed.notify_all()

    def _count(self, texts: int, tokens: int, padded: int, seconds: float) -> None:
        """Count what a thread computed; with several threads the caller holds the lock."""
        told = self.told
        told.batches, told.texts, told.seconds = told.batches + 1, told.texts + texts, told.seconds + seconds
        told.tokens, told.padded = told.tokens + tokens, told.padded + padded
        self._rate = 0.9 * self._rate + 0.1 * texts / max(seconds, 1e-6) if self._rate else texts / max(seconds, 1e-6)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._closed and not self._ready():
                    self._idle += 1
                    self._changed.wait(self._patience())
                    self._idle -= 1
                if self._closed:
                    break
            try:
                with panics_as_errors():
                    self._turn()
            except Exception as error:  # a defect must not end a thread that everybody waits for
                log.error("a turn of the engine failed: %s", place_of(error))
                self._fail(Failed("the engine failed; the log says where"))
        self._fail(Failed("the service ends; ask again"))

    @abstractmethod
    def _ready(self) -> bool:
        """Whether there is something to do now; called with the lock held."""

    def _patience(self) -> float | None:
        """Return the seconds after which something that waits is ready by itself."""
        return None

    @abstractmethod
    def _turn(self) -> None:
        """Compute once."""

    @abstractmethod
    def _fail(self, error: SilotuneError) -> None:
        """Let everything fail that waits or is at hand."""


@dataclass(eq=False)
class _Asked:
    """A request: its examples, and the outputs that came so far."""

    model: Model
    examples: Sequence[Example]
    arrived: float
    future: Future[list[Tensor]] = field(default_factory=Future)
    outputs: dict[int, Tensor] = field(default_factory=dict)


class Batching(Engine):
    """Answers texts in batches: the one that waits longest, with those that are closest to it in length.

    Threads that are idle at the same time share what waits. An idle one waits up to `batch_wait_ms` for a batch to fill;
    where all are busy, none does, for what comes meanwhile fills it.
    """

    watch: Callable[[list[Example]], None] | None = None
    """Called with each batch before it is computed, for measurements."""

    def __init__(self, limits: Limits, threads: int = 1) -> None:
        self._queue: list[tuple[_Asked, int]] = []
        self._tokens = self._computing = 0
        super().__init__(limits, threads)

    def submit(self, model: Model, examples: Sequence[Example]) -> Future[list[Tensor]]:
        """Take on a request of any size; the result has the head's output of every example, in order.

        Whoever no longer wants it cancels the future.

        Raises:
            QueueFull: if it does not fit into the queue.
        """
        asked = _Asked(model, examples, time.monotonic())
        if not examples:
            asked.future.set_result([])
            return asked.future
        with self._changed:
            self._take_on(len(examples))
            self._queue += [(asked, index) for index in range(len(examples))]
            self._tokens += sum(example.length for example in examples)
        return asked.future

    def _ready(self) -> bool:
        if not self._queue or self._computing >= self._queue[0][0].model.at_once:
            return False
        waited = time.monotonic() - self._queue[0][0].arrived
        return self._tokens >= self.limits.batch_tokens or waited * 1000 >= self.limits.batch_wait_ms

    def _patience(self) -> float | None:
        if not self._queue or self._computing >= self._queue[0][0].model.at_once:
            return None  # whoever computes tells when it is done
        return max(0.0, self._queue[0][0].arrived + self.limits.batch_wait_ms / 1000 - time.monotonic())

    def _turn(self) -> None:
        with self._changed:
            batch = self._next_batch()
            if not batch:
                return
            self._computing += 1
        try:
            self._compute(batch)
        finally:
            with self._changed:
                self._computing -= 1
                self._changed.notify_all()

    def _compute(self, batch: list[tuple[_Asked, int]]) -> None:
        model, examples = batch[0][0].model, [asked.examples[index] for asked, index in batch]
        if self.watch is not None:
            self.watch(examples)
        began = time.perf_counter()
        try:
            with panics_as_errors():
                outputs = model.outputs(examples)
        except Exception as error:
            log.error("a batch of %s failed: %s", model.version, place_of(error))
            for asked in {id(asked): asked for asked, _ in batch}.values():
                _resolve(asked.future, Failed("the model could not compute this; the log says where"))
            return
        lengths = [example.length for example in examples]
        with self._changed:
            self._count(len(batch), sum(lengths), max(lengths) * len(lengths), time.perf_counter() - began)
            for (asked, index), output in zip(batch, outputs, strict=True):
                asked.outputs[index] = output
            complete = {asked for asked, _ in batch if len(asked.outputs) == len(asked.examples)}
        for asked in complete:
            _resolve(asked.future, [asked.outputs[place] for place in range(len(asked.examples))])

    def _next_batch(self) -> list[tuple[_Asked, int]]:
        """Take the next batch out of the queue, and out with it whatever nobody waits for; the lock is held."""
        self._forget_gone()
        if not self._queue:
            return []
        first, oldest = self._queue[0], self._queue[0][0].model
        if (room := oldest.at_once - self._computing) < 1:
            return []  # another thread was faster
        known = sorted(
            (one for one in self._queue[:_MOST_SORTED] if one[0].model is oldest),
            key=lambda one: one[0].examples[one[1]].length,
        )
        lengths = [asked.examples[index].length for asked, index in known]
        place = known.index(first, bisect.bisect_left(lengths, first[0].examples[first[1]].length))
        sharing = min(1 + self._idle, room)
        share = lengths[-1] * -(-len(lengths) // sharing)
        begin, end = _around(lengths, place, min(self.limits.batch_tokens, share))
        batch = known[begin:end]
        taken = {(id(asked), index) for asked, index in batch}
        self._queue = [one for one in self._queue if (id(one[0]), one[1]) not in taken]
        self._left(sum(lengths[begin:end]), len(batch))
        return batch

    def _forget_gone(self) -> None:
        gone = {asked for asked in {asked for asked, _ in self._queue} if asked.future.done()}
        if gone:
            left = [asked.examples[index].length for asked, index in self._queue if asked in gone]
            self._queue = [one for one in self._queue if one[0] not in gone]
            self._left(sum(left), len(left))

    def _left(self, tokens: int, count: int) -> None:
        self._tokens -= tokens
        self.waiting -= count

    def _fail(self, error: SilotuneError) -> None:
        with self._changed:
            lost, self._queue, self._tokens, self.waiting = self._queue, [], 0, 0
        for asked, _ in lost:
            _resolve(asked.future, error)


def _around(lengths: Sequence[int], place: int, most_tokens: int) -> tuple[int, int]:
    """Return begin and end of the texts that go with the one at `place`, so that padded tokens stay within `most_tokens`.

    Args:
        lengths: of all, rising.
    """
    begin, end = place, place + 1
    while True:
        below = lengths[end - 1] - lengths[begin - 1] if begin else None
        above = lengths[end] - lengths[begin] if end < len(lengths) else None
        room = most_tokens // (end - begin + 1)
        if above is not None and lengths[end] > room:
            above = None
        if below is not None and lengths[end - 1] > room:
            below = None
        if above is None and below is None:
            return begin, end
        if below is None or (above is not None and above <= below):
            end += 1
        else:
            begin -= 1


def _resolve(future: Future[list[Tensor]], result: list[Tensor] | Exception) -> None:
    """Answer, unless whoever asked is gone."""
    with contextlib.suppress(Exception):  # cancelled meanwhile
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)
