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
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

LogFormat = Literal["text", "json"]

FACTS = ("job", "round", "site")
"""What a JSON line names by a key of its own where it is about one: given by `about`, or by `extra` of a single call."""

_FILE_BYTES = 10 * 2**20
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
