"""How large the files of a model may be, and what its tokenizer and configuration may ask for, before a library reads them.

Libraries take such files at their word: a number in `config.json` becomes memory, a regular expression in `tokenizer.json`
hours. What is loaded is looked at here first, whether it came with a model or is its backbone.

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

from shared.errors import ModelError, excerpt
from shared.files.bounded import MOST_TEXT_BYTES, read_named_bytes
from shared.limits import MAX_LABELS

MOST_FILES = 1000
MOST_BYTES = 64 << 30
MOST_TOKENS = 1 << 20
"""Of a vocabulary, and merges of one; XLM-V has 902,000 tokens."""
MOST_ENTRIES = 10_000
"""Of any list or object in other JSON files; the longest are labels and tokens that were added."""
MOST_SIZE = 1 << 24
MOST_LAYERS = 1000
_MOST_GROWTH = 100
_MOST_WORD = 1000
_MOST_AFFIX = 100
"""Characters of what a tokenizer puts before or behind a part of a word, each time that it looks one up."""
_MOST_PIECES = 16
"""Of what is put around a text: tokens at its begin and end, and the text, once."""
_MISSING_NUMBERS = 1 << 24
"""Numbers that a model may have beyond twice those that are stored: a pooler that nobody uses, tables that are computed."""

REGEXES = frozenset(
    {
        " ",
        r" {2,}",
        r"\s+",
        r"\s{2,}|[\n\r\t]",
        r"[\n\r\t]",
        # GPT-2, Llama 3, Qwen 2, Qwen 3.5, GPT-4o
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    }
)
"""Of published tokenizers, whose time is known: nobody can say of another one how long it takes on a long text."""

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
            raise _beyond(path, f"has {size:,} bytes", f"{MOST_TEXT_BYTES:,}")
    if total > MOST_BYTES:
        raise _beyond(folder, f"holds a model of {total:,} bytes", f"{MOST_BYTES:,}")


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
            raise _beyond(folder / "config.json", f"says {key} {value:,}", f"{tensors:,}, as many as there are tensors")
    with torch.device("meta"):
        model = build()
    described = sum(one.numel() for one in (*model.parameters(), *model.buffers()))
    if described > 2 * stored + _MISSING_NUMBERS:
        raise _beyond(
            folder / "config.json", f"describes a model of {described:,} numbers", f"those {stored:,} that are there"
        )


def _read(path: Path) -> Any:
    try:
        return json.loads(read_named_bytes(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{path} cannot be read as JSON ({type(error).__name__}); restore it, or make the model anew."
        ) from None


def _check_tokenizer(path: Path, content: Any) -> None:
    content = content if isinstance(content, dict) else {}
    model = content.get("model")
    for name, most in (("vocab", MOST_TOKENS), ("merges", MOST_TOKENS)):
        found = model.get(name) if isinstance(model, dict) else None
        if isinstance(found, list | dict) and len(found) > most:
            raise _beyond(path, f"has {len(found):,} entries of {name}", f"{most:,}")
    word = model.get("max_input_chars_per_word", 0) if isinstance(model, dict) else 0
    if isinstance(word, int) and word > _MOST_WORD:
        raise _beyond(path, f"says max_input_chars_per_word {word:,}", f"{_MOST_WORD:,}")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "unk_token"):
        found = model.get(name) if isinstance(model, dict) else None
        if isinstance(found, str) and len(found) > _MOST_AFFIX:
            raise _beyond(path, f"has a {name} of {len(found):,} characters", f"{_MOST_AFFIX:,}")
    rest = {key: value for key, value in content.items() if key != "model"}
    _check_entries(path, rest)
    growth = 1
    for one in _objects(rest):
        _check_template(path, one)
        regex = one.get("Regex")
        if regex is not None and regex not in REGEXES:
            raise ModelError(
                f"{path} holds the regular expression {excerpt(regex, 120)}, which is that of no published tokenizer known here, "
                "so nobody can say how long it takes. Use the tokenizer that the backbone was published with; one of your "
                "own may split by the expression of GPT-2, or without any, by ByteLevel, Whitespace or Metaspace."
            )
        added = {"Replace": one.get("content"), "Prepend": one.get("prepend")}.get(str(one.get("type")))
        if isinstance(added, str):
            growth *= max(1, len(added))
        if growth > _MOST_GROWTH:
            raise _beyond(path, f"may make a text {growth:,} times as long", f"{_MOST_GROWTH}")


def _check_template(path: Path, one: Mapping[str, Any]) -> None:
    """Refuse a post-processor that repeats the text, or adds many tokens."""
    if one.get("type") != "TemplateProcessing":
        return
    for inner in _nested(dict(one)):
        if isinstance(inner, list) and len(inner) > _MOST_PIECES:
            raise _beyond(path, f"puts a text together of {len(inner):,} pieces", f"{_MOST_PIECES}")
    for name, sequences in (("single", 1), ("pair", 2)):
        template = one.get(name)
        found = sum("Sequence" in piece for piece in _objects(template))
        if found > sequences:
            raise _beyond(path, f"repeats a text: {found} sequences in {name}", f"{sequences}")


def _check_config(path: Path, content: Any) -> None:
    _check_entries(path, content)
    for key, value in _counts(content):
        most = MOST_LAYERS if _LAYERS.fullmatch(key) else MAX_LABELS if key.endswith("labels") else MOST_SIZE
        if value > most:
            raise _beyond(path, f"says {key} {value:.4g}", f"{most:,}")


def _check_vocabulary(path: Path, content: Any) -> None:
    if isinstance(content, list | dict) and len(content) > MOST_TOKENS:
        raise _beyond(path, f"has {len(content):,} entries", f"{MOST_TOKENS:,}")


def _check_entries(path: Path, content: Any) -> None:
    for one in _nested(content):
        if len(one) > MOST_ENTRIES:
            raise _beyond(path, f"has {len(one):,} entries in one place", f"{MOST_ENTRIES:,}")


_CHECKS: Mapping[str, Callable[[Path, Any], None]] = {
    "config.json": _check_config,
    "tokenizer.json": _check_tokenizer,
    "vocab.json": _check_vocabulary,
    **dict.fromkeys(
        ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json"),
        _check_entries,
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
    for one in _objects(content):
        for key, value in one.items():
            if _COUNTS.fullmatch(key) and isinstance(value, int | float) and not isinstance(value, bool):
                yield key, value


def _objects(content: Any) -> Iterator[dict[str, Any]]:
    return (one for one in _nested(content) if isinstance(one, dict))


def _nested(content: Any) -> Iterator[list[Any] | dict[str, Any]]:
    """Yield every list and object in some JSON, the outermost first."""
    waiting = [content]
    while waiting:
        one = waiting.pop()
        if isinstance(one, list | dict):
            yield one
            waiting += one.values() if isinstance(one, dict) else one


def _beyond(path: Path, found: str, allowed: str) -> ModelError:
    return ModelError(
        f"{excerpt(str(path), 200)} {found}; at most {allowed} may be. Use the model as it was published."
    )
