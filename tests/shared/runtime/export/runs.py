"""Finished runs without training: an adapter that changes something, and the records that a run leaves."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from shared.files.atomic import write_json, write_text
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.privacy.statement import Statement
from shared.runtime.export.peft import save_peft_folder
from shared.runtime.runtime import Runtime, load_runtime

CPU = ComputeConfig(device="cpu", precision="float32")
STATEMENT = "Run test, 2 sites. Everything released is (3.355, 1e-05)-differentially private.\n\nNot covered: <this>."


def finished_run(folder: Path, job: Job, *, temperature: float = 1.0) -> Path:
    """Write a run of `job` into `folder`; every trained value is drawn anew, so nothing of it stays what it was."""
    runtime = load_runtime(job, CPU)
    folder.mkdir(parents=True)
    save_peft_folder(folder / "adapter", runtime, job, drawn_state(runtime, job), temperature=temperature)
    write_text(folder / "job.json", job.canonical_json())
    write_json(folder / "statement.json", Statement(one_site=STATEMENT, text=STATEMENT))
    write_json(folder / "run.json", {"status": "completed", "versions": {"silotune": "0.1.0"}})
    metrics = {"loss": 0.5, runtime.task.primary_metric: 0.75}
    record = {"metrics": metrics, "primary_metric": runtime.task.primary_metric, "round": 3}
    write_json(folder / "evaluation.json", record)
    (folder / "sites" / "north").mkdir(parents=True)
    (folder / "sites" / "north" / "privacy.json").write_text(json.dumps({"site": "north", "declared_records": 500}))
    return folder


def drawn_state(runtime: Runtime, job: Job) -> dict[str, torch.Tensor]:
    """Return a global adapter of normal values, as large as training makes them."""
    generator = torch.Generator().manual_seed(1)
    shapes = runtime.global_shapes(job.averages_products)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
