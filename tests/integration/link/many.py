"""Many sites in one process: connections with certificates of their own, driven by one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Sequence
from typing import Any, Self

import grpc
from flwr.app import Message

from client.link.answering import answering
from client.link.client import Credentials
from client.link.letterbox import Letterbox
from shared.link import frames
from shared.link.frames import Hello, Welcome
from shared.link.line import Line, Parcel, new_id
from shared.link.options import client_options


class _AtOnce(Letterbox):
    """Answers with what came, as soon as it is whole."""

    def __init__(self) -> None:
        super().__init__()
        self.welcome: Welcome | None = None
        self._same = answering(lambda message, node, waited: Message(message.content, reply_to=message))

    def arrived(self, parcel: Parcel) -> None:
        super().arrived(parcel)
        assert self.welcome is not None
        self.answer(parcel, self._same(parcel, self.welcome))


class ManySites:
    """They connect when the block is entered, and again, after half a second, when their stream ends.

    Attributes:
        connected: how many are.
    """

    def __init__(self, port: int, credentials: Sequence[Credentials]) -> None:
        self._port, self._credentials = port, credentials
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self.connected = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout=60)

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        sites = [asyncio.create_task(self._site(shown)) for shown in self._credentials]
        await self._stop.wait()
        for site in sites:
            site.cancel()
        await asyncio.gather(*sites, return_exceptions=True)

    async def _site(self, shown: Credentials) -> None:
        letterbox = _AtOnce()
        credentials = grpc.ssl_channel_credentials(shown.ca, shown.key, shown.certificate)
        while True:
            with contextlib.suppress(grpc.RpcError):
                async with grpc.aio.secure_channel(
                    f"localhost:{self._port}", credentials, client_options(None)
                ) as channel:
                    await self._stream(channel, letterbox)
            await asyncio.sleep(0.5)

    async def _stream(self, channel: Any, letterbox: _AtOnce) -> None:
        call = channel.stream_stream(frames.METHOD)()
        await call.write(frames.bytes_of(Hello(new_id(), "many")))
        welcome = frames.frame_of(await call.read())
        assert isinstance(welcome, Welcome)
        letterbox.welcome = welcome
        with letterbox.lock:
            letterbox.begin()
        line = Line(letterbox, wake=lambda: None, noticed=lambda text: None)
        self.connected += 1
        try:
            while True:
                while (frame := line.next_frame()) is not None:
                    await call.write(frame)
                data = await call.read()
                if data is grpc.aio.EOF:
                    return
                with letterbox.lock:
                    line.receive(data)
        finally:
            self.connected -= 1
