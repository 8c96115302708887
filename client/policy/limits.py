"""How large a job may be: `[limits]` in policy.toml, judged before anything is loaded or built for it.

Guarantee (tests: tests/client/policy/test_limits.py): an answer follows from the job, the size of the adapter that was sent and
the policy's own limits, so its text may be sent to the coordinator; nothing is allocated on the way.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from shared.errors import PolicyError
from shared.job.job import Job
from shared.job.parsing import Section

_MEGABYTE = 1_000_000


class Limits(Section):
    """`[limits]` of policy.toml: how large a job may be, whoever signed it, so that none exhausts this machine."""

    max_labels: int = Field(default=1000, ge=1)
    """Most labels (`task.labels`): the head and the memory of every example grow with them."""
    max_rank: int = Field(default=64, ge=1)
    """Largest rank of the adapters (`lora.rank`)."""
    max_length: int = Field(default=1024, ge=2)
    """Most tokens of one text (`model.max_length`): time and memory of an example grow faster than it."""
    max_adapter_megabytes: float = Field(default=256.0, gt=0)
    """Largest adapter of a round that is read, in megabytes of a million bytes."""


def broken_limits(limits: Limits, job: Job) -> Iterator[str]:
    """Yield a sentence for every limit that a job breaks, in a fixed order."""
    asked = (
        ("task.labels", len(job.task.labels), limits.max_labels, "labels"),
        ("lora.rank", job.lora.rank, limits.max_rank, "as rank"),
        ("model.max_length", job.model.max_length, limits.max_length, "tokens"),
    )
    for key, value, most, unit in asked:
        if value > most:
            yield f"its {key} asks for {value:,}; this site accepts at most {most:,} {unit}."


def check_adapter_size(limits: Limits, num_bytes: int) -> None:
    """Refuse an adapter of more bytes than the policy has room for.

    Raises:
        PolicyError: with both sizes.
    """
    if num_bytes > limits.max_adapter_megabytes * _MEGABYTE:
        raise PolicyError(
            f"the adapter of this round has {num_bytes / _MEGABYTE:,.1f} MB; this site accepts at most "
            f"{limits.max_adapter_megabytes:g} MB."
        )
