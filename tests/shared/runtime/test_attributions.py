"""Integrated gradients: complete, right where the answer is known, harmless to the model, and shown without a way to inject."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from shared.errors import ConfigError, DataError, ModelError
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.models.batches import Example, collate
from shared.runtime.attributions import MOST_GAP, Explanation, Word, explain, integrate
from shared.runtime.export.peft import save_peft_folder
from shared.runtime.inference import load_tuned, predict
from shared.runtime.runtime import Runtime, load_runtime
from shared.tools.explain.report import (
    as_json,
    level_of,
    named,
    parts_of,
    print_explanation,
    ranked,
    render_html,
    signed,
)

CPU = ComputeConfig(device="cpu", precision="float32")
TEXT = "a dull plot, but what a bright and funny cast"
TASKS: dict[str, dict[str, Any]] = {
    "labels": {"kind": "sequence_classification", "labels": ["bad", "good", "other"]},
    "pairs": {"kind": "pair_matching", "labels": ["no", "match"]},
    "score": {"kind": "regression", "target_range": [1, 5]},
    "tags": {"kind": "token_classification", "labels": ["O", "B-THING", "I-THING"]},
}
TEXTS = {"pairs": f"{TEXT}\tthe film is a quiet joy"}


@pytest.fixture
def tuned(task_job: Callable[..., Job]) -> Iterator[Callable[..., tuple[Runtime, Job]]]:
    """Return a loader of a model of one task whose adapter is far from its start."""
    loaded: list[Runtime] = []

    def load(task: str, **sections: Any) -> tuple[Runtime, Job]:
        job = task_job(TASKS[task], **sections)
        runtime = load_runtime(job, CPU)
        generator = torch.Generator().manual_seed(11)
        runtime.load({n: 0.4 * torch.randn(t.shape, generator=generator) for n, t in runtime.initial.items()})
        loaded.append(runtime)
        return runtime, job

    yield load
    for runtime in loaded:
        runtime.load(runtime.initial)


def outputs_of(runtime: Runtime, ids: Tensor) -> Tensor:
    """Return what the model says of tokens, by its usual way."""
    with torch.no_grad():
        return runtime.model(collate([Example(ids)]))


# --- the integral ---


def test_a_linear_model_s_attributions_are_weight_times_difference() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, inputs, baseline = (torch.randn(1, 5, 8, generator=generator) for _ in range(3))
    found = integrate(lambda e: (e * weight).sum(dim=(1, 2)) + 3, inputs, baseline, steps=2)
    expected = (weight * (inputs - baseline)).sum(dim=-1)[0].double()
    torch.testing.assert_close(found.attributions, expected, rtol=1e-4, atol=1e-5)
    assert found.steps == 2
    assert abs(found.gap) < 1e-4


def test_steps_are_doubled_until_the_sum_is_right() -> None:
    inputs, baseline = torch.ones(1, 2, 1), torch.zeros(1, 2, 1)
    found = integrate(lambda e: torch.tanh(60 * (e.sum(dim=(1, 2)) - 0.7)), inputs, baseline, steps=4, at_once=7)
    assert found.steps > 4
    assert abs(found.gap) <= MOST_GAP * float(found.attributions.abs().sum())
    assert found.attributions.tolist() == pytest.approx([1, 1], abs=0.02)


def test_what_does_not_converge_is_refused() -> None:
    def jump(e: Tensor) -> Tensor:
        return (e.sum(dim=(1, 2)) > 1).float() + 0 * e.sum(dim=(1, 2))

    with pytest.raises(ModelError, match="not be faithful"):
        integrate(jump, torch.ones(1, 2, 1), torch.zeros(1, 2, 1), steps=500)


# --- the model ---


@pytest.mark.parametrize("task", TASKS)
def test_from_embeddings_is_forward(tuned: Callable[..., tuple[Runtime, Job]], task: str) -> None:
    runtime, _ = tuned(task)
    batch = collate([Example(torch.arange(5, 5 + n)) for n in (3, 9, 6)])
    with torch.no_grad():
        there = runtime.model.from_embeddings(runtime.model.embeddings(batch.input_ids), batch.attention_mask)
        torch.testing.assert_close(there, runtime.model(batch))


@pytest.mark.parametrize("baseline", ["pad", "mask"])
@pytest.mark.parametrize("task", TASKS)
def test_attributions_add_up(tuned: Callable[..., tuple[Runtime, Job]], task: str, baseline: Any) -> None:
    runtime, _ = tuned(task)
    options = {"word": 3} if task == "tags" else {}
    found = explain(runtime, TEXTS.get(task, TEXT), baseline=baseline, **options)  # type: ignore[arg-type]
    total = sum(word.attribution for word in found.words)
    absolute = sum(abs(word.attribution) for word in found.words)
    assert absolute > 0.01
    assert total == pytest.approx(found.total, abs=1e-6)
    assert found.gap == pytest.approx(total - (found.output - found.baseline_output), abs=1e-6)
    assert abs(found.gap) <= MOST_GAP * absolute * 1.5
    for word in found.words:
        assert found.texts[word.text][word.begin : word.end] == word.word
    assert [w.word for w in found.words if w.text == 0] == re.findall(r"\w+|,", TEXT)


def test_outputs_are_those_of_the_text_and_of_the_baseline(tuned: Callable[..., tuple[Runtime, Job]]) -> None:
    runtime, job = tuned("labels")
    tokenizer = runtime.tokenizer
    for label in (None, "bad", "other"):
        found = explain(runtime, TEXT, label=label, baseline="mask")
        (prediction,) = predict(runtime, [TEXT])
        p = torch.tensor(prediction["probabilities"][label or prediction["label"]]).double()
        assert found.output == pytest.approx(float(p.logit()), abs=1e-3)
        ids = torch.tensor(tokenizer(TEXT)["input_ids"])
        ids[1:-1] = tokenizer.mask_token_id
        q = outputs_of(runtime, ids)[0].double().softmax(dim=-1)[job.task.labels.index(label or prediction["label"])]
        assert found.baseline_output == pytest.approx(float(q.logit()), abs=1e-3)
        assert found.baseline == "[MASK]"
        assert f"{prediction['label']}, probability {prediction['probability']:.3f}" == found.says


def test_against_an_integral_by_hand(tuned: Callable[..., tuple[Runtime, Job]]) -> None:
    runtime, _ = tuned("score")
    found = explain(runtime, TEXT)
    ids = torch.tensor([runtime.tokenizer(TEXT)["input_ids"]])
    other = ids.clone()
    other[0, 1:-1] = runtime.tokenizer.pad_token_id
    start, end = runtime.model.embeddings(other), runtime.model.embeddings(ids)
    total, steps = torch.zeros_like(start), 150
    for k in range(steps):
        place = (start + (k + 0.5) / steps * (end - start)).requires_grad_()
        mask = torch.ones_like(ids, dtype=torch.bool)
        score = 3 + 2 * runtime.model.from_embeddings(place, mask)[0, 0]
        total += torch.autograd.grad(score, place)[0] / steps
    by_token = (total * (end - start)).sum(dim=-1)[0]
    assert by_token[[0, -1]].abs().max() == 0, "special tokens stay and get nothing"
    by_word: dict[int, float] = {}
    for value, word in zip(by_token.tolist(), runtime.tokenizer(TEXT).word_ids(), strict=True):
        if word is not None:
            by_word[word] = by_word.get(word, 0.0) + value
    assert [w.attribution for w in found.words] == pytest.approx(list(by_word.values()), abs=2e-3)
    assert len(by_word) < len(by_token) - 2, "some word must have several pieces"
    (prediction,) = predict(runtime, [TEXT])
    assert min(max(found.output, 1.0), 5.0) == pytest.approx(prediction["score"], abs=1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_explaining_leaves_the_model_as_it_was(tuned: Callable[..., tuple[Runtime, Job]], task: str) -> None:
    runtime, _ = tuned(task)
    parameters = dict(runtime.model.named_parameters())
    for parameter in runtime.model.trainable().values():
        parameter.grad = torch.full_like(parameter, 0.5)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in parameters.items()}
    modes = [module.training for module in runtime.model.modules()]
    state = torch.get_rng_state()
    explain(runtime, TEXTS.get(task, TEXT), **({"word": 1} if task == "tags" else {}))  # type: ignore[arg-type]
    for name, parameter in parameters.items():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
        if parameter.grad is not None:
            assert bool((parameter.grad == 0.5).all())
    assert sum(p.grad is not None for p in parameters.values()) == len(runtime.model.trainable())
    assert [module.training for module in runtime.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert runtime.model.packing is None
    for parameter in runtime.model.trainable().values():
        parameter.grad = None


def test_the_sign_of_a_planted_word(tiny_bert: Path, task_job: Callable[..., Job], tmp_path: Path) -> None:
    """A real BERT whose layers only pass on what comes in, and a head that looks for the embedding of one word."""
    from transformers import AutoTokenizer, BertModel

    backbone = BertModel.from_pretrained(tiny_bert)
    with torch.no_grad():
        for layer in backbone.encoder.layer:
            for dense in (layer.attention.output.dense, layer.output.dense):
                dense.weight.zero_()
                dense.bias.zero_()
        backbone.embeddings.position_embeddings.weight.zero_()
    backbone.save_pretrained(tmp_path, safe_serialization=True)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path)
    task = {"kind": "sequence_classification", "labels": ["bad", "good"]}
    job = task_job(task, model={"backbone": str(tmp_path)})
    runtime = load_runtime(job, CPU)
    (token,) = runtime.tokenizer("funny", add_special_tokens=False)["input_ids"]
    planted = runtime.model.embeddings(torch.tensor([[token]]))[0, 0]
    state = {name: torch.zeros_like(tensor) for name, tensor in runtime.initial.items()}
    state["head.linear.weight"][1] = planted
    runtime.load(state)
    for label, sign in (("good", 1), ("bad", -1)):
        found = explain(runtime, "a bright and funny cast", label=label)
        values = {word.word: sign * word.attribution for word in found.words}
        assert values["funny"] > 0
        assert all(values["funny"] > 2 * value for word, value in values.items() if word != "funny")


def test_gpt2_s_words_come_without_their_spaces(task_job: Callable[..., Job], tiny_gpt2: Path) -> None:
    job = task_job(
        TASKS["labels"],
        model={"backbone": str(tiny_gpt2), "pooling": "mean"},
        lora={"target_modules": ["c_attn"]},
    )
    found = explain(load_runtime(job, CPU), " a dull plot; warm", label="good")
    assert [(w.word, w.begin) for w in found.words] == [("a", 1), ("dull", 3), ("plot", 8), (";", 12), ("warm", 14)]
    assert found.baseline == "<|endoftext|>"
    spaces = explain(load_runtime(job, CPU), "a   plot", label="good")
    assert [named(word) for word in spaces.words] == ["a", "(space)", "plot"]
    assert sum(word.attribution for word in spaces.words) == pytest.approx(spaces.total, abs=1e-6)
    assert "".join(part.text for part in parts_of(spaces, 0)) == "a   plot"


def test_a_word_s_tag_is_explained(tuned: Callable[..., tuple[Runtime, Job]]) -> None:
    runtime, _ = tuned("tags")
    (entities,) = [prediction["entities"] for prediction in predict(runtime, [TEXT])]
    words = re.findall(r"\w+|,", TEXT)
    found = explain(runtime, TEXT, word=2, label="B-THING")
    assert found.target == "log-odds of 'B-THING' against all other labels at word 2 (dull)"
    other = explain(runtime, TEXT, word=5, label="B-THING")
    assert other.output != found.output
    with pytest.raises(DataError, match=f"1 to {len(words)}"):
        explain(runtime, TEXT, word=len(words) + 1)
    dropped = explain(runtime, "a \u200bdull plot", word=2, label="B-THING")
    assert dropped.target.endswith("at word 2 (dull)")
    assert [word.word for word in dropped.words] == ["a", "dull", "plot"]
    if entities:
        first = explain(runtime, TEXT)
        assert f"({TEXT[entities[0]['start'] :].split()[0]}" in first.target
    state = {name: torch.zeros_like(tensor) for name, tensor in runtime.initial.items()}
    state["head.linear.bias"][0] = 9.0
    runtime.load(state)
    with pytest.raises(DataError, match="finds no entity"):
        explain(runtime, TEXT)


def test_what_lies_beyond_the_model_s_length_is_not_read(tuned: Callable[..., tuple[Runtime, Job]]) -> None:
    runtime, _ = tuned("labels")
    long = " ".join([TEXT] * 5)
    found = explain(runtime, long)
    assert found.unread == (0,)
    parts = parts_of(found, 0)
    assert "".join(part.text for part in parts) == long
    assert [part.unread for part in parts].count(True) == 1
    assert parts[-1].unread
    assert explain(runtime, TEXT + " ").unread == ()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"label": "god"}, ConfigError, "did you mean 'good'"),
        ({"word": 1}, ConfigError, "token_classification"),
        ({"steps": 1}, ConfigError, "--steps"),
        ({"text": " "}, DataError, "no text"),
    ],
)
def test_mistakes_are_explained(
    tuned: Callable[..., tuple[Runtime, Job]], options: dict[str, Any], error: type[Exception], text: str
) -> None:
    runtime, _ = tuned("labels")
    with pytest.raises(error, match=text):
        explain(runtime, **({"text": TEXT} | options))


def test_other_tasks_and_half_pairs_are_refused(
    tuned: Callable[..., tuple[Runtime, Job]], language_job: Callable[..., Job]
) -> None:
    runtime, _ = tuned("pairs")
    with pytest.raises(ConfigError, match="no prediction"):
        explain(load_runtime(language_job(), CPU), TEXT)
    with pytest.raises(DataError, match="a tab between"):
        explain(runtime, TEXT)


def test_without_captum_the_package_is_named(
    tuned: Callable[..., tuple[Runtime, Job]], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, _ = tuned("labels")
    monkeypatch.setitem(sys.modules, "captum", None)
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(ConfigError, match=r"pip install 'silotune\[explain\]'"):
        explain(runtime, TEXT)


# --- the page and the terminal ---


def made_up(text: str, **changes: Any) -> Explanation:
    words = [
        Word(text=0, begin=m.start(), end=m.end(), word=m[0], attribution=0.0)
        for m in re.finditer(r"\w+|[^\w\s]", text)
    ]
    words = [replace(word, attribution=(-1) ** i * (i + 1.0)) for i, word in enumerate(words)]
    defaults: dict[str, Any] = {
        "kind": "sequence_classification",
        "texts": (text,),
        "says": "good, probability 0.9",
        "target": "log-odds of 'good' against all other labels",
        "output": 2.0,
        "baseline_output": -1.0,
        "baseline": "[PAD]",
        "words": tuple(words),
        "steps": 32,
        "gap": 1e-3,
    }
    return Explanation(**(defaults | changes))


class Page(HTMLParser):
    """What a browser makes of a page."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.shown, self.titles = "", []
        self._inside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "p" and ("class", "text") in attrs:
            self._inside = ["p"]
        elif self._inside:
            self._inside.append(tag)
            self.titles += [value for name, value in attrs if name == "title"]

    def handle_endtag(self, tag: str) -> None:
        if self._inside:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if self._inside and self._inside[-1] != "sub":
            self.shown += data


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script> & \"quoted\" 'single'",
        "</p></main><img src=x onerror=alert(1)>",
        "{{ 7 * 7 }} {% raw %}",
        "schöne 中文 text\nsecond line",
    ],
)
def test_the_page_escapes_the_text_and_shows_all_of_it(text: str) -> None:
    raw = render_html(made_up(text, says=f"<b>{text}", target=f"the <i>{text}"), "<u>run").decode()
    page = Page()
    page.feed(raw)
    assert page.shown == text
    assert {"script", "img", "b", "i", "u", "link", "iframe"}.isdisjoint(page.tags)
    assert not any(name.startswith("on") or name in ("src", "href", "style") for name, _ in page.attributes)
    style = re.search(r"<style>(.*?)</style>", raw, flags=re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'sha256-{digest}'" in raw.replace("&#39;", "'")
    assert "://" not in raw
    assert "url(" not in raw


def test_the_page_says_the_numbers_without_colour() -> None:
    found = made_up("one two three")
    page = Page()
    raw = render_html(found, "demo").decode()
    page.feed(raw)
    assert page.titles == ["+1.00", "−2.00", "+3.00"]
    for said in ("[PAD]", "−1.00", "1.00e-03", "after 32 steps", "solid line, +", "dashed line, −", "Largest first"):
        assert said in raw


def test_the_terminal_shows_signs_without_colour_and_no_control_characters() -> None:
    text = "good \x1b[31mbad\x07 \u202ereversed"
    buffer = io.StringIO()
    print_explanation(Console(file=buffer, width=100, highlight=False, markup=False), made_up(text))
    said = buffer.getvalue()
    assert not set(said) & {"\x1b", "\x07", "\u202e"}
    assert "completeness gap 1.0e-03 after 32 steps" in said
    assert re.search(r"bad\S*[+−]", said)
    coloured = io.StringIO()
    print_explanation(
        Console(file=coloured, width=100, force_terminal=True, color_system="standard", highlight=False),
        made_up("a [b] c"),
    )
    assert "\x1b[" in coloured.getvalue()


def test_levels_and_numbers() -> None:
    assert [level_of(v, 1.0) for v in (1, -1, 0.61, -0.05, 0.049, 0)] == [5, -5, 4, -1, 0, 0]
    assert level_of(0.0, 0.0) == 0
    found = made_up("one two three")
    assert [signed(v, found) for v in (3.14159, -0.004, -1234.5, 0)] == ["+3.14", "0.00", "−1,234.50", "0.00"]
    assert [word.word for word in ranked(found)] == ["three", "two", "one"]
    small = made_up("one", words=(replace(found.words[0], attribution=0.00123),))
    assert signed(0.00123, small) == "+0.00123"


# --- the command ---


@pytest.fixture
def run_dir(tuned: Callable[..., tuple[Runtime, Job]], tmp_path: Path) -> Path:
    runtime, job = tuned("labels")
    state = {name: p.detach().clone() for name, p in runtime.model.trainable().items()}
    save_peft_folder(tmp_path / "run" / "adapter", runtime, job, state)
    (tmp_path / "run" / "job.json").write_text(job.canonical_json())
    return tmp_path / "run"


def test_the_command(
    silotune: Callable[..., Any], run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = silotune("explain", run_dir, TEXT, "--json", "--html", tmp_path / "page.html", "--label", "good")
    assert done.status == 0, done.err
    (line,) = done.out.splitlines()
    job = Job.model_validate_json((run_dir / "job.json").read_text())
    expected = explain(load_tuned(run_dir, job, CPU), TEXT, label="good")
    assert json.loads(line) == json.loads(json.dumps(as_json(expected, "test")))
    assert json.loads(line)["sum"] == pytest.approx(sum(w["attribution"] for w in json.loads(line)["words"]), abs=1e-6)
    assert (tmp_path / "page.html").read_bytes() == render_html(expected, "test")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"{TEXT}\n".encode())))
    piped = silotune("explain", run_dir, "--baseline", "mask")
    assert piped.status == 0
    assert "replaced by [MASK]" in " ".join(piped.out.split())
    assert "completeness gap" in piped.out
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    assert silotune("explain", run_dir).status == 1
    wrong = silotune("explain", run_dir, TEXT, "--label", "goood")
    assert (wrong.status, wrong.out) == (2, "")
    assert "did you mean 'good'" in wrong.err
