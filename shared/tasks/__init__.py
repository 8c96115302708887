"""Tasks by kind: an explicit table, one file per kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from shared.job.job import Job
from shared.job.model import ModelConfig, TaskConfig
from shared.tasks.base import Evaluation, Record, Task
from shared.tasks.causal_lm import CausalLanguageModelling
from shared.tasks.image_classification import ImageClassification
from shared.tasks.pair_matching import PairMatching
from shared.tasks.regression import Regression
from shared.tasks.replies import Replies
from shared.tasks.sequence_classification import SequenceClassification
from shared.tasks.token_classification import TokenClassification

TASKS: Mapping[str, Callable[[TaskConfig, ModelConfig], Task]] = {
    "sequence_classification": SequenceClassification.from_config,
    "token_classification": TokenClassification.from_config,
    "pair_matching": PairMatching.from_config,
    "regression": Regression.from_config,
    "causal_lm": CausalLanguageModelling.from_config,
    "replies": Replies.from_config,
    "image_classification": ImageClassification.from_config,
}


def task_of(job: Job) -> Task:
    """Return the task that `job` names."""
    return TASKS[job.task.kind](job.task, job.model)


__all__ = ["TASKS", "Evaluation", "Record", "Task", "task_of"]
