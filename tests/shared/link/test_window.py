"""How a window grows on lines of different width and delay; a real slow line: tests/integration/link/test_endurance.py."""

from __future__ import annotations

from collections import deque

import pytest

from shared.link.options import CHUNK_BYTES, MOST_WINDOW_BYTES, WINDOW_BYTES
from shared.link.window import Window


class Path:
    """A sender that always has something to send, over a line of a certain width and delay, on a clock of its own."""

    def __init__(self, *, bytes_per_second: float, delay: float) -> None:
        self.rate, self.delay = bytes_per_second, delay
        self.now = self.free_at = 0.0
        self.window = Window(lambda: self.now)
        self.sent = self.acknowledged = 0
        self.flying: deque[tuple[float, int]] = deque()
        self.longest_wait = 0.0

    def run(self, num_bytes: int) -> float:
        """Carry so many bytes and return how many seconds it took."""
        started, target = self.now, self.acknowledged + num_bytes
        while self.acknowledged < target:
            while self.sent - self.acknowledged < self.window.num_bytes:
                self.sent += CHUNK_BYTES
                self.window.sent(self.sent)
                self.longest_wait = max(self.longest_wait, self.free_at - self.now)
                self.free_at = max(self.free_at, self.now) + CHUNK_BYTES / self.rate
                self.flying.append((self.free_at + self.delay, self.sent))
            self.now, self.acknowledged = self.flying.popleft()
            self.window.acknowledged(self.acknowledged)
        return self.now - started


def test_a_wide_line_with_a_long_delay_is_used() -> None:
    """100 Mbit/s and 100 ms: a fixed window of 64 KB carried 5 Mbit/s."""
    path = Path(bytes_per_second=12.5e6, delay=0.1)
    path.run(10 * MOST_WINDOW_BYTES)
    assert path.window.num_bytes > 0.9 * MOST_WINDOW_BYTES
    assert path.run(10 * MOST_WINDOW_BYTES) < 10 * 0.2


@pytest.mark.parametrize(("bytes_per_second", "delay"), [(32e3, 0.3), (32e3, 0.0), (125e3, 0.05)])
def test_a_slow_line_keeps_the_smallest_window(bytes_per_second: float, delay: float) -> None:
    path = Path(bytes_per_second=bytes_per_second, delay=delay)
    seconds = path.run(50 * WINDOW_BYTES)
    assert path.window.num_bytes <= WINDOW_BYTES + CHUNK_BYTES
    assert seconds == pytest.approx(50 * WINDOW_BYTES / bytes_per_second, rel=0.1), "and it is full all the same"


def test_a_line_in_between_is_full_and_its_buffers_are_not() -> None:
    path = Path(bytes_per_second=1.25e6, delay=0.1)  # 10 Mbit/s
    path.run(4 * MOST_WINDOW_BYTES)
    path.longest_wait = 0.0
    assert path.run(10 * MOST_WINDOW_BYTES) == pytest.approx(10 * MOST_WINDOW_BYTES / 1.25e6, rel=0.05)
    assert path.longest_wait < 0.3


def test_a_line_that_becomes_slow_gets_a_small_window_again() -> None:
    path = Path(bytes_per_second=12.5e6, delay=0.1)
    path.run(10 * MOST_WINDOW_BYTES)
    path.rate = 125e3
    path.run(4 * MOST_WINDOW_BYTES)
    assert path.window.num_bytes == WINDOW_BYTES


def test_who_does_not_fill_the_window_has_not_tried_a_larger_one() -> None:
    """Many small messages over a slow line, then a large one: it must not come as a megabyte at once."""
    now = [0.0]
    window = Window(lambda: now[0])
    for _ in range(100):
        window.begin(0)
        window.sent(1000)
        now[0] += 0.3
        window.acknowledged(1000)
    assert window.num_bytes == WINDOW_BYTES


def test_what_is_acknowledged_and_was_not_sent_here_changes_nothing() -> None:
    window = Window(lambda: 0.0)
    window.acknowledged(10**6)
    window.sent(WINDOW_BYTES)
    window.begin(0)
    window.acknowledged(WINDOW_BYTES)
    assert window.num_bytes == WINDOW_BYTES
    window.sent(WINDOW_BYTES)
    window.acknowledged(WINDOW_BYTES - 1)
    assert window.num_bytes == WINDOW_BYTES
    window.acknowledged(WINDOW_BYTES)
    assert window.num_bytes == 2 * WINDOW_BYTES


def test_it_changes_once_a_round_trip() -> None:
    """All chunks that were under way when it changed still tell of the window before."""
    now = [0.0]
    window = Window(lambda: now[0])
    chunks = range(CHUNK_BYTES, WINDOW_BYTES + 1, CHUNK_BYTES)
    for offset in chunks:
        window.sent(offset)
    now[0] = 0.1
    for offset in chunks:
        window.acknowledged(offset)
    assert window.num_bytes == 2 * WINDOW_BYTES
