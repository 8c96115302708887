"""The site's GPUs as their driver tells them, without PyTorch: by `nvidia-smi`, where that is installed."""

from __future__ import annotations

import csv
import shutil
import subprocess
import threading
import time
from dataclasses import dataclass

_FIELDS = ("name", "memory.used", "memory.total", "utilization.gpu", "temperature.gpu", "driver_version")
_SECONDS, _KEPT_SECONDS, _MOST_BYTES, _MOST_GPUS = 5.0, 5.0, 1 << 16, 64


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU; None is what its driver does not tell.

    Attributes:
        used, total: bytes of its memory.
        busy: share of the last second in which it worked, in 100.
        celsius: its temperature.
    """

    name: str
    used: int | None
    total: int | None
    busy: int | None
    celsius: int | None
    driver: str


class Gpus:
    """Asks for the GPUs of this machine, at most every few seconds; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: tuple[float, list[Gpu]] | None = None

    def all(self) -> list[Gpu]:
        """Return them; none where there is none, no driver, or one that does not answer in time."""
        with self._lock:
            if self._kept is None or time.monotonic() > self._kept[0] + _KEPT_SECONDS:
                self._kept = (time.monotonic(), _asked())
            return self._kept[1]


def _asked() -> list[Gpu]:
    if (program := shutil.which("nvidia-smi")) is None:
        return []
    try:
        done = subprocess.run(  # noqa: S603 (the driver's own program, and nothing of a user in its words)
            [program, f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"],
            capture_output=True,
            timeout=_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    text = done.stdout[:_MOST_BYTES].decode(errors="replace") if done.returncode == 0 else ""
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines())]
    return [_gpu(row) for row in rows if len(row) == len(_FIELDS)][:_MOST_GPUS]


def _gpu(row: list[str]) -> Gpu:
    used, total, busy, celsius = (int(cell) if cell.isdecimal() else None for cell in row[1:5])
    mebibytes = [None if value is None else value << 20 for value in (used, total)]
    return Gpu(name=row[0], used=mebibytes[0], total=mebibytes[1], busy=busy, celsius=celsius, driver=row[5])
