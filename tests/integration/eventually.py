"""Waiting for what other processes do, on machines that are busy."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable
from typing import Any


def eventually(condition: Callable[[], Any], *, timeout: float = 150.0) -> Any:
    """Return the first true value of `condition`; the limit is generous, for machines that are busy."""
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {inspect.getsource(condition).strip()}"
        time.sleep(0.1)
    return found


def crowding() -> float:
    """Return how many processes want each processor, at least 1: by this a promise of seconds is kept later on a busy machine."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
