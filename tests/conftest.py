"""Small real models for tests: BERT and GPT-2 architectures with random weights and tokenizers trained on a few lines."""

from __future__ import annotations

import csv
import functools
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import shared.link  # noqa: F401  (limits TLS to 1.3 before a test imports grpc)

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

LINES = [
    "the film is a quiet joy from start to end",
    "a dull plot and a worse script",
    "what a bright and funny cast",
    "nobody should have to sit through this",
    "it drags, it bores, it ends too late",
    "warm, clever and very well made",
]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several processes share the tests, begin with the files that take minutes: one of them alone must not be the end."""
    if hasattr(config, "workerinput"):
        long = ("integration", "simulations")
        items.sort(key=lambda item: next((i for i, folder in enumerate(long) if folder in item.path.parts), len(long)))


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """Take back what a command that ran in this process did to logging: its handler writes to a stream that is closed by then."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture(scope="session", autouse=True)
def _one_thread_at_first() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Take back what a test did to the number of threads: by it a library cuts its sums, so the tests after it would differ."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of 3 layers and hidden size 32 in a local folder, safetensors, with its own WordPiece tokenizer."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-bert")
    # Words and letters: the library's own training breaks ties differently in each process, so the model would be another one.
    text = " ".join(LINES).replace(",", " ,")
    letters = sorted(set(text) - {" "})
    pieces = [*letters, *(f"##{letter}" for letter in letters), *sorted(set(text.split()) - set(letters))]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    made = BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=True)
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt"), tokenizer_object=made._tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=200,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of 3 layers and hidden size 32 in a local folder, with its own byte-level BPE tokenizer."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-gpt2")
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        LINES, vocab_size=300, min_frequency=1, special_tokens=["<|endoftext|>"], show_progress=False
    )
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token=end, bos_token=end).save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=3, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def classification_job(tiny_bert: Path) -> Callable[..., Any]:
    """Return a builder of small classification jobs; keyword arguments are sections that replace keys."""
    return _job_builder(tiny_bert, {"kind": "sequence_classification", "labels": ["bad", "good"]}, ["query", "value"])


@pytest.fixture(scope="session")
def language_job(tiny_gpt2: Path) -> Callable[..., Any]:
    """Return a builder of small causal language modelling jobs."""
    return _job_builder(tiny_gpt2, {"kind": "causal_lm"}, ["c_attn"])


@pytest.fixture(scope="session")
def task_job(tiny_bert: Path, tiny_gpt2: Path) -> Callable[..., Any]:
    """Return a builder of small jobs for a given `[task]` section, whatever its kind."""

    def build(task: dict[str, Any], **sections: Any) -> Any:
        if task["kind"] == "image_classification":
            return _image_job(task, sections)
        if task["kind"] in ("causal_lm", "replies"):
            return _job_builder(tiny_gpt2, task, ["c_attn"])(**sections)
        return _job_builder(tiny_bert, task, ["query", "value"])(**sections)

    return build


def _image_job(task: dict[str, Any], sections: dict[str, Any]) -> Any:
    """A job without what only language models have."""
    from shared.job.job import Job
    from shared.job.parsing import parse

    raw: dict[str, Any] = {
        "name": "test",
        "model": {"backbone": "cnn:small"},
        "task": task,
        "training": {"rounds": 3, "local_steps": 2, "learning_rate": 0.05},
        "privacy": {"epsilon": 8.0, "delta": 1e-5, "sample_rate": 0.25},
    }
    for name, value in sections.items():
        raw[name] = {**raw.get(name, {}), **value} if isinstance(value, dict) else value
    return parse(Job, raw, source="test job")


def _job_builder(backbone: Path, task: dict[str, Any], targets: list[str]) -> Callable[..., Any]:
    from shared.job.job import Job
    from shared.job.parsing import parse

    def build(**sections: Any) -> Job:
        raw: dict[str, Any] = {
            "name": "test",
            "model": {"backbone": str(backbone), "max_length": 24},
            "lora": {"rank": 4, "alpha": 8.0, "target_modules": targets, "last_layers": 2},
            "task": task,
            "training": {"rounds": 3, "local_steps": 2, "learning_rate": 0.05},
            "privacy": {"epsilon": 8.0, "delta": 1e-5, "sample_rate": 0.25},
        }
        for name, value in sections.items():
            raw[name] = {**raw[name], **value} if isinstance(value, dict) and name in raw else value
        return parse(Job, raw, source="test job")

    return build


@pytest.fixture
def records() -> list[dict[str, Any]]:
    """60 labelled records of different lengths."""
    return [
        {"text": " ".join(LINES[(i + k) % 6] for k in range(1 + i % 3)), "label": ["good", "bad"][i % 2]}
        for i in range(60)
    ]


@pytest.fixture(scope="session")
def write_scenario(tiny_bert: Path) -> Callable[..., Path]:
    """Return a writer of a small scenario file with its data into a folder; keyword arguments replace keys of sections.

    `rows` replaces the (text, label) rows of train.csv.
    """
    import tomli_w

    def write(folder: Path, *, rows: list[tuple[str, str]] | None = None, **sections: Any) -> Path:
        if rows is None:
            rows = [(f"{LINES[i % 6]} {LINES[(i // 6) % 6]}", ["good", "bad"][i % 2]) for i in range(60)]
        with (folder / "train.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("review", "verdict"), *rows])
        raw: dict[str, Any] = {
            "name": "small",
            "model": {"backbone": str(tiny_bert), "max_length": 24},
            "lora": {"rank": 4, "alpha": 8.0, "target_modules": ["query", "value"], "last_layers": 2},
            "task": {"kind": "sequence_classification", "labels": ["bad", "good"]},
            "training": {"rounds": 3, "local_steps": 2, "learning_rate": 0.05},
            "privacy": {"delta": 1e-5, "sample_rate": 0.25, "noise_multiplier": 1.0},
            "data": {"train": {"path": "train.csv", "columns": {"text": "review", "label": "verdict"}}, "num_test": 12},
            "partition": {"num_sites": 3},
            "simulation": {"threads": 1},
        }
        for key, value in sections.items():
            raw[key] = {**raw[key], **value} if isinstance(value, dict) and key in raw else value
        (folder / "scenario.toml").write_text(tomli_w.dumps(raw), encoding="utf-8")
        return folder / "scenario.toml"

    return write


@pytest.fixture
def scenario_file(write_scenario: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Return `write_scenario` for this test's own folder."""
    return functools.partial(write_scenario, tmp_path)


@dataclass(frozen=True)
class Outcome:
    """How a command line ended."""

    status: int
    out: str
    err: str


@pytest.fixture
def silotune(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Return a function that runs one `silotune` command line in this process."""
    import cli

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        try:
            cli.main([str(argument) for argument in arguments])
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        out, err = capsys.readouterr()
        return Outcome(status, out, err)

    return run
