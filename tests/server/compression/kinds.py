"""Runs of every kind of task with tiny models, and public texts that are as many as a student needs."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared.job.job import Job
from shared.runtime.export.folder import ModelFolder
from tests.conftest import LINES
from tests.shared.runtime.export.runs import finished_run

KINDS: dict[str, dict[str, Any]] = {
    "classification": {"kind": "sequence_classification", "labels": ["bad", "good"]},
    "entities": {"kind": "token_classification", "labels": ["O", "B-film", "I-film"]},
    "pairs": {"kind": "pair_matching", "labels": ["other", "match"]},
    "ratings": {"kind": "regression", "target_range": [1.0, 5.0]},
    "language": {"kind": "causal_lm"},
    "replies": {"kind": "replies"},
}


def new_run(folder: Path, kind: str, task_job: Callable[..., Job]) -> ModelFolder:
    """Return a finished run of a tiny model."""
    job = task_job(KINDS[kind])
    return ModelFolder.read(finished_run(folder, job, temperature=1.7 if job.task.has_classes else 1.0))


def public_lines(kind: str = "classification", count: int = 140) -> list[str]:
    """Return different texts, of pairs and replies two with a tab between them."""
    order, words = random.Random(0), " ".join(LINES).replace(",", "").split()
    found = [" ".join(order.choices(words, k=order.randint(3, 9))) for _ in range(count)]
    if kind in ("pairs", "replies"):
        return [f"{one}\t{other}" for one, other in zip(found, reversed(found), strict=True)]
    return found


def public_file(path: Path, kind: str = "classification", count: int = 140) -> Path:
    """Write them to a file, one a line."""
    path.write_text("\n".join(public_lines(kind, count)) + "\n", encoding="utf-8")
    return path
