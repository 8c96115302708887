"""How long texts are in the tokens of a backbone, and whether it knows their words: its tokenizer and configuration are read,
not its weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared.errors import ModelError
from shared.files.bounded import read_named_text
from shared.job.model import ModelConfig
from shared.job.parsing import parse
from shared.models.backbones import backbone_folder
from shared.models.families import Architecture, architecture_of
from shared.models.tokenizers import load_tokenizer
from simulations.new_scenario.vocabulary import unknown_share

LENGTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""What `model.max_length` is rounded up to, so that it tells next to nothing about single records."""
LONGEST = 256
"""Longer texts are cut unless --max-length says otherwise: time grows faster than length, accuracy hardly."""
SHARE = 0.95
"""Share of the texts that is to fit in full."""
_MOST_MEASURED = 5_000


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """What a scenario has to know of a backbone.

    Attributes:
        name, revision: as in `model`.
        model_type: family, such as "bert".
        positions: longest text, in tokens, that it can read.
        folder: where it is; None for one that the first run makes.
    """

    name: str
    model_type: str
    positions: int
    folder: Path | None
    revision: str | None = None

    @property
    def target_modules(self) -> tuple[str, ...]:
        """The linear modules that LoRA adapts in such a backbone."""
        return self.architecture.targets

    @property
    def architecture(self) -> Architecture:
        """What differs by family."""
        return architecture_of(self.model_type)


def look_at_backbone(name: str, revision: str | None = None) -> Backbone:
    """Return what `name` stands for.

    Raises:
        ModelError: if it cannot be had, or its configuration cannot be read.
        ConfigError: if it is no name of a backbone.
    """
    from simulations.data.small_gpt2 import resolve_backbone

    path = resolve_backbone(name)
    if path != name and not Path(path).is_dir():  # `cache:` names a folder that the first run makes
        return Backbone(name=name, model_type="gpt2", positions=128, folder=None)
    wanted = {"backbone": path} | ({"revision": revision} if revision else {})
    folder = backbone_folder(parse(ModelConfig, wanted, source="--backbone"))
    try:
        config = json.loads(read_named_text(folder / "config.json"))
        kind, positions = (
            str(config["model_type"]),
            int(config.get("max_position_embeddings", config.get("n_positions", 512))),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ModelError(f"{folder} holds no usable config.json ({type(error).__name__}); is it a backbone?") from None
    architecture_of(kind)  # a family that cannot be tuned is refused before anything is measured
    if kind in ("roberta", "xlm-roberta", "camembert"):
        positions -= 2  # the first two rows of their table are for padding
    return Backbone(name=name, model_type=kind, positions=positions, folder=folder, revision=revision)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a backbone's tokenizer makes of texts.

    Attributes:
        lengths: tokens of each.
        unknown: share of their letters that stand in words which it does not know.
    """

    lengths: Sequence[int]
    unknown: float


def fitting_length(backbone: Backbone, lengths: Sequence[int]) -> tuple[int, float]:
    """Return the smallest of `LENGTHS` into which `SHARE` of the texts fit, at most `LONGEST`, and the share that does."""
    measured = np.array(lengths)
    needed = float(np.quantile(measured, SHARE))
    most = min(LONGEST, backbone.positions)
    length = next((length for length in LENGTHS if needed <= length <= most), most)
    return length, float((measured <= length).mean())


def measure(backbone: Backbone, texts: Sequence[Any]) -> Measured:
    """Return what the backbone's tokenizer makes of the texts, or of a part of many.

    Args:
        backbone: one that is not made yet is taken to need a token for three characters, and to know every word.
        texts: texts, pairs of texts, or lists of words.
    """
    texts = texts[:: max(1, len(texts) // _MOST_MEASURED)]
    if backbone.folder is None:
        sizes = (sum(map(len, text if isinstance(text, tuple) else (text,))) for text in texts)
        return Measured(lengths=[2 + size // 3 for size in sizes], unknown=0.0)
    tokenizer = load_tokenizer(backbone.folder)
    if isinstance(texts[0], tuple):
        firsts, seconds = zip(*texts, strict=True)
        encoded = tokenizer(list(firsts), list(seconds))
    else:
        encoded = tokenizer(list(texts), is_split_into_words=isinstance(texts[0], list))
    lengths = [len(ids) for ids in encoded["input_ids"]]
    # Without the library's fast tokenizers nothing tells which tokens make a word.
    unknown = unknown_share(encoded.encodings, texts, tokenizer.unk_token_id) if encoded.encodings else 0.0
    return Measured(lengths=lengths, unknown=unknown)
