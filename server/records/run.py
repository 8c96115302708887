"""`run.json`: what happened around the training."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from shared.files.json_files import Count, Positive


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where the coordinator ran."""

    system: str | None = None
    cpu_count: Count | None = None
    device: str | None = None
    precision: str | None = None


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The data, as far as it may be told.

    Attributes:
        test_kind: what a simulation's evaluation records were declared to be; a coordinator's own are public, and nothing is
            recorded.
        test_name: file of the evaluation records where it is one of its own.
        site_names: what the data calls a site whose folder has another name, such as one in ASCII.
    """

    name: str | None = None
    train_records: Count | None = None
    test_records: Count | None = None
    test_records_at_max_length: Count | None = None
    test_kind: Literal["public", "synthetic", "private"] | None = None
    test_name: str | None = None
    site_names: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PublicCounts:
    """The public records in two parts: those that figures are of, and those by which something was chosen."""

    reported: Count
    deciding: Count


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """`run.json`; further facts about a run stand in it too.

    Attributes:
        seconds_before: what the run had taken when it was last begun or resumed; None of all times under central DP.
    """

    name: str | None = None
    job_sha256: str | None = None
    created: datetime | None = None
    finished: datetime | None = None
    status: Literal["running", "completed", "stopped"]
    mode: str | None = None
    seconds: Positive | None = None
    seconds_before: Positive = 0.0
    peak_rss_mb: Positive | None = None
    versions: dict[str, str | None] = field(default_factory=dict)
    machine: Machine = field(default_factory=Machine)
    dataset: Dataset = field(default_factory=Dataset)
    public_records: PublicCounts | None = None

    @property
    def test_records(self) -> int | None:
        """How many records every figure of the run is of."""
        return self.dataset.test_records if self.public_records is None else self.public_records.reported
