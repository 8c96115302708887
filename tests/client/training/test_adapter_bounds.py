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
from client.training.adapter_bounds import MOST, AdapterBounds, check_bounds, largest_ratio
from client.training.trainer import train_local_round
from server.aggregation.optimizers import apply_update
from shared.errors import AdapterError
from shared.job.job import Job
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
        result = train_local_round(
            runtime, examples, adapter, training=job.training, plan=PrivacyPlan.from_job(job), declared_records=1,
            randomness=SiteRandomness.injected(f"round {number}"), round_number=number, optimizer_state=moments,
        )  # fmt: skip
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


def test_before_the_first_round_only_the_public_adapter_passes(private_job: Callable[..., Job]) -> None:
    job = private_job()
    initial = load_runtime(job, COMPUTE).initial
    check(job, dict(initial), 0)
    for name, value in initial.items():
        with pytest.raises(AdapterError, match="away from where the job's seed puts it"):
            check(job, initial | {name: value + 0.01}, 0)
    check(job, {name: value + 0.01 for name, value in initial.items()}, 1)


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
    job = private_job(training={"learning_rate": 1e12, "optimizer": "sgd"})
    initial = load_runtime(job, COMPUTE).initial
    weight = initial["head.linear.weight"].clone()
    weight[0], weight[1] = strength, -strength
    with pytest.raises(AdapterError, match="no value may exceed 10000"):
        check(job, initial | {"head.linear.weight": weight}, 2)
    check(job, initial | {"head.linear.weight": weight.clamp(-MOST, MOST) * 0.99}, 2)


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
