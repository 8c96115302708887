"""`/v1/completions` as OpenAI's client speaks it: whole answers, and streams of server-sent events."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response

from server.serving.access.tokens import Use
from server.serving.application import Asked, Service, before_gone, book, check_model, refused_of, settle
from server.serving.asking import decoding_of
from server.serving.completing import Completing, Finish, Row, rows_of
from server.serving.engine import Failed, QueueFull
from server.serving.schemas import CompletionRequest, read
from shared.errors import SilotuneError

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
]
Piece = tuple[int, str, Finish | SilotuneError | None]
"""Number of the row, its new text, and at the end why it ended."""


@dataclass
class _Answer:
    """A request that is being answered.

    Attributes:
        prompt_tokens: of all prompts.
        about: what every body of it begins with.
    """

    wanted: CompletionRequest
    rows: Sequence[Row]
    pieces: asyncio.Queue[Piece]
    prompt_tokens: int
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def used(self) -> Use:
        """What is billed."""
        return Use(1, self.prompt_tokens, sum(len(row.tokens) for row in self.rows))

    @property
    def usage(self) -> dict[str, int]:
        """The same, by OpenAI's names."""
        used = self.used
        return {
            "prompt_tokens": used.read_tokens,
            "completion_tokens": used.written_tokens,
            "total_tokens": used.tokens,
        }

    def body(self, choices: list[dict[str, Any]], usage: dict[str, int] | None) -> str:
        """Return a body, or a piece of a stream."""
        return json.dumps({**self.about, "choices": choices, "usage": usage})


async def completions(service: Service, asked: Asked) -> Response | None:
    """Answer `/v1/completions`."""
    model, wanted = service.model(), read(CompletionRequest, asked.body)
    check_model(service, model, wanted.model)
    prompts = await service.desk.prompts(model, wanted)
    tokens = sum(map(len, prompts))
    await book(service, asked, Use(1, tokens, wanted.max_tokens * wanted.n * len(prompts)))
    pieces: asyncio.Queue[Piece] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def told(number: int, text: str, end: Finish | SilotuneError | None) -> None:
        loop.call_soon_threadsafe(pieces.put_nowait, (number, text, end))

    rows = rows_of(model, prompts, decoding_of(wanted), _stops(wanted), told)
    answer = _Answer(wanted, rows, pieces, tokens)
    answer.about = {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": service.following.name,
        "version": model.version,
        "system_fingerprint": model.version,
    }
    assert isinstance(service.engine, Completing)  # noqa: S101 (its model continues texts)
    try:
        service.engine.submit(rows)
        if wanted.stream:
            await _stream(service, asked, answer)
            return None
        content = await before_gone(asked, _whole(answer), service.limits.answer_seconds)
    except (QueueFull, Failed) as error:
        raise refused_of(error) from None
    finally:
        for row in rows:
            row.gone = True
    settle(service, asked, answer.used)
    return Response(content, media_type="application/json")


async def _whole(answer: _Answer) -> str:
    texts, ends = ["" for _ in answer.rows], [None for _ in answer.rows]  # type: list[str], list[Finish | None]
    for _ in answer.rows:
        while True:
            number, text, end = await answer.pieces.get()
            if isinstance(end, SilotuneError):
                raise end
            texts[number] += text
            if end is not None:
                ends[number] = end
                break
    choices = [_choice(number, text, end) for number, (text, end) in enumerate(zip(texts, ends, strict=True))]
    return answer.body(choices, answer.usage)


async def _stream(service: Service, asked: Asked, answer: _Answer) -> None:
    """Send events as they come. Whoever reads slowly holds up nobody but itself, and not beyond `answer_seconds`.

    An error after the begin is an event of its own, as the client expects it.
    """
    options = answer.wanted.stream_options
    with_usage = options is not None and options.include_usage
    try:
        async with asyncio.timeout(service.limits.answer_seconds):
            first = await before_gone(asked, answer.pieces.get(), service.limits.answer_seconds)
            if isinstance(first[2], SilotuneError):
                raise first[2]
            await asked.send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
            await _events(service, asked, answer, first)
            if with_usage:
                await _send(asked, answer.body([], answer.usage))
            await _send(asked, "[DONE]", last=True)
    except TimeoutError:
        raise ClientDisconnect from None
    finally:
        # What was handed out is billed, also where the client left before the end.
        settle(service, asked, answer.used if any(row.tokens for row in answer.rows) else Use())


async def _events(service: Service, asked: Asked, answer: _Answer, piece: Piece) -> None:
    left = len(answer.rows)
    while True:
        number, text, end = piece
        if isinstance(end, SilotuneError):
            await _send(asked, refused_of(end).body.decode(), last=True)
            raise ClientDisconnect
        await _send(asked, answer.body([_choice(number, text, end)], None))
        left -= end is not None
        if not left:
            return
        piece = await before_gone(asked, answer.pieces.get(), service.limits.answer_seconds)


async def _send(asked: Asked, data: str, *, last: bool = False) -> None:
    await asked.send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": not last})


def _choice(number: int, text: str, end: Finish | None) -> dict[str, Any]:
    return {"index": number, "text": text, "finish_reason": end, "logprobs": None}


def _stops(wanted: CompletionRequest) -> tuple[str, ...]:
    if wanted.stop is None:
        return ()
    return (wanted.stop,) if isinstance(wanted.stop, str) else tuple(wanted.stop)
