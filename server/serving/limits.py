"""What a service takes on: sizes of requests, of batches and queues, and how long anything may take."""

from __future__ import annotations

from dataclasses import dataclass, fields

from shared.errors import ConfigError
from shared.http.serving import Connections

_FROM_ZERO = ("batch_wait_ms",)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Every bound of a service, each at least 1 but for `batch_wait_ms`, which may be 0.

    Attributes:
        batch_tokens: padded tokens of one batch; a single longer text still forms one of its own.
        batch_wait_ms: milliseconds for which an idle engine waits for a batch to fill.
        queue: texts that wait for the engine; beyond them requests are refused with 503.
        cache_tokens: places in the caches of all texts that are continued at the same time.
        body_bytes: of a request.
        texts: of a request: texts, pairs or images, or continuations.
        characters: of a text; both of a pair count together.
        connections: open at a time, together; one address may have a quarter of them.
        request_seconds: in which a whole request must come, and in which its answer must be on its way.
        answer_seconds: in which an answer must be complete.
    """

    batch_tokens: int = 200
    batch_wait_ms: float = 2.0
    queue: int = 2048
    cache_tokens: int = 8192
    body_bytes: int = 4 << 20
    texts: int = 256
    characters: int = 100_000
    connections: int = 1024
    request_seconds: float = 20.0
    answer_seconds: float = 120.0

    def __post_init__(self) -> None:
        for one in fields(self):
            value, least = getattr(self, one.name), 0 if one.name in _FROM_ZERO else 1
            if not least <= value < 1 << 40:
                raise ConfigError(f"--{one.name.replace('_', '-')} is {value}; give a number from {least} up.")
        if self.texts > self.queue:
            raise ConfigError(
                f"--texts is {self.texts}, more than --queue ({self.queue}): such a request could never be taken on. Raise "
                "--queue or lower --texts."
            )

    @property
    def of_connections(self) -> Connections:
        """What the server keeps to."""
        return Connections(
            of_an_address=max(16, self.connections // 4),
            together=self.connections,
            request_seconds=self.request_seconds,
        )
