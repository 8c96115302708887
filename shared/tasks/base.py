"""What every kind of task is; trainer, rounds, commands and reports know nothing else about one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from shared.errors import DataError
from shared.files.json_files import Count, Finite, Share
from shared.job.kinds import TaskKind
from shared.job.model import ModelConfig, TaskConfig
from shared.models.batches import Batch, Example

Record = Mapping[str, Any]
Prediction = dict[str, Any]
"""What a model says of a text, by name."""
_PAIR = Field(min_length=2, max_length=2)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Result on public evaluation data.

    Attributes:
        metrics: every metric by name, finite floats; None where the data leaves it undefined; always holds "loss".
        labels: class names, or None.
        confusion: counts, rows are true classes and columns predicted ones; None without labels, or with more than
            `MAX_TABLE_LABELS`.
        confusion_cells: with so many labels [true, predicted, count] of the cells that are not 0, else None.
        roc: (false, true) positive rate at falling thresholds, the last label as positive; None unless there are two labels.
        pairs: (true, predicted) numbers of some of the data, in the task's own unit, or None.
        note: how the metrics are counted, for whoever reads them, or None.
    """

    metrics: dict[str, float | None]
    labels: tuple[str, ...] | None = None
    confusion: list[list[Count]] | None = None
    confusion_cells: list[Annotated[list[Count], Field(min_length=3, max_length=3)]] | None = None
    roc: Annotated[list[Annotated[list[Share], _PAIR]], Field(min_length=2)] | None = None
    pairs: Annotated[list[Annotated[list[Finite], _PAIR]], Field(min_length=1)] | None = None
    note: str | None = None


@dataclass(frozen=True)
class Task(ABC):
    """One kind of task, made of the sections of a job that it reads."""

    config: TaskConfig
    model: ModelConfig

    kind: ClassVar[TaskKind]
    """Its name, `task.kind` of a job."""
    about: ClassVar[str]
    """What it learns, for a report."""
    content: ClassVar[str]
    """What its records are, for a report."""
    roles: ClassVar[tuple[str, ...]]
    """Columns that a data source must declare."""
    primary_metric: ClassVar[str]
    """The metric that reports and plots show first."""
    higher_is_better: ClassVar[bool]
    """Direction of the primary metric."""
    causal_lm: ClassVar[bool] = False
    """True if the task needs a left-to-right backbone with its own vocabulary output."""

    @abstractmethod
    def build_head(self, backbone: nn.Module, hidden_size: int, *, seed: int) -> nn.Module:
        """Return the module from token vectors [B, T, H] and mask [B, T] to outputs, or a `TokenHead`; of images from [B, H]."""

    @abstractmethod
    def encode(self, records: Sequence[Record], tokenizer: Any, max_length: int) -> list[Example]:
        """Turn records into examples.

        Raises:
            DataError: naming the row, never the content, of a record that does not fit.
        """

    @abstractmethod
    def probe(self, input_ids: Tensor, number: int) -> Example:
        """Return an example with these tokens or pixels, int64 [T >= 2], and a target that changes with `number`."""

    def check_site(self, examples: Sequence[Example]) -> None:
        """Raise `DataError` if a site cannot train on these examples, as on none."""
        if not examples:
            raise DataError("the site has no records; it cannot take part.")

    @abstractmethod
    def per_example_loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return one loss per example, float [B]; an example's loss must not depend on its neighbours."""

    def classes(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Return (predicted, true) class of each example, int [B] each; None if the task has no classes."""
        return None

    @abstractmethod
    def evaluate(self, parts: Iterable[tuple[Tensor, Batch]]) -> Evaluation:
        """Return metrics over (outputs, batch) pairs of public data."""

    @abstractmethod
    def shown(self, prediction: Prediction) -> str:
        """Return what a model says of a text as one line for a terminal."""
