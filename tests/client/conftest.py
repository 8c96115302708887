"""A site's folder, and requests to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.runtime.runtime import load_runtime
from shared.tensors.adapters import encode
from shared.wire.messages import TrainRequest

COMPUTE = ComputeConfig(device="cpu", precision="float32")


@pytest.fixture
def site_home(tmp_path: Path, records: list[dict[str, Any]]) -> Callable[..., Path]:
    """Return a writer of site folders; keyword arguments replace keys of site.toml."""

    def write(name: str = "north", *, rows: list[dict[str, Any]] | None = None, **changes: Any) -> Path:
        home = tmp_path / name / "home"
        home.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row) for row in (records if rows is None else rows)]
        (home / "data.jsonl").write_text("\n".join(lines) + "\n")
        config: dict[str, Any] = {
            "name": name,
            "dataset": "notes",
            "data": {"path": "data.jsonl", "columns": {"text": "text", "label": "label"}},
            "budget": {"epsilon": 50.0, "delta": 1e-5},
            "compute": COMPUTE.model_dump(exclude_none=True),
        }
        (home / "site.toml").write_text(tomli_w.dumps(config | changes))
        return home

    return write


@pytest.fixture
def private_job(classification_job: Callable[..., Job]) -> Callable[..., Job]:
    """Return a builder of jobs with a given noise multiplier, which spares the calibration."""

    def build(**sections: Any) -> Job:
        return classification_job(**{**sections, "privacy": {"noise_multiplier": 1.0, **sections.get("privacy", {})}})

    return build


@pytest.fixture
def request_for() -> Callable[..., TrainRequest]:
    """Return a builder of requests from the job's initial adapter, moved by `shift`."""

    def build(job: Job, round_number: int = 1, *, shift: float = 0.0) -> TrainRequest:
        runtime = load_runtime(job, COMPUTE)
        adapter = {n: t + shift for n, t in runtime.initial_global(job.lora.train == "both").items()}
        return TrainRequest(job=job, round_number=round_number, adapter=encode(adapter))

    return build
