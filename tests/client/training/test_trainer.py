"""The local round: its gradients against a plain loop, its noise, its determinism and its memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import client.training.per_example as per_example_module
import client.training.trainer as trainer_module
from client.training.proof import prove_trainer
from client.training.trainer import LocalRound, LocalWork, Observations, per_example_hooks, train_local_rounds
from shared.errors import ConfigError, PrivacyError
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.models.batches import Example, collate
from shared.models.frozen_cache import FrozenCache
from shared.privacy.mechanism import CLIP_MARGIN, per_example_gradients
from shared.privacy.persons import Persons
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import SiteRandomness
from shared.runtime.runtime import Runtime, load_runtime
from shared.tensors.optimizers import build_optimizer, dump_optimizer, restore_optimizer, set_learning_rate

Records = list[dict[str, Any]]
GENEROUS = 1 << 30
CPU = ComputeConfig(device="cpu", precision="float32", cache_frozen_layers=False)
PLAIN_SGD = {"optimizer": "sgd", "momentum": 0.0, "learning_rate": 0.05, "schedule": "linear"}
COMBINATIONS = [
    *((task, train) for task in ("classification", "language") for train in ("b", "both")),
    ("classification", "none"),
]


@pytest.fixture
def job_of(classification_job: Callable[..., Any], language_job: Callable[..., Any]) -> Callable[..., Job]:
    def build(task: str = "classification", train: str = "b", **sections: Any) -> Job:
        builder = classification_job if task == "classification" else language_job
        return builder(lora={"train": train}, **sections)

    return build


def away_from_zero(runtime: Runtime, scale: float = 0.05) -> dict[str, Tensor]:
    """A start at which no gradient vanishes: at B = 0 that of A does."""
    generator = torch.Generator().manual_seed(1)
    return {n: t + scale * torch.randn(t.shape, generator=generator) for n, t in sorted(runtime.initial.items())}


def plan_of(job: Job, **changes: Any) -> PrivacyPlan:
    return replace(PrivacyPlan.from_job(job), **changes)


def run(runtime: Runtime, job: Job, examples: Sequence[Example], **options: Any) -> LocalRound:
    work = LocalWork(
        examples=examples,
        declared_records=options.pop("declared_records", 32),
        randomness=options.pop("randomness", SiteRandomness.injected("trainer")),
        optimizer_state=options.pop("optimizer_state", {}),
        persons=options.pop("persons", None),
    )
    arguments = {"training": job.training, "plan": PrivacyPlan.from_job(job), "round_number": 1, **options}
    start = arguments.pop("start", runtime.initial)
    return train_local_rounds(runtime, [work], start, **arguments)[0]


def flat(result: LocalRound) -> Tensor:
    return torch.cat([value.flatten() for value in result.delta.values()])


def hooked_gradients(runtime: Runtime, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Per-example gradients [n, *shape] of one padded batch, through the hooks."""
    trainable = runtime.model.trainable()
    batch = collate(examples).to(runtime.model.device)
    with per_example_hooks(runtime.model):
        with runtime.autocast():
            losses = runtime.task.per_example_loss(runtime.model(batch), batch)
        losses.sum().backward()
        gradients = per_example_gradients(list(trainable.values()), len(examples))
    return dict(zip(trainable, gradients, strict=True))


def plain_gradients(runtime: Runtime, examples: Sequence[Example]) -> dict[str, Tensor]:
    """The same by plain autograd: every example alone, unpadded, without any hook."""
    trainable = runtime.model.trainable()
    rows: dict[str, list[Tensor]] = {name: [] for name in trainable}
    for example in examples:
        batch = collate([example]).to(runtime.model.device)
        with runtime.autocast():
            loss = runtime.task.per_example_loss(runtime.model(batch), batch)[0]
        for name, gradient in zip(trainable, torch.autograd.grad(loss, list(trainable.values())), strict=True):
            rows[name].append(gradient)
    return {name: torch.stack(parts) for name, parts in rows.items()}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-4) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float(value.abs().max()) > 0, name
        error = (found[name].double() - value.double()).flatten(1).norm(dim=1)
        assert (error <= rtol * value.double().flatten(1).norm(dim=1) + 1e-9).all(), name


# --- per-example gradients ---


@pytest.mark.parametrize(("task", "train"), COMBINATIONS)
def test_per_example_gradients_equal_those_of_single_examples(
    job_of: Callable[..., Job], records: Records, task: str, train: str
) -> None:
    runtime = load_runtime(job_of(task, train), CPU)
    examples = runtime.encode(records[:9])
    assert len({example.length for example in examples}) > 1  # padding takes part
    runtime.load(away_from_zero(runtime))
    names = set(runtime.model.trainable())
    assert any("lora_A" in name for name in names) is (train == "both")
    assert any(name.startswith("head.") for name in names) is (task == "classification")
    expected = plain_gradients(runtime, examples)
    assert_same_gradients(hooked_gradients(runtime, examples), expected)
    # The comparison can fail: a wrong scale of one percent, and two examples exchanged, are seen.
    with pytest.raises(AssertionError):
        assert_same_gradients({n: g * 1.01 for n, g in expected.items()}, expected)
    with pytest.raises(AssertionError):
        assert_same_gradients({n: g.flip(0) for n, g in expected.items()}, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("task", "train"), COMBINATIONS)
def test_per_example_gradients_equal_those_of_single_examples_on_a_gpu(
    job_of: Callable[..., Job], records: Records, task: str, train: str
) -> None:
    compute = ComputeConfig(device="cuda", precision="float32", cache_frozen_layers=False)
    runtime = load_runtime(job_of(task, train), compute)
    examples = runtime.encode(records[:9])
    runtime.load(away_from_zero(runtime))
    found = {name: gradient.cpu() for name, gradient in hooked_gradients(runtime, examples).items()}
    assert_same_gradients(found, {n: g.cpu() for n, g in plain_gradients(runtime, examples).items()}, rtol=1e-3)
    on_cpu = load_runtime(job_of(task, train), CPU)
    on_cpu.load(away_from_zero(on_cpu))
    assert_same_gradients(found, plain_gradients(on_cpu, examples), rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "auto"])
@pytest.mark.parametrize(("task", "train"), COMBINATIONS)
def test_one_round_on_a_gpu_agrees_with_the_processor(
    job_of: Callable[..., Job], records: Records, task: str, train: str, precision: str
) -> None:
    job = job_of(task, train, training={"optimizer": "sgd", "momentum": 0.0})
    deltas = []
    for compute in (CPU, ComputeConfig(device="cuda", precision=precision)):
        runtime = load_runtime(job, compute)
        prove_trainer(runtime)
        examples = runtime.encode(records)
        runtime.warm_cache(examples)
        # Mechanism and noise come from the processor, so they are the same on both.
        deltas.append(flat(run(runtime, job, examples, start=away_from_zero(runtime))))
    difference = float((deltas[0] - deltas[1]).norm() / deltas[0].norm())
    assert difference < (1e-3 if precision == "float32" else 0.05)


# --- the round against the algorithm written out ---


def reference_round(
    runtime: Runtime,
    job: Job,
    examples: Sequence[Example],
    plan: PrivacyPlan,
    start: dict[str, Tensor],
    seed: str,
    persons: Persons | None = None,
    round_number: int = 1,
) -> tuple[Tensor, Observations]:
    """Algorithm 1 of Abadi et al. with plain SGD, one example at a time, in NumPy; with persons, of their mean gradients.

    The learning rate falls linearly over all planned steps.
    """
    values = {name: tensor.double().numpy().copy() for name, tensor in sorted(start.items())}
    source, seen = SiteRandomness.injected(seed), Observations(losses=[], num_examples=0, num_clipped=0)
    for step in range(job.training.local_steps):
        runtime.load({name: torch.from_numpy(value).float() for name, value in values.items()})
        stream = functools.partial(source.stream, round_number=round_number, step=step)
        num_units = len(examples) if persons is None else persons.count
        drawn = np.flatnonzero(stream("sampling").bernoulli(num_units, plan.sample_rate))
        groups = [[unit] for unit in drawn]
        if persons is not None:
            groups = persons.choose(drawn, plan.records_per_person, stream("records"))
        total, losses = np.zeros(sum(value.size for value in values.values())), []
        for group in groups:
            found = [plain_gradients(runtime, [examples[index]]) for index in group]
            flattened = [np.concatenate([one[name].numpy().ravel() for name in values]) for one in found]
            vector = np.mean(flattened, axis=0, dtype=np.float64)
            total += vector * min(1.0, CLIP_MARGIN * plan.max_grad_norm / np.linalg.norm(vector))
            seen.num_clipped += int(np.linalg.norm(vector) > plan.max_grad_norm)
            batch = collate([examples[index] for index in group])
            with torch.no_grad():
                losses += runtime.task.per_example_loss(runtime.model(batch), batch).tolist()
        seen.num_examples += len(groups)
        seen.losses.append(float(np.mean(losses)))
        noise = stream("noise").normal(total.size)
        step_vector = (total + plan.noise_multiplier * plan.max_grad_norm * noise) / (plan.sample_rate * 32)
        done = (round_number - 1) * job.training.local_steps + step
        rate = job.training.learning_rate * (1 - done / job.training.planned_steps)
        offset = 0
        for value in values.values():
            value -= rate * step_vector[offset : offset + value.size].reshape(value.shape)
            offset += value.size
    delta = [torch.from_numpy(value - start[name].double().numpy()).flatten() for name, value in values.items()]
    return torch.cat(delta), seen


def assert_same_observations(found: Observations, expected: Observations) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=1e-4)
    assert (found.num_examples, found.num_clipped) == (expected.num_examples, expected.num_clipped)
    assert 0 < found.num_clipped < found.num_examples
    assert found.num_non_finite == 0


@pytest.mark.parametrize(("task", "train"), COMBINATIONS)
def test_a_round_is_dp_sgd_as_written_in_the_paper(
    job_of: Callable[..., Job], records: Records, task: str, train: str
) -> None:
    job = job_of(task, train, training=PLAIN_SGD)
    runtime = load_runtime(job, CPU)
    examples, start = runtime.encode(records[:30]), away_from_zero(runtime)
    runtime.load(start)
    gradients = plain_gradients(runtime, examples).values()
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
    # A bound at which some records are clipped and some are not, and none is so near that rounding would decide.
    plan = plan_of(job, noise_multiplier=0.3, max_grad_norm=1.02 * float(norms.median()))
    expected, seen = reference_round(runtime, job, examples, plan, start, "paper")
    result = run(runtime, job, examples, plan=plan, start=start, randomness=SiteRandomness.injected("paper"))
    torch.testing.assert_close(flat(result).double(), expected, rtol=1e-3, atol=2e-6)
    assert result.executed_steps == job.training.local_steps
    assert_same_observations(result.observations, seen)


def test_a_round_with_persons_is_dp_sgd_by_person(
    job_of: Callable[..., Job], records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Persons draw the coins, at most two records of each count, and a person's mean gradient is clipped."""
    privacy = {"unit": "patient", "records_per_person": 2, "sample_rate": 0.5}
    job = job_of(privacy=privacy, training=PLAIN_SGD)
    runtime = load_runtime(job, CPU)
    examples, start = runtime.encode(records[:30]), away_from_zero(runtime)
    persons = Persons.from_ids([f"p{row % 11}" for row in range(30)])
    runtime.load(start)
    norms = torch.cat([g.flatten(1) for g in plain_gradients(runtime, examples).values()], dim=1).norm(dim=1)
    plan = plan_of(job, noise_multiplier=0.3, max_grad_norm=0.8 * float(norms.median()))
    expected, seen = reference_round(runtime, job, examples, plan, start, "persons", persons, round_number=2)
    options = {"plan": plan, "start": start, "persons": persons, "round_number": 2}
    result = run(runtime, job, examples, randomness=SiteRandomness.injected("persons"), **options)
    torch.testing.assert_close(flat(result).double(), expected, rtol=1e-3, atol=2e-6)
    assert_same_observations(result.observations, seen)
    with pytest.raises(PrivacyError, match="the unit of privacy is the patient, but no persons are known"):
        run(runtime, job, examples)
    # A record that is lost on the way to its person's mean.
    batches = Runtime.grouped_batches
    monkeypatch.setattr(Runtime, "grouped_batches", lambda *arguments: list(batches(*arguments))[:-1])
    with pytest.raises(PrivacyError, match="never came to the sum"):
        run(runtime, job, examples, **options)


def test_micro_batching_does_not_change_the_sum(job_of: Callable[..., Job], records: Records) -> None:
    for task, train in COMBINATIONS:
        job = job_of(task, train, training={"optimizer": "sgd", "momentum": 0.0})
        deltas, sizes = [], []
        runtime = load_runtime(job, CPU)
        examples, start = runtime.encode(records), away_from_zero(runtime)
        for tokens in (1, 60, 10_000):
            pieces = replace(runtime, compute=CPU.model_copy(update={"micro_batch_tokens": tokens}))
            sizes.append(len(list(pieces.batches(examples, range(20)))))
            deltas.append(flat(run(pieces, job, examples, start=start, plan=plan_of(job, noise_multiplier=1e-3))))
        assert sizes[0] == 20 > sizes[1] > sizes[2] == 1
        for other in deltas[1:]:
            torch.testing.assert_close(other, deltas[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("unit", ["record", "patient"])
def test_a_pass_is_bounded_by_its_gradients_and_the_sum_stays_the_same(
    job_of: Callable[..., Job], records: Records, monkeypatch: pytest.MonkeyPatch, unit: str
) -> None:
    """A head of thousands of labels has megabytes for each example; three of them may share a pass here."""
    limits = {"unit": unit, "records_per_person": 2} if unit == "patient" else {}
    job = job_of(privacy={"sample_rate": 0.8, **limits})
    runtime = load_runtime(job, CPU)
    examples, start = runtime.encode(records[:40]), away_from_zero(runtime)
    persons = Persons(np.arange(40) // 4) if limits else None
    sizes: list[int] = []

    def seen(parameters: list[torch.nn.Parameter], batch_size: int) -> list[Tensor]:
        sizes.append(batch_size)
        return per_example_gradients(parameters, batch_size)

    monkeypatch.setattr(trainer_module, "per_example_gradients", seen)
    options = {"start": start, "persons": persons, "plan": plan_of(job, noise_multiplier=1e-3)}
    whole = run(runtime, job, examples, **options)
    assert max(sizes) > 3
    bytes_each = sum(4 * parameter.numel() for parameter in runtime.model.trainable().values())
    for room, most in ((3.5, 3), (0.5, 1)):
        monkeypatch.setattr(per_example_module, "_MOST_PASS_BYTES", int(room * bytes_each))
        before = sum(sizes)
        sizes.clear()
        cut = run(runtime, job, examples, **options)
        assert (max(sizes), sum(sizes)) == (most, before)
        assert torch.equal(flat(cut), flat(whole))


@pytest.mark.parametrize(("task", "train"), COMBINATIONS)
def test_cached_activations_change_nothing(job_of: Callable[..., Job], records: Records, task: str, train: str) -> None:
    job = job_of(task, train, training={"optimizer": "sgd", "momentum": 0.0})
    runtime = replace(load_runtime(job, CPU), cache=FrozenCache())
    examples, start = runtime.encode(records), away_from_zero(runtime)
    assert runtime.model.first_adapted == (3 if train == "none" else 1)
    options = {"start": start, "plan": plan_of(job, noise_multiplier=1e-3)}
    assert all(batch.hidden is None for batch in runtime.batches(examples, range(5)))
    without = flat(run(runtime, job, examples, **options))
    cached = replace(runtime, compute=CPU.model_copy(update={"cache_frozen_layers": True}))
    cached.warm_cache(examples)
    assert all(batch.hidden is not None for batch in cached.batches(examples, range(5)))
    torch.testing.assert_close(flat(run(cached, job, examples, **options)), without, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_file_tier_trains_as_the_memory_does(
    job_of: Callable[..., Job], records: Records, precision: str, tmp_path: Path
) -> None:
    """Bit for bit, from memory, from both and from the file alone; the uncached update within the precision."""
    job = job_of(training={"optimizer": "sgd", "momentum": 0.0})
    plain = ComputeConfig(device="cpu", precision=precision, cache_frozen_layers=False)  # type: ignore[arg-type]
    runtime = load_runtime(job, plain)
    examples, start = runtime.encode(records), away_from_zero(runtime)
    options = {"start": start, "plan": plan_of(job, noise_multiplier=1e-3)}
    without = flat(run(runtime, job, examples, **options))
    deltas, tiers = [], []
    for in_memory, in_file in ((GENEROUS, 0), (2_000, GENEROUS), (0, GENEROUS)):
        cache = FrozenCache()
        with runtime.autocast(), torch.no_grad():
            cache.fill(
                examples,
                runtime.model.embed_frozen,
                max_tokens=plain.micro_batch_tokens,
                max_bytes=in_memory,
                max_file_bytes=in_file,
                folder=tmp_path,
            )
        cached = replace(runtime, cache=cache)
        assert all(batch.hidden is not None for batch in cached.batches(examples, range(len(examples))))
        deltas.append(flat(run(cached, job, examples, **options)))
        tiers.append((cache.num_bytes > 0, cache.file_bytes > 0))
    assert tiers == [(True, False), (True, True), (False, True)]
    assert torch.equal(deltas[0], deltas[1])
    assert torch.equal(deltas[0], deltas[2])
    tolerance = (
        {"rtol": 1e-3, "atol": 1e-6}
        if precision == "float32"
        else {"rtol": 0.1, "atol": float(without.abs().max()) / 20}
    )
    torch.testing.assert_close(deltas[0], without, **tolerance)


def test_the_settings_reach_the_cache(job_of: Callable[..., Job], records: Records, tmp_path: Path) -> None:
    compute = ComputeConfig(
        device="cpu", precision="float32", cache_megabytes=0, cache_file_megabytes=8, cache_file_folder=tmp_path
    )
    runtime = replace(load_runtime(job_of(), compute), cache=FrozenCache())
    runtime.warm_cache(runtime.encode(records))
    assert (runtime.cache.num_bytes, runtime.cache.file_bytes > 0) == (0, True)


# --- noise, empty samples, randomness ---


@pytest.mark.parametrize("declared", [32, 640])
def test_an_empty_sample_is_a_noised_step(job_of: Callable[..., Job], records: Records, declared: int) -> None:
    """No record at all: the delta is pure noise with deviation sigma C / (q declared), never divided by what was drawn."""
    job = job_of(training={"optimizer": "sgd", "momentum": 0.0, "learning_rate": 1.0, "local_steps": 3})
    plan = plan_of(job, max_grad_norm=0.2, noise_multiplier=1.5)
    runtime = load_runtime(job, CPU)
    for examples in ([], runtime.encode(records[:1])):
        # A rate that leaves the one record out: the sample is empty though the site is not.
        rare = replace(plan, sample_rate=plan.sample_rate if not examples else 1e-9)
        public = declared if not examples else declared * plan.sample_rate / 1e-9
        result = run(runtime, job, examples, plan=rare, declared_records=public)
        std = math.sqrt(3) * 1.5 * 0.2 / (0.25 * declared)
        statistic = float((flat(result) ** 2).sum()) / std**2
        assert 5e-4 < stats.chi2.cdf(statistic, len(flat(result))) < 1 - 5e-4
        assert not 5e-4 < stats.chi2.cdf(statistic * 0.8**2, len(flat(result))) < 1 - 5e-4
        assert result.executed_steps == 3
        assert len(result.observations.losses) == 3
        assert all(math.isnan(loss) for loss in result.observations.losses)
        assert result.observations.num_examples == 0


def test_noise_of_a_round_does_not_depend_on_the_drawn_batch(job_of: Callable[..., Job], records: Records) -> None:
    """The same noise stream on 1 and on 60 records gives the same noise: clipping to almost nothing leaves only that."""
    job = job_of(training={"optimizer": "sgd", "momentum": 0.0})
    runtime = load_runtime(job, CPU)
    examples = runtime.encode(records)
    plan = plan_of(job, noise_multiplier=1e6, max_grad_norm=1e-6)
    few, many = (flat(run(runtime, job, examples[:n], plan=plan)) for n in (1, 60))
    torch.testing.assert_close(few, many, rtol=1e-3, atol=1e-5 * float(few.abs().max()))


def test_a_round_is_determined_by_injected_randomness(job_of: Callable[..., Job], records: Records) -> None:
    job = job_of("classification", "both")
    runtime = load_runtime(job, CPU)
    examples = runtime.encode(records)
    first, again = run(runtime, job, examples), run(runtime, job, examples)
    assert torch.equal(flat(first), flat(again))
    assert not torch.equal(flat(first), flat(run(runtime, job, examples, randomness=SiteRandomness.injected("other"))))
    assert not torch.equal(flat(first), flat(run(runtime, job, examples, round_number=2)))
    fresh = [flat(run(runtime, job, examples, randomness=SiteRandomness.from_os())) for _ in range(2)]
    assert not torch.equal(*fresh)


def test_the_delta_is_what_was_trained_minus_the_start(job_of: Callable[..., Job], records: Records) -> None:
    job = job_of()
    runtime = load_runtime(job, CPU)
    start = away_from_zero(runtime)
    result = run(runtime, job, runtime.encode(records), start=start)
    for name, parameter in runtime.model.trainable().items():
        assert torch.equal(result.delta[name], parameter.detach() - start[name])
        assert result.delta[name].dtype == torch.float32
        assert float(result.delta[name].abs().max()) > 0


def test_one_record_that_is_not_finite_leaves_the_update_finite(
    job_of: Callable[..., Job], records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(training={"optimizer": "sgd", "momentum": 0.0, "local_steps": 1})
    runtime = load_runtime(job, CPU)
    examples, plan = runtime.encode(records[:6]), plan_of(job, sample_rate=1.0, noise_multiplier=1e-9)
    without = flat(run(runtime, job, examples[1:], plan=plan))
    loss = type(runtime.task).per_example_loss

    def poisoned(self: Any, outputs: Tensor, batch: Any) -> Tensor:
        losses = loss(self, outputs, batch)
        same = (batch.input_ids[:, : examples[0].length] == examples[0].input_ids).all(dim=1)
        alone = same & (batch.attention_mask.sum(dim=1) == examples[0].length)
        return losses * torch.where(alone, math.nan, 1.0)

    monkeypatch.setattr(type(runtime.task), "per_example_loss", poisoned)
    result = run(runtime, job, examples, plan=plan)
    assert result.observations.num_non_finite == 1
    assert torch.isfinite(flat(result)).all()
    torch.testing.assert_close(flat(result), without, rtol=1e-3, atol=1e-6)


# --- optimiser ---


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("task", ["classification", "language"])
def test_restored_moments_continue_bit_for_bit(
    job_of: Callable[..., Job], records: Records, monkeypatch: pytest.MonkeyPatch, task: str, optimizer: str
) -> None:
    """Two rounds of two steps, with the moments carried over as files would, equal one round of four."""
    job = job_of(task, "both", training={"optimizer": optimizer, "weight_decay": 0.01, "schedule": "cosine"})
    runtime = load_runtime(job, CPU)
    examples = runtime.encode(records)
    long = job.training.model_copy(update={"rounds": 1, "local_steps": 6})
    short = job.training.model_copy(update={"rounds": 3, "local_steps": 2})
    stream = SiteRandomness.stream

    def by_global_step(self: SiteRandomness, purpose: Any, *, round_number: int, step: int) -> Any:
        return stream(self, purpose, round_number=1, step=step + 2 * (round_number - 1))

    monkeypatch.setattr(SiteRandomness, "stream", by_global_step)
    run(runtime, job, examples, training=long)
    expected = {name: p.detach().clone() for name, p in runtime.model.trainable().items()}
    state: dict[str, Tensor] = {}
    start = runtime.initial
    for round_number in (1, 2, 3):
        result = run(
            runtime, job, examples, training=short, start=start, round_number=round_number, optimizer_state=state
        )
        state = result.optimizer_state
        start = {name: p.detach().clone() for name, p in runtime.model.trainable().items()}
    assert state
    for name, value in expected.items():
        assert torch.equal(start[name], value), name
    # Without the moments it would be another path.
    run(runtime, job, examples, training=long)
    forgotten = run(runtime, job, examples, training=short, start=runtime.initial, round_number=3)
    assert not torch.equal(flat(forgotten), flat(result))


def test_dumped_state_is_a_copy_and_survives_a_restore(job_of: Callable[..., Job], records: Records) -> None:
    job = job_of()
    runtime = load_runtime(job, CPU)
    state = run(runtime, job, runtime.encode(records)).optimizer_state
    trainable = runtime.model.trainable()
    assert {name.partition("|")[0] for name in state} == set(trainable)
    assert {name.partition("|")[2] for name in state} == {"step", "exp_avg", "exp_avg_sq"}
    stacks = {name: torch.nn.Parameter(p.detach().unsqueeze(0)) for name, p in trainable.items()}
    optimizer = build_optimizer(stacks, runtime.model.head_parameters(), job.training)
    assert dump_optimizer(optimizer, stacks, 0) == {}
    restore_optimizer(optimizer, stacks, [state])
    dumped = dump_optimizer(optimizer, stacks, 0)
    assert dumped.keys() == state.keys()
    assert all(torch.equal(dumped[name], state[name]) for name in state)
    before = {name: value.clone() for name, value in state.items()}
    for stack in stacks.values():
        stack.grad = torch.ones_like(stack)
    optimizer.step()
    assert all(torch.equal(before[name], state[name]) for name in state)
    assert all(torch.equal(before[name], dumped[name]) for name in state)


def test_the_optimiser_has_a_group_for_the_adapter_and_one_for_the_head(job_of: Callable[..., Job]) -> None:
    runtime = load_runtime(job_of(), CPU)
    trainable, head = runtime.model.trainable(), runtime.model.head_parameters()
    changes = {"learning_rate": 0.2, "momentum": 0.7, "weight_decay": 0.02, "head_learning_rate_factor": 3.0}
    for name, moments in (("sgd", {"momentum": 0.7}), ("adamw", {"betas": (0.7, 0.999)})):
        training = job_of().training.model_copy(update={"optimizer": name, **changes})
        groups = build_optimizer(trainable, head, training).param_groups
        for group, members, factor in zip(groups, (trainable.keys() - head, head), (1.0, 3.0), strict=True):
            assert {id(parameter) for parameter in group["params"]} == {id(trainable[member]) for member in members}
            assert group["factor"] == factor
            assert (group["lr"], group["weight_decay"]) == (0.2, 0.02)
            assert moments.items() <= group.items()
        assert len(build_optimizer(trainable, set(), training).param_groups) == 1


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", (1, 1, 1, 1)),
        ("linear", (1, 0.5, 0, 0)),
        ("cosine", (1, 0.5, 0, 0)),
        ("one-cycle", (1 / 25, (1 + math.cos(math.pi * 2 / 7)) / 2, 0, 0)),
    ],
)
def test_learning_rates_follow_the_public_schedule(
    job_of: Callable[..., Job], schedule: str, factors: tuple[float, ...]
) -> None:
    training = job_of().training.model_copy(
        update={"schedule": schedule, "rounds": 5, "local_steps": 2, "head_learning_rate_factor": 3.0}
    )
    runtime = load_runtime(job_of(), CPU)
    optimizer = build_optimizer(runtime.model.trainable(), runtime.model.head_parameters(), training)
    for step, factor in zip((0, 5, 10, 15), factors, strict=True):
        set_learning_rate(optimizer, training, step)
        adapter, head = (group["lr"] for group in optimizer.param_groups)
        assert adapter == pytest.approx(0.05 * factor, abs=1e-12)
        assert head == pytest.approx(3 * 0.05 * factor, abs=1e-12)


def test_one_cycle_rises_for_three_tenths(job_of: Callable[..., Job]) -> None:
    training = job_of(training={"rounds": 10, "local_steps": 1, "schedule": "one-cycle"}).training
    rates = [training.learning_rate_at(step) / training.learning_rate for step in range(10)]
    assert rates[:4] == pytest.approx([0.04, 0.36, 0.68, 1.0])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert 0 < rates[-1] < 0.06
    with pytest.raises(ConfigError, match="one-cycle rises by itself; remove warmup_steps"):
        job_of(training={"rounds": 10, "local_steps": 1, "schedule": "one-cycle", "warmup_steps": 2})


def test_the_learning_rate_warms_up_in_equal_parts(job_of: Callable[..., Job]) -> None:
    runtime = load_runtime(job_of(), CPU)
    training = job_of(training={"rounds": 2, "local_steps": 5, "schedule": "linear", "warmup_steps": 3}).training
    optimizer = build_optimizer(runtime.model.trainable(), set(), training)
    rates = []
    for step in range(training.planned_steps):
        set_learning_rate(optimizer, training, step)
        rates.append(optimizer.param_groups[0]["lr"] / training.learning_rate)
    assert rates == pytest.approx([0.25, 0.5 * 0.9, 0.75 * 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    with pytest.raises(ConfigError, match="warmup_steps is 10, but only 10 steps are planned"):
        job_of(training={"rounds": 2, "local_steps": 5, "warmup_steps": 10})


# --- hooks ---


def test_a_failed_round_leaves_nothing_behind(
    job_of: Callable[..., Job], records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error between forward and backward, or while gradients are taken, does not disturb the next round."""
    job = job_of()
    runtime = load_runtime(job, CPU)
    examples = runtime.encode(records)
    expected = flat(run(runtime, job, examples))

    def interrupted(*_: Any) -> Any:
        raise MemoryError

    for owner, name in ((type(runtime.task), "per_example_loss"), (trainer_module, "per_example_gradients")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupted)
            with pytest.raises(MemoryError):
                run(runtime, job, examples, plan=plan_of(job, sample_rate=1.0))
        assert torch.equal(flat(run(runtime, job, examples)), expected)


def test_a_parameter_without_per_example_gradient_stops_the_round(
    job_of: Callable[..., Job], records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of()
    runtime = load_runtime(job, CPU)

    def blind(*_: Any) -> Iterator[None]:
        yield

    from contextlib import contextmanager

    monkeypatch.setattr(trainer_module, "per_example_hooks", contextmanager(blind))
    with pytest.raises(PrivacyError, match="per-example gradient none"):
        run(runtime, job, runtime.encode(records))
