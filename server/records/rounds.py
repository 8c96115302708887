"""`metrics.jsonl`: one line a round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from server.records.metrics import Metrics
from shared.files.atomic import write_text
from shared.files.json_files import Count, Positive, canonical_json, damaged, parse_record, read_text


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """One line of `metrics.jsonl`.

    Attributes:
        round: 0 is before training.
        metrics: on public evaluation data; empty for rounds that were not evaluated.
        deciding: on the public records that decide and are not reported; empty if there are none, or nothing is decided.
        epsilon_max: largest epsilon spent by a site so far; None if nothing private was released.
        sites: sites whose update was aggregated.
        failed: other sites that were asked, with the reason.
        doubted: what is suspicious about an update that was aggregated: it is shorter than its noise alone would be.
        norms: L2 norms of the adapter after the round, "adapter" and "head".
        bytes_up, bytes_down: adapter bytes from and to all sites; None where it would tell who was drawn in secret.
        seconds: wall clock of the round, None likewise; `seconds_evaluation` of it went into evaluation.
    """

    round: Count
    metrics: Metrics = field(default_factory=dict)
    deciding: Metrics = field(default_factory=dict)
    epsilon_max: Positive | None = None
    sites: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    doubted: dict[str, str] = field(default_factory=dict)
    norms: dict[str, Positive] = field(default_factory=dict)
    bytes_up: Count | None = 0
    bytes_down: Count | None = 0
    seconds: Positive | None = 0.0
    seconds_evaluation: Positive = 0.0


_LATER_KEYS = ("doubted", "norms")


def write_rounds(path: Path, rounds: Sequence[RoundRecord]) -> None:
    """Replace `path` by one line for each round."""
    write_text(path, "\n".join(canonical_json(_fields(record)) for record in rounds) + "\n")


def _fields(record: RoundRecord) -> dict[str, Any]:
    """Return what is written of a round: keys that older versions did not have only where there is something to say."""
    return {key: value for key, value in asdict(record).items() if value or key not in _LATER_KEYS}


def read_rounds(path: Path, *, complete: bool) -> tuple[RoundRecord, ...]:
    """Read the rounds in order; while a run is going on, a last line without its end is not there yet.

    Raises:
        RunError: if a line is no round, or they do not rise; of a `complete` run also if there is none.
    """
    if not complete and not path.exists():
        return ()
    text = read_text(path)
    lines = text.split("\n") if complete else text.split("\n")[:-1]
    records = [
        parse_record(line, RoundRecord, path, where=f"line {number}: ")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    for earlier, later in pairwise(records):
        if later.round <= earlier.round:
            raise damaged(path, f"round {later.round} follows round {earlier.round}, expected rising rounds")
    if complete and not records:
        raise damaged(path, "it has no round, expected one line for each")
    return tuple(records)
