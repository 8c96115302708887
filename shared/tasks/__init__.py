"""Tasks by kind: an explicit table, one file per kind."""

from __future__ import annotations

from collections.abc import Mapping

from shared.job.job import Job
from shared.job.kinds import TaskKind
from shared.tasks.base import Evaluation, Record, Task
from shared.tasks.causal_lm import CausalLanguageModelling
from shared.tasks.image_classification import ImageClassification
from shared.tasks.pair_matching import PairMatching
from shared.tasks.regression import Regression
from shared.tasks.replies import Replies
from shared.tasks.sequence_classification import SequenceClassification
from shared.tasks.token_classification import TokenClassification

_KINDS: tuple[type[Task], ...] = (
    SequenceClassification,
    Regression,
    PairMatching,
    TokenClassification,
    CausalLanguageModelling,
    Replies,
    ImageClassification,
)
TASKS: Mapping[TaskKind, type[Task]] = {task.kind: task for task in _KINDS}


def task_of(job: Job) -> Task:
    """Return the task that `job` names."""
    return TASKS[job.task.kind](job.task, job.model)


__all__ = ["TASKS", "Evaluation", "Record", "Task", "task_of"]
