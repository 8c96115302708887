"""A model on a backbone of any family can be explained, and a decoder continues texts in a group as it does alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from server.serving.growing import Recomputed
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.job.parsing import parse
from shared.models.batches import Example, collate
from shared.models.families import ARCHITECTURES
from shared.models.tunable import TunableModel
from shared.runtime.attributions import explain
from shared.runtime.inference import next_logits
from shared.runtime.runtime import Runtime, load_runtime
from tests.shared.runtime.export.runs import drawn_state
from tests.tiny_families import make_backbone

CPU = ComputeConfig(device="cpu", precision="float32")
TEXT = "a dull plot, but what a bright cast"


@pytest.fixture
def tuned(tmp_path: Path, tiny_bert: Path, tiny_gpt2: Path) -> Callable[..., Runtime]:
    """Return a maker of models on tiny backbones."""

    def make(kind: str, task: str) -> Runtime:
        row = ARCHITECTURES[kind]
        backbone = make_backbone(tmp_path / kind, kind, tiny_gpt2 if row.causal else tiny_bert)
        raw = {
            "name": "test",
            "model": {"backbone": str(backbone), "max_length": 24},
            "lora": {"rank": 4, "target_modules": list(row.targets), "last_layers": 1},
            "task": {"kind": task, "labels": ["bad", "good"] if task == "sequence_classification" else []},
            "training": {"rounds": 1, "local_steps": 1, "learning_rate": 0.05},
            "privacy": {"epsilon": 8.0, "delta": 1e-5, "sample_rate": 0.25},
        }
        job = parse(Job, raw, source="test job")
        runtime = load_runtime(job, CPU)
        runtime.load(drawn_state(runtime, job))
        return runtime

    return make


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_its_embeddings_lead_to_its_outputs_and_attributions_add_up(kind: str, tuned: Callable[..., Runtime]) -> None:
    runtime = tuned(kind, "sequence_classification")
    model = runtime.model
    assert isinstance(model, TunableModel)
    (example,) = runtime.encode([{"text": TEXT}])
    ids = example.input_ids[None]
    with torch.no_grad():
        usual = model(collate([Example(example.input_ids)]))
        entered = model.from_embeddings(model.embeddings(ids), torch.ones_like(ids, dtype=torch.bool))
    torch.testing.assert_close(entered, usual, rtol=1e-4, atol=1e-5)
    found = explain(runtime, TEXT)  # or it refuses, because they do not add up
    assert any(word.attribution for word in found.words)


@pytest.mark.parametrize("kind", sorted(kind for kind, row in ARCHITECTURES.items() if row.causal))
def test_a_decoder_continues_in_a_group_as_alone(kind: str, tuned: Callable[..., Runtime]) -> None:
    runtime = tuned(kind, "causal_lm")
    rows = [[5, 6, 7, 8, 9], [20]]
    group = Recomputed(runtime)
    torch.testing.assert_close(group.join(rows), next_logits(runtime, rows), rtol=1e-4, atol=1e-5)
    alone = torch.cat([next_logits(runtime, [[*row, 40 + i]]) for i, row in enumerate(rows)])
    torch.testing.assert_close(group.step([40, 41]), alone, rtol=1e-4, atol=1e-4)
