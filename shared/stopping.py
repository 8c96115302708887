"""Ctrl-C and SIGTERM: a command that is stopped says so, says how to go on, and ends with 130 or 143.

Guarantee (test: tests/integration/test_stopping.py, with real processes and signals): a stopped command prints no traceback.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from shared.errors import SilotuneError

STATUS = {signal.SIGINT: 128 + signal.SIGINT, signal.SIGTERM: 128 + signal.SIGTERM}


class Terminated(KeyboardInterrupt):
    """SIGTERM came; it ends what is at hand as Ctrl-C does."""


class Stopped(SilotuneError):
    """The command was stopped from outside; the text says how to go on."""

    def __init__(self, how_to_go_on: str, *, number: signal.Signals = signal.SIGINT) -> None:
        super().__init__(f"stopped; {how_to_go_on}")
        self.exit_code = STATUS[number]


def signal_of(stop: KeyboardInterrupt) -> signal.Signals:
    """Return which signal `stop` stands for."""
    return signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT


@contextlib.contextmanager
def saying(how_to_go_on: Callable[[], str]) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM inside into `Stopped` with the words of `how_to_go_on`, asked at that time."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Stopped(how_to_go_on(), number=signal_of(stop)) from None


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM end what is inside as Ctrl-C does, instead of at once; only a main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


@contextlib.contextmanager
def orderly(stop: Callable[[], None], how_to_go_on: str) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM call `stop`, after which what is inside ends by itself; a second one ends it at once.

    SIGTERM is how a service is stopped, so an orderly end by it is a success (status 0).

    Args:
        stop: safe in a signal handler.

    Raises:
        Stopped: after an orderly end by Ctrl-C.
    """
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if len(asked) > 1:
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
        stop()
        with contextlib.suppress(OSError):  # whoever read it may be gone
            os.write(2, b"stopping after the work at hand; once more stops at once\n")

    before = {number: signal.signal(number, ask) for number in STATUS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked == [signal.SIGINT]:
        raise Stopped(how_to_go_on)
