"""The word with systemd, or whatever started the process and set NOTIFY_SOCKET: that it is ready, lives, ends.

The protocol is sd_notify(3): a datagram of lines such as READY=1 to a Unix socket. Without that variable nothing is sent.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping

from shared.errors import printable

_SEND_SECONDS = 1.0
_SIGNS_A_LIMIT = 4


class ServiceManager:
    """See the module; not for two threads at a time.

    Args:
        environment: where NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID stand.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        limit, watched = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", str(os.getpid()))
        # Several signs of life within the limit, so that one that comes late, or is lost, is no death.
        asked = limit.isdecimal() and watched == str(os.getpid())
        self._interval = int(limit) / 1e6 / _SIGNS_A_LIMIT if asked else None
        self._signed, self._told = -1e9, ""

    def ready(self) -> None:
        """Say that the start is over."""
        self._send("READY=1")

    def alive(self) -> None:
        """Give a sign of life, if one is asked for and due; call it where the work is done, and nowhere else."""
        now = time.monotonic()
        if self._interval is not None and now - self._signed >= self._interval:
            self._signed = now
            self._send("WATCHDOG=1")

    def tell(self, text: str) -> None:
        """Say in a line for people how things are, if it changed."""
        if text != self._told:
            self._told = text
            self._send(f"STATUS={printable(text)}")

    def stopping(self) -> None:
        """Say that the process ends, as it was asked to."""
        self._send("STOPPING=1")

    def _send(self, line: str) -> None:
        if not self._address:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(_SEND_SECONDS)
            sender.sendto(line.encode(), self._address)
