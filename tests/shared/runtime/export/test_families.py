"""Merged weights of other families than BERT and GPT-2, and the plain word where one has no such form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from server.compression.compressing import Recipe, Size, compress
from shared.data.text_stream import TextFormat
from shared.errors import ConfigError
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.job.parsing import parse
from shared.models.families import ARCHITECTURES
from shared.runtime.export import merged
from shared.runtime.export.exporting import export, read_model
from shared.runtime.export.folder import ModelFolder
from shared.runtime.export.parts import Parts
from shared.runtime.inference import Decoding, generate_all, head_outputs, load_model, predict
from tests.conftest import LINES
from tests.shared.runtime.export.runs import finished_run
from tests.tiny_families import make_backbone

CPU = ComputeConfig(device="cpu", precision="float32")
LABELS = {"sequence_classification": ["bad", "good"], "token_classification": ["O", "B-film", "I-film"]}


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, tiny_gpt2: Path) -> Callable[..., ModelFolder]:
    """Return a maker of finished runs on a tiny backbone of a family."""

    def make(kind: str, task: str, pooling: str = "mean") -> ModelFolder:
        folder = tmp_path_factory.mktemp("run")
        row = ARCHITECTURES[kind]
        backbone = make_backbone(folder / "backbone", kind, tiny_gpt2 if row.causal else tiny_bert)
        raw: dict[str, Any] = {
            "name": "test",
            "model": {"backbone": str(backbone), "max_length": 24, "pooling": pooling},
            "lora": {"rank": 4, "target_modules": list(row.targets), "last_layers": 2, "train": "both"},
            "task": {"kind": task, "labels": LABELS.get(task, [])},
            "training": {"rounds": 1, "local_steps": 1, "learning_rate": 0.05},
            "privacy": {"epsilon": 8.0, "delta": 1e-5, "sample_rate": 0.25},
        }
        return ModelFolder.read(finished_run(folder / "run", parse(Job, raw, source="test job"), temperature=1.5))

    return make


@pytest.mark.parametrize(
    ("kind", "task", "pooling"),
    [
        ("distilbert", "sequence_classification", "mean"),
        ("distilbert", "sequence_classification", "first"),
        ("distilbert", "token_classification", "mean"),
        ("electra", "sequence_classification", "mean"),
        ("electra", "token_classification", "mean"),
    ],
)
def test_merged_encoders_predict_what_the_run_does(
    kind: str, task: str, pooling: str, run_of: Callable[..., ModelFolder], tmp_path: Path
) -> None:
    run = run_of(kind, task, pooling)
    made = export(run, tmp_path / "merged", "merged")
    own, other = load_model(run.path, CPU), load_model(made.path, CPU)
    examples = own.encode([{"text": t} if task[0] == "s" else {"tokens": t.split()} for t in LINES])
    rows = zip(head_outputs(own, examples), head_outputs(other, examples), examples, strict=True)
    for mine, theirs, example in rows:
        upto = slice(example.length if task == "token_classification" else None)
        torch.testing.assert_close(theirs[upto], mine[upto], rtol=1e-4, atol=1e-4)
    key = "label" if task == "sequence_classification" else "entities"
    answers = [[p[key] for p in predict(model, LINES)] for model in (own, other)]
    assert len(answers[0]) == len(answers[1]) == len(LINES)
    if key == "label":
        assert answers[0] == answers[1]
    # Taken back: the head as the run had it, and as many layers.
    back, parts = read_model(made), read_model(run)
    assert isinstance(back, Parts)
    assert isinstance(parts, Parts)
    assert back.num_layers == parts.num_layers
    assert back.weights.keys() == parts.weights.keys()
    assert back.head is not None
    assert parts.head is not None
    for one, same in zip(back.head, parts.head, strict=True):
        torch.testing.assert_close(one, same, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "opt", "gpt_neox"])
def test_merged_decoders_write_what_the_run_does(kind: str, run_of: Callable[..., ModelFolder], tmp_path: Path) -> None:
    """Also where the output is a matrix of its own."""
    run = run_of(kind, "causal_lm")
    made = export(run, tmp_path / "merged", "merged")
    own, other = load_model(run.path, CPU), load_model(made.path, CPU)
    greedy = Decoding(max_new_tokens=6, temperature=0)
    texts = generate_all(own, LINES[:3], greedy)
    assert texts == generate_all(other, LINES[:3], greedy)
    assert any(texts[0])
    back = read_model(made)
    assert isinstance(back, Parts)
    assert (back.output is None) == (kind in ("qwen3", "opt"))


def test_fault_an_output_of_its_own_is_left_out(
    run_of: Callable[..., ModelFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would draw it at random."""
    parts = read_model(run_of("llama", "causal_lm"))
    assert isinstance(parts, Parts)
    monkeypatch.setattr(merged, "save_tokenizer", lambda folder, parts: None)
    merged.write_merged(tmp_path / "whole", parts, 1.0)
    with pytest.raises(AssertionError, match="other weights than expected, first lm_head"):
        merged.write_merged(tmp_path / "lacking", replace(parts, output=None), 1.0)


def test_a_form_that_a_family_has_not_is_refused_by_name(run_of: Callable[..., ModelFolder], tmp_path: Path) -> None:
    modern, llama = run_of("modernbert", "sequence_classification"), run_of("llama", "sequence_classification")
    with pytest.raises(ConfigError, match=r"classifiers on ModernBERT have a head.*its adapter stands in the run"):
        export(modern, tmp_path / "a", "merged")
    with pytest.raises(ConfigError, match=r"classifiers on Llama pool other tokens.*its adapter stands in the run"):
        export(llama, tmp_path / "b", "merged")
    for run in (modern, llama):
        with pytest.raises(ConfigError, match=r"no graph is made of (ModernBERT|Llama); BERT.*Its adapter stands"):
            export(run, tmp_path / "c", "onnx")
    distil = run_of("distilbert", "sequence_classification")
    with pytest.raises(ConfigError, match=r"no graph is made of DistilBERT; BERT.*Export it with --to merged"):
        export(distil, tmp_path / "d", "onnx")
    public = tmp_path / "public.txt"
    public.write_text("\n".join(LINES))
    with pytest.raises(ConfigError, match="DistilBERT cannot be compressed here, BERT, "):
        compress(distil, public, TextFormat(), tmp_path / "e", Size(layers=1), Recipe())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["public.txt"]


def test_the_table_says_what_can_be_merged() -> None:
    assert {kind for kind, row in ARCHITECTURES.items() if row.merges_labels} == merged._CLASSIFIERS.keys()
