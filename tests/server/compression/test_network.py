"""A network that is made of a model's parts computes what the run does, and gives the parts back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from server.compression.network import Network
from shared.job.job import Job
from shared.models.batches import collate
from shared.runtime.export.exporting import read_model
from shared.runtime.export.parts import Parts
from shared.runtime.inference import load_tuned
from tests.server.compression.kinds import KINDS, new_run
from tests.shared.runtime.export.runs import CPU


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_the_run_does_and_gives_its_parts_back(
    kind: str, task_job: Callable[..., Job], tmp_path: Path
) -> None:
    run = new_run(tmp_path / "run", kind, task_job)
    parts = read_model(run)
    assert isinstance(parts, Parts)
    network, runtime = Network(parts), load_tuned(run.path, run.job, CPU)
    batch = collate([runtime.task.probe(torch.arange(1, 4 + length), length) for length in range(3)])
    with torch.no_grad():
        hidden, outputs = network(batch)
        expected = runtime.model(batch)
    seen = batch.attention_mask if outputs.dim() == 3 else torch.ones(len(outputs), dtype=torch.bool)
    assert float((outputs - expected)[seen].abs().max()) < 1e-5
    assert len(hidden) == 3
    assert torch.equal(network.answer(hidden[-1], batch), outputs)

    found = network.parts()
    assert {name: value.tolist() for name, value in found.weights.items()} == {
        name: value.tolist() for name, value in parts.weights.items()
    }
    assert (found.head is None) == (parts.head is None)
    if found.head and parts.head:
        assert all(torch.equal(one, other) for one, other in zip(found.head, parts.head, strict=True))


def test_embeddings_are_not_trained(task_job: Callable[..., Job], tmp_path: Path) -> None:
    parts = read_model(new_run(tmp_path / "run", "classification", task_job))
    assert isinstance(parts, Parts)
    trained = {name for name, one in Network(parts).named_parameters() if one.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"backbone", "head"}
    assert not [name for name in trained if "embeddings" in name]
    assert len([name for name in trained if "output.dense.weight" in name]) == 2 * 3
