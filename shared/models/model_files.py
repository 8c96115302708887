"""How large the files of a model may be, and what its tokenizer and configuration may ask for, before a library reads them.

Libraries take such files at their word: a number in `config.json` becomes memory, a regular expression in `tokenizer.json`
hours (`shared.models.tokenizers`). What is loaded is looked at here first, whether it came with a model or is its backbone.

Guarantee (tests: tests/shared/models/test_model_files.py): a file beyond these bounds is refused within seconds,
by what was found and what is allowed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from shared.errors import ModelError
from shared.files.bounded import MOST_TEXT_BYTES, read_named_bytes
from shared.limits import MAX_LABELS
from shared.models.bounds import beyond, check_entries, objects
from shared.models.tokenizers import MOST_TOKENS, check_tokenizer

MOST_FILES = 1000
MOST_BYTES = 64 << 30
MOST_SIZE = 1 << 24
MOST_LAYERS = 1000
_MISSING_NUMBERS = 1 << 24
"""Numbers that a model may have beyond twice those that are stored: a pooler that nobody uses, tables that are computed."""

_COUNTS = re.compile(r"(n|num|max)_.*|.*_(size|dim|inner|heads|layers|labels|positions|embeddings)|dim")
_LAYERS = re.compile(r"(?!max_window_).*layers?")  # of Qwen, from which of its layers on a window counts
_TEXTS = (".json", ".jsonl", ".txt", ".md", ".jinja", ".model")


def check_sizes(folder: Path, names: Collection[str]) -> None:
    """Refuse files of a model, by their places below `folder`, that are too many or too large.

    Raises:
        ModelError: saying what was found and what is allowed.
    """
    if len(names) > MOST_FILES:
        raise ModelError(f"{folder} holds {len(names):,} files of a model; at most {MOST_FILES:,} are taken.")
    total = 0
    for path in (folder / name for name in names):
        size = path.stat().st_size if path.is_file() else 0
        total += size
        if path.suffix in _TEXTS and size > MOST_TEXT_BYTES:
            raise beyond(path, f"has {size:,} bytes", f"{MOST_TEXT_BYTES:,}")
    if total > MOST_BYTES:
        raise beyond(folder, f"holds a model of {total:,} bytes", f"{MOST_BYTES:,}")


def check_model_files(folder: Path) -> None:
    """Refuse what a library would read in `folder` and could not bear, whether or not anything lists it.

    Raises:
        ModelError: saying what was found and what is allowed.
    """
    check_sizes(folder, [name for name in (*_CHECKS, *_TABLES) if (folder / name).exists()])
    for name, check in _CHECKS.items():
        if (folder / name).exists():
            check(folder / name, _read(folder / name))


def check_weights(folder: Path, build: Callable[[], nn.Module]) -> None:
    """Refuse a configuration that describes a far larger model than the weights in `folder` are: the rest would be made up.

    Args:
        build: makes the model that config.json describes; nothing in it takes memory.

    Raises:
        ModelError: saying how large both are.
    """
    import torch
    from safetensors import safe_open

    stored, tensors = 0, 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                stored += math.prod(file.get_slice(name).get_shape())
                tensors += 1
    config = _read(folder / "config.json")
    for key, value in _counts(config):
        if _LAYERS.fullmatch(key) and value > tensors:
            raise beyond(folder / "config.json", f"says {key} {value:,}", f"{tensors:,}, as many as there are tensors")
    with torch.device("meta"):
        model = build()
    described = sum(one.numel() for one in (*model.parameters(), *model.buffers()))
    if described > 2 * stored + _MISSING_NUMBERS:
        raise beyond(
            folder / "config.json", f"describes a model of {described:,} numbers", f"those {stored:,} that are there"
        )


def _read(path: Path) -> Any:
    try:
        return json.loads(read_named_bytes(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{path} cannot be read as JSON ({type(error).__name__}); restore it, or make the model anew."
        ) from None


def _check_config(path: Path, content: Any) -> None:
    check_entries(path, content)
    for key, value in _counts(content):
        most = MOST_LAYERS if _LAYERS.fullmatch(key) else MAX_LABELS if key.endswith("labels") else MOST_SIZE
        if value > most:
            raise beyond(path, f"says {key} {value:.4g}", f"{most:,}")


def _check_vocabulary(path: Path, content: Any) -> None:
    if isinstance(content, list | dict) and len(content) > MOST_TOKENS:
        raise beyond(path, f"has {len(content):,} entries", f"{MOST_TOKENS:,}")


_CHECKS: Mapping[str, Callable[[Path, Any], None]] = {
    "config.json": _check_config,
    "tokenizer.json": check_tokenizer,
    "vocab.json": _check_vocabulary,
    **dict.fromkeys(
        ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json"),
        check_entries,
    ),
}
_TABLES = (
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
)


def _counts(content: Any) -> Iterator[tuple[str, float]]:
    """Yield what numbers a configuration has for sizes and counts, at any depth."""
    for one in objects(content):
        for key, value in one.items():
            if _COUNTS.fullmatch(key) and isinstance(value, int | float) and not isinstance(value, bool):
                yield key, value
