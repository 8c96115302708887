"""The lines of Python in a model card: they run as they stand, in the model's folder and without Silotune.

Each leaves `texts` and `logits` behind, which the tests compare with what the run's model says.
"""

from __future__ import annotations

from typing import Any

from shared.job.job import Job
from shared.runtime.export.folder import ModelRecord
from shared.runtime.export.merged import CLASSES

_TEXTS = 'texts = ["The first text.", "A second one, which is a little longer."]\n'
_PAIRS = 'texts = [("What opens at nine?", "The shop opens at nine."), ("What opens at nine?", "It rained.")]\n'
_WORDS = 'texts = [["A", "first", "text", "."], ["Another", "one", "in", "words"]]\n'

_MERGED = """import torch
from transformers import {cls}, AutoTokenizer

folder = "."  # or the model's name on the hub
tokenizer = AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
model = {cls}.from_pretrained(folder)
"""
_MERGED_BATCH = """batch = tokenizer({given}, truncation=True, padding=True, return_tensors="pt"{words})
with torch.no_grad():
    logits = model(**batch).logits
"""
_MERGED_GENERATE = """batch = tokenizer({text}, add_special_tokens=False, return_tensors="pt")
tokens = model.generate(**batch, max_new_tokens=20, do_sample=False, pad_token_id=tokenizer.eos_token_id)
print(tokenizer.decode(tokens[0, batch["input_ids"].shape[1] :], skip_special_tokens=True))
with torch.no_grad():
    logits = model(**batch).logits
"""
_ONNX = """import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")
tokenizer.encode_special_tokens = True  # what a person wrote is text
session = onnxruntime.InferenceSession("model.onnx")
"""
_ONNX_BATCH = """tokenizer.enable_truncation({max_length})
tokenizer.enable_padding(pad_id={pad_id}, pad_token={pad!r})
batch = tokenizer.encode_batch(texts{words})
inputs = {{
    "input_ids": np.array([text.ids for text in batch], np.int64),
    "attention_mask": np.array([text.attention_mask for text in batch], np.int64),
}}
logits = session.run(["logits"], inputs)[0]
"""
_ONNX_GENERATE = """caches = [one for one in session.get_inputs() if one.name.startswith("past_key_values")]
past = {{one.name: np.zeros((1, one.shape[1], 0, one.shape[3]), np.float32) for one in caches}}
tokens = tokenizer.encode({text}, add_special_tokens=False).ids
new, answer, steps = tokens, [], []
for _ in range(20):
    seen = np.ones((1, len(tokens) + len(answer)), np.int64)
    step, *cache = session.run(None, {{"input_ids": np.array([new], np.int64), "attention_mask": seen, **past}})
    past = dict(zip(past, cache))
    steps.append(step)
    new = [int(step[0, -1].argmax())]
    if new == [{end}]:
        break
    answer += new
print(tokenizer.decode(answer))
logits = np.concatenate(steps, axis=1)
"""
_ONNX_IMAGE = """import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
# One image a row: {size} numbers from {low:g} to {high:g}, channel by channel and row by row.
texts = np.full((1, {size}), {low!r}, np.float32)
logits = session.run(["logits"], {{"pixels": texts}})[0]
labels = {labels!r}
print(labels[int(logits[0].argmax())])
"""


def snippet(job: Job, record: ModelRecord, tokenizer: Any) -> str:
    """Return the lines; see the module.

    Args:
        tokenizer: of the backbone; None of images.
    """
    if record.task == "image_classification":
        assert job.task.pixel_range is not None  # noqa: S101 (checked by TaskConfig)
        low, high = job.task.pixel_range
        return _ONNX_IMAGE.format(size=job.task.num_pixels, low=low, high=high, labels=list(record.labels))
    generates = record.task in ("causal_lm", "replies")
    text = 'texts[0] + "\\n"' if record.task == "replies" else "texts[0]"
    texts = {"pair_matching": _PAIRS, "token_classification": _WORDS}.get(record.task, _TEXTS)
    by_word = record.task == "token_classification"
    if record.format == "merged":
        begin = _MERGED.format(cls=CLASSES[record.task]) + texts
        if generates:
            return begin + _MERGED_GENERATE.format(text=text)
        given = "*zip(*texts)" if record.task == "pair_matching" else "texts"
        words = ", is_split_into_words=True" if by_word else ""
        return begin + _MERGED_BATCH.format(given=given, words=words) + _shown(job, record, "model.config.id2label")
    onnx = _ONNX + texts
    if generates:
        return onnx + _ONNX_GENERATE.format(text=text, end=tokenizer.eos_token_id)
    words = ", is_pretokenized=True" if by_word else ""
    pad = (tokenizer.pad_token_id, tokenizer.pad_token)
    if tokenizer.pad_token is None:  # of a GPT-2; whichever stands there is not seen
        pad = (0, tokenizer.convert_ids_to_tokens(0))
    batch = _ONNX_BATCH.format(max_length=record.max_length, pad_id=pad[0], pad=pad[1], words=words)
    labels = f"labels = {list(record.labels)!r}\n" if record.labels else ""
    return onnx + batch + labels + _shown(job, record, "labels")


def _shown(job: Job, record: ModelRecord, labels: str) -> str:
    """Return the lines that print answers."""
    merged = record.format == "merged"
    if job.task.target_range is not None:
        low, high = job.task.target_range
        clip = f"logits[:, 0].clamp({low!r}, {high!r})" if merged else f"logits[:, 0].clip({low!r}, {high!r})"
        return f"for text, score in zip(texts, {clip}):\n    print(round(float(score), 3), text)\n"
    if record.task == "token_classification":
        numbers = "batch.word_ids(i)" if merged else "batch[i].word_ids"
        return (
            "for i, words in enumerate(texts):\n"
            f"    for place, word in enumerate({numbers}):\n"
            f"        if word is not None and word not in {numbers}[:place]:  # a word's tag stands at its first piece\n"
            f"            print(words[word], {labels}[int(logits[i, place].argmax())])\n"
        )
    if merged:
        shares = "shares = logits.softmax(dim=-1)\n"
    else:
        shares = "shares = np.exp(logits - logits.max(axis=-1, keepdims=True))\nshares /= shares.sum(axis=-1, keepdims=True)\n"
    return shares + (
        "for text, row in zip(texts, shares):\n"
        f"    print({labels}[int(row.argmax())], round(float(row.max()), 3), text)\n"
    )
