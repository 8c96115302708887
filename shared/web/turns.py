"""Requests that wait for one another, or for somebody elsewhere: few at a time, and not for long.

A console answers everybody with some forty threads. What waits holds one of them, so without a bound whoever asks often enough
for what takes seconds would shut everybody out.

Guarantee (tests: tests/shared/web/test_turns.py): beside those that compute, no more requests wait than there are places, and
none waits longer than it may; the others are told at once to try again.
"""

from __future__ import annotations

import threading

from shared.web.asked import Denied

MOST_WAITING = 12
"""Of all requests of a console that wait for others."""
MOST_SECONDS = 30.0


class Busy(Denied):
    """Others are being answered; the same request can be answered soon."""

    def __init__(self) -> None:
        super().__init__(503, "busy")


class Places:
    """A number of places; whoever finds none is told so at once.

    Args:
        most: how many there are.
    """

    def __init__(self, most: int) -> None:
        self._free = threading.BoundedSemaphore(most)

    def __enter__(self) -> None:
        """Take one; raises `Busy` if there is none."""
        if not self._free.acquire(blocking=False):
            raise Busy

    def __exit__(self, *_: object) -> None:
        """Give it back."""
        self._free.release()


_PLACES = Places(MOST_WAITING)


class Turn:
    """A lock for what takes seconds, used as any other one.

    Args:
        places: for those that wait; by default the same ones for all turns of a console.
        seconds: that a request waits at most.
    """

    def __init__(self, *, places: Places = _PLACES, seconds: float = MOST_SECONDS) -> None:
        self._lock, self._places, self._seconds = threading.Lock(), places, seconds

    def __enter__(self) -> None:
        """Wait for one's turn; raises `Busy` if too many wait, or it takes too long."""
        if self._lock.acquire(blocking=False):
            return
        with self._places:
            if not self._lock.acquire(timeout=self._seconds):
                raise Busy

    def __exit__(self, *_: object) -> None:
        """Let the next one."""
        self._lock.release()

    @property
    def taken(self) -> bool:
        """Whether it is somebody's at this moment."""
        return self._lock.locked()
