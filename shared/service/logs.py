"""The log of a coordinator or a node: lines for people, or one JSON object a line for a program (`log_format`).

Guarantee (tests: tests/shared/service/test_logs.py): a JSON line is one line of ASCII whatever the message holds, so no site and
no job can forge a line.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import logging
import logging.handlers
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

LogFormat = Literal["text", "json"]

FACTS = ("job", "round", "site")
"""What a JSON line names by a key of its own where it is about one: given by `about`, or by `extra` of a single call."""

_FILE_BYTES = 10 * 2**20
_SPARING_SECONDS = 60.0
_MOST_KINDS = 256
_about: contextvars.ContextVar[dict[str, object] | None] = contextvars.ContextVar("about", default=None)


@contextlib.contextmanager
def about(**facts: object) -> Iterator[None]:
    """Name what all lines of this thread are about, while the block lasts; keys are those of `FACTS`."""
    before = _about.get()
    token = _about.set((before or {}) | facts)
    try:
        yield
    finally:
        _about.reset(token)


class _JsonFormatter(logging.Formatter):
    def __init__(self, always: dict[str, str]) -> None:
        super().__init__()
        self._always = always

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{at}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        own = {key: value for key in FACTS if (value := getattr(record, key, None)) is not None}
        line |= self._always | (_about.get() or {}) | own
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def formatter(form: LogFormat, **always: str) -> logging.Formatter:
    """Return what makes lines of records.

    Args:
        form: for whom.
        always: keys and values of every JSON line.
    """
    if form == "json":
        return _JsonFormatter(always)
    return logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")


def log_file(path: Path, form: LogFormat, *, backups: int) -> logging.Handler:
    """Return what writes to a file of at most 10 MB, and keeps so many full ones beside it."""
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=_FILE_BYTES, backupCount=backups, encoding="utf-8")
    handler.setFormatter(formatter(form))
    return handler


class _Sparing(logging.Filter):
    """Lets one line of a kind pass in a minute; the next one says how many were left out.

    A kind is a whole line. So that strangers cannot make many kinds, no more than `_MOST_KINDS` are told in a minute.

    Args:
        now: seconds that rise.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        super().__init__()
        self._now = now
        self._kinds: dict[str, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """See the class."""
        if record.levelno < logging.WARNING:
            return True
        kind, now = record.getMessage(), self._now()
        if kind not in self._kinds and len(self._kinds) >= _MOST_KINDS and not self._forget(now):
            return False
        began, left_out = self._kinds.get(kind, (-math.inf, 0))
        if now - began < _SPARING_SECONDS:
            self._kinds[kind] = (began, left_out + 1)
            return False
        self._kinds[kind] = (now, 0)
        if left_out:
            record.msg, record.args = f"{kind} (and {left_out:,} more like it since the last line)", ()
        return True

    def _forget(self, now: float) -> bool:
        """Forget kinds whose minute is over; return whether there are fewer."""
        before = len(self._kinds)
        self._kinds = {kind: one for kind, one in self._kinds.items() if now - one[0] < _SPARING_SECONDS}
        return len(self._kinds) < before


def sparing(log: logging.Logger, now: Callable[[], float] = time.monotonic) -> None:
    """Let warnings and errors of `log` that strangers can cause fill no disk: one line of a kind in a minute."""
    if not any(isinstance(one, _Sparing) for one in log.filters):
        log.addFilter(_Sparing(now))


def set_up(form: LogFormat, *files: logging.Handler, **always: str) -> None:
    """Let this process log to the terminal, or whatever the service manager keeps, and to `files`.

    Args:
        form: for whom.
        files: made by `log_file`.
        always: keys and values of every JSON line.
    """
    terminal = logging.StreamHandler()
    terminal.setFormatter(formatter(form, **always))
    logging.basicConfig(level=logging.INFO, handlers=[terminal, *files], force=True)
    for noisy in ("flwr", "absl"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
