"""What every kind of task must keep: the contract of `shared.tasks.base.Task`, run against each row of `shared.tasks.TASKS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from client.training.proof import prove_trainer
from client.training.trainer import LocalWork, per_example_hooks, train_local_rounds
from shared.data.datasets import TEXT_ROLES
from shared.data.records import FileRecord
from shared.errors import ConfigError, DataError
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.job.kinds import RULES, TaskKind
from shared.models.batches import Example, collate
from shared.models.images import PIXEL_STEPS
from shared.privacy.mechanism import per_example_gradients
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import SiteRandomness
from shared.runtime.export.peft import load_state, save_peft_folder
from shared.runtime.inference import Decoding, generate_all, predict
from shared.runtime.runtime import Runtime, load_runtime
from shared.tasks import TASKS, task_of
from simulations.new_scenario.looking import CHECKS
from simulations.new_scenario.rule import RATES
from tests.conftest import LINES

CPU = ComputeConfig(device="cpu", precision="float32", cache_frozen_layers=False)


@dataclass(frozen=True)
class Case:
    """One kind of task with small data.

    Attributes:
        section: `[task]` of a job.
        records: good records, of different lengths.
        bad: changes of a record, and what the refusal must say beside the row.
        bad_sections: changes of `[task]`, and what the refusal must say.
        alike: records on which no site should train, or None if any record will do.
        sections: further sections of a job.
        one_length: whether all examples have one length.
    """

    section: dict[str, Any]
    records: list[dict[str, Any]]
    bad: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    bad_sections: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    alike: list[dict[str, Any]] | None = None
    sections: dict[str, Any] = field(default_factory=lambda: {"lora": {"train": "both"}})
    one_length: bool = False


def _texts() -> list[str]:
    return [" ".join(LINES[i % 6].replace(",", "").split()[: 3 + i % 4]) for i in range(16)]


def _images() -> list[list[int]]:
    """Two bars on 5x6 pixels, upright in odd images and lying in even ones, at changing places and with changing ink."""
    images = []
    for number in range(16):
        image = torch.zeros(2, 5, 6, dtype=torch.int64)
        if number % 2:
            image[:, :, number % 6] = 10 + number
        else:
            image[:, number % 5, :] = 10 + number
        image[1] += number % 3
        images.append(image.flatten().tolist())
    return images


_TAGS = ["O", "B-film", "I-film", "B-cast"]
_WORDS = [text.split() for text in _texts()]
CASES = {
    "sequence_classification": Case(
        {"labels": ["bad", "good"]},
        [{"text": text, "label": ["bad", "good"][i % 2]} for i, text in enumerate(_texts())],
        bad=[({"label": "secret"}, "label")],
        bad_sections=[({"labels": ["one"]}, "at least two"), ({"target_range": [0, 1]}, "target_range")],
        alike=[{"text": text, "label": "good"} for text in LINES],
    ),
    "token_classification": Case(
        {"labels": _TAGS},
        [{"tokens": w, "tags": [_TAGS[(i + k) % 4] for k in range(len(w))]} for i, w in enumerate(_WORDS)],
        bad=[
            ({"tags": ["B-secret"] * len(_WORDS[1])}, "tag that is not among"),
            ({"tags": ["O"]}, "1 tags"),
            ({"tokens": [], "tags": []}, "no words"),
            ({"tokens": "\u200b", "tags": "O"}, "no word"),
        ],
        bad_sections=[
            ({"labels": ["B-x", "I-x"]}, '"O"'),
            ({"labels": ["O", "I-x"]}, "'B-x'"),
            ({"labels": ["O", "x"]}, "B-NAME"),
        ],
        alike=[{"tokens": w, "tags": ["O"] * len(w)} for w in _WORDS],
    ),
    "pair_matching": Case(
        {"labels": ["other", "match"]},
        [{"text": LINES[i % 3], "pair": text, "label": ["other", "match"][i % 2]} for i, text in enumerate(_texts())],
        bad=[({"label": "secret"}, "label")],
        bad_sections=[({"labels": ["a", "b", "c"]}, "name two")],
        alike=[{"text": text, "pair": text, "label": "match"} for text in LINES],
    ),
    "regression": Case(
        {"target_range": [1, 5], "head_offset": 0.25},
        [{"text": text, "score": 1 + i % 5} for i, text in enumerate(_texts())],
        bad=[({"score": score}, "no finite number") for score in ("secret", float("nan"), "1_3", "inf", True)]
        + [({"score": "3,57"}, r"no finite number \(a decimal comma\? write a point\); mend")],
        bad_sections=[
            ({"target_range": None}, "missing"),
            ({"target_range": [5, 1]}, "must rise"),
            ({"head_offset": -0.1}, "head_offset"),
            ({"labels": ["a", "b"]}, "takes no labels"),
        ],
        alike=[{"text": text, "score": 9 + i} for i, text in enumerate(LINES)],
    ),
    "causal_lm": Case(
        {},
        [{"text": text} for text in _texts()],
        bad=[({"text": ""}, "fewer than two tokens")],
        bad_sections=[({"labels": ["a", "b"]}, "takes no labels")],
    ),
    "replies": Case(
        {},
        [{"prompt": LINES[i % 6][:12], "response": text} for i, text in enumerate(_texts())],
        bad=[({"response": ""}, "empty response")],
        bad_sections=[({"labels": ["a", "b"]}, "takes no labels")],
    ),
    "image_classification": Case(
        {"labels": ["lying", "upright"], "image_shape": [2, 5, 6], "pixel_range": [0, 32]},
        [
            {"pixels": pixels if i % 3 else " ".join(map(str, pixels)), "label": ["lying", "upright"][i % 2]}
            for i, pixels in enumerate(_images())
        ],
        bad=[
            ({"label": "secret"}, "label"),
            ({"pixels": "1 secret 3"}, "no numbers"),
            ({"pixels": "1_3" + " 0" * 59}, "no numbers"),
            ({"pixels": ["1_3"] * 60}, "no numbers"),
            ({"pixels": [True] * 60}, "no numbers"),
            ({"pixels": [{"secret": 1}] * 60}, "no numbers"),
            ({"pixels": [[1, 2], [3]]}, "no numbers"),
            ({"pixels": [10**400] * 60}, "no numbers"),
            ({"pixels": [1.0] * 59}, r"shape \[59\], expected 60"),
            ({"pixels": [[1] * 6] * 10}, r"shape \[10, 6\], expected 60"),
            ({"pixels": "33" + " 0" * 59}, "outside task.pixel_range, 0 to 32"),
            ({"pixels": [float("nan")] * 60}, "outside task.pixel_range"),
            ({"pixels": [None] * 60}, "outside task.pixel_range"),
        ],
        bad_sections=[
            ({"labels": ["one"]}, "at least two"),
            ({"image_shape": None}, "image_shape belongs"),
            ({"pixel_range": None}, "pixel_range belongs"),
            ({"pixel_range": [1, 1]}, "must rise"),
            ({"image_shape": [1, 3, 8]}, "greater than or equal to 4"),
            ({"image_shape": [16, 1024, 1024]}, "65,536 are the most"),
            ({"target_range": [0, 1]}, "target_range"),
        ],
        alike=[{"pixels": pixels, "label": "lying"} for pixels in _images()],
        sections={},
        one_length=True,
    ),
}


@pytest.fixture(params=list(TASKS))
def case(request: pytest.FixtureRequest) -> tuple[str, Case]:
    return request.param, CASES[request.param]


@pytest.fixture
def job(case: tuple[str, Case], task_job: Callable[..., Job]) -> Job:
    kind, chosen = case
    return task_job({"kind": kind, **chosen.section}, **chosen.sections)


@pytest.fixture
def runtime(job: Job) -> Runtime:
    return load_runtime(job, CPU)


def away_from_zero(runtime: Runtime) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in sorted(runtime.initial.items())}


def losses_of(runtime: Runtime, examples: list[Example]) -> Tensor:
    batch = collate(examples).to(runtime.model.device)
    with runtime.autocast():
        return runtime.task.per_example_loss(runtime.model(batch), batch)


def test_every_kind_stands_in_every_table() -> None:
    """What differs by kind stands in the task; higher and lower floors keep a row for each kind."""
    kinds = TASKS.keys()
    assert kinds == {*get_args(TaskKind)} == CASES.keys() == RULES.keys() == CHECKS.keys()
    assert RATES.keys() == {kind for kind, task in TASKS.items() if not task.causal_lm}


def test_deidentify_knows_every_role_that_a_person_writes() -> None:
    """A role is masked, or is one of those that hold no free text; a new one has to be put on either side."""
    not_free_text = {"label", "score", "tags", "pixels"}
    assert {role for task in TASKS.values() for role in task.roles} == TEXT_ROLES | not_free_text


def test_a_kind_says_what_it_is(job: Job, runtime: Runtime) -> None:
    task = task_of(job)
    assert task.about
    assert task.content
    for other in (partial(generate_all, decoding=Decoding()), predict):
        if task.causal_lm == (other is predict):
            with pytest.raises(ConfigError, match=f"the run's task is '{task.kind}', which .* use `silotune"):
                other(runtime, ["a text"])
    assert (job.task.rules.check_labels is None) == (not job.task.labels)


def test_per_example_gradients_equal_those_of_a_loop(runtime: Runtime, case: tuple[str, Case]) -> None:
    examples = runtime.encode(case[1].records[:7])
    assert (len({example.length for example in examples}) == 1) == case[1].one_length
    runtime.load(away_from_zero(runtime))
    trainable = list(runtime.model.trainable().values())
    with per_example_hooks(runtime.model):
        losses_of(runtime, examples).sum().backward()
        found = per_example_gradients(trainable, len(examples))
    for row, example in enumerate(examples):
        alone = torch.autograd.grad(losses_of(runtime, [example])[0], trainable)
        for gradients, expected in zip(found, alone, strict=True):
            assert float((gradients[row] - expected).norm()) <= 1e-4 * float(expected.norm()) + 1e-9
    assert all(float(gradients.abs().max()) > 0 for gradients in found)


def test_the_loss_of_an_example_is_its_own(runtime: Runtime, case: tuple[str, Case]) -> None:
    """Alone, beside others, and in whatever order: one loss, finite and not negative."""
    examples = runtime.encode(case[1].records)
    runtime.load(away_from_zero(runtime))
    with torch.no_grad():
        together, backwards = losses_of(runtime, examples), losses_of(runtime, examples[::-1])
        alone = torch.cat([losses_of(runtime, [example]) for example in examples])
    assert together.shape == (len(examples),)
    assert bool((together.isfinite() & (together >= 0)).all())
    assert float(together.std()) > 0
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together, backwards.flip(0), rtol=1e-4, atol=1e-5)


def test_encoding_is_repeatable_and_keeps_within_bounds(runtime: Runtime, case: tuple[str, Case]) -> None:
    examples, again = runtime.encode(case[1].records), runtime.encode(case[1].records)
    for example, other in zip(examples, again, strict=True):
        assert 1 <= example.length <= runtime.max_length
        assert torch.equal(example.input_ids, other.input_ids)
        assert torch.equal(torch.as_tensor(example.target), torch.as_tensor(other.target))
    assert len({example.key for example in examples}) > 1
    assert runtime.encode([]) == []
    # An example does not depend on the records beside it, but for the number of its first text in a ranking.
    single = runtime.encode(case[1].records[:1])[0]
    assert torch.equal(single.input_ids, examples[0].input_ids)
    assert torch.equal(torch.as_tensor(single.target), torch.as_tensor(examples[0].target))


def test_decoding_gives_back_the_content(runtime: Runtime, case: tuple[str, Case], job: Job) -> None:
    record = case[1].records[0]
    if job.task.pixel_range is not None:
        low, high = job.task.pixel_range
        steps = runtime.encode(case[1].records[:2])
        found = [(low + (high - low) * example.input_ids.double() / PIXEL_STEPS).tolist() for example in steps]
        assert found == [[float(value) for value in record["pixels"].split()], case[1].records[1]["pixels"]]
        return
    text = runtime.tokenizer.decode(runtime.encode([record])[0].input_ids, skip_special_tokens=True)
    for role in ("text", "pair", "tokens", "prompt", "response"):
        if role in record:
            words = record[role].split() if isinstance(record[role], str) else record[role]
            assert set(words) <= {*text.split()}, role


def test_bad_records_are_refused_by_row_without_their_content(runtime: Runtime, case: tuple[str, Case]) -> None:
    for change, message in case[1].bad:
        with pytest.raises(DataError, match=message) as caught:
            runtime.encode([case[1].records[0], case[1].records[1] | change])
        assert "record 2" in str(caught.value)
        assert "secret" not in str(caught.value)
        with pytest.raises(DataError, match=message) as caught:
            runtime.encode([case[1].records[0], FileRecord(case[1].records[1] | change, row=101)])
        assert str(caught.value).startswith("row 101 of the file has ")


def test_bad_settings_are_refused(task_job: Callable[..., Job], case: tuple[str, Case]) -> None:
    for change, message in case[1].bad_sections:
        with pytest.raises(ConfigError, match=message):
            task_job({"kind": case[0], **case[1].section, **change})


def test_a_site_that_cannot_train_is_refused(runtime: Runtime, case: tuple[str, Case]) -> None:
    with pytest.raises(DataError, match="no records"):
        runtime.task.check_site([])
    runtime.task.check_site(runtime.encode(case[1].records))
    if case[1].alike is not None:
        with pytest.raises(DataError, match="one and the same"):
            runtime.task.check_site(runtime.encode(case[1].alike))


def test_the_site_s_own_proof_passes(runtime: Runtime) -> None:
    runtime.proven = False
    prove_trainer(runtime)


def test_a_private_round_trains_and_its_plan_is_accounted(runtime: Runtime, job: Job, case: tuple[str, Case]) -> None:
    plan = PrivacyPlan.from_job(job)
    assert 0.9 * job.privacy.epsilon < plan.epsilon() <= job.privacy.epsilon
    examples = runtime.encode(case[1].records)
    result = train_local_rounds(
        runtime,
        [LocalWork(examples=examples, declared_records=16, randomness=SiteRandomness.injected(case[0]))],
        away_from_zero(runtime),
        training=job.training,
        plan=plan,
        round_number=1,
    )[0]
    assert result.executed_steps == job.training.local_steps
    assert result.observations.num_examples > 0
    assert result.observations.num_non_finite == 0
    assert all(bool(value.isfinite().all()) for value in result.delta.values())


def test_evaluation_has_the_primary_metric_and_only_finite_ones(runtime: Runtime, case: tuple[str, Case]) -> None:
    runtime.load(away_from_zero(runtime))
    found = runtime.evaluate(runtime.encode(case[1].records))
    assert {"loss", runtime.task.primary_metric} <= found.metrics.keys()
    assert torch.tensor(list(found.metrics.values())).isfinite().all()
    with torch.no_grad():
        mean = float(losses_of(runtime, runtime.encode(case[1].records)).mean())
    if case[0] not in ("token_classification", "causal_lm", "replies"):  # whose loss is by token here
        assert found.metrics["loss"] == pytest.approx(mean, rel=1e-4)


def test_training_without_noise_learns(runtime: Runtime, job: Job, case: tuple[str, Case], task_job: Any) -> None:
    """On its own few records loss and primary metric become better: loss, target and metric belong together."""
    open_job = task_job(
        {"kind": case[0], **case[1].section},
        **case[1].sections,
        training={"rounds": 1, "local_steps": 60, "learning_rate": 0.02},
        privacy={"mechanism": "none", "sample_rate": 1.0},
    )
    examples = runtime.encode(case[1].records)
    runtime.load(runtime.initial)
    before = runtime.evaluate(examples).metrics
    train_local_rounds(
        runtime,
        [LocalWork(examples=examples, declared_records=16, randomness=SiteRandomness.injected(case[0]))],
        runtime.initial,
        training=open_job.training,
        plan=PrivacyPlan.from_job(open_job),
        round_number=1,
    )[0]
    after, metric = runtime.evaluate(examples).metrics, runtime.task.primary_metric
    assert after["loss"] < 0.97 * before["loss"]
    assert after[metric] >= before[metric] if runtime.task.higher_is_better else after[metric] < before[metric]


def test_a_saved_adapter_is_loaded_as_it_was(
    runtime: Runtime, job: Job, case: tuple[str, Case], tmp_path: Path
) -> None:
    state = runtime.initial_global(exact=True) | away_from_zero(runtime)
    save_peft_folder(tmp_path / "adapter", runtime, job, state)
    examples = runtime.encode(case[1].records)
    with torch.no_grad():
        runtime.load(state)
        expected = losses_of(runtime, examples)
        runtime.load(runtime.initial)
        assert not torch.allclose(losses_of(runtime, examples), expected)
        runtime.load(load_state(tmp_path / "adapter", runtime, job))
        torch.testing.assert_close(losses_of(runtime, examples), expected)


def test_the_task_is_the_job_s(job: Job, case: tuple[str, Case]) -> None:
    task = task_of(job)
    assert set(task.roles) == case[1].records[0].keys()
    assert job.task.kind == case[0]


@pytest.mark.gpu
def test_the_gpu_gives_the_losses_of_the_processor(runtime: Runtime, job: Job, case: tuple[str, Case]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is visible")
    other = load_runtime(job, CPU.model_copy(update={"device": "cuda"}))
    examples, state = runtime.encode(case[1].records), away_from_zero(runtime)
    with torch.no_grad():
        runtime.load(state)
        expected = losses_of(runtime, examples)
        other.load(state)
        torch.testing.assert_close(losses_of(other, examples).cpu(), expected, rtol=1e-3, atol=1e-4)
