"""Who asks, and what it is billed: tokens looked up for each request, rates in memory, use booked by one thread for all.

Guarantee (tests: tests/server/serving/test_tokens.py): requests that come while the disk writes are booked together by the next
write, so that one slow disk does not set how many requests there may be.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from server.serving.access.tokens import QuotaExceeded, Token, TokenFile, Use
from shared.errors import SilotuneError, place_of

log = logging.getLogger("silotune.serving")

_AT_ONCE = 256
_LOOK_SECONDS = 0.2
"""For which a look-up waits for a process that holds the file alone: everybody's answers wait with it."""


@dataclass(frozen=True)
class Booked:
    """A request that was booked; `Accounts.settle` takes back what it did not use."""

    token: Token
    model: str
    day: str
    use: Use


class TooFast(Exception):
    """A token asks more often than it may; `seconds` is when to come again."""

    def __init__(self, most: int, seconds: int) -> None:
        super().__init__(f"this token may ask {most:,} times a minute; try again in {seconds} s")
        self.seconds = seconds


class Accounts:
    """The tokens of a file, for one service.

    Args:
        path: of the token file.
        clock: seconds that only grow.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._reading, self._writing = TokenFile(path, busy_seconds=_LOOK_SECONDS), TokenFile(path)
        self._clock = clock
        self._owed: list[tuple[Token, str, str, Use]] = []
        self._buckets: dict[int, tuple[float, float]] = {}
        self._jobs: queue.SimpleQueue[tuple[tuple[Token, str, Use] | Booked, Use, Future[str | QuotaExceeded]] | None]
        self._jobs = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="accounts", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write what is to be written, and close the file."""
        self._jobs.put(None)
        self._thread.join()
        self._reading.close()
        self._writing.close()

    def find(self, secret: str) -> Token | None:
        """See `TokenFile.find`."""
        return self._reading.find(secret)

    def trouble(self) -> str | None:
        """Return why no token can be looked up now; None if one can."""
        try:
            self._reading.find("")
        except SilotuneError as error:
            return str(error)
        return None

    def check_rate(self, token: Token) -> None:
        """Count a request; raise `TooFast` if it is one too many in a minute (a token bucket of a minute's size)."""
        most, now = token.requests_per_minute, self._clock()
        if most is None:
            return
        left, since = self._buckets.get(token.id, (float(most), now))
        left = min(float(most), left + (now - since) * most / 60)
        if left < 1:
            self._buckets[token.id] = (left, now)
            raise TooFast(most, max(1, round((1 - left) * 60 / most)))
        self._buckets[token.id] = (left - 1, now)

    async def charge(self, token: Token, model: str, use: Use) -> Booked:
        """Book what a request may use at most; it is on the disk when this returns.

        Raises:
            QuotaExceeded: if that is more than the token may use; nothing was booked.
        """
        day = await asyncio.wrap_future(self._put((token, model, use), use))
        if isinstance(day, QuotaExceeded):
            raise day
        return Booked(token, model, day, use)

    def settle(self, booked: Booked, used: Use) -> None:
        """Take back what was booked and not used; nobody waits for that, and what cannot be written is tried again."""
        rest = Use(
            booked.use.requests - used.requests,
            booked.use.read_tokens - used.read_tokens,
            booked.use.written_tokens - used.written_tokens,
        )
        if rest != Use():
            self._put(booked, rest)

    def _put(self, job: tuple[Token, str, Use] | Booked, use: Use) -> Future[str | QuotaExceeded]:
        found: Future[str | QuotaExceeded] = Future()
        self._jobs.put((job, use, found))
        return found

    def _work(self) -> None:
        ended = False
        while not ended:
            jobs = [self._jobs.get()]
            while len(jobs) < _AT_ONCE and not self._jobs.empty():
                jobs.append(self._jobs.get())
            ended = None in jobs
            self._write([job for job in jobs if job is not None])

    def _write(self, jobs: list[tuple[tuple[Token, str, Use] | Booked, Use, Future[str | QuotaExceeded]]]) -> None:
        charges = [(job, found) for job, _, found in jobs if not isinstance(job, Booked)]
        self._owed += [(job.token, job.model, job.day, rest) for job, rest, _ in jobs if isinstance(job, Booked)]
        try:
            if self._owed:
                self._writing.refund(self._owed)
                self._owed = []
            days = self._writing.charge([job for job, _ in charges]) if charges else []
        except Exception as error:
            log.error("use could not be booked: %s", error if isinstance(error, SilotuneError) else place_of(error))
            for _, found in charges:
                _resolve(found, error)
            return
        for (_, found), day in zip(charges, days, strict=True):
            _resolve(found, day)


def _resolve(found: Future[str | QuotaExceeded], result: str | QuotaExceeded | Exception) -> None:
    """Answer, unless whoever asked is gone: then what was booked for it stays booked."""
    if not found.set_running_or_notify_cancel():
        return
    if isinstance(result, Exception) and not isinstance(result, QuotaExceeded):
        found.set_exception(result)
    else:
        found.set_result(result)
