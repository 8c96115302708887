"""Texts that are continued, token by token: rows of all requests grow together, join between two steps and leave when they end.

Guarantees (tests: tests/server/serving/test_completing.py)
    * With a seed a continuation is the same whoever else is served (as far as rounding of the model's products allows).
    * What was handed out is never taken back: text that may be the begin of a stop sequence, or half a character, waits.
    * A row whose request is gone is computed no further.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch

from server.serving.engine import Engine, Failed
from server.serving.growing import Growing
from server.serving.limits import Limits
from server.serving.models import Model
from shared.errors import SilotuneError, panics_as_errors, place_of
from shared.runtime.inference import Decoding, choose_tokens

log = logging.getLogger("silotune.serving")

_PROMPT_TOKENS = 1024
"""Read in one step at most, beyond one prompt: their logits are kept for a moment, and who grows already waits."""
Finish = Literal["stop", "length"]


@dataclass(eq=False)
class Row:
    """One continuation.

    Attributes:
        prompt: its tokens.
        decoding: of it; its `max_new_tokens` fit behind the prompt.
        stop: where the text ends, before the first of these.
        told: called by the engine's thread with new text and, at the end, why it ended, or with an error.
        gone: set by whoever asked, when nobody wants it any more.
    """

    model: Model
    prompt: Sequence[int]
    decoding: Decoding
    stop: tuple[str, ...]
    told: Callable[[str, Finish | SilotuneError | None], None]
    gone: bool = False
    tokens: list[int] = field(default_factory=list)
    handed_out: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = self.decoding.new_generator()

    @property
    def places(self) -> int:
        """Tokens that it may come to."""
        return len(self.prompt) + self.decoding.max_new_tokens

    def take(self, token: int) -> bool:
        """Take the next token, hand out what is certain of the text; return whether the row goes on."""
        tokenizer: Any = self.model.runtime.tokenizer
        ended = token == tokenizer.eos_token_id
        if not ended:
            self.tokens.append(token)
        # Without tidying spaces up, which would change what was handed out already.
        text = str(tokenizer.decode(self.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        last = ended or len(self.tokens) >= self.decoding.max_new_tokens
        whole = len(text) if last else certain_length(text, ())  # half a character is none that could be a stop
        found = min((place for one in self.stop if (place := text.find(one, 0, whole)) >= 0), default=-1)
        if found >= 0:
            text, ended = text[:found], True
        finish: Finish | None = "stop" if ended else None
        if finish is None and last:
            finish = "length"
        certain = len(text) if finish else certain_length(text, self.stop)
        new = text[self.handed_out : certain]
        self.handed_out = max(self.handed_out, certain)
        if new or finish:
            self.told(new, finish)
        return finish is None


def certain_length(text: str, stop: Sequence[str]) -> int:
    """Return how much of a text that grows stays: not half a character, and nothing that may be the begin of a stop sequence."""
    whole = len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
    for one in stop:
        for length in range(min(len(one) - 1, whole), 0, -1):
            if text.endswith(one[:length], 0, whole):
                whole -= length
                break
    return whole


def rows_of(
    model: Model,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    stop: tuple[str, ...],
    told: Callable[[int, str, Finish | SilotuneError | None], None],
) -> list[Row]:
    """Return the rows of a request: `decoding.num_sequences` for each prompt, each with a seed of its own if there is one."""
    rows: list[Row] = []
    for prompt in prompts:
        for _ in range(decoding.num_sequences):
            number = len(rows)
            seed = None if decoding.seed is None else (decoding.seed + number) % 2**63
            own = replace(decoding, num_sequences=1, seed=seed)
            rows.append(Row(model, prompt, own, stop, partial(told, number)))
    return rows


@dataclass(eq=False)
class _Group:
    """Rows of one model that grow together."""

    growing: Growing
    rows: list[Row] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


class Completing(Engine):
    """Continues texts; as many at a time as the caches may hold."""

    def __init__(self, limits: Limits) -> None:
        self._queue: deque[Row] = deque()
        self._groups: dict[Model, _Group] = {}
        super().__init__(limits)

    def submit(self, rows: Sequence[Row]) -> None:
        """Take on the rows of a request; `QueueFull` if they do not fit into the queue."""
        with self._changed:
            self._take_on(len(rows))
            self._queue.extend(rows)

    def _ready(self) -> bool:
        return bool(self._queue or self._groups)

    def _turn(self) -> None:
        for model in list(self._groups):
            self._step(model)
        with self._changed:
            joining = self._joining()
        for model in {row.model: None for row in joining}:
            self._join(model, [row for row in joining if row.model is model])

    def _joining(self) -> list[Row]:
        """Take rows out of the queue for which there is room; the lock is held."""
        found: list[Row] = []
        there = [row for group in self._groups.values() for row in group.rows]
        while self._queue:
            if self._queue[0].gone:
                self._queue.popleft()
                self.waiting -= 1
                continue
            row, together = self._queue[0], [*there, *found, self._queue[0]]
            full = max(one.places for one in together) * len(together) > self.limits.cache_tokens
            prompts = [len(one.prompt) for one in [*found, row]]
            if (len(together) > 1 and full) or (found and max(prompts) * len(prompts) > _PROMPT_TOKENS):
                break
            found.append(self._queue.popleft())
            self.waiting -= 1
        return found

    def _join(self, model: Model, rows: list[Row]) -> None:
        group = self._groups.setdefault(model, _Group(model.growing()))
        group.rows += rows
        self._advance(model, len(rows), lambda: group.growing.join([row.prompt for row in rows]))

    def _step(self, model: Model) -> None:
        group = self._groups[model]
        if any(row.gone for row in group.rows):
            self._keep(model, [place for place, row in enumerate(group.rows) if not row.gone])
        if model in self._groups:
            self._advance(model, len(group.rows), lambda: group.growing.step(group.tokens))

    def _advance(self, model: Model, count: int, logits_of: Callable[[], torch.Tensor]) -> None:
        """Compute logits of the last `count` rows, choose their next tokens, and let those go that end."""
        group, began = self._groups[model], time.perf_counter()
        try:
            with panics_as_errors():
                logits = logits_of()
                chosen = [
                    int(choose_tokens(one[None], row.decoding, row.generator)[0])
                    for one, row in zip(logits, group.rows[-count:], strict=True)
                ]
        except Exception as error:
            log.error("a step of %s failed: %s", model.version, place_of(error))
            self._end(self._groups.pop(model).rows, Failed("the model could not go on; the log says where"))
            return
        group.tokens[len(group.rows) - count :] = chosen
        going = [row.take(token) for row, token in zip(group.rows[-count:], chosen, strict=True)]
        self._count(0, count, count, time.perf_counter() - began)
        if not all(going):
            first = len(group.rows) - count
            self._keep(model, [*range(first), *(first + place for place, goes in enumerate(going) if goes)])

    def _keep(self, model: Model, places: list[int]) -> None:
        group = self._groups[model]
        self.told.texts += len(group.rows) - len(places)
        if not places:
            del self._groups[model]
            return
        group.growing.keep(places)
        group.rows = [group.rows[place] for place in places]
        group.tokens = [group.tokens[place] for place in places]

    def _fail(self, error: SilotuneError) -> None:
        with self._changed:
            lost = [*self._queue, *(row for group in self._groups.values() for row in group.rows)]
            self._queue.clear()
            self._groups.clear()
            self.waiting = 0
        self._end(lost, error)

    @staticmethod
    def _end(rows: Sequence[Row], error: SilotuneError) -> None:
        for row in rows:
            row.told("", error)
