"""Tokenizers: what one may ask for, before and after a library reads it, and how it is loaded.

A tokenizer is a small program in JSON: steps that rewrite a text, regular expressions, tables. Some take a library hours for one
text, or all of the memory.

Guarantee (tests: tests/shared/models/test_model_files.py, test_tokenizers.py): a tokenizer beyond these bounds is refused within
seconds, by what was found and what is allowed, whichever file it comes from.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from shared.errors import ModelError, Panicked, excerpt, panics_as_errors
from shared.models.bounds import beyond, check_entries, nested, objects

MOST_TOKENS = 1 << 20
"""Of a vocabulary, and merges of one; XLM-V has 902,000 tokens."""
_MOST_PIECE = 1000
"""Characters of a token, each of which a continuation may be made of; the longest published ones are runs of 128 blanks."""
_MOST_UNIGRAM_PIECE = 128
"""Such a model tries all pieces at every place of a text, so that time grows with the longest; SentencePiece makes at most 16."""
_MOST_WORD = 200
"""Characters of a word that WordPiece takes apart, in the square of which its time grows; BERT's is 100."""
_MOST_AFFIX = 100
"""Characters of what a tokenizer puts before or behind a part of a word, each time that it looks one up."""
_MOST_STEPS = 100
"""One after the other, each over the whole text."""
_MOST_GROWTH = 400
_GROWTH = {"NFKC": 18, "NFKD": 18, "ByteLevel": 4}
"""Characters that one may become: U+FDFA has 18 (Unicode Standard Annex 15), and UTF-8 writes one as up to four bytes."""
_MOST_PIECES = 16
"""Of what is put around a text: tokens at its begin and end, and the text, once."""
_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "tokenizer.model")

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


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer in `folder`; what a person wrote is text to it, also where it looks like a control token.

    Raises:
        ModelError: if there is none, or none that can be used.
    """
    from transformers import AutoTokenizer

    # transformers would make do with an empty vocabulary, in which every word is unknown.
    if not any((folder / name).exists() for name in _FILES):
        raise ModelError(f"{folder} holds no tokenizer (none of {', '.join(_FILES)}); put the backbone's there.")
    try:
        with panics_as_errors():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, split_special_tokens=True
            )
            tokenizer("a text")  # its steps are read when they are first used
        if not (folder / "tokenizer.json").exists():  # it was made of other files, which nobody has looked at
            check_tokenizer(folder, json.loads(tokenizer.backend_tokenizer.to_str()))
    except ModelError:
        raise
    except Panicked:
        raise ModelError(f"no usable tokenizer in {folder}: its files are damaged; restore them.") from None
    except Exception as error:  # a damaged file can fail anywhere inside transformers
        raise ModelError(f"no usable tokenizer in {folder}: {' '.join(str(error).split())[:300]}") from None
    return tokenizer


def check_tokenizer(path: Path, content: Any) -> None:
    """Refuse what a `tokenizer.json` asks for and a library could not bear.

    Args:
        path: named in errors.

    Raises:
        ModelError: saying what was found and what is allowed.
    """
    content = content if isinstance(content, dict) else {}
    model = content.get("model")
    _check_model(path, model if isinstance(model, dict) else {})
    rest = {key: value for key, value in content.items() if key != "model"}
    check_entries(path, rest)
    _check_pieces(path, [one.get("content") for one in objects(rest.get("added_tokens"))], _MOST_PIECE)
    for one in objects(rest):
        _check_template(path, one)
        regex = one.get("Regex")
        if regex is not None and regex not in REGEXES:
            raise ModelError(
                f"{path} holds the regular expression {excerpt(regex, 120)}, which is that of no published tokenizer known here, "
                "so nobody can say how long it takes. Use the tokenizer that the backbone was published with; one of your "
                "own may split by the expression of GPT-2, or without any, by ByteLevel, Whitespace or Metaspace."
            )
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        steps = sum("type" in one for one in objects(rest.get(name)))
        if steps > _MOST_STEPS:
            raise beyond(path, f"has {steps:,} steps in its {name}", f"{_MOST_STEPS}")
    for names in (("normalizer", "pre_tokenizer"), ("decoder",)):
        growth = 1
        for one in objects([rest.get(name) for name in names]):
            growth *= 1 if names == ("decoder",) and one.get("type") == "ByteLevel" else _growth(path, one)
            if growth > _MOST_GROWTH:
                raise beyond(path, f"may make a text {growth:,} times as long", f"{_MOST_GROWTH}")


def _check_model(path: Path, model: Mapping[str, Any]) -> None:
    for name in ("vocab", "merges"):
        found = model.get(name)
        if isinstance(found, list | dict) and len(found) > MOST_TOKENS:
            raise beyond(path, f"has {len(found):,} entries of {name}", f"{MOST_TOKENS:,}")
    pieces = model.get("vocab")
    if isinstance(pieces, list):  # of Unigram: pieces with the logarithms of how frequent they are
        _check_pieces(path, [one[0] for one in pieces if isinstance(one, list) and one], _MOST_UNIGRAM_PIECE)
    elif isinstance(pieces, dict):
        _check_pieces(path, pieces, _MOST_PIECE)
    word = model.get("max_input_chars_per_word", 0)
    if isinstance(word, int) and word > _MOST_WORD:
        raise beyond(path, f"says max_input_chars_per_word {word:,}", f"{_MOST_WORD:,}")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "unk_token"):
        found = model.get(name)
        if isinstance(found, str) and len(found) > _MOST_AFFIX:
            raise beyond(path, f"has a {name} of {len(found):,} characters", f"{_MOST_AFFIX:,}")
    if model.get("dropout"):
        raise ModelError(
            f"{path} says dropout {excerpt(model['dropout'])}: a text would have other tokens each time that it is read, so no "
            "answer could be had again. Set it to null."
        )


def _check_pieces(path: Path, pieces: Iterable[Any], most: int) -> None:
    longest = max((len(one) for one in pieces if isinstance(one, str)), default=0)
    if longest > most:
        raise beyond(path, f"has a token of {longest:,} characters", f"{most:,}")


def _growth(path: Path, step: Mapping[str, Any]) -> int:
    """Return how many characters a step may make of one."""
    kind = str(step.get("type"))
    added = {"Replace": step.get("content"), "Prepend": step.get("prepend")}.get(kind)
    if isinstance(added, str):
        return max(1, len(added))
    return _longest_replacement(path, step) if kind == "Precompiled" else _GROWTH.get(kind, 1)


def _longest_replacement(path: Path, step: Mapping[str, Any]) -> int:
    """Return the most characters that SentencePiece's table of replacements has for one.

    The table is a trie, before it its length in bytes (four, little-endian), behind it the replacements in UTF-8, each ended by
    a zero byte (https://github.com/google/sentencepiece, src/normalizer.cc, `DecodePrecompiledCharsMap`).
    """
    try:
        table = base64.b64decode(step.get("precompiled_charsmap") or "", validate=True)
        size = int.from_bytes(table[:4], "little")
        if size % 4 or 4 + size > len(table):
            raise ValueError("its trie is longer than the table")
        return max(map(len, table[4 + size :].decode().split("\0")), default=1) or 1
    except (TypeError, ValueError):
        raise ModelError(
            f"{path} holds a table of replacements (Precompiled) that is damaged; restore the file."
        ) from None


def _check_template(path: Path, one: Mapping[str, Any]) -> None:
    """Refuse a post-processor that repeats the text, or adds many tokens."""
    if one.get("type") != "TemplateProcessing":
        return
    for inner in nested(dict(one)):
        if isinstance(inner, list) and len(inner) > _MOST_PIECES:
            raise beyond(path, f"puts a text together of {len(inner):,} pieces", f"{_MOST_PIECES}")
    for name, sequences in (("single", 1), ("pair", 2)):
        template = one.get(name)
        found = sum("Sequence" in piece for piece in objects(template))
        if found > sequences:
            raise beyond(path, f"repeats a text: {found} sequences in {name}", f"{sequences}")
