"""Several tuned adapters as one model: the mean of their heads' outputs (logits, or numbers), for tasks that have such.

The mean of logits is the normalised geometric mean of the probabilities. Members may differ in seed, adapter, training and
budget; what they are asked and what they may answer must be the same.

Privacy: an ensemble is post-processing of its members, so it costs nothing beyond them. It says what all of them say: a record
that several runs trained on has the composition of their epsilons, not that of a single run (`server.reports.ensembles`
computes it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor

from shared.errors import ConfigError
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.models.batches import Batch, Example
from shared.runtime.inference import head_outputs, load_tuned, predict
from shared.runtime.runtime import Runtime, load_runtime, on_cpu
from shared.tasks import Evaluation, Record, task_of
from shared.tasks.base import Prediction

_IN_COMMON = (
    "task.kind", "task.labels", "task.target_range", "model.backbone", "model.revision", "model.max_length",
)  # fmt: skip
"""Keys of the job in which members must not differ."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One run of an ensemble: its folder and its job."""

    run: Path
    job: Job


class Ensemble:
    """Members whose outputs can be averaged; one model is in memory at a time, apart from what `load_runtime` keeps."""

    def __init__(self, members: Sequence[Member], compute: ComputeConfig) -> None:
        """Check that the members fit together.

        Raises:
            ConfigError: if there are fewer than two, one is there twice, or they differ in what they are asked or may answer.
        """
        check_members(members)
        self._members, self._compute = tuple(members), compute

    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        """Return what the members say together of every text; see `shared.runtime.inference.predict`.

        Raises:
            DataError, AdapterError: naming the text or the run at fault.
        """
        first = self._members[0]
        runtime = load_runtime(first.job, self._compute)

        def outputs(examples: Sequence[Example]) -> list[Tensor]:
            parts = [head_outputs(self._load(member), examples) for member in self._members]
            return [_mean(rows) for rows in zip(*parts, strict=True)]

        return predict(runtime, texts, outputs=outputs)

    def evaluate(self, records: Sequence[Record]) -> tuple[Evaluation, list[Evaluation]]:
        """Return the metrics of the ensemble and of each member on public records.

        Raises:
            DataError, AdapterError: naming the record or the run at fault.
        """
        examples = load_runtime(self._members[0].job, self._compute).encode(records)
        batches: list[Batch] = []
        total: list[Tensor] = []
        single: list[Evaluation] = []
        for member in self._members:
            runtime = self._load(member)
            runtime.warm_cache(examples)
            parts = list(on_cpu(runtime.outputs(examples)))
            single.append(runtime.task.evaluate(parts))
            # The cut into batches follows from the lengths alone, so it is the same for all members.
            outputs = [output.double() for output, _ in parts]
            total = (
                [sum_so_far + output for sum_so_far, output in zip(total, outputs, strict=True)] if total else outputs
            )
            batches = [batch for _, batch in parts]
        mean = [(output / len(self._members)).float() for output in total]
        together = task_of(self._members[0].job).evaluate(zip(mean, batches, strict=True))
        return together, single

    def _load(self, member: Member) -> Runtime:
        return load_tuned(member.run, member.job, self._compute)


def check_members(members: Sequence[Member]) -> None:
    """Refuse what cannot be averaged.

    Raises:
        ConfigError: naming the runs and what differs.
    """
    if len(members) < 2:
        raise ConfigError("an ensemble needs at least two runs; name another one.")
    first = members[0]
    if not can_be_averaged(first.job):
        raise ConfigError(
            f"the task of {first.run} is {first.job.task.kind!r}, which continues texts; ensembles are for tasks with classes, "
            "scores or entities."
        )
    folders = [member.run.resolve() for member in members]
    for twice in (member.run for member, folder in zip(members, folders, strict=True) if folders.count(folder) > 1):
        raise ConfigError(f"{twice} is named twice, and would count twice; name each run once.")
    for other in members[1:]:
        for key in _IN_COMMON:
            own, wanted = (attrgetter(key)(member.job) for member in (other, first))
            if own != wanted:
                raise ConfigError(
                    f"{other.run} and {first.run} do not fit together: {key} is {_shown(own)} in the one and {_shown(wanted)} "
                    "in the other. Members of an ensemble must have task, labels and backbone in common."
                )


def can_be_averaged(job: Job) -> bool:
    """Return whether runs of this task can form an ensemble."""
    return not task_of(job).causal_lm


def _mean(rows: Sequence[Tensor]) -> Tensor:
    return torch.stack([row.double() for row in rows]).mean(dim=0).float()


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else repr(value)
