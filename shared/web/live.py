"""Pages that follow what happens: a stream of server-sent events says that something changed, never what.

The page then asks for its parts as it always does, through the same gate, so a stream carries nothing that could leak, and a
browser without scripts loads the page again.

Formal guarantees (tests: tests/server/console/test_live.py)
    * A stream ends within seconds when its session ends, or its account may see the page no more
      (test_a_stream_ends_with_its_session, test_a_role_counts_for_streams_too).
    * One session holds a few streams, one account twice as many, all together a bounded number (test_streams_are_bounded,
      test_an_account_gets_no_more_by_more_sessions).
    * Neither a stream nor what a page loads because of it keeps a session alive (test_a_stream_keeps_no_session_alive).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable

from fastapi.responses import Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from shared.errors import SilotuneError
from shared.web.asked import Asked, Denied, asked_by
from shared.web.roles import Action, allowed

LOOK_SECONDS = 1.0
JUDGE_SECONDS = 2.0
BEAT_SECONDS = 15.0
"""Proxies end a connection on which nothing comes, most after a minute."""
LONGEST_SECONDS = 900.0
"""Then the browser connects anew, by itself."""
MOST_OF_A_SESSION, MOST_OF_AN_ACCOUNT, MOST = 4, 8, 64
"""A browser has six connections to a host for everything."""


class Streams:
    """The open streams of a console."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[tuple[str, str]] = []  # session and account of each

    def answer(self, asked: Asked, action: Action, mark: Callable[[], str], *, since: str) -> Response:
        """Return a stream with an event whenever a mark is another one.

        Args:
            action: that the page asks for; judged again and again.
            mark: stands for what the page shows; quick to make.
            since: the mark of the page as it was sent.

        Raises:
            Denied: the session, the account, or all together, hold as many streams as they may.
        """
        holder = (asked.token, asked.me().id)
        with self._lock:
            of_session, of_account = (sum(one[kind] == holder[kind] for one in self._open) for kind in (0, 1))
            if of_session >= MOST_OF_A_SESSION or of_account >= MOST_OF_AN_ACCOUNT or len(self._open) >= MOST:
                raise Denied(429, "wait")
            self._open.append(holder)
        return _Stream(_events(asked, action, mark, since), ended=lambda: self._release(holder))

    @property
    def num_open(self) -> int:
        """How many are open."""
        with self._lock:
            return len(self._open)

    def _release(self, holder: tuple[str, str]) -> None:
        with self._lock:
            self._open.remove(holder)


class _Stream(StreamingResponse):
    """Tells when it is over, also if it never began."""

    def __init__(self, events: AsyncIterator[str], *, ended: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()


async def _events(asked: Asked, action: Action, mark: Callable[[], str], since: str) -> AsyncIterator[str]:
    begun = judged = told = time.monotonic()
    yield "retry: 3000\n\n"
    while (now := time.monotonic()) < begun + LONGEST_SECONDS:
        if now >= judged + JUDGE_SECONDS:
            if not await run_in_threadpool(_goes_on, asked, action):
                return
            judged = now
        found = await run_in_threadpool(_marked, mark)
        if found != since:
            since, told = found, now
            yield f"event: changed\nid: {found}\ndata: {found}\n\n"
        elif now >= told + BEAT_SECONDS:
            told = now
            yield ": still here\n\n"
        await asyncio.sleep(LOOK_SECONDS)


def _goes_on(asked: Asked, action: Action) -> bool:
    """Return whether whoever opened a stream is signed in and may see its page, now."""
    again = asked_by(asked.request)
    return again.account is not None and again.account.id == asked.me().id and allowed(again.account.role, action)


def _marked(mark: Callable[[], str]) -> str:
    try:
        return mark()
    except SilotuneError:
        return "trouble"  # its page says which
