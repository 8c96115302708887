"""Accounting on behalf of a page: one at a time, in a thread of its own, and what it took is given back.

A composition takes some tens of megabytes for a second. Allocators keep what a thread needed for that thread, and some forty
threads answer a console's browsers: many who ask would fill the memory for good (tests/client/console/test_process.py,
test_a_flood_of_what_if_leaves_the_console_small).
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from shared.privacy.accountant.loss_distribution import forget_steps
from shared.web.turns import Turn

Found = TypeVar("Found")

_HERE = threading.local()
_WORKER = ThreadPoolExecutor(1, thread_name_prefix="accounting")
_TURN = Turn()

# Of glibc's malloc.h. Another C library does as it does.
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
_MOST_ARENAS, _LARGE_BYTES = 2, 256 << 10


def accounted(compute: Callable[[], Found]) -> Found:
    """Return what `compute` returns, or raise what it raises, once those before it are done; it may ask for more of the same.

    Raises:
        Busy: others wait already, or it takes too long until those before it are done.
    """
    if getattr(_HERE, "is_worker", False):
        return compute()
    with _TURN:
        return _WORKER.submit(_run, compute).result()


def _run(compute: Callable[[], Found]) -> Found:
    _HERE.is_worker = True
    try:
        return compute()
    finally:
        forget_steps()
        _give_back()


def bound_memory() -> None:
    """Have threads share what they allocate from, and large pieces returned to the system once they are free.

    To be called before there are threads.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_ARENA_MAX, _MOST_ARENAS)
        library.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def _give_back() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
