"""Generation and labelling from a run folder: every decoding rule against an independent computation."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.errors import AdapterError, ConfigError
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.models.batches import Example
from shared.runtime.export.peft import save_peft_folder
from shared.runtime.inference import (
    Decoding,
    choose_tokens,
    distinct,
    generate,
    generate_all,
    load_tuned,
    next_logits,
    predict,
)
from shared.runtime.runtime import Runtime, load_runtime
from shared.tasks.causal_lm import CausalLanguageModelling
from tests.conftest import LINES

CPU = ComputeConfig(device="cpu", precision="float32")  # what is compared is computed outside in float32
GREEDY = Decoding(temperature=0.0, max_new_tokens=8)


@pytest.fixture(scope="module")
def job(language_job: Callable[..., Job]) -> Job:
    return language_job()


@pytest.fixture(scope="module")
def run_dir(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose adapter moves the model far from its start."""
    folder = tmp_path_factory.mktemp("run")
    runtime = load_runtime(job, CPU)
    generator = torch.Generator().manual_seed(3)
    state = {name: torch.randn(t.shape, generator=generator) for name, t in runtime.initial.items()}
    save_peft_folder(folder / "adapter", runtime, job, state)
    (folder / "job.json").write_text(job.canonical_json())
    return folder


@pytest.fixture
def runtime(run_dir: Path, job: Job) -> Iterator[Runtime]:
    runtime = load_tuned(run_dir, job, CPU)
    yield runtime
    runtime.load(runtime.initial)


def scripted(monkeypatch: pytest.MonkeyPatch, columns: Sequence[Sequence[int]]) -> list[int]:
    """Let the model answer step t with the tokens `columns[t]`; return for how many sequences it was asked."""
    asked: list[int] = []

    def answer(_: Runtime, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        asked.append(len(sequences))
        return torch.nn.functional.one_hot(torch.tensor(columns[len(asked) - 1]), 300).float()

    monkeypatch.setattr("shared.runtime.inference.next_logits", answer)
    return asked


class TestChoice:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0], [5.0, -1.0, 4.0, 0.0]])

    def draw(self, number: int = 4000, **settings: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        decoding = Decoding(**settings)
        return torch.stack([choose_tokens(self.logits, decoding, generator) for _ in range(number)])

    def test_greedy_is_the_best(self) -> None:
        assert self.draw(1, temperature=0.0).tolist() == [[1, 0]]

    def test_top_k_excludes_all_others(self) -> None:
        drawn = self.draw(top_k=2)
        assert set(drawn[:, 0].tolist()) == {1, 3}
        assert set(drawn[:, 1].tolist()) == {0, 2}

    def test_top_1_is_greedy(self) -> None:
        assert self.draw(50, top_k=1, temperature=5.0).unique(dim=0).tolist() == [[1, 0]]

    @pytest.mark.parametrize("top_k", [0, 4, 10_000])
    @pytest.mark.parametrize("temperature", [1.0, 2.5])
    def test_frequencies_are_those_of_the_softmax(self, top_k: int, temperature: float) -> None:
        drawn = self.draw(top_k=top_k, temperature=temperature)
        wanted = (self.logits / temperature).softmax(dim=-1)
        wrong = (self.logits / (temperature * 1.5)).softmax(dim=-1)
        for row in range(2):
            found = torch.bincount(drawn[:, row], minlength=4) / len(drawn)
            # Five standard errors of a frequency of one half.
            assert float((found - wanted[row]).abs().max()) < 0.04
            assert float((found - wrong[row]).abs().max()) > 0.04

    @pytest.mark.parametrize("temperature", [1e-3, 1e-40, 5e-324])
    def test_a_temperature_close_to_zero_is_greedy(self, temperature: float) -> None:
        assert self.draw(20, temperature=temperature, top_k=0).unique(dim=0).tolist() == [[1, 0]]


class TestGenerate:
    def test_greedy_equals_transformers_on_the_plain_peft_adapter(
        self, runtime: Runtime, job: Job, run_dir: Path, tiny_gpt2: Path
    ) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
        base = AutoModelForCausalLM.from_pretrained(tiny_gpt2).eval()
        model = PeftModel.from_pretrained(base, run_dir / "adapter").eval()
        changed = 0
        for text in ("a dull", "what a bright", "it"):
            ids = tokenizer(text, return_tensors="pt").input_ids
            settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
            with torch.no_grad():
                theirs = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[
                    0, ids.shape[1] :
                ]
                with model.disable_adapter():
                    untuned = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
            ours = generate(runtime, text, Decoding(temperature=0.0, max_new_tokens=12))
            assert ours == [tokenizer.decode(theirs, skip_special_tokens=True)]
            changed += untuned[0, ids.shape[1] :].tolist() != theirs.tolist()
        assert changed  # or the adapter was not in play

    def test_greedy_is_the_argmax_of_the_whole_model(self, runtime: Runtime) -> None:
        ids = runtime.tokenizer("warm, clever")["input_ids"]
        start = len(ids)
        for _ in range(GREEDY.max_new_tokens):
            ((outputs, _),) = runtime.outputs([Example(torch.tensor(ids))])
            ids.append(int(outputs[0, -1].argmax()))
            if ids[-1] == runtime.tokenizer.eos_token_id:
                break
        expected = runtime.tokenizer.decode(ids[start:], skip_special_tokens=True)
        assert generate(runtime, "warm, clever", GREEDY) == [expected]

    def test_sequences_differ_and_a_seed_repeats_them(self, runtime: Runtime) -> None:
        decoding = Decoding(num_sequences=5, seed=7, temperature=2.0, max_new_tokens=10)
        first = generate(runtime, "the film", decoding)
        assert len(first) == 5
        assert len(set(first)) == 5
        assert generate(runtime, "the film", decoding) == first
        assert generate(runtime, "the film", dataclasses.replace(decoding, seed=8)) != first

    def test_without_a_seed_every_process_differs(self, runtime: Runtime) -> None:
        decoding = Decoding(temperature=2.0, max_new_tokens=20, top_k=0)
        found = []
        for _ in range(2):
            torch.manual_seed(0)  # what every process starts with
            found += generate(runtime, "the film", decoding)
        assert found[0] != found[1]

    def test_sampling_leaves_the_global_generator_alone(self, runtime: Runtime) -> None:
        before = torch.get_rng_state()
        generate(runtime, "the film", Decoding(max_new_tokens=2, seed=1))
        assert torch.equal(torch.get_rng_state(), before)

    def test_each_row_stops_at_its_own_end(self, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
        end = runtime.tokenizer.eos_token_id
        a, b = runtime.tokenizer("ab")["input_ids"][:2]
        asked = scripted(monkeypatch, [[a, end], [b], [end]])  # who has ended is asked no more
        decoding = Decoding(temperature=0.0, num_sequences=2, max_new_tokens=50)
        assert generate(runtime, "the film", decoding) == [runtime.tokenizer.decode([a, b]), ""]
        assert asked == [2, 1, 1]

    def test_at_most_max_new_tokens(self, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
        (a,) = runtime.tokenizer("a")["input_ids"]
        asked = scripted(monkeypatch, [[a]] * 10)
        assert generate(runtime, "b", dataclasses.replace(GREEDY, max_new_tokens=4)) == ["aaaa"]
        assert len(asked) == 4

    def test_a_context_longer_than_the_window_is_seen_by_its_end(self, runtime: Runtime) -> None:
        long = runtime.tokenizer(" ".join(LINES))["input_ids"]
        assert len(long) > runtime.max_length
        near = next_logits(runtime, [long])
        torch.testing.assert_close(near, next_logits(runtime, [long[-runtime.max_length :]]))
        (more,) = generate(runtime, " ".join(LINES), Decoding(max_new_tokens=40, seed=0))
        assert more

    def test_an_empty_text_starts_from_the_end_of_text_token(self, runtime: Runtime) -> None:
        end = runtime.tokenizer.eos_token_id
        assert isinstance(runtime.task, CausalLanguageModelling)
        start = partial(runtime.task.start, tokenizer=runtime.tokenizer, max_length=runtime.max_length)
        assert start("") == [end]
        # What a person wrote stays text, also where it looks like that token.
        assert end not in start(runtime.tokenizer.eos_token)
        assert generate(runtime, "", GREEDY)

    def test_all_sequences_share_a_forward_pass(
        self, runtime: Runtime, job: Job, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shapes = []
        forward = type(runtime.model).forward
        monkeypatch.setattr(
            type(runtime.model),
            "forward",
            lambda self, batch: shapes.append(tuple(batch.input_ids.shape)) or forward(self, batch),
        )
        generate(runtime, "a", Decoding(num_sequences=6, max_new_tokens=1))
        assert shapes == [(6, 1)]

    def test_micro_batches_keep_the_order(self, runtime: Runtime) -> None:
        drawn = torch.randint(0, 300, (9, 7), generator=torch.Generator().manual_seed(0)).tolist()
        sequences = [row[: 3 + i % 4] for i, row in enumerate(drawn)]
        small = dataclasses.replace(runtime, compute=ComputeConfig(device="cpu", micro_batch_tokens=14))
        torch.testing.assert_close(next_logits(small, sequences), next_logits(runtime, sequences))

    def test_texts_of_different_lengths_are_continued_together(self, runtime: Runtime) -> None:
        texts = ["warm, clever", "the film is a quiet joy", "nobody"]
        alone = [generate(runtime, text, GREEDY) for text in texts]
        assert generate_all(runtime, texts, GREEDY) == alone
        several = dataclasses.replace(GREEDY, num_sequences=2)
        assert generate_all(runtime, texts, several) == [[*found, *found] for found in alone]

    def test_distinct_n_by_hand(self) -> None:
        assert distinct(["the film the film", "The plot"], 1) == 3 / 6
        assert distinct(["the film the film", "The plot"], 2) == 3 / 4
        assert distinct(["a"], 2) == 0

    def test_a_classifier_is_refused(self, runtime: Runtime, classification_job: Callable[..., Job]) -> None:
        with pytest.raises(ConfigError, match="silotune predict"):
            generate(load_runtime(classification_job(), CPU), "a", GREEDY)

    @pytest.mark.parametrize(
        "wrong",
        [
            {"max_new_tokens": 0},
            {"num_sequences": 0},
            {"top_k": -1},
            {"temperature": -0.1},
            {"temperature": float("nan")},
            {"temperature": float("inf")},
            {"seed": -1},
            {"seed": 2**64},
        ],
    )
    def test_bad_settings_are_refused_by_name(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Decoding(**wrong)


@pytest.fixture(scope="module")
def classifier(classification_job: Callable[..., Job]) -> Runtime:
    return load_runtime(classification_job(), CPU)


class TestPredict:
    def test_order_and_values_are_those_of_one_text_at_a_time(self, classifier: Runtime) -> None:
        texts = [" ".join(LINES[: 1 + i % 3]) + " plot" * (i % 5) for i in range(20)]
        together = predict(classifier, texts)
        assert [p["text"] for p in together] == texts
        for prediction in together:
            (alone,) = predict(classifier, [prediction["text"]])
            assert prediction["label"] == alone["label"]
            assert prediction["probabilities"] == pytest.approx(alone["probabilities"], abs=1e-5)
            assert sum(prediction["probabilities"].values()) == pytest.approx(1)

    def test_no_texts_no_labels(self, classifier: Runtime) -> None:
        assert predict(classifier, []) == []

    def test_a_language_model_is_refused(self, runtime: Runtime) -> None:
        with pytest.raises(ConfigError, match="silotune generate"):
            predict(runtime, ["a"])


def test_a_run_without_an_adapter_is_named(job: Job, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"holds no tuned adapter .* Finish the run first"):
        load_tuned(tmp_path, job, CPU)


def test_the_command_line_continues_a_text(
    run_dir: Path, job: Job, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import cli

    monkeypatch.setattr(sys, "argv", ["silotune"])
    options = ["--num", "3", "--top-k", "5", "--temperature", "1.5", "--seed", "4", "--max-new-tokens", "6"]
    with pytest.raises(SystemExit) as done:
        cli.main(["generate", str(run_dir), "the film", *options, "--json"])
    assert done.value.code == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    decoding = Decoding(num_sequences=3, top_k=5, temperature=1.5, seed=4, max_new_tokens=6)
    expected = generate(load_tuned(run_dir, job, ComputeConfig()), "the film", decoding)
    assert [line["continuation"] for line in lines] == expected
