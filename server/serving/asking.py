"""From the body of a request to examples and prompts, and from outputs to answers, by the task's own functions.

One thread at a time does that, for tokenizers are not made for two. A small request is read where it came, which takes less time
than handing it over; of a large one a thread reads parts of milliseconds, so that it holds up nobody.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from torch import Tensor

from server.serving.limits import Limits
from server.serving.models import Model
from server.serving.refusals import Refused
from server.serving.schemas import CompletionRequest, ExplainRequest, PredictRequest
from shared.errors import DataError, SilotuneError, panics_as_errors
from shared.models.batches import Example
from shared.runtime.inference import Decoding
from shared.tasks.base import Prediction, Record
from shared.tasks.causal_lm import CausalLanguageModelling
from shared.tasks.predicting import Predicting

_PART_TEXTS, _PART_CHARACTERS = 64, 32_768
_SMALL_TEXTS, _SMALL_CHARACTERS = 32, 4096
_INPUTS = {"pair_matching": "pairs", "image_classification": "images"}
T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """A request to predict, ready for the engine.

    Attributes:
        tokens: that it is billed; an image counts as one.
    """

    task: Predicting
    records: list[Record]
    examples: list[Example]
    tokens: int


class Desk:
    """Reads and writes texts."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._tokenizer = limits, threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="texts")

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    async def question(self, model: Model, asked: PredictRequest) -> Question:
        """Return what a request asks.

        Raises:
            Refused: 400, if it does not fit the model's task or the limits.
        """
        task = model.task
        if not isinstance(task, Predicting):
            raise Refused(400, "wrong_task", "this model continues texts; ask /v1/completions.")
        kind = _INPUTS.get(task.kind, "texts")
        texts = _texts(asked, kind)
        if number := next((i for i, text in enumerate(texts, start=1) if not text.strip()), None):
            raise Refused(400, "invalid_input", f"text {number} is blank; give what is to be read.", param=kind)
        self._check_sizes(texts, kind)
        records: list[Record] = []
        examples: list[Example] = []
        for begin, end in _parts(texts):
            new = await self._do(partial(_read, model, task, texts[begin:end], begin), kind, is_small(texts))
            records += new[0]
            examples += new[1]
        tokens = len(examples) if kind == "images" else sum(example.length for example in examples)
        return Question(task, records, examples, tokens)

    async def answers(self, question: Question, outputs: Sequence[Tensor]) -> list[Prediction]:
        """Return what the model says of each text, without the text, which whoever asked has."""
        found: list[Prediction] = []
        for begin in range(0, len(outputs), _PART_TEXTS):
            part = partial(_answers, question, outputs, begin, begin + _PART_TEXTS)
            found += await self._do(part, "texts", len(outputs) <= _SMALL_TEXTS)
        return found

    async def prompts(self, model: Model, asked: CompletionRequest) -> list[list[int]]:
        """Return the tokens of every prompt.

        Raises:
            Refused: 400, if it does not fit the model or the limits.
        """
        task = model.task
        if not isinstance(task, CausalLanguageModelling):
            raise Refused(400, "wrong_task", "this model labels texts; ask /v1/predict.")
        texts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
        self._check_sizes(texts, "prompt", times=asked.n)
        tokenizer = model.runtime.tokenizer
        read = partial(task.start, tokenizer=tokenizer, max_length=model.max_length)
        found = [await self._do(partial(read, text), "prompt", is_small(texts)) for text in texts]
        longest = max(map(len, found))
        if longest + asked.max_tokens > model.max_length:
            raise Refused(
                400,
                "context_length_exceeded",
                f"the prompt has {longest:,} tokens and max_tokens is {asked.max_tokens:,}; together they must be at most "
                f"{model.max_length:,}. Shorten the prompt, or lower max_tokens.",
                param="prompt",
            )
        return found

    async def _do(self, work: Callable[[], T], param: str, small: bool) -> T:
        try:
            if small and self._tokenizer.acquire(blocking=False):
                try:
                    with panics_as_errors():
                        return work()
                finally:
                    self._tokenizer.release()
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._locked, work)
        except SilotuneError as error:  # names the text by its number and never quotes it
            raise Refused(400, "invalid_input", str(error), param=param) from None

    def _locked(self, work: Callable[[], T]) -> T:
        with self._tokenizer, panics_as_errors():
            return work()

    def _check_sizes(self, texts: Sequence[str], param: str, times: int = 1) -> None:
        limits = self._limits
        if len(texts) * times > limits.texts:
            raise Refused(
                400,
                "too_many_texts",
                f"the request asks for {len(texts) * times:,} answers; at most {limits.texts:,} go into one. Send several.",
                param=param,
            )
        # Of images the numbers count, as they were written; the body's limit bounds them.
        longest = 0 if param == "images" else max(map(len, texts))
        if longest > limits.characters:
            raise _too_long(longest, limits, param)


def _too_long(characters: int, limits: Limits, param: str) -> Refused:
    return Refused(
        400,
        "text_too_long",
        f"a text has {characters:,} characters; at most {limits.characters:,} are read. Cut it.",
        param=param,
    )


def single_text(model: Model, asked: ExplainRequest, limits: Limits) -> str:
    """Return the text of a request to explain, as `Predicting.question` takes it.

    Raises:
        Refused: 400, if it does not fit the model's task or the limits.
    """
    texts = None if asked.text is None else [asked.text]
    pairs = None if asked.pair is None else [asked.pair]
    kind = _INPUTS.get(model.kind, "texts")
    (text,) = _texts(PredictRequest(texts=texts, pairs=pairs), kind)
    if len(text) > limits.characters:
        raise _too_long(len(text), limits, "text")
    return text


def is_small(texts: Sequence[str]) -> bool:
    """Return whether texts are read in less than about a millisecond."""
    return len(texts) <= _SMALL_TEXTS and sum(map(len, texts)) <= _SMALL_CHARACTERS


def _texts(asked: PredictRequest, kind: str) -> list[str]:
    """Return the inputs as `Predicting.question` takes them."""
    given = {name: value for name in ("texts", "pairs", "images") if (value := getattr(asked, name)) is not None}
    if given.keys() != {kind}:
        found = " and ".join(given) or "none of them"
        raise Refused(400, "wrong_input", f"this model takes {kind}, and the request has {found}.", param=kind)
    if asked.pairs is not None:
        if number := next((i for i, (first, _) in enumerate(asked.pairs, start=1) if "\t" in first), None):
            raise Refused(
                400, "invalid_input", f"the first text of pair {number} holds a tab, which parts two texts.", param=kind
            )
        return ["\t".join(pair) for pair in asked.pairs]
    if asked.images is not None:
        return [" ".join(map(repr, image)) for image in asked.images]
    return asked.texts or []


def _read(model: Model, task: Predicting, texts: Sequence[str], begin: int) -> tuple[list[Record], list[Example]]:
    tokenizer, length = model.runtime.tokenizer, model.max_length
    records = [task.question(text, f"text {begin + i}", tokenizer, length) for i, text in enumerate(texts, start=1)]
    try:
        return records, model.runtime.encode(records)
    except DataError:
        if len(records) == 1:
            raise
    # The error counts within a part: find the one that it is about.
    for i, record in enumerate(records, start=begin + 1):
        try:
            model.runtime.encode([record])
        except DataError as error:
            raise DataError(f"text {i}: {error}") from None
    raise DataError("the texts do not fit the model's task")


def _parts(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield begin and end of parts of a few texts, and not many characters unless one text alone has them."""
    begin, characters = 0, 0
    for place, text in enumerate(texts):
        if place > begin and (place - begin >= _PART_TEXTS or characters + len(text) > _PART_CHARACTERS):
            yield begin, place
            begin, characters = place, 0
        characters += len(text)
    yield begin, len(texts)


def _answers(question: Question, outputs: Sequence[Tensor], begin: int, end: int) -> list[Prediction]:
    rows = zip(question.records[begin:end], question.examples[begin:end], outputs[begin:end], strict=True)
    return [_without_inputs(question.task.answer(*row)) for row in rows]


def _without_inputs(prediction: Prediction) -> Prediction:
    return {key: value for key, value in prediction.items() if key not in ("text", "pair", "pixels")}


def decoding_of(asked: CompletionRequest) -> Decoding:
    """Return how a request wants its tokens chosen."""
    return Decoding(
        max_new_tokens=asked.max_tokens,
        temperature=asked.temperature,
        top_k=0,
        top_p=asked.top_p,
        num_sequences=asked.n,
        seed=asked.seed,
    )
