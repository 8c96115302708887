"""How long an honest update can be and how short: against the real trainer, the worst case, and liars."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from client.training.trainer import LocalWork, train_local_rounds
from server.rounds.update_bounds import (
    FAILURE,
    UpdateBounds,
    Weights,
    adapter_norms,
    largest_ratio_after,
    longest_noise,
    most_drawn,
    shortest_noise,
)
from shared.errors import AdapterError
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.job.training import TrainingConfig
from shared.privacy.persons import Persons
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import SiteRandomness
from shared.runtime.runtime import load_runtime
from shared.tensors.adapters import shapes_of
from shared.wire.updates import decode_update, encode_update
from tests.server.rounds.test_loop import make_job

IMAGES = {"kind": "image_classification", "labels": ["x", "y"], "image_shape": [1, 8, 8], "pixel_range": [0, 255]}
SGD = {"optimizer": "sgd", "learning_rate": 0.5, "rounds": 3, "local_steps": 3}
ADAMW = {"optimizer": "adamw", "learning_rate": 0.01, "rounds": 3, "local_steps": 3}
CASES: dict[str, dict[str, Any]] = {
    "sgd": {"training": SGD | {"schedule": "linear", "warmup_steps": 2, "head_learning_rate_factor": 3.0}},
    "sgd, much decay": {
        "training": SGD | {"weight_decay": 0.5, "learning_rate": 0.1},
        "privacy": {"noise_multiplier": 0.2},
    },
    "sgd, one step": {"training": SGD | {"local_steps": 1}},
    "sgd, both factors": {"training": SGD | {"momentum": 0.0, "weight_decay": 0.1}, "lora": {"train": "both"}},
    "adamw": {"training": ADAMW | {"schedule": "cosine", "weight_decay": 0.1}},
    "adamw, one step": {"training": ADAMW | {"local_steps": 1, "head_learning_rate_factor": 0.1}},
    "everything clipped": {
        "training": SGD,
        "privacy": {"max_grad_norm": 1e-3, "sample_rate": 1.0, "noise_multiplier": 0.3},
    },
}


def rounds_of(
    job: Job, records: list[dict[str, Any]], *, precision: str = "float32", persons: Persons | None = None
) -> list[tuple[UpdateBounds, dict[str, Tensor], int]]:
    """Return (bounds, what is sent, declared size) of every round of a site that trains honestly."""
    runtime = load_runtime(job, ComputeConfig(device="cpu", precision=precision))  # type: ignore[arg-type]
    plan, shapes = PrivacyPlan.from_job(job), shapes_of(runtime.initial)
    units = persons.count if persons else len(records)
    work = LocalWork(
        examples=runtime.encode(records),
        declared_records=units // 2 + 1,  # as few as an honest site may declare
        randomness=SiteRandomness.injected("bounds"),
        persons=persons,
    )
    start, moments, residual, found, norms = dict(runtime.initial), {}, {}, [], []
    for number in range(1, job.training.rounds + 1):
        (result,) = train_local_rounds(
            runtime,
            [replace(work, optimizer_state=moments)],
            start,
            training=job.training,
            plan=plan,
            round_number=number,
        )
        moments = result.optimizer_state
        encoded = encode_update(result.delta, job.federation.update_dtype, residual=residual)
        residual = encoded.residual
        update = decode_update(encoded.data, shapes, job.federation.update_dtype)
        found.append((UpdateBounds(job, plan, start, shapes, number, earlier=norms), update, work.declared_records))
        norms = [*norms, adapter_norms(start, shapes)]
        start = {name: start[name] + update[name] for name in start}
    return found


def group_norm(update: Mapping[str, Tensor], head: bool) -> float:
    return math.sqrt(sum(float(v.double().square().sum()) for n, v in update.items() if n.startswith("head.") == head))


# --- honest updates pass ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("case", CASES)
def test_honest_updates_of_the_trainer_are_within_the_bounds(
    classification_job: Callable[..., Job], records: list[dict[str, Any]], case: str, dtype: str
) -> None:
    job = classification_job(
        **{"federation": {"update_dtype": dtype}, "privacy": {"noise_multiplier": 1.0}} | CASES[case]
    )
    for bounds, update, declared in rounds_of(job, records):
        assert bounds.check(update, declared) is None
        for head, title in ((False, "adapter"), (True, "head")):
            norm = group_norm(update, head)
            assert norm <= bounds.largest(title, declared)
            assert norm >= bounds.smallest(title, declared) * (0.8 if dtype == "int8" else 0.99)


def test_honest_updates_in_half_precision_of_persons_and_of_images(
    classification_job: Callable[..., Job], task_job: Callable[..., Job], records: list[dict[str, Any]]
) -> None:
    private = {"noise_multiplier": 1.0}
    persons = Persons.from_ids([f"p{row % 11}" for row in range(len(records))])
    of_persons = private | {"unit": "patient", "records_per_person": 3, "sample_rate": 0.5}
    generator = np.random.default_rng(0)
    pictures = [{"pixels": generator.integers(0, 256, 64).tolist(), "label": "xy"[n % 2]} for n in range(40)]
    for found in (
        rounds_of(classification_job(training=SGD, privacy=private), records, precision="bfloat16"),
        rounds_of(classification_job(training=ADAMW, privacy=private), records, precision="bfloat16"),
        rounds_of(classification_job(training=SGD, privacy=of_persons), records, persons=persons),
        rounds_of(task_job(IMAGES, training=SGD, privacy=private), pictures),
        rounds_of(task_job(IMAGES, training=ADAMW, privacy=private), pictures),
    ):
        for bounds, update, declared in found:
            assert bounds.check(update, declared) is None


SHAPES = {"w": torch.Size([60, 100]), "head.b": torch.Size([50])}
START = {name: torch.zeros(shape) for name, shape in SHAPES.items()}


def bounds_of(number: int = 1, *, sigma: float = 1.0, rate: float = 0.05, **training: Any) -> UpdateBounds:
    job = make_job(
        training={"rounds": 4, "local_steps": 4, "optimizer": "sgd", "learning_rate": 0.1} | training,
        privacy={"noise_multiplier": sigma, "sample_rate": rate},
    )
    return UpdateBounds(job, PrivacyPlan.from_job(job), START, SHAPES, number)


def simulated(
    seed: int,
    *,
    declared: int,
    number: int = 1,
    sigma: float = 1.0,
    rate: float = 0.05,
    against: bool = False,
    **training: Any,
) -> dict[str, Tensor]:
    """Return an update by torch.optim.SGD whose gradients are as long as clipping allows, all in one direction.

    Args:
        against: the signal takes back as much of the noise as it can, from the second step on.
    """
    settings = TrainingConfig.model_validate(
        {"rounds": 4, "local_steps": 4, "optimizer": "sgd", "learning_rate": 0.1} | training
    )
    generator = np.random.default_rng(seed)
    values = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}
    optimizer = torch.optim.SGD(values.values(), lr=1.0, momentum=settings.momentum, weight_decay=settings.weight_decay)
    expected = rate * declared
    for step in range(number * settings.local_steps):
        if step == (number - 1) * settings.local_steps:
            for value in values.values():
                value.data.zero_()
        optimizer.param_groups[0]["lr"] = settings.learning_rate_at(step)
        drawn = generator.binomial(2 * declared - 1, rate)
        where = {name: value.detach().double() for name, value in values.items()}
        length = math.sqrt(sum(float(value.square().sum()) for value in where.values()))
        for name, value in values.items():
            signal = torch.full(SHAPES[name], 1 / math.sqrt(6050), dtype=torch.float64)
            if against:
                signal = where[name] / length if length else torch.zeros(SHAPES[name], dtype=torch.float64)
            noise = torch.from_numpy(generator.normal(0, sigma, tuple(SHAPES[name])))
            value.grad = ((signal * drawn + noise) / expected).float()
        optimizer.step()
    return {name: value.detach().clone() for name, value in values.items()}


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("declared", [16, 1024])
def test_the_worst_case_is_within_the_bounds_and_near_them(declared: int, momentum: float, number: int) -> None:
    bounds = bounds_of(number, momentum=momentum, schedule="linear")
    largest = smallest = None
    for seed in range(20):
        keys: dict[str, Any] = {"declared": declared, "number": number, "momentum": momentum, "schedule": "linear"}
        high = simulated(seed, **keys)
        low = simulated(seed, against=True, **keys)
        assert bounds.check(high, declared) is None
        assert bounds.check(low, declared) is None
        largest = max(largest or 0.0, group_norm(high, False))
        smallest = min(smallest or math.inf, group_norm(low, False))
    assert largest is not None
    assert smallest is not None
    # Of few records Bernstein's bound is wide; noise and signal are added here as if they pointed the same way.
    assert largest > (0.5 if declared == 1024 else 0.3) * bounds.largest("adapter", declared)
    assert smallest > bounds.smallest("adapter", declared)


# --- dishonest ones do not ---


def test_an_update_that_is_too_long_is_refused_by_the_size_that_gives_the_weight() -> None:
    honest = simulated(0, declared=64)
    bounds = bounds_of()
    assert bounds.check(honest, 64) is None
    with pytest.raises(AdapterError, match=r"long in the adapter; .* declares 64 records is longer than .*left out"):
        bounds.check({name: 10 * value for name, value in honest.items()}, 64)
    # The noise of 64 records is sixteen times that of 1,024.
    with pytest.raises(AdapterError, match="declares 1,024 records"):
        bounds.check(honest, 1024)
    one_value = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    one_value["head.b"][0] = 2 * bounds.largest("head", 64)
    with pytest.raises(AdapterError, match="long in the head"):
        bounds.check(one_value, 64)


def test_adamw_moves_no_value_further_than_its_steps_allow() -> None:
    for number, steps in ((1, 4), (4, 4)):
        bounds = bounds_of(number, optimizer="adamw", learning_rate=0.01)
        reach = bounds.largest("adapter", 64) / math.sqrt(6000)
        assert 0.01 * steps <= reach <= 0.01 * steps * 1.5
        update = {name: torch.full(shape, reach) for name, shape in SHAPES.items()}
        assert bounds.check(update, 64) is None
        update["w"][3, 3] *= 1.1
        with pytest.raises(AdapterError, match=r"a value of 'w' 1\.09 times as far as 4 steps of adamw can"):
            bounds.check(update, 64)


@pytest.mark.parametrize(("share", "doubted"), [(0.0, True), (0.5, True), (1.0, False)])
def test_too_little_noise_is_told_where_the_plan_has_much(share: float, doubted: bool) -> None:
    bounds = bounds_of(sigma=2.0)
    for seed in range(10):
        update = simulated(seed, declared=64, sigma=2.0 * share)
        doubt = bounds.check(update, 64)
        assert (doubt is not None) == doubted
        assert not doubted or "the site seems to add too little" in str(doubt)


def test_where_the_signal_can_be_longer_than_the_noise_only_the_last_step_counts() -> None:
    """An honest site's signal could take back the noise of earlier steps; nothing more can be told from the norm."""
    bounds, std = bounds_of(), 1 / (0.05 * 65536)
    assert bounds.smallest("adapter", 65536) == pytest.approx(0.1 * std * shortest_noise(6000, FAILURE / 10))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_thousand_updates_of_long_rounds_are_judged_in_little_time(optimizer: str) -> None:
    bounds = bounds_of(2, optimizer=optimizer, local_steps=10_000, learning_rate=1e-4)
    update = {name: torch.full(shape, 1e-3) for name, shape in SHAPES.items()}
    started = time.process_time()
    for number in range(1000):
        bounds.check(update, 64 << number % 4)
    assert time.process_time() - started < 10


def test_without_noise_of_the_sites_nothing_is_bounded() -> None:
    job = make_job(privacy={"mechanism": "none"})
    bounds = UpdateBounds(job, PrivacyPlan.from_job(job), START, SHAPES, 1)
    assert bounds.check({name: torch.full(shape, 1e3) for name, shape in SHAPES.items()}, 1) is None


def test_weight_decay_that_momentum_kept_is_bounded_where_earlier_adapters_are_known() -> None:
    job = make_job(
        training={"rounds": 4, "local_steps": 4, "optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 0.1}
    )
    plan, norms = PrivacyPlan.from_job(job), {"adapter": 3.0, "head": 1.0}
    known = UpdateBounds(job, plan, START, SHAPES, 3, earlier=[norms] * 2).largest("adapter", 64)
    plain = bounds_of(3).largest("adapter", 64)
    assert plain < known < 1.5 * plain
    for earlier in ([norms], [norms, {}], []):
        assert UpdateBounds(job, plan, START, SHAPES, 3, earlier=earlier).largest("adapter", 64) == math.inf
    assert math.isfinite(bounds_of(1, weight_decay=0.1).largest("adapter", 64))
    assert math.isfinite(bounds_of(2, weight_decay=0.1, momentum=0.0).largest("adapter", 64))


# --- the parts ---


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_weights_are_what_pytorch_does(momentum: float, decay: float) -> None:
    rates = [0.3, 0.1, 0.2]
    weights = Weights.of(rates, momentum=momentum, decay=decay)

    def moved(start: float, kept: float, gradients: list[float]) -> float:
        value = torch.nn.Parameter(torch.tensor([start], dtype=torch.float64))
        optimizer = torch.optim.SGD([value], lr=1.0, momentum=momentum, weight_decay=decay)
        if momentum:
            optimizer.state[value]["momentum_buffer"] = torch.tensor([kept], dtype=torch.float64)
        for rate, gradient in zip(rates, gradients, strict=True):
            optimizer.param_groups[0]["lr"] = rate
            value.grad = torch.tensor([gradient], dtype=torch.float64)
            optimizer.step()
        return start - value.item()

    for step in range(3):
        gradients = [float(step == other) for other in range(3)]
        assert moved(0.0, 0.0, gradients) == pytest.approx(weights.steps[step])
    assert moved(0.0, 1.0 if momentum else 0.0, [0.0] * 3) == pytest.approx(weights.history)
    assert moved(1.0, 0.0, [0.0] * 3) == pytest.approx(weights.shrunk)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 100])
def test_the_largest_ratio_of_adams_moments_is_reached(steps: int) -> None:
    """By gradients in proportion to beta1^j / beta2^j; of few steps the first, alone, has the largest."""
    beta1, beta2 = 0.9, 0.999
    gradients = [(beta1 / beta2) ** (steps - 1 - step) for step in range(steps)]
    first = second = 0.0
    for gradient in gradients:
        first, second = beta1 * first + (1 - beta1) * gradient, beta2 * second + (1 - beta2) * gradient**2
    found = first / (1 - beta1**steps) / math.sqrt(second / (1 - beta2**steps))
    assert largest_ratio_after(steps, beta1, beta2) == pytest.approx(max(found, 1.0))
    assert largest_ratio_after(steps, 0.9999, 0.999) >= 1
    assert largest_ratio_after(10**9, 0.99999, 0.999) == math.inf


@pytest.mark.parametrize("size", [1, 2, 50, 6914, 1_000_000])
def test_norms_of_normal_numbers(size: int) -> None:
    for failure in (1e-10, 1e-4):
        assert stats.chi2.sf(longest_noise(size, failure) ** 2, size) <= failure
        assert stats.chi2.cdf(shortest_noise(size, failure) ** 2, size) <= failure
    if size >= 50:
        assert longest_noise(size, 1e-10) < math.sqrt(size) + 8.5
        assert shortest_noise(size, 1e-10) > math.sqrt(size) - 7.8


@pytest.mark.parametrize("units", [1, 31, 1000, 10**6])
@pytest.mark.parametrize("rate", [1e-3, 0.05, 1.0])
def test_the_number_of_units_in_a_step(units: int, rate: float) -> None:
    for failure in (1e-12, 1e-3):
        most = most_drawn(units, rate, failure)
        assert stats.binom.sf(math.floor(most), units, rate) <= failure
        assert most <= units
