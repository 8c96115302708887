"""The other end of NOTIFY_SOCKET: what a process tells its service manager."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path


class Heard:
    """Stands where systemd does, and reads all the time as that does: a full queue would lose what comes.

    Attributes:
        environment: for the process.
    """

    def __init__(self, folder: Path, *, watchdog_seconds: float) -> None:
        path = folder / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._lines: list[str] = []
        self._sync = threading.Event()
        self._path = str(path)
        self.environment = {"NOTIFY_SOCKET": self._path, "WATCHDOG_USEC": str(int(watchdog_seconds * 1e6))}
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def lines(self) -> list[str]:
        """Return all that was said so far."""
        self._sync.clear()
        self._send(b"sync")
        self._sync.wait(10)
        return list(self._lines)

    def close(self) -> None:
        """Hear no more."""
        self._send(b"over")
        self._thread.join(10)
        self._socket.close()

    def _send(self, word: bytes) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, contextlib.suppress(OSError):
            sender.sendto(word, self._path)

    def _read(self) -> None:
        while (word := self._socket.recv(4096)) != b"over":
            if word == b"sync":
                self._sync.set()
            else:
                self._lines.append(word.decode())
