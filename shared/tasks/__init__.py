"""Tasks by kind: an explicit table, one file per kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from shared.config import Job, ModelConfig, TaskConfig
from shared.tasks.base import Evaluation, Record, Task
from shared.tasks.causal_lm import CausalLanguageModelling
from shared.tasks.sequence_classification import SequenceClassification

TASKS: Mapping[str, Callable[[TaskConfig, ModelConfig], Task]] = {
    "sequence_classification": SequenceClassification.from_config,
    "causal_lm": CausalLanguageModelling.from_config,
}


def task_of(job: Job) -> Task:
    """Return the task that `job` names."""
    return TASKS[job.task.kind](job.task, job.model)


__all__ = ["TASKS", "Evaluation", "Record", "Task", "task_of"]
