"""Records all TCP traffic of the loopback interface; needs the right to open raw sockets."""

from __future__ import annotations

import contextlib
import math
import socket
import struct
import threading
import time
from typing import Self

_ALL_PROTOCOLS, _TCP, _OUTGOING = 0x0003, 6, 4
_SOL_PACKET, _PACKET_STATISTICS, _SO_RCVBUFFORCE = 263, 6, 33
_BUFFER_BYTES = 256 << 20


def may_sniff() -> bool:
    """Return whether this process may record the loopback interface."""
    try:
        with _raw_socket():
            return True
    except (OSError, AttributeError):
        return False


class LoopbackSniffer:
    """Records from `__enter__` to `__exit__`.

    Attributes:
        flows: the bytes of each direction of each connection, by (source, source port, target, target port).
        num_dropped: packets that the kernel could not keep for us.
    """

    def __init__(self) -> None:
        self.flows: dict[tuple[bytes, int, bytes, int], bytearray] = {}
        self.num_dropped = 0

    def __enter__(self) -> Self:
        self._socket = _raw_socket()
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        self._socket.settimeout(0.2)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._record, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        _, self.num_dropped = struct.unpack("II", self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
        self._socket.close()

    def holds(self, text: bytes) -> bool:
        """Return whether `text` was on the wire as it is."""
        return bool(self.ports_with(text))

    def ports_with(self, text: bytes) -> set[tuple[int, int]]:
        """Return the ports (from, to) of all connections in which `text` was sent as it is."""
        return {(source, target) for (_, source, _, target), flow in self.flows.items() if text in flow}

    def ports(self) -> set[int]:
        """Return all ports that anything was sent to."""
        return {flow[3] for flow in self.flows}

    def _record(self) -> None:
        until = math.inf
        while time.monotonic() < until:
            if self._over.is_set() and until == math.inf:
                until = time.monotonic() + 5.0  # for what is still in the buffer, also if others go on talking
            try:
                frame, address = self._socket.recvfrom(1 << 18)
            except TimeoutError:
                if self._over.is_set():
                    return
                continue
            if address[2] == _OUTGOING:  # the loopback interface shows every packet twice
                self._keep(frame[14:])

    def _keep(self, packet: bytes) -> None:
        version = packet[0] >> 4
        if version == 4:
            start, end = (packet[0] & 15) * 4, int.from_bytes(packet[2:4], "big")
            protocol, source, target = packet[9], packet[12:16], packet[16:20]
        elif version == 6:
            start, end = 40, 40 + int.from_bytes(packet[4:6], "big")
            protocol, source, target = packet[6], packet[8:24], packet[24:40]
        else:
            return
        if protocol != _TCP:
            return
        segment = packet[start : end or len(packet)]  # a length of 0 stands for more than 64 KiB
        source_port, target_port = struct.unpack("!HH", segment[:4])
        payload = segment[(segment[12] >> 4) * 4 :]
        if payload:
            self.flows.setdefault((source, source_port, target, target_port), bytearray()).extend(payload)


def _raw_socket() -> socket.socket:
    raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL_PROTOCOLS))
    raw.bind(("lo", 0))
    return raw
