"""Exports of every kind of task compute what the run's model computes, by the lines of their own cards and without Silotune."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import onnx
import pytest
import torch
import yaml
from torch import Tensor

from cli import main
from shared.errors import ConfigError, ModelError, RunError
from shared.job.job import Job
from shared.models.batches import Batch, Example, collate
from shared.runtime.export.exporting import Target, export
from shared.runtime.export.folder import ModelFolder, Precision
from shared.runtime.export.onnx import GRAPH_FILE
from shared.runtime.inference import Decoding, generate, head_outputs, load_model, load_tuned, predict
from shared.tasks.base import Record
from tests.conftest import LINES
from tests.shared.runtime.export.alone import run_card
from tests.shared.runtime.export.runs import CPU, STATEMENT, finished_run

TOLERANCE = 1e-4
MERGED_ALONE, ONNX_ALONE = ("onnx", "onnxruntime"), ("torch", "transformers", "onnx")


@dataclass(frozen=True)
class Case:
    """One kind of task.

    Attributes:
        section: `[task]`.
        texts: as a user gives them to `predict`.
        record: makes a record of one of the card's texts.
        sections: further sections of a job.
    """

    section: dict[str, Any]
    texts: list[str]
    record: Callable[[Any], Record]
    sections: dict[str, Any] = field(default_factory=dict)


IMAGES = {
    "kind": "image_classification",
    "labels": ["a", "b"],
    "image_shape": [2, 5, 6],
    "pixel_range": [0.0, 16.0],
}
LONG = " ".join(LINES * 3)
CASES = {
    "classification": Case(
        {"kind": "sequence_classification", "labels": ["bad", "good"], "head_centre": "label-names"},
        [*LINES, LONG, "x", "[SEP] a [PAD] film"],
        lambda text: {"text": text},
        {"lora": {"train": "both"}},
    ),
    "entities": Case(
        {"kind": "token_classification", "labels": ["O", "B-film", "I-film"]},
        [*LINES, LONG],
        lambda words: {"tokens": words},
    ),
    "pairs": Case(
        {"kind": "pair_matching", "labels": ["other", "match"]},
        [f"{first}\t{second}" for first, second in pairwise(LINES)] + [f"{LONG}\t{LINES[0]}"],
        lambda pair: {"text": pair[0], "pair": pair[1]},
    ),
    "ratings": Case(
        {"kind": "regression", "target_range": [1.0, 5.0], "head_offset": 0.25},
        [*LINES, LONG],
        lambda text: {"text": text},
    ),
}


def _run(tmp: pytest.TempPathFactory, job: Job) -> ModelFolder:
    return ModelFolder.read(
        finished_run(tmp.mktemp("runs") / "run", job, temperature=1.7 if job.task.has_classes else 1.0)
    )


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def run(case: Case, task_job: Callable[..., Job], tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return _run(tmp_path_factory, task_job(case.section, **case.sections))


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory, language_job: Callable[..., Job]) -> ModelFolder:
    return _run(tmp_path_factory, language_job(lora={"target_modules": ["c_attn", "c_fc"]}, model={"max_length": 64}))


def expected(run: ModelFolder, records: list[Record]) -> list[Tensor]:
    """Return the outputs of the run's own model in float32, a score in the job's own unit."""
    runtime = load_tuned(run.path, run.job, CPU)
    examples = runtime.encode(records)
    rows = [  # of tokens without those of padding
        row[: example.length] if row.dim() == 2 else row
        for row, example in zip(head_outputs(runtime, examples), examples, strict=True)
    ]
    if run.job.task.target_range is None:
        return rows
    low, high = run.job.task.target_range
    return [low + (row + 1) * (high - low) / 2 for row in rows]


def assert_close(found: list[Any], rows: list[Tensor]) -> None:
    """Compare outputs, of tokens as many as there are in `rows`."""
    assert len(found) == len(rows)
    for one, row in zip(found, rows, strict=True):
        assert float((torch.tensor(one)[: len(row)] - row).abs().max()) < TOLERANCE


@pytest.mark.parametrize("to", ["merged", "onnx"])
def test_the_cards_lines_alone_compute_what_the_run_does(
    run: ModelFolder, case: Case, tmp_path: Path, to: Target
) -> None:
    made = export(run, tmp_path / "model", to)
    made.check()
    assert (made.format, made.lineage, made.record.temperature) == (to, run.lineage, run.record.temperature)
    texts, logits, printed = run_card(made.path, missing=MERGED_ALONE if to == "merged" else ONNX_ALONE)
    assert_close(logits, expected(run, [case.record(text) for text in texts]))
    assert len(printed) >= len(texts)


def test_merged_weights_become_the_graph_that_the_run_becomes(run: ModelFolder, case: Case, tmp_path: Path) -> None:
    made = export(export(run, tmp_path / "merged", "merged"), tmp_path / "onnx", "onnx")
    assert (made.record.made_from, made.lineage) == ("model.safetensors", run.lineage)
    texts, logits, _ = run_card(made.path, missing=ONNX_ALONE)
    assert_close(logits, expected(run, [case.record(text) for text in texts]))


@pytest.mark.parametrize("to", ["merged", "onnx"])
def test_predict_says_the_same_of_an_export(run: ModelFolder, case: Case, tmp_path: Path, to: Target) -> None:
    made = load_model(export(run, tmp_path / "model", to).path, CPU)
    tuned = load_tuned(run.path, run.job, CPU)
    for found, right in zip(predict(made, case.texts), predict(tuned, case.texts), strict=True):
        numbers = {key for key in right if key in ("probability", "score")}
        assert {k: v for k, v in found.items() if k not in numbers | {"probabilities"}} == {
            k: v for k, v in right.items() if k not in numbers | {"probabilities"}
        }
        assert all(abs(found[key] - right[key]) < TOLERANCE for key in numbers)


@pytest.mark.parametrize("to", ["merged", "onnx"])
def test_a_language_model_continues_alike(language: ModelFolder, tmp_path: Path, to: Target) -> None:
    made = export(language, tmp_path / "model", to)
    texts, logits, printed = run_card(made.path, missing=MERGED_ALONE if to == "merged" else ONNX_ALONE)
    tuned = load_tuned(language.path, language.job, CPU)
    greedy = Decoding(temperature=0, max_new_tokens=20)
    answer = generate(tuned, texts[0], greedy)[0]
    assert "\n".join(printed) == answer
    # The graph read the answer token by token, with what it kept of those before.
    start = tuned.task.start(texts[0], tuned.tokenizer, tuned.max_length)  # type: ignore[attr-defined]
    found = torch.tensor(logits[0])
    whole = start + found[len(start) - 1 : -1].argmax(dim=-1).tolist()
    assert_close(logits, head_outputs(tuned, [Example(torch.tensor(whole))]))
    assert generate(load_model(made.path, CPU), texts[0], greedy)[0] == answer


def test_a_classifier_on_gpt2_and_a_network_for_images_are_graphs_only(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, task_job: Callable[..., Job], tiny_gpt2: Path
) -> None:
    section = {"kind": "sequence_classification", "labels": ["bad", "good"]}
    sections = {"model": {"backbone": str(tiny_gpt2)}, "lora": {"target_modules": ["c_attn"]}}
    on_gpt2 = _run(tmp_path_factory, task_job(section, **sections))
    images = _run(tmp_path_factory, task_job(IMAGES))
    for run, record in ((on_gpt2, lambda text: {"text": text}), (images, lambda pixels: {"pixels": pixels})):
        with pytest.raises(ConfigError, match="--to onnx"):
            export(run, tmp_path / "merged", "merged")
        made = export(run, tmp_path / run.record.task, "onnx")
        texts, logits, _ = run_card(made.path, missing=ONNX_ALONE)
        assert_close(logits, expected(run, [record(text) for text in texts]))
    pixels = " ".join(str(number % 17) for number in range(60))
    found, right = (
        predict(model, [pixels])[0] for model in (load_model(made.path, CPU), load_tuned(run.path, run.job, CPU))
    )
    assert abs(found["probability"] - right["probability"]) < TOLERANCE
    with pytest.raises(ConfigError, match="int8 saves nothing"):
        export(images, tmp_path / "int8", "onnx", "int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image_classification", "sequence_classification"]


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_a_model_of_robertas_kind_is_exported_alike(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    task_job: Callable[..., Job],
    tiny_roberta: Path,
    pooling: str,
) -> None:
    section = {"kind": "sequence_classification", "labels": ["bad", "good"]}
    run = _run(tmp_path_factory, task_job(section, model={"backbone": str(tiny_roberta), "pooling": pooling}))
    right = [
        prediction["probabilities"]["bad"] for prediction in predict(load_tuned(run.path, run.job, CPU), [*LINES, LONG])
    ]
    for to in get_args(Target):
        made = load_model(export(run, tmp_path / to, to).path, CPU)
        found = [prediction["probabilities"]["bad"] for prediction in predict(made, [*LINES, LONG])]
        assert found == pytest.approx(right, abs=TOLERANCE / 10)


@pytest.fixture(scope="module")
def tiny_roberta(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of RoBERTa's kind, whose positions begin behind the padding token's number; random weights."""
    from transformers import RobertaConfig, RobertaModel

    folder = tmp_path_factory.mktemp("tiny-roberta")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (folder / name).write_bytes((tiny_bert / name).read_bytes())
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 200,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    settings = {"max_position_embeddings": 65, "pad_token_id": 0, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    RobertaModel(RobertaConfig(**sizes, **settings)).save_pretrained(folder)
    return folder


def test_int8_is_small_and_close(language: ModelFolder, tmp_path: Path) -> None:
    whole, small = (export(language, tmp_path / p, "onnx", p) for p in get_args(Precision))
    again = export(language, tmp_path / "again", "onnx", "int8")
    assert again.record.files[GRAPH_FILE] == small.record.files[GRAPH_FILE]
    sizes = [(made.path / GRAPH_FILE).stat().st_size for made in (whole, small)]
    assert sizes[1] < sizes[0]
    # No table and no product is left in float32.
    graph = onnx.load(small.path / GRAPH_FILE).graph
    large = [weight.name for weight in graph.initializer if weight.data_type == 1 and len(weight.dims) == 2]
    assert all(min(weight.dims) == 1 for weight in graph.initializer if weight.name in large)
    run_card(small.path, missing=ONNX_ALONE)
    models = [load_model(made.path, CPU) for made in (whole, small)]
    records = [{"text": line} for line in LINES]
    right, found = (model.task.evaluate(_parts(model, records)).metrics["perplexity"] for model in models)
    assert found == pytest.approx(right, rel=0.005)


def _parts(model: Any, records: list[Record]) -> Iterator[tuple[Tensor, Batch]]:
    for example in model.encode(records):
        yield torch.stack(model.outputs([example])), collate([example])


def test_what_was_exported_is_not_exported_again(language: ModelFolder, tmp_path: Path) -> None:
    made = export(language, tmp_path / "model", "merged")
    with pytest.raises(ConfigError, match="export from the run"):
        export(made, tmp_path / "again", "merged")
    with pytest.raises(ConfigError, match="int8 goes with --to onnx"):
        export(language, tmp_path / "again", "merged", "int8")
    with pytest.raises(RunError, match="new folder"):
        export(language, tmp_path / "model", "merged")
    (made.path / "model.safetensors").write_bytes(b"other")
    with pytest.raises(ModelError, match="is not as it was written"):
        load_model(made.path, CPU)


def test_without_the_extra_it_is_said_what_to_install(
    language: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"pip install 'silotune\[export\]'"):
        export(language, tmp_path / "model", "onnx")


def test_the_card_holds_the_statement_word_for_word_and_what_the_hub_reads(
    language: ModelFolder, tmp_path: Path
) -> None:
    card = (export(language, tmp_path / "model", "onnx", "int8").path / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {
        "library_name": "onnx",
        "pipeline_tag": "text-generation",
        "tags": ["silotune", "differential-privacy", "federated-learning", "onnx"],
    }
    assert STATEMENT in card
    assert "declared sizes: 500 records" in card
    assert "| perplexity | 0.75 |" in card
    assert "opset 20" in card
    assert str(language.job.model.backbone) not in card


def test_metrics_on_private_records_are_not_in_the_card(
    tmp_path: Path, language_job: Callable[..., Job], capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_run(tmp_path / "run", language_job())
    (run / "run.json").write_text(json.dumps({"status": "completed", "dataset": {"test_kind": "private"}}))
    with pytest.raises(SystemExit, match="0"):
        main(["export", str(run), "--to", "merged", "--out", str(tmp_path / "model"), "--json"])
    out, err = capsys.readouterr()
    assert json.loads(out)["format"] == "merged"
    assert "evaluation.json" in err
    assert "perplexity" not in (tmp_path / "model" / "README.md").read_text()
