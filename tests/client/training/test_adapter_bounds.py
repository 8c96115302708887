"""What honest rounds lead to passes; what a coordinator makes up does not, and a refusal costs nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from client.site.site import Site
from client.training.adapter_bounds import AdapterBounds, check_bounds, largest_ratio
from client.training.trainer import LocalWork, train_local_rounds
from server.aggregation.optimizers import apply_update
from shared.errors import AdapterError
from shared.job.job import Job
from shared.limits import MAX_ADAPTER_VALUE, MAX_LEARNING_RATE
from shared.models.tunable import RESIDUAL
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import SiteRandomness
from shared.runtime.runtime import load_runtime
from shared.tensors.adapters import encode
from shared.wire.messages import Refusal, TrainReply, TrainRequest
from tests.client.conftest import COMPUTE


def bounds_of(job: Job) -> AdapterBounds:
    return AdapterBounds(job, PrivacyPlan.from_job(job))


def check(job: Job, adapter: dict[str, Tensor], rounds_before: int) -> None:
    runtime = load_runtime(job, COMPUTE)
    check_bounds(job, PrivacyPlan.from_job(job), runtime.initial, adapter, rounds_before=rounds_before)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("server", ["none", "momentum", "adam"])
def test_the_smallest_site_that_there_is_stays_within_the_bound(
    private_job: Callable[..., Job], records: list[dict[str, Any]], optimizer: str, server: str
) -> None:
    """One declared record, so all of the noise; high rates; every round is checked as a site would."""
    job = private_job(
        training={
            "rounds": 4, "local_steps": 3, "optimizer": optimizer, "learning_rate": 0.5, "momentum": 0.8,
            "weight_decay": 0.05, "schedule": "linear", "warmup_steps": 2, "head_learning_rate_factor": 2.0,
        },
        privacy={"noise_multiplier": 2.0, "sample_rate": 0.5},
        aggregation={"server_optimizer": server, "server_learning_rate": 1.5, "server_momentum": 0.7},
    )  # fmt: skip
    runtime = load_runtime(job, COMPUTE)
    examples = runtime.encode(records[:2])
    adapter, moments, state = dict(runtime.initial), {}, {}
    for number in range(1, 5):
        check(job, adapter, number - 1)
        work = LocalWork(
            examples=examples,
            declared_records=1,
            randomness=SiteRandomness.injected(f"round {number}"),
            optimizer_state=moments,
        )
        (result,) = train_local_rounds(
            runtime, [work], adapter, training=job.training, plan=PrivacyPlan.from_job(job), round_number=number
        )
        moments = result.optimizer_state
        adapter, state = apply_update(adapter, result.delta, state, job.aggregation)
    check(job, adapter, 4)
    moved = max(float((adapter[name] - value).abs().max()) for name, value in runtime.initial.items())
    # Not a bound that holds because it is endless.
    assert moved > bounds_of(job).limit("head.linear.weight", 4, largest_initial=0.0) / 300


def test_the_ratio_of_adam_s_moments_is_bounded_for_the_worst_gradients() -> None:
    """Gradients made to push: silence, then one push or a rising run; compared with PyTorch's own steps."""
    for beta1 in (0.0, 0.5, 0.9):
        limit = largest_ratio(beta1, 0.999)
        for gradients in ([1.0], [1e-9] * 500 + [1.0] * 20, [1.3**k for k in range(40)], [0.0] * 2000 + [1.0] * 8):
            value = torch.nn.Parameter(torch.zeros(()))
            optimizer = torch.optim.AdamW([value], lr=1.0, betas=(beta1, 0.999), weight_decay=0.0)
            for gradient in gradients:
                before = value.item()
                value.grad = torch.tensor(gradient)
                optimizer.step()
                assert abs(value.item() - before) <= limit
    assert largest_ratio(0.9, 0.999) < 10
    assert largest_ratio(0.9999, 0.999) == math.inf


@pytest.mark.parametrize(
    ("beta1", "beta2"), [(0.0, 0.999), (0.5, 0.99), (0.9, 0.999), (0.9, 0.99), (0.99, 0.999), (0.994, 0.99)]
)
def test_the_ratio_of_adam_s_moments_is_that_of_cauchy_and_schwarz(beta1: float, beta2: float) -> None:
    """For t steps |sum a g| / sqrt(sum b g^2) <= sqrt(sum a^2 / b), a and b the weights of the corrected moments."""
    steps = torch.arange(0, 3000, dtype=torch.float64)
    ratios = []
    for t in (*range(1, 300), 1000, 3000):
        first = (1 - beta1) * beta1 ** steps[:t] / (1 - beta1**t)
        second = (1 - beta2) * beta2 ** steps[:t] / (1 - beta2**t)
        ratios.append(math.sqrt(float((first**2 / second).sum())))
    found = largest_ratio(beta1, beta2)
    assert max(ratios) <= found
    ever = sum(beta1 ** (2 * k) / beta2**k for k in range(20_000)) if beta1 else 1.0  # of endlessly many steps
    tops = [
        (1 - beta1) / (1 - beta1**t) * math.sqrt((1 - beta2**t) / (1 - beta2) * ever)
        for t in (*range(1, math.ceil(1 / (1 - beta2)) + 1), 10**6)
    ]
    assert found == pytest.approx(max(tops), rel=1e-9)
    assert largest_ratio(0.5, 0.25) == math.inf


def test_before_the_first_round_only_the_public_adapter_passes(private_job: Callable[..., Job]) -> None:
    job = private_job()
    initial = load_runtime(job, COMPUTE).initial
    check(job, dict(initial), 0)
    for name, value in initial.items():
        with pytest.raises(AdapterError, match="away from where the job's seed puts it"):
            check(job, initial | {name: value + 0.01}, 0)
    check(job, {name: value + 0.01 for name, value in initial.items()}, 1)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_one_coordinate_that_went_too_far_is_enough(private_job: Callable[..., Job], sign: float) -> None:
    job = private_job()
    initial, bounds = load_runtime(job, COMPUTE).initial, bounds_of(job)
    for name, start in initial.items():
        limit = bounds.limit(name, 1, largest_initial=float(start.abs().max()))
        moved = start.clone()
        moved.view(-1)[1] += sign * limit * 0.999
        check(job, initial | {name: moved}, 1)
        moved.view(-1)[1] += sign * limit * 0.002
        with pytest.raises(AdapterError, match=rf"tensor {name!r} is .* away .* 1 rounds .* by {limit:.3g} at most"):
            check(job, initial | {name: moved}, 1)


def test_a_value_beyond_the_largest_is_refused_though_it_has_not_moved(private_job: Callable[..., Job]) -> None:
    job = private_job(training={"learning_rate": MAX_LEARNING_RATE, "optimizer": "sgd"})
    plan = PrivacyPlan.from_job(job)
    for value, fits in (
        (MAX_ADAPTER_VALUE, True),
        (-MAX_ADAPTER_VALUE, True),
        (1.001 * MAX_ADAPTER_VALUE, False),
        (-1.001 * MAX_ADAPTER_VALUE, False),
    ):
        far = {"w": torch.tensor([0.0, value])}
        if fits:
            check_bounds(job, plan, {"w": far["w"]}, far, rounds_before=1)
            check_bounds(job, plan, {}, far, rounds_before=1)  # a tensor without an initial value begins at 0
        else:
            with pytest.raises(AdapterError, match="no value may exceed 10000"):
                check_bounds(job, plan, {"w": far["w"]}, far, rounds_before=1)


def test_weight_decay_moves_a_tensor_by_twice_its_largest_initial_value_and_a_residual_not_at_all(
    private_job: Callable[..., Job],
) -> None:
    """Whatever its sign; each value within a hair of its limit, on either side of it."""
    job = private_job(training={"weight_decay": 0.05, "learning_rate": 1e-3})
    plan, bounds = PrivacyPlan.from_job(job), bounds_of(job)
    initial = {"a.lora_B": torch.tensor([0.1, -0.75, 0.2])}
    adapter = {**initial, f"a.{RESIDUAL}": torch.zeros(2, 2)}
    for name, largest in (("a.lora_B", 0.75), (f"a.{RESIDUAL}", 0.0)):
        limit = bounds.limit(name, 1, largest_initial=largest)
        assert limit == pytest.approx(bounds.limit(name, 1, largest_initial=0.0) + 2 * largest)
        for factor in (1, -1):
            moved = adapter[name].clone()
            moved.view(-1)[0] += factor * limit * 0.999
            check_bounds(job, plan, initial, adapter | {name: moved}, rounds_before=1)
            moved.view(-1)[0] += factor * limit * 0.002
            with pytest.raises(AdapterError, match=f"tensor {name!r}"):
                check_bounds(job, plan, initial, adapter | {name: moved}, rounds_before=1)


SGD = {"optimizer": "sgd", "momentum": 0.5, "learning_rate": 0.1, "local_steps": 3, "head_learning_rate_factor": 2.0}
ROUND = 3 * 0.1 * 0.25 * (2 + 10 * 2.0) / 0.5 / (1 - 0.5)  # steps, rate, C (2 + 10 sigma) / q, momentum


@pytest.mark.parametrize(
    ("name", "rounds", "training", "aggregation", "expected"),
    [
        ("a.lora_B", 1, {}, {}, 2 * ROUND),
        ("a.lora_B", 3, {}, {"server_learning_rate": 1.5}, 2 * 3 * 1.5 * ROUND),
        ("head.linear.weight", 3, {}, {}, 2 * 3 * 2.0 * ROUND),
        ("a.lora_B", 2, {"weight_decay": 0.1}, {}, 2 * 2 * ROUND + 2 * 0.7),
        ("a.lora_B", 2, {}, {"server_optimizer": "momentum", "server_momentum": 0.75}, 2 * 2 * ROUND / 0.25),
        (
            "a.lora_B",
            2,
            {},
            {"server_optimizer": "adam", "server_momentum": 0.5, "server_learning_rate": 0.3},
            2 * 2 * 0.3 * largest_ratio(0.5, 0.99),
        ),
        ("a.lora_B", 2, {"optimizer": "adamw"}, {}, 2 * 2 * 3 * 0.1 * largest_ratio(0.5, 0.999)),
        (f"a.{RESIDUAL}", 2, {"learning_rate": 0.01}, {}, 2 * 2 * 2 * 8.0 * (ROUND / 10) ** 2),
        ("a.lora_B", 10**6, {}, {}, MAX_ADAPTER_VALUE),
    ],
)
def test_the_bound_is_what_noise_rates_and_optimisers_can_do(
    private_job: Callable[..., Job],
    name: str,
    rounds: int,
    training: dict[str, Any],
    aggregation: dict[str, Any],
    expected: float,
) -> None:
    privacy = {"noise_multiplier": 2.0, "sample_rate": 0.5, "max_grad_norm": 0.25}
    job = private_job(training={**SGD, **training}, privacy=privacy, aggregation=aggregation)
    assert job.lora.alpha == 8.0
    found = bounds_of(job).limit(name, rounds, largest_initial=0.7)
    assert found == pytest.approx(min(expected + 1e-4, MAX_ADAPTER_VALUE), rel=1e-9)
    assert bounds_of(job).limit(name, 0, largest_initial=0.7) == 1e-4


@pytest.mark.parametrize(
    "changed",
    [
        {"training": {"optimizer": "adamw", "momentum": 0.9995}},
        {"aggregation": {"server_optimizer": "adam", "server_momentum": 0.995}},
    ],
    ids=["site", "server"],
)
def test_moments_without_a_bound_leave_the_first_round_as_it_is(
    private_job: Callable[..., Job], changed: dict[str, dict[str, Any]]
) -> None:
    """No rounds of a step without a bound are still no step: zero times infinity made the limit NaN, which nothing is within."""
    job = private_job(**changed)
    initial = load_runtime(job, COMPUTE).initial
    check(job, dict(initial), 0)
    for name, value in initial.items():
        with pytest.raises(AdapterError, match="away from where the job's seed puts it"):
            check(job, initial | {name: value + 0.01}, 0)
    check(job, {name: value + 1.0 for name, value in initial.items()}, 1)


@pytest.mark.parametrize("strength", [1e5, 1e6, 1e8])
def test_no_learning_rate_opens_the_way_for_any_value(private_job: Callable[..., Job], strength: float) -> None:
    job = private_job(training={"learning_rate": MAX_LEARNING_RATE, "optimizer": "sgd"})
    initial = load_runtime(job, COMPUTE).initial
    weight = initial["head.linear.weight"].clone()
    weight[0], weight[1] = strength, -strength
    with pytest.raises(AdapterError, match="no value may exceed 10000"):
        check(job, initial | {"head.linear.weight": weight}, 2)
    check(job, initial | {"head.linear.weight": weight.clamp(-MAX_ADAPTER_VALUE, MAX_ADAPTER_VALUE) * 0.99}, 2)


def test_factors_and_residuals_of_an_exact_mean_are_bounded_too(private_job: Callable[..., Job]) -> None:
    job = private_job(lora={"train": "both"})
    start = load_runtime(job, COMPUTE).initial_global(exact=True)
    check(job, start, 0)
    for name in start:
        check(job, start | {name: start[name] + 0.001}, 1)
        with pytest.raises(AdapterError, match=f"tensor {name!r}"):
            check(job, start | {name: start[name] + 2e3}, 1)


def test_a_fixed_factor_cannot_be_sent_at_all(private_job: Callable[..., Job]) -> None:
    job = private_job(lora={"train": "b"})
    assert not any("lora_A" in name for name in load_runtime(job, COMPUTE).global_shapes(exact=False))


def test_baselines_without_noise_at_the_sites_are_not_bounded(private_job: Callable[..., Job]) -> None:
    job = private_job(privacy={"mechanism": "none", "noise_multiplier": None})
    check(job, {name: value + 1e6 for name, value in load_runtime(job, COMPUTE).initial.items()}, 0)


def test_a_refused_adapter_costs_nothing_and_the_next_round_is_as_before(
    site_home: Callable[..., Path], private_job: Callable[..., Job], request_for: Callable[..., TrainRequest]
) -> None:
    job, site = private_job(), Site(site_home())
    adapter = dict(load_runtime(job, COMPUTE).initial)
    adapter["head.linear.weight"] = torch.full_like(adapter["head.linear.weight"], 1e6)
    answer = site.answer(TrainRequest(job=job, round_number=1, adapter=encode(adapter)))
    assert isinstance(answer, Refusal)
    assert (answer.code, site.ledger().spent_epsilon()) == ("AdapterError", 0.0)
    assert "head.linear.weight" in answer.reason
    assert isinstance(site.answer(request_for(job)), TrainReply)
