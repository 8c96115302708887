"""When a run ends before its planned rounds, and which round's adapter it hands out; decided on public records.

Guarantees (tests: tests/server/rounds/test_early_stopping.py)
    * Both read the metrics in the run's history and nothing else. They are of public records, of the part that decides and is
      not reported where one was held back, and of adapters that were released anyway: post-processing, free of charge.
    * The history lies in the checkpoint, so a run that was killed and resumed decides as one that never stopped.
    * Nothing is accounted here. Epsilon follows the executed rounds, as everywhere; the plan stays that of all rounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from server.records.rounds import RoundRecord
from server.store.checkpoint import Checkpoint
from shared.errors import ConfigError
from shared.job.job import Job
from shared.tasks import task_of


def is_over(checkpoint: Checkpoint, job: Job) -> bool:
    """Return whether training has ended: all planned rounds are done, or the job's rule stopped it."""
    return checkpoint.round_number >= job.training.rounds or stopped_early(checkpoint, job)


def stopped_early(checkpoint: Checkpoint, job: Job) -> bool:
    """Return whether the job's rule ended the run before its planned rounds."""
    rule = job.training.early_stopping
    if rule is None or checkpoint.round_number >= job.training.rounds:
        return False
    return evaluations_without_improvement(checkpoint.history, job) >= rule.patience


def evaluations_without_improvement(history: Sequence[RoundRecord], job: Job) -> int:
    """Return how many evaluations followed the last one that was better, by more than `min_delta`, than the one before it."""
    rule = job.training.early_stopping
    min_delta = rule.min_delta if rule else 0.0
    reference, waited = -math.inf, 0
    for _, score in _scores(history, job):
        if score - reference > min_delta:
            reference, waited = score, 0
        else:
            waited += 1
    return waited


def best_round(history: Sequence[RoundRecord], job: Job) -> int:
    """Return the round with the best metric, the first of equals; 0 is before training, and so is no evaluation."""
    best, found = -math.inf, 0
    for number, score in _scores(history, job):
        if score > best:
            best, found = score, number
    return found


def keeps_best(job: Job) -> bool:
    """Return whether the run hands out the best round's adapter."""
    return job.training.early_stopping is not None and job.training.early_stopping.keep == "best"


def require_public_records(job: Job, num_records: int) -> None:
    """Refuse early stopping where there is nothing public to decide by.

    Raises:
        ConfigError: saying what to do.
    """
    if job.training.early_stopping is not None and num_records == 0:
        raise ConfigError(
            "training.early_stopping decides by the coordinator's public evaluation records, and there are none; give some, or "
            "remove the section. A decision by records of the sites would be a release that no budget pays for."
        )


def _scores(history: Sequence[RoundRecord], job: Job) -> Iterator[tuple[int, float]]:
    """Yield (round, metric that decides, larger is better) of every evaluation; what is no number is worse than any."""
    task, rule = task_of(job), job.training.early_stopping
    by_loss = rule is not None and rule.metric == "loss"
    rises = task.higher_is_better and not by_loss
    for record in history:
        # Of a few records none was held back, and older versions held none back.
        if metrics := record.deciding or record.metrics:
            value = metrics["loss" if by_loss else task.primary_metric]
            if value is None:  # the evaluation data leaves it undefined
                value = math.nan
            score = value if rises else -value
            yield record.round, score if math.isfinite(score) else -math.inf
