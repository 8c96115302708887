"""How many bytes of a message may be in flight: few on a slow line, as many as it carries on a wide one with a long delay.

The delay of a chunk, until it is acknowledged, has a part that the line always takes, and one that it waits behind others. Once
a round trip the window becomes so large that chunks would wait for `WAIT_SECONDS`: then the line is never idle, and its buffers
are never so full that pings come too late. After FAST TCP (Wei, Jin, Low, Hegde, 2006, equation 7, gamma 1, alpha as a time).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from shared.link.options import CHUNK_BYTES, MOST_WINDOW_BYTES, WINDOW_BYTES

WAIT_SECONDS = 0.1
"""So long may a chunk wait behind others (LEDBAT, RFC 6817, has the same as the most that others on the line bear)."""


class Window:
    """See the module.

    Attributes:
        num_bytes: that may be sent and not acknowledged, `WINDOW_BYTES` to `MOST_WINDOW_BYTES`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._sent: deque[tuple[int, float, bool]] = deque()  # up to which byte, when, whether the window was full then
        self._least_delay = float("inf")
        self._acknowledged = self._next_change = 0
        self.num_bytes = WINDOW_BYTES

    def begin(self, offset: int) -> None:
        """Forget what is in flight: another message is sent from this byte on."""
        self._sent.clear()
        self._acknowledged = self._next_change = offset

    def sent(self, offset: int) -> None:
        """Take note that the message was sent up to this byte."""
        full = offset - self._acknowledged >= self.num_bytes
        self._sent.append((offset, self._clock(), full))

    def acknowledged(self, offset: int) -> None:
        """Take note that it arrived up to this byte; one acknowledgement may stand for several chunks."""
        latest = None
        while self._sent and self._sent[0][0] <= offset:
            latest = self._sent.popleft()
        if latest is None:
            return
        self._acknowledged, sent_at, full = offset, latest[1], latest[2]
        delay = self._clock() - sent_at
        self._least_delay = min(self._least_delay, delay)
        factor = min((self._least_delay + WAIT_SECONDS) / max(delay, 1e-6), 2.0)
        # Who did not fill it has not tried whether the line bears more.
        if offset >= self._next_change and (full or factor < 1):
            self.num_bytes = min(max(int(self.num_bytes * factor), WINDOW_BYTES), MOST_WINDOW_BYTES)
            # Next by a chunk that was sent after this change, and so met it.
            self._next_change = max(offset, self._sent[-1][0] if self._sent else 0) + CHUNK_BYTES
