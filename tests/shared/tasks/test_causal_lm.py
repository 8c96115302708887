"""Next-token prediction: what is a target, whose loss depends on what, and what perplexity means."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.errors import DataError, ModelError
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.job.model import ModelConfig, TaskConfig
from shared.models.batches import Batch, Example, collate
from shared.runtime.runtime import Runtime, load_runtime
from shared.tasks.causal_lm import CausalLanguageModelling
from tests.conftest import LINES

TASK = CausalLanguageModelling(TaskConfig(kind="causal_lm"), ModelConfig())


@pytest.fixture(scope="module")
def runtime(language_job: Callable[..., Job]) -> Runtime:
    return load_runtime(language_job(), ComputeConfig(device="cpu", precision="float32"))


def texts(*values: str) -> list[dict[str, str]]:
    return [{"text": value} for value in values]


def test_a_whole_text_ends_with_the_end_of_text_token(runtime: Runtime) -> None:
    (example,) = runtime.encode(texts("a dull plot"))
    ids = example.input_ids.tolist()
    assert ids[-1] == runtime.tokenizer.eos_token_id
    assert ids.count(runtime.tokenizer.eos_token_id) == 1
    assert runtime.tokenizer.decode(ids[:-1]) == "a dull plot"


def test_a_cut_text_has_no_end(runtime: Runtime) -> None:
    (example,) = runtime.encode(texts(" ".join(LINES)))
    assert example.length == runtime.max_length
    assert runtime.tokenizer.eos_token_id not in example.input_ids.tolist()


def test_a_text_that_leaves_one_place_still_ends(runtime: Runtime) -> None:
    ids = runtime.tokenizer(" ".join(LINES))["input_ids"]
    fits = runtime.tokenizer.decode(ids[: runtime.max_length - 1])
    (example,) = runtime.encode(texts(fits))
    assert example.length == runtime.max_length
    assert int(example.input_ids[-1]) == runtime.tokenizer.eos_token_id


def test_an_empty_text_is_refused_by_its_row_only(runtime: Runtime) -> None:
    with pytest.raises(DataError, match="record 2 has fewer than two tokens") as caught:
        runtime.encode(texts("a secret", "", "another secret"))
    assert "secret" not in str(caught.value)
    assert runtime.encode([]) == []


def test_any_bytes_can_be_encoded_and_come_back(runtime: Runtime) -> None:
    for text in ("Łódź 医院 \U0001f600", "\x00\x7f\t\n"):
        (example,) = runtime.encode(texts(text))
        assert runtime.tokenizer.decode(example.input_ids[:-1]) == text


def test_the_loss_is_the_mean_over_the_examples_own_tokens() -> None:
    examples = [Example(torch.tensor([1, 2, 3])), Example(torch.tensor([4, 0]))]
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    losses = TASK.per_example_loss(logits, collate(examples))
    log_p = logits.log_softmax(dim=-1)
    expected = [-(log_p[0, 0, 2] + log_p[0, 1, 3]) / 2, -log_p[1, 0, 0]]
    torch.testing.assert_close(losses, torch.stack(expected))


def test_the_loss_of_an_example_does_not_depend_on_its_neighbours(runtime: Runtime) -> None:
    short, long = runtime.encode(texts("what a cast", LINES[0]))
    alone, together = [], {}
    with torch.no_grad():
        for example in (short, long):
            batch = collate([example])
            alone.append(TASK.per_example_loss(runtime.model(batch), batch))
        batch = collate([short, long])
        together = TASK.per_example_loss(runtime.model(batch), batch)
    assert short.length < long.length
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-5, atol=1e-6)


def test_a_token_sees_nothing_to_its_right(runtime: Runtime) -> None:
    one, other = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 6, 9, 10]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    with torch.no_grad():
        first, second = (runtime.model(Batch(ids, mask, torch.zeros(1))) for ids in (one, other))
    torch.testing.assert_close(first[:, :2], second[:, :2])
    assert not torch.allclose(first[:, 2], second[:, 2])


def test_perplexity_weighs_tokens_not_texts() -> None:
    batch = collate([Example(torch.tensor([1, 2, 3])), Example(torch.tensor([4, 0]))])
    uniform = torch.zeros(2, 3, 5)
    assert TASK.evaluate([(uniform, batch)]).metrics["perplexity"] == pytest.approx(5)
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    loss = TASK.evaluate([(logits, batch)]).metrics["loss"]
    log_p = logits.log_softmax(dim=-1)
    assert loss == pytest.approx(float(-(log_p[0, 0, 2] + log_p[0, 1, 3] + log_p[1, 0, 0]) / 3))


def test_a_hopeless_model_has_a_finite_perplexity() -> None:
    batch = collate([Example(torch.tensor([1, 2]))])
    logits = torch.zeros(1, 2, 5)
    logits[0, 0, 2] = -1e6
    metrics = TASK.evaluate([(logits, batch)]).metrics
    assert all(math.isfinite(value) for value in metrics.values())


def test_the_outputs_are_those_of_transformers(runtime: Runtime, tiny_gpt2: Path) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tiny_gpt2).eval()
    runtime.load(runtime.initial)
    batch = collate(runtime.encode(texts(*LINES[:3])))
    with torch.no_grad():
        ours = runtime.model(batch)
        theirs = plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    torch.testing.assert_close(ours[batch.attention_mask], theirs[batch.attention_mask], rtol=1e-4, atol=1e-5)


def test_a_bert_is_refused(language_job: Callable[..., Any], tiny_bert: Path) -> None:
    job = language_job(model={"backbone": str(tiny_bert)}, lora={"target_modules": ["query"]})
    with pytest.raises(ModelError, match="left-to-right"):
        load_runtime(job, ComputeConfig(device="cpu"))


def test_only_the_adapter_is_trained(runtime: Runtime) -> None:
    assert runtime.model.head_parameters() == set()
    assert all("lora_B" in name for name in runtime.model.trainable())
    with pytest.raises(DataError, match="no records"):
        TASK.check_site([])
