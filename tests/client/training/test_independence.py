"""A library that lets company show is found, whatever the adapter; then every example gets a pass of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import client.training.independence as independence_module
import client.training.per_example as per_example_module
from client.site.site import Site
from client.training.independence import check_adapter, keep_settled, settle_company, settle_stacks
from shared.errors import AdapterError, PrivacyError
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.models.batches import Batch
from shared.runtime.runtime import Runtime, load_runtime
from shared.tensors.adapters import encode
from shared.wire.messages import Refusal, TrainReply, TrainRequest
from simulations.running.together import train_together
from tests.client.conftest import COMPUTE
from tests.conftest import LINES
from tests.test_task_contract import CASES


@pytest.fixture
def runtime(private_job: Callable[..., Job]) -> Iterator[Runtime]:
    """A runtime whose settings are put back afterwards: others share it."""
    runtime = load_runtime(private_job(), COMPUTE)
    compute = runtime.compute
    runtime.settled_threads, runtime.settled_stacks = 0, False
    yield runtime
    runtime.compute, runtime.proven, runtime.tried_adapter = compute, False, ""
    runtime.settled_threads, runtime.settled_stacks = 0, False


def shaken(real: Callable[..., Any], strength: float) -> Callable[..., Any]:
    """Return losses that owe a trace to the number of examples: what another order of adding up does."""

    def per_example_loss(task: object, outputs: Tensor, batch: Batch) -> Tensor:
        losses: Tensor = real(task, outputs, batch)
        return losses * (1 + strength * (len(losses) - 1))

    return per_example_loss


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", CASES)
def test_this_machine_lets_no_company_show(
    task_job: Callable[..., Job], caplog: pytest.LogCaptureFixture, kind: str, precision: Any
) -> None:
    job = task_job({"kind": kind, **CASES[kind].section}, **CASES[kind].sections)
    runtime = load_runtime(job, ComputeConfig(device="cpu", precision=precision, cache_frozen_layers=False))
    before = {name: value.detach().clone() for name, value in runtime.model.trainable().items()}
    shared = runtime.compute.micro_batch_tokens
    settle_company(runtime)
    runtime.settled_stacks = False
    settle_stacks(runtime)
    check_adapter(runtime, runtime.initial)
    assert runtime.compute.micro_batch_tokens == shared > 1
    assert not caplog.records
    assert all(torch.equal(value, before[name]) for name, value in runtime.model.trainable().items())


@pytest.mark.parametrize("strength", [1e-3, 1e-6])
def test_where_company_shows_each_example_is_computed_by_itself(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, strength: float
) -> None:
    """Planted: one part in a million of every gradient follows from the number of examples. The proof of single examples, which
    allows for rounding, lets it pass."""
    monkeypatch.setattr(type(runtime.task), "per_example_loss", shaken(type(runtime.task).per_example_loss, strength))
    settle_company(runtime)
    assert runtime.compute.micro_batch_tokens == 1
    assert "depends on the examples beside it" in caplog.text
    examples = [runtime.task.probe(torch.arange(2, 2 + length), length) for length in (3, 9, 4)]
    batches = list(runtime.grouped_batches(examples, [[0], [1], [2]]))
    assert sorted(rows for rows, _ in batches) == [[0], [1], [2]]
    check_adapter(runtime, runtime.initial)


def test_a_fault_that_only_full_passes_have_is_found(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    real = per_example_module._linear

    def rounded(inputs: Tensor, *others: Any) -> Tensor:
        outputs = real(inputs, *others)
        return outputs * (1 + 2**-20) if inputs.ndim == 3 and inputs.shape[1] > 1024 else outputs

    monkeypatch.setattr(per_example_module, "_linear", rounded)
    settle_company(runtime)
    assert runtime.compute.micro_batch_tokens == 1


def test_a_fault_that_only_sites_side_by_side_have_is_found(
    site_home: Callable[..., Path],
    private_job: Callable[..., Job],
    request_for: Callable[..., TrainRequest],
    runtime: Runtime,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Planted: products with each example's own values owe a trace to their number. A real site never makes them."""
    real = per_example_module._linear

    def rounded(inputs: Tensor, weight: Tensor, *others: Any) -> Tensor:
        outputs = real(inputs, weight, *others)
        return outputs * (1 + 2**-20) if weight.ndim == 3 and len(weight) > 1 else outputs

    monkeypatch.setattr(per_example_module, "_linear", rounded)
    shared = runtime.compute.micro_batch_tokens
    settle_company(runtime)
    assert runtime.compute.micro_batch_tokens == shared
    request = request_for(private_job())
    sites = [Site(site_home(name)) for name in ("north", "south")]
    (alone,) = train_together([(sites[0], request)])
    assert isinstance(alone, TrainReply)
    assert runtime.compute.micro_batch_tokens == shared
    other = request_for(private_job(name="other"))
    answers = train_together([(site, other) for site in sites])
    assert all(isinstance(answer, TrainReply) for answer in answers)
    assert runtime.compute.micro_batch_tokens == 1
    assert "depends on the examples beside it" in caplog.text


@pytest.mark.parametrize("least", [65, 97])
def test_a_fault_that_only_long_texts_have_is_found(
    classification_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, least: int
) -> None:
    """Planted: products of texts of 65, or 97, places and more owe a trace to how many there are."""
    sections = {"lora": {"last_layers": 1, "train": "b"}, "privacy": {"noise_multiplier": 1.0}}
    model = {"backbone": "embedded:all-minilm-l6-v2", "max_length": 128}
    runtime = load_runtime(classification_job(model=model, **sections), COMPUTE)
    shared = runtime.compute.micro_batch_tokens
    settle_company(runtime)
    assert runtime.compute.micro_batch_tokens == shared
    real = per_example_module._bmm

    def rounded(first: Tensor, second: Tensor) -> Tensor:
        product = real(first, second)
        return product * (1 + 2**-20) if len(first) > 1 and first.shape[-1] >= least else product

    monkeypatch.setattr(per_example_module, "_bmm", rounded)
    settle_company(runtime)
    assert runtime.compute.micro_batch_tokens == 1


def test_another_number_of_threads_is_settled_anew(
    site_home: Callable[..., Path],
    private_job: Callable[..., Job],
    request_for: Callable[..., TrainRequest],
    runtime: Runtime,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Libraries cut their sums by it: what was found for one number says nothing about another."""
    settled: list[int] = []
    monkeypatch.setattr(independence_module, "settle_company", lambda runtime: settled.append(torch.get_num_threads()))
    site, job = Site(site_home()), private_job()
    threads = torch.get_num_threads()
    assert isinstance(site.answer(request_for(job, 1)), TrainReply)
    assert isinstance(site.answer(request_for(job, 2)), TrainReply)
    tried = runtime.tried_adapter
    assert settled == [threads]
    runtime.warm_cache(runtime.encode([{"text": LINES[0], "label": "bad"}]))
    try:
        torch.set_num_threads(threads + 1)
        keep_settled(runtime)
    finally:
        torch.set_num_threads(threads)
    assert settled == [threads, threads + 1]
    assert (runtime.tried_adapter, runtime.cache.num_bytes) == ("", 0)
    assert isinstance(site.answer(request_for(job, 3)), TrainReply)
    assert settled == [threads, threads + 1, threads]
    assert runtime.tried_adapter == tried


def test_a_device_that_does_not_repeat_itself_trains_nothing(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = type(runtime.task).per_example_loss, iter(range(10**6))

    def drifting(task: object, outputs: Tensor, batch: Batch) -> Tensor:
        losses: Tensor = real(task, outputs, batch)
        return losses * (1 + 1e-6 * next(calls))

    monkeypatch.setattr(type(runtime.task), "per_example_loss", drifting)
    with pytest.raises(PrivacyError, match="when the same pass is repeated"):
        settle_company(runtime)


def test_a_round_s_own_adapter_is_tried_out(
    site_home: Callable[..., Path],
    private_job: Callable[..., Job],
    runtime: Runtime,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planted: company shows only beside an adapter that no start has. The round is refused, and nothing is charged."""
    job, site = private_job(), Site(site_home())
    real = type(runtime.task).per_example_loss

    def sometimes(task: object, outputs: Tensor, batch: Batch) -> Tensor:
        losses: Tensor = real(task, outputs, batch)
        moved = runtime.model.trainable()["head.linear.bias"].detach()[0] == 0.125
        return losses * (1 + 1e-6 * (len(losses) - 1)) if moved else losses

    monkeypatch.setattr(type(runtime.task), "per_example_loss", sometimes)
    adapter = {name: value.clone() for name, value in runtime.initial.items()}
    adapter["head.linear.bias"][0] = 0.125
    with pytest.raises(AdapterError, match="depends on the records beside it"):
        check_adapter(runtime, adapter)
    refused = site.answer(TrainRequest(job=job, round_number=2, adapter=encode(adapter)))
    assert isinstance(refused, Refusal)
    assert (refused.code, site.ledger().spent_epsilon()) == ("AdapterError", 0.0)
    again = site.answer(TrainRequest(job=job, round_number=2, adapter=encode(runtime.initial)))
    assert isinstance(again, TrainReply)


def test_an_adapter_that_makes_nothing_finite_shows_no_company(runtime: Runtime) -> None:
    """NaN for every example, alone and beside others, is the same; such gradients count as zero."""
    check_adapter(runtime, {name: torch.full_like(value, 1e38) for name, value in runtime.initial.items()})


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_gpu_is_settled_one_way_or_the_other(private_job: Callable[..., Job], precision: Any) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is visible")
    settle_company(load_runtime(private_job(), ComputeConfig(device="cuda", precision=precision)))
