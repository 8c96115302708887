"""Text stays text, and a long one costs what a short one does."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertTokenizer, PreTrainedTokenizerFast

from shared.errors import DataError
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.runtime.runtime import load_runtime
from shared.tasks import TASKS
from shared.tasks.tokens import read_part, read_words

CONTROL = ("[SEP]", "[CLS]", "[MASK]", "[PAD]", "[UNK]", "<|endoftext|>", "<s>", "</s>", "<mask>", "<pad>", "<unk>")
WORDS = ["pain", "fever", "a-b-c", "北京", "naïve,", "x" * 150, "(well)", "12.5", "😀", "\u200b"]


@pytest.fixture(scope="module")
def bert() -> Any:
    job = Job.model_validate(
        {"name": "t", "task": {"kind": "sequence_classification", "labels": ["a", "b"]}, "training": {"rounds": 1}}
    )
    return load_runtime(job, ComputeConfig()).tokenizer


def roberta_like() -> Any:
    """A byte-level BPE as of RoBERTa and GPT-2, trained on a few words."""
    from tokenizers import trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator([" ".join(WORDS)] * 9, trainer)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        additional_special_tokens=["<|endoftext|>"],
        split_special_tokens=True,
        **dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), special, strict=False)),
    )


def texts(seed: int) -> list[str]:
    draw = random.Random(seed)
    made = [" ".join(draw.choices(WORDS, k=draw.randint(1, 400))) for _ in range(20)]
    return [*made, "北" * 5000, "x" * 9000, "a" + " " * 9000 + "b", "one\ntwo\n" * 900, ".,;" * 3000]


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("max_length", [2, 8, 64])
def test_the_tokens_of_a_part_are_those_of_the_whole(
    kind: str, max_length: int, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue("bert") if kind == "bert" else roberta_like()
    for text in texts(max_length):
        words = text.split()
        if len(text) > 1000 * max_length and len(words) < 5:
            continue  # one endless word, or blanks
        whole = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
        part = read_part(text, tokenizer, max_length)
        assert tokenizer(part, truncation=True, max_length=max_length)["input_ids"] == whole
        if len(words) < 5:
            continue
        last = tokenizer(text, add_special_tokens=False)["input_ids"][-max_length:]
        part = read_part(text, tokenizer, max_length, end=True)
        assert tokenizer(part, add_special_tokens=False)["input_ids"][-max_length:] == last
        options = {"is_split_into_words": True, "truncation": True, "max_length": max_length}
        found = tokenizer(read_words(words, tokenizer, max_length), **options)["input_ids"]
        assert found == tokenizer(words, **options)["input_ids"]


def test_short_texts_are_not_touched(bert: Any) -> None:
    text = "pain " * 1000
    assert read_part(text, bert, 64) is text


@pytest.mark.parametrize("piece", ["pain and fever ", "北京", "x", "a,b;", "\n", "(", "é"])
def test_twenty_megabytes_take_no_more_than_seconds(piece: str, bert: Any) -> None:
    text = "start " + piece * (20 * 2**20 // len(piece.encode()))
    began = time.monotonic()
    ids = bert(read_part(text, bert, 64), truncation=True, max_length=64)["input_ids"]
    assert time.monotonic() - began < 10
    assert 2 < len(ids) <= 64


# --- what looks like a control token is text ---


def test_the_loaded_tokenizer_splits_what_looks_like_a_control_token(bert: Any) -> None:
    for word in CONTROL:
        ids = bert(f"fine {word} ok")["input_ids"]
        assert (ids[0], ids[-1]) == (bert.cls_token_id, bert.sep_token_id)
        assert not {*ids[1:-1]} & {*bert.all_special_ids}
        ids = bert(["fine", word], is_split_into_words=True)["input_ids"]
        assert not {*ids[1:-1]} & {*bert.all_special_ids}
        ids = bert([f"a {word}"], [f"{word} b"])["input_ids"][0]
        assert ids.count(bert.sep_token_id) == 2


def test_honest_texts_keep_their_tokens(bert: Any) -> None:
    plain = ["It is all well; 12 mg, b.i.d.", "naïve café 北京", "a [brace] and <angle> & more"]
    free = bert(plain, split_special_tokens=False)["input_ids"]
    assert bert(plain)["input_ids"] == free


def test_byte_level_and_slow_tokenizers(tmp_path: Path) -> None:
    fast = roberta_like()
    for word in CONTROL:
        ids = fast(f"fine {word} ok")["input_ids"]
        assert not {*ids[1:-1]} & {*fast.all_special_ids}
    backend = Tokenizer(
        models.WordPiece({"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "[": 5, "sep": 6, "]": 7})
    )
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n[\nsep\n]\n")
    bert = BertTokenizer(str(vocabulary), split_special_tokens=True)
    assert bert("[SEP]", add_special_tokens=False)["input_ids"] == [5, 6, 7]


# --- tasks take text and nothing else ---


@pytest.mark.parametrize("value", [5, {"a": "PRIVATE"}, ["PRIVATE"], b"PRIVATE", True, "PRIVATE \ud800"])
@pytest.mark.parametrize(
    ("kind", "record"),
    [
        ("sequence_classification", {"text": None, "label": "a"}),
        ("pair_matching", {"text": "fine", "pair": None, "label": "a"}),
        ("regression", {"text": None, "score": 1.0}),
        ("causal_lm", {"text": None}),
        ("replies", {"prompt": "fine", "response": None}),
        ("token_classification", {"tokens": None, "tags": ["O"]}),
    ],
)
def test_a_task_refuses_what_is_no_text(value: object, kind: str, record: dict[str, Any], bert: Any) -> None:
    if kind == "token_classification":
        value = [value]
    own: dict[str, Any] = {"kind": kind}
    if kind == "regression":
        own["target_range"] = [0, 5]
    elif kind == "token_classification":
        own["labels"] = ["O", "B-X"]
    elif kind not in ("causal_lm", "replies"):
        own["labels"] = ["a", "b"]
    job = Job.model_validate({"name": "t", "task": own, "training": {"rounds": 1}})
    task = TASKS[kind](job.task, job.model)
    broken = {role: value if cell is None else cell for role, cell in record.items()}
    with pytest.raises(DataError, match="record 1 has") as caught:
        task.encode([broken], roberta_like() if kind == "replies" else bert, 16)
    assert "PRIVATE" not in str(caught.value)
