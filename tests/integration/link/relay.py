"""What can stand between a site and the coordinator: a line that is cut or slow, and a proxy."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from typing import Self

HOST = "127.0.0.1"


class _Loop:
    """An event loop in a thread, with a listener on some port."""

    def __init__(self) -> None:
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self.port = 0

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout=30)

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._accepted, HOST, 0)
        self.port = int(server.sockets[0].getsockname()[1])
        self._ready.set()
        await self._stop.wait()

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise NotImplementedError


class Relay(_Loop):
    """Forwards connections to a port; without one it hangs up on everybody.

    Attributes:
        cuts: how many connections it has cut.
        carried: bytes, of both directions.
    """

    def __init__(self, target_port: int | None, *, bytes_per_second: float = float("inf"), delay: float = 0.0) -> None:
        super().__init__()
        self._target_port, self._rate, self._delay = target_port, bytes_per_second, delay
        self._cut_after: int | None = None
        self._frozen = False
        self.cuts = self.carried = 0

    def freeze(self) -> None:
        """Let nothing through any more, in connections that are open; new ones are not accepted either."""
        self._frozen = True

    def thaw(self) -> None:
        """Serve new connections again; what was frozen stays dead."""
        self._frozen = False

    def cut_after(self, most: int | None) -> None:
        """Cut every connection once so many bytes have passed, counted from now for those that are open."""
        self._cut_after = most

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._target_port is None or self._frozen:
            writer.close()
            return
        with contextlib.suppress(OSError):
            from_server, to_server = await asyncio.open_connection(HOST, self._target_port, limit=2**14)
            passed = [0]

            def cut() -> None:
                self.cuts += 1
                for one in (writer, to_server):
                    one.transport.abort()

            async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
                free_at = 0.0
                pending: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=64)

                async def deliver() -> None:
                    while True:
                        due, data = await pending.get()
                        await asyncio.sleep(max(0.0, due - time.monotonic()))
                        if not data:
                            target.close()
                            return
                        target.write(data)
                        await target.drain()

                delivering = asyncio.create_task(deliver())
                with contextlib.suppress(OSError):
                    while data := await source.read(4096):
                        if self._frozen:
                            await asyncio.sleep(3600)
                        self.carried += len(data)
                        passed[0] += len(data)
                        if self._cut_after is not None and passed[0] > self._cut_after:
                            cut()
                            break
                        # The line is busy with what came before; then the delay.
                        now = time.monotonic()
                        free_at = max(free_at, now) + len(data) / self._rate
                        await asyncio.sleep(max(0.0, free_at - now))
                        await pending.put((free_at + self._delay, data))
                await pending.put((0.0, b""))
                with contextlib.suppress(OSError):
                    await delivering

            await asyncio.gather(pump(reader, to_server), pump(from_server, writer))


class ConnectProxy(_Loop):
    """An HTTP proxy that does CONNECT and nothing else.

    Attributes:
        heads: of the requests that came.
    """

    def __init__(self) -> None:
        super().__init__()
        self.heads: list[str] = []

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.heads.append(head)
        host, _, port = head.split()[1].rpartition(":")
        from_server, to_server = await asyncio.open_connection(host, int(port))
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await asyncio.gather(_copy(reader, to_server), _copy(from_server, writer))


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(65536):
            target.write(data)
            await target.drain()
    target.close()
