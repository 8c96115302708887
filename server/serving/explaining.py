"""Why a model answers as it does: `/v1/explain`, integrated gradients of one text in a thread of its own.

An explanation takes up to `MOST_PASSES` passes of the model, hundreds of times a prediction. So few wait, and one is computed at
a time, which ends within `Limits.answer_seconds`, or as soon as whoever asked is gone.

Guarantees (tests: tests/server/serving/test_explaining.py)
    * Beyond `_WAITING` requests are refused at once, with a time to come again (test_few_wait).
    * What nobody waits for any more is computed no further (test_whoever_is_gone_is_computed_no_further).
    * No text enters a log (test_texts_stay.py: test_no_text_is_in_any_log).
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from starlette.requests import ClientDisconnect
from starlette.responses import Response

from server.serving.access.tokens import Use
from server.serving.application import Asked, Service, before_gone, book, check_model, settle
from server.serving.asking import single_text
from server.serving.models import Model
from server.serving.refusals import Refused, busy
from server.serving.schemas import ExplainRequest, read
from shared.errors import ConfigError, DataError, ModelError, panics_as_errors, place_of
from shared.job.parsing import nearest
from shared.runtime.attributions import Explanation
from shared.runtime.attributions import explain as attribute
from shared.tasks.predicting import Predicting

log = logging.getLogger("silotune.serving")

_WAITING = 4
_STEPS, _MOST_STEPS = 32, 256
MOST_PASSES = 2 * _MOST_STEPS
"""Steps of all attempts together: 32, 64, 128 and 256."""
_MOST_READINGS = MOST_PASSES + 16
"""And the text and its baseline, by themselves and at the ends of attempts."""
_MOST_BYTES_OF_A_CHARACTER, _CONTROL_TOKENS = 4, 8
"""A tokenizer makes no more tokens than a text has bytes in UTF-8, and its own."""


class _Left(Exception):
    """Nobody waits for the answer."""


class Explaining:
    """The thread that explains."""

    def __init__(self) -> None:
        self.waiting = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="explaining")

    def close(self) -> None:
        """End the thread; what waits is dropped."""
        self._thread.shutdown(cancel_futures=True)

    async def explain(self, model: Model, asked: ExplainRequest, text: str) -> tuple[Explanation, int, int]:
        """Return the explanation of a text, its tokens, and how often they were read; a task that is cancelled stops it.

        Raises:
            Refused: if too many wait, or the request does not fit.
        """
        if self.waiting >= _WAITING:
            raise busy("queue_full", f"{_WAITING} explanations wait already; try again.", 5)
        left = threading.Event()
        self.waiting += 1
        future = asyncio.get_running_loop().run_in_executor(self._thread, partial(_explained, model, asked, text, left))
        future.add_done_callback(self._done)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            left.set()
            raise

    def _done(self, future: asyncio.Future[tuple[Explanation, int, int]]) -> None:
        self.waiting -= 1
        if not future.cancelled():
            future.exception()  # whoever asked has it, or is gone


def _explained(model: Model, asked: ExplainRequest, text: str, left: threading.Event) -> tuple[Explanation, int, int]:
    runtime = model.explaining
    assert runtime is not None  # noqa: S101 (the plan wants it)
    readings = 0

    def go_on(num_texts: int) -> None:
        nonlocal readings
        readings += num_texts
        if left.is_set():
            raise _Left

    try:
        go_on(0)
        task = runtime.task
        assert isinstance(task, Predicting)  # noqa: S101 (see `server.serving.models`)
        with panics_as_errors():
            record = task.question(text, "the text", runtime.tokenizer, runtime.max_length)
            tokens = sum(example.length for example in runtime.encode([record]))
            found = attribute(
                runtime,
                text,
                label=asked.label,
                word=asked.word,
                baseline=asked.baseline,
                steps=_STEPS,
                most_steps=_MOST_STEPS,
                before_each=go_on,
            )
    except (ConfigError, DataError) as error:
        raise Refused(400, "invalid_input", str(error).replace("--", "")) from None
    except ModelError as error:
        raise Refused(400, "not_faithful", str(error).replace("--", "")) from None
    return found, tokens, readings


def _check(model: Model, asked: ExplainRequest) -> None:
    task = model.task
    assert isinstance(task, Predicting)  # noqa: S101 (see `server.serving.models`)
    labels = list(getattr(task.config, "labels", ()))
    if asked.label is not None and asked.label not in labels:
        told = nearest(asked.label, labels) if labels else "this model has no labels."
        raise Refused(400, "invalid_input", f"there is no such label; {told}", param="label")
    if asked.word is not None and not task.by_word:
        raise Refused(400, "invalid_input", "this model does not answer word by word; leave word out.", param="word")


async def explain(service: Service, asked: Asked) -> Response:
    """Answer `/v1/explain`."""
    model, wanted = service.model(), read(ExplainRequest, asked.body)
    if service.explaining is None or model.explaining is None:
        raise Refused(404, "explains_nothing", "this service does not explain; it was started without --explain.")
    check_model(service, model, wanted.model)
    text = single_text(model, wanted, service.limits)
    _check(model, wanted)
    most_tokens = min(model.max_length, _MOST_BYTES_OF_A_CHARACTER * len(text) + _CONTROL_TOKENS)
    await book(service, asked, Use(requests=1, read_tokens=_MOST_READINGS * most_tokens))
    work = service.explaining.explain(model, wanted, text)
    try:
        found, tokens, readings = await before_gone(asked, work, service.limits.answer_seconds)
    except (Refused, ClientDisconnect):
        raise
    except Exception as error:
        log.error("an explanation of %s failed: %s", model.version, place_of(error))
        raise Refused(500, "failed", "the model could not compute this; the log says where.") from None
    settle(service, asked, Use(requests=1, read_tokens=tokens * readings))
    usage = {"tokens": tokens * readings, "text_tokens": tokens, "readings": readings}
    return Response(json.dumps(_told(service, model, found, usage), allow_nan=False), media_type="application/json")


def _told(service: Service, model: Model, found: Explanation, usage: dict[str, int]) -> dict[str, object]:
    """Return the answer; it does not repeat the text, whose words are told by their places."""
    return {
        "model": service.following.name,
        "version": model.version,
        "prediction": found.says,
        "target": found.target,
        "output": found.output,
        "baseline_output": found.baseline_output,
        "baseline": found.baseline,
        "steps": found.steps,
        "gap": found.gap,
        "words": [
            {"text": one.text, "begin": one.begin, "end": one.end, "attribution": one.attribution}
            for one in found.words
        ],
        "unread": list(found.unread),
        "usage": usage,
    }
