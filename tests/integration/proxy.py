"""Proxies between sites and the coordinator that record what passes, encrypted or decrypted."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from pathlib import Path
from typing import Self

HOST = "127.0.0.1"


class RecordingProxy:
    """Forwards TCP connections to a port of this machine and keeps every byte.

    Args:
        target_port: where to forward to.
        server_files: certificate and key of the server that is forwarded to, and its CA: with them the proxy ends the
            TLS of both sides, so that it records what they say to each other.

    Attributes:
        shows: certificate and key (PEM files) of the client, which the proxy shows the server in its place.
        port: where it listens.
        sent, received: what clients sent and received, one entry a connection.
    """

    def __init__(self, target_port: int, *, server_files: tuple[Path, Path, Path] | None = None) -> None:
        self._target_port, self._server_files = target_port, server_files
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.port = 0
        self.shows: tuple[Path, Path] | None = None
        self.sent: list[bytearray] = []
        self.received: list[bytearray] = []

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(timeout=30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=30)

    async def _listen(self) -> None:
        towards_client = None
        if self._server_files is not None:
            towards_client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            towards_client.load_cert_chain(*self._server_files[:2])
            towards_client.set_alpn_protocols(["h2"])
        server = await asyncio.start_server(self._forward, HOST, 0, ssl=towards_client)
        self.port = int(server.sockets[0].getsockname()[1])

    async def _forward(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        towards_server = None
        if self._server_files is not None:
            towards_server = ssl.create_default_context(cafile=str(self._server_files[2]))
            if self.shows is not None:
                towards_server.load_cert_chain(*self.shows)
            towards_server.set_alpn_protocols(["h2"])
        try:
            from_server, to_server = await asyncio.open_connection(
                HOST,
                self._target_port,
                ssl=towards_server,
                server_hostname=None if towards_server is None else "localhost",
            )
        except OSError:  # the coordinator is not up yet
            to_client.close()
            return
        sent, received = bytearray(), bytearray()
        self.sent.append(sent)
        self.received.append(received)
        await asyncio.gather(_pump(from_client, to_server, sent), _pump(from_server, to_client, received))


async def _pump(source: asyncio.StreamReader, target: asyncio.StreamWriter, record: bytearray) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(65536):
            record += data
            target.write(data)
            await target.drain()
    target.close()
