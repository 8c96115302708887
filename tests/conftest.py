"""Small real models for tests: BERT and GPT-2 architectures with random weights and tokenizers trained on a few lines."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

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


@pytest.fixture(scope="session", autouse=True)
def _threads() -> Iterator[None]:
    torch.set_num_threads(1)
    yield


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of 3 layers and hidden size 32 in a local folder, safetensors, with its own WordPiece tokenizer."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-bert")
    trained = BertWordPieceTokenizer(lowercase=True)
    trained.train_from_iterator(LINES, vocab_size=200, min_frequency=1, show_progress=False)
    trained.save_model(str(folder))
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt"), tokenizer_object=trained._tokenizer).save_pretrained(folder)
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
    PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=3, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def classification_job(tiny_bert: Path) -> Callable[..., Any]:
    """Return a builder of small classification jobs; keyword arguments are sections that replace keys."""
    return _job_builder({"backbone": str(tiny_bert), "max_length": 24}, "sequence_classification", ["query", "value"])


@pytest.fixture(scope="session")
def language_job(tiny_gpt2: Path) -> Callable[..., Any]:
    """Return a builder of small causal language modelling jobs."""
    return _job_builder({"backbone": str(tiny_gpt2), "max_length": 24}, "causal_lm", ["c_attn"])


def _job_builder(model: dict[str, Any], kind: str, targets: list[str]) -> Callable[..., Any]:
    from shared.config import Job, parse

    def build(**sections: Any) -> Job:
        raw: dict[str, Any] = {
            "name": "test",
            "model": model,
            "lora": {"rank": 4, "alpha": 8.0, "target_modules": targets, "last_layers": 2},
            "task": {"kind": kind, "labels": ["bad", "good"] if kind == "sequence_classification" else []},
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
