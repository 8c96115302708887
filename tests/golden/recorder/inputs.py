"""Small inputs that are the same on every call: backbones with random weights, records, scenario files.

They are made here and not taken from the product's tests, for both sides of a comparison must get the same.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w

LINES = [
    "the film is a quiet joy from start to end",
    "a dull plot and a worse script",
    "what a bright and funny cast",
    "nobody should have to sit through this",
    "it drags, it bores, it ends too late",
    "warm, clever and very well made",
]
LABELS = ["good", "bad", "good", "bad", "bad", "good"]
BACKBONE = "backbone"
"""Name of a made backbone's folder: an input, and not recorded."""


def texts(count: int) -> list[str]:
    """Return `count` different texts of one to three sentences."""
    return [f"{number} " + ", ".join(LINES[(number + k) % 6] for k in range(1 + number % 3)) for number in range(count)]


def label(number: int) -> str:
    """Return the label that belongs to a text of `texts`."""
    return LABELS[number % 6]


def write_table(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a CSV file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write a JSONL file."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")


def labelled_texts(folder: Path, count: int) -> dict[str, Any]:
    """Write `train.csv` with `count` labelled texts and return `[data.train]` for it."""
    rows = [(text, label(number)) for number, text in enumerate(texts(count))]
    write_table(folder / "train.csv", ("review", "verdict"), rows)
    return {"path": "train.csv", "columns": {"text": "review", "label": "verdict"}}


def tiny_bert(folder: Path) -> None:
    """Make a BERT of three layers of width 32, whose pieces are words and letters of `LINES`."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    place = folder / BACKBONE
    place.mkdir()
    text = " ".join(LINES).replace(",", " ,")
    letters = sorted(set(text) - {" "}) + list("0123456789")
    pieces = [*letters, *(f"##{c}" for c in letters), *sorted(set(text.split()) - set(letters))]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]
    (place / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    made = BertWordPieceTokenizer(str(place / "vocab.txt"), lowercase=True)
    tokenizer = BertTokenizerFast(vocab_file=str(place / "vocab.txt"), tokenizer_object=made._tokenizer)
    tokenizer.save_pretrained(place)
    _save(
        BertModel,
        BertConfig(
            vocab_size=256,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
        ),
        place,
    )


def tiny_gpt2(folder: Path) -> None:
    """Make a GPT-2 of three layers of width 32, whose tokens are the 256 bytes and an end."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    place = folder / BACKBONE
    place.mkdir()
    trained = ByteLevelBPETokenizer()
    end = "<|endoftext|>"
    # Bytes alone: the library breaks ties between merges differently in each process.
    trained.train_from_iterator(LINES, vocab_size=257, special_tokens=[end], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token=end, bos_token=end)
    tokenizer.save_pretrained(place)
    config = GPT2Config(vocab_size=260, n_embd=32, n_layer=3, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    _save(GPT2LMHeadModel, config, place)


def _save(architecture: Any, config: Any, place: Path) -> None:
    import torch

    torch.manual_seed(0)
    architecture(config).save_pretrained(place, safe_serialization=True)


def write_scenario(folder: Path, name: str = "scenario", **sections: Any) -> None:
    """Write a scenario file for a made BERT; keyword arguments replace keys of sections, or whole sections;
    None removes one."""
    raw: dict[str, Any] = {
        "name": "golden",
        "model": {"backbone": BACKBONE, "max_length": 24},
        "lora": {"rank": 4, "alpha": 8.0, "target_modules": ["query", "value"], "last_layers": 2},
        "task": {"kind": "sequence_classification", "labels": ["bad", "good"]},
        "training": {"rounds": 2, "local_steps": 2, "learning_rate": 0.05},
        "privacy": {"delta": 1e-5, "sample_rate": 0.25, "noise_multiplier": 1.0},
        "data": {"num_test": 12},
        "partition": {"num_sites": 3},
        "simulation": {"threads": 1},
        "compute": {"device": "cpu", "precision": "float32"},
    }
    for key, value in sections.items():
        both = isinstance(value, dict) and key in raw
        raw[key] = {**raw[key], **value} if both else value
    (folder / f"{name}.toml").write_text(tomli_w.dumps(_without_none(raw)), encoding="utf-8")


def _without_none(raw: dict[str, Any]) -> dict[str, Any]:
    """Leave out the keys whose default was taken away: TOML knows no null."""
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in raw.items()
        if value is not None
    }
