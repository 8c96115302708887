"""A library that lets company show is found, whatever the adapter; then every example gets a pass of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import client.training.independence as independence_module
import client.training.per_example as per_example_module
from client.site.site import Site
from client.training.independence import Take, check_adapter, keep_settled, settle_company, settle_stacks
from shared.errors import AdapterError, PrivacyError
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.models.batches import Batch, Example
from shared.models.packing import padded_length
from shared.runtime.runtime import Runtime, load_own_runtime, load_runtime
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
    assert {record.name for record in caplog.records} == {"silotune.site"}
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


@pytest.mark.parametrize(("threads", "hint"), [(1, None), (2, None), (3, "3 threads: try 2"), (6, "6 threads: try 4")])
def test_who_pays_for_an_odd_number_of_threads_is_told(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, threads: int, hint: str | None
) -> None:
    real = type(runtime.task).per_example_loss
    monkeypatch.setattr(type(runtime.task), "per_example_loss", shaken(real, 1e-6))
    torch.set_num_threads(threads)
    settle_company(runtime)
    assert "depends on the examples beside it" in caplog.text
    assert (hint or "") in caplog.text
    assert ("OMP_NUM_THREADS" in caplog.text) == (hint is not None)


def test_a_function_that_rounds_two_ways_parts_the_examples(
    task_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: a function whose last bit follows from how many numbers stand beside; passes of the sizes tried out are whole."""

    class TwoWays(nn.GELU):
        def forward(self, values: Tensor) -> Tensor:
            return super().forward(values) * (1 + 2**-22 * (values.numel() % 32 != 0))

    TwoWays.__module__ = nn.GELU.__module__
    job = task_job({"kind": "sequence_classification", **CASES["sequence_classification"].section})
    runtime = load_own_runtime(job, ComputeConfig(device="cpu", precision="float32", cache_frozen_layers=False))
    settle_company(runtime)
    assert runtime.compute.micro_batch_tokens > 1
    for layer in runtime.model.layers():
        layer.intermediate.intermediate_act_fn = TwoWays()
    monkeypatch.setattr(independence_module, "rounds_one_way", lambda *_: True)
    settle_company(runtime)
    assert runtime.compute.micro_batch_tokens > 1, "the passes show it, so this test shows nothing"
    monkeypatch.undo()
    settle_company(runtime)
    assert runtime.compute.micro_batch_tokens == 1


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
    caplog: pytest.LogCaptureFixture,
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
    assert not caplog.records
    runtime.settled_stacks = True
    record = runtime.encode([{"text": LINES[0], "label": "bad"}])
    runtime.warm_cache(record)
    try:
        torch.set_num_threads(threads + 1)
        keep_settled(runtime)
    finally:
        torch.set_num_threads(threads)
    assert settled == [threads, threads + 1]
    assert (runtime.tried_adapter, runtime.cache.get(record), runtime.settled_stacks) == ("", None, False)
    assert f"the number of threads went from {threads} to {threads + 1}" in caplog.messages
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


# --- which passes are tried ---


@dataclass(frozen=True)
class Pass:
    """One pass: tokens of its examples, their keys and sites (none: the model's own values), and the values that they met."""

    lengths: list[int]
    keys: list[bytes]
    owners: list[int] | None
    values: dict[str, Tensor]


Fault = Callable[[Pass, int], bool]


@pytest.fixture
def watch(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Pass]]:
    """Return what notes every pass, whose gradients are then numbers of each example and its site; a fault changes some.

    Texts have up to 200 tokens here: no network has to take them.
    """

    def begin(fault: Fault = lambda tried, place: False) -> list[Pass]:
        passes: list[Pass] = []

        @contextmanager
        def noting(
            runtime: Runtime, stacks: Mapping[Tensor, Tensor] | None = None, *, sites: int = 1, cached: bool = False
        ) -> Iterator[Take]:
            def take(examples: Sequence[Example], numbers: Sequence[int]) -> Tensor:
                assert len(numbers) == len(examples)
                values = {
                    name: stacks[p] if stacks else p.detach().clone() for name, p in runtime.model.trainable().items()
                }
                owners = None if stacks is None else [number % sites for number in numbers]
                tried = Pass([e.length for e in examples], [e.key for e in examples], owners, values)
                found = [
                    [float(example.input_ids.sum()), float(example.target), owner, fault(tried, place)]
                    for place, (example, owner) in enumerate(zip(examples, owners or [0] * len(examples), strict=True))
                ]
                passes.append(tried)
                return torch.tensor(found)

            yield take

        monkeypatch.setattr(independence_module, "_passes", noting)
        return passes

    monkeypatch.setattr(runtime, "max_length", 200)
    runtime.load(runtime.initial)
    return begin


SETTLE = {"one site": settle_company, "sites side by side": settle_stacks}


def is_long_pass(tried: Pass) -> bool:
    """A pass that ends with two texts of one length beyond the probes'."""
    return len(tried.lengths) == 4 and tried.lengths[2] == tried.lengths[3] > 64


@pytest.mark.parametrize("settle", SETTLE.values(), ids=SETTLE)
def test_texts_of_every_padded_length_are_tried_alone_and_in_company(
    runtime: Runtime, watch: Callable[..., list[Pass]], settle: Callable[[Runtime], None]
) -> None:
    passes = watch()
    settle(runtime)
    every = {padded_length(length) for length in range(2, 201)}
    for wanted in (lambda tried: len(tried.lengths) == 1, lambda tried: len(tried.lengths) > 1):
        assert {padded_length(length) for tried in passes if wanted(tried) for length in tried.lengths} == every
    for tried in filter(is_long_pass, passes):  # beside short ones, and one like it, which is of the other site
        assert tried.lengths[:2] == [5, 20]
        assert tried.keys[2] != tried.keys[3]
        assert tried.owners is None or tried.owners[2] != tried.owners[3]
    # All together, half of them, and with as many more of the longest as a pass of 2,048 tokens holds.
    together = [tried for tried in passes if len(tried.lengths) > 1 and not is_long_pass(tried)]
    assert [len(tried.lengths) for tried in together[:3]] == [12, 6, 40]
    assert together[0].lengths == together[2].lengths[:-13:-1] == [3, 25, 64, 8, 48, 17, 16, 2, 33, 9, 20, 5]
    assert 2048 - 64 < sum(together[2].lengths) <= 2048
    assert runtime.compute.micro_batch_tokens == 2048


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(2048, [96, 128, 192, 200]), (390, [96, 128, 192, 195]), (389, [96, 128, 192, 194]), (384, [96, 128, 192]), (130, [65])]
)  # fmt: skip
def test_long_texts_are_tried_up_to_those_of_which_two_share_a_pass(
    runtime: Runtime, watch: Callable[..., list[Pass]], tokens: int, expected: list[int]
) -> None:
    passes = watch()
    runtime.compute = runtime.compute.model_copy(update={"micro_batch_tokens": tokens})
    settle_company(runtime)
    assert [tried.lengths[-1] for tried in passes if len(tried.lengths) == 4] == expected
    assert {length for tried in passes for length in tried.lengths if length > 64} == set(expected)


def test_a_full_pass_has_no_more_examples_than_training_s(
    runtime: Runtime, watch: Callable[..., list[Pass]], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = watch()
    for most, expected in ((15, 15), (12, 12), (3, 12)):
        monkeypatch.setattr(independence_module, "most_examples", lambda parameters, most=most: most)
        passes.clear()
        settle_company(runtime)
        assert max(len(tried.lengths) for tried in passes) == expected


@pytest.mark.parametrize(("shape", "num_probes"), [([2, 5, 6], 4), ([2, 12, 10], 3)])
def test_images_are_tried_alone_together_and_in_a_full_pass(
    task_job: Callable[..., Job], watch: Callable[..., list[Pass]], shape: list[int], num_probes: int
) -> None:
    """As many as have 256 values, three at least."""
    case = CASES["image_classification"]
    task = {"kind": "image_classification", **case.section, "image_shape": shape}
    images = load_runtime(task_job(task, **case.sections), COMPUTE)
    size, tokens = images.max_length, images.compute.micro_batch_tokens
    passes = watch()
    settle_company(images)
    assert {length for tried in passes for length in tried.lengths} == {size}
    once = [*[1] * num_probes, 1, 1, num_probes, 2, tokens // size]  # alone, two of them again, in company
    assert [len(tried.lengths) for tried in passes] == once * 2


FAULTS: dict[str, Fault] = {
    "the first of all": lambda tried, place: len(tried.lengths) == 12 and place == 0,
    "the last of all": lambda tried, place: len(tried.lengths) == 12 and place == 11,
    "the first of half": lambda tried, place: len(tried.lengths) == 6 and place == 0,
    "one probe of a full pass": lambda tried, place: len(tried.lengths) == 40 and place == 28,
    "the last of a full pass": lambda tried, place: len(tried.lengths) == 40 and place == 39,
    "the longest text": lambda tried, place: is_long_pass(tried) and tried.lengths[place] == 200,
    "a long text alone": lambda tried, place: tried.lengths == [96],
}


@pytest.mark.parametrize("settle", SETTLE.values(), ids=SETTLE)
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_one_example_that_differs_in_one_pass_is_enough(
    runtime: Runtime, watch: Callable[..., list[Pass]], settle: Callable[[Runtime], None], fault: Fault
) -> None:
    runtime.compute = runtime.compute.model_copy(update={"cache_frozen_layers": True})
    runtime.warm_cache(runtime.encode([{"text": LINES[0], "label": "bad"}]))
    watch(fault)
    settle(runtime)
    assert runtime.compute.micro_batch_tokens == 1
    assert runtime.cache.num_bytes == 0  # of what was computed in company


def test_examples_meet_a_noisy_adapter_and_the_attack_s_head(
    private_job: Callable[..., Job], watch: Callable[..., list[Pass]]
) -> None:
    """And sites side by side one each. All of it is the same each time: a public seed gives it."""
    runtime = load_runtime(private_job(task={"labels": ["bad", "fair", "good", "best"]}), COMPUTE)
    passes = watch()
    settle_company(runtime)
    noisy, sharp = passes[0].values, passes[17].values
    for name, value in runtime.initial.items():
        assert all(torch.equal(tried.values[name], noisy[name]) for tried in passes[:17])
        if value.numel() > 100:
            assert float((noisy[name] - value).std()) == pytest.approx(0.02, rel=0.2)
        rows = (-1.0) ** torch.arange(len(value))
        is_head = name == "head.linear.weight"
        assert torch.equal(sharp[name], 1e6 * rows[:, None].expand_as(value) if is_head else noisy[name])
    assert (
        len({round(float(value.flatten()[0] - runtime.initial[name].flatten()[0]), 6) for name, value in noisy.items()})
        > 2
    )
    again = watch()
    settle_company(runtime)
    assert [tried.keys for tried in again] == [tried.keys for tried in passes]
    assert all(torch.equal(again[0].values[name], value) for name, value in noisy.items())
    together = watch()
    settle_stacks(runtime)
    for name, value in together[0].values.items():
        assert torch.equal(value, torch.stack([noisy[name], sharp[name]]))
    assert [tried.owners for tried in together[:12]] == [[0], [1]] * 6
    together.clear()
    settle_stacks(runtime)
    assert not together  # once is enough


@pytest.mark.parametrize("length", [5, 20])
def test_each_of_two_passes_is_repeated(runtime: Runtime, watch: Callable[..., list[Pass]], length: int) -> None:
    passes = watch(lambda tried, place: tried.lengths == [length] and tried.keys in (p.keys for p in passes))
    with pytest.raises(PrivacyError, match="when the same pass is repeated"):
        settle_company(runtime)
    assert all(torch.equal(p.detach(), runtime.initial[name]) for name, p in runtime.model.trainable().items())


def test_where_each_example_has_a_pass_of_its_own_nothing_is_tried_again(
    runtime: Runtime, watch: Callable[..., list[Pass]]
) -> None:
    passes = watch()
    for tokens in (1, 2):
        runtime.compute = runtime.compute.model_copy(update={"micro_batch_tokens": tokens})
        runtime.settled_stacks = False
        settle_stacks(runtime)
        check_adapter(runtime, runtime.initial)
        assert bool(passes) == (tokens > 1)


@pytest.mark.parametrize("differs", [None, 0, 1])
def test_an_adapter_is_tried_on_three_examples(
    runtime: Runtime, watch: Callable[..., list[Pass]], differs: int | None
) -> None:
    adapter = {name: value + 0.25 for name, value in runtime.initial.items()}
    passes = watch(lambda tried, place: len(tried.lengths) > 1 and place == differs)
    if differs is None:
        check_adapter(runtime, adapter)
    else:
        with pytest.raises(AdapterError, match="depends on the records beside it"):
            check_adapter(runtime, adapter)
    assert [tried.lengths for tried in passes] == [[5], [20], [5, 20, 64]]
    assert all(torch.equal(tried.values[name], value) for tried in passes for name, value in adapter.items())
    assert all(torch.equal(p.detach(), runtime.initial[name]) for name, p in runtime.model.trainable().items())


def test_gradients_are_the_same_only_if_each_number_is_or_is_none_in_both() -> None:
    nan = float("nan")
    one = torch.tensor([1.0, nan, -2.0])
    assert independence_module._same(one, one.clone())
    for other in ([1.0, nan, -2.0000002], [1.0, 3.0, -2.0], [nan, nan, -2.0]):
        assert not independence_module._same(one, torch.tensor(other))
        assert not independence_module._same(torch.tensor(other), one)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_gpu_is_settled_one_way_or_the_other(private_job: Callable[..., Job], precision: Any) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is visible")
    settle_company(load_runtime(private_job(), ComputeConfig(device="cuda", precision=precision)))


def test_a_round_s_check_computes_the_frozen_layers_once(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies below the adapter is the same in every round; a site that caches nothing computes it in each, as in training."""
    embedded: list[int] = []
    real = type(runtime.model)._embed_frozen

    def counting(model: Any, input_ids: Tensor, packing: Any) -> Tensor:
        embedded.append(len(input_ids))
        return real(model, input_ids, packing)

    monkeypatch.setattr(type(runtime.model), "_embed_frozen", counting)
    runtime.cache.forget()
    for _ in range(3):
        check_adapter(runtime, runtime.initial)
    assert sum(embedded) == 3  # two probes and the long one, once
    # From before the first record on, so that its time does not tell whether records fill the cache.
    runtime.cache.forget()
    monkeypatch.setattr(independence_module, "settle_company", lambda runtime: None)
    keep_settled(runtime)
    runtime.compute = runtime.compute.model_copy(update={"cache_megabytes": 0})  # full
    embedded.clear()
    check_adapter(runtime, runtime.initial)
    assert embedded == []
    runtime.cache.forget()
    runtime.compute = runtime.compute.model_copy(update={"cache_frozen_layers": False})
    check_adapter(runtime, runtime.initial)
    assert sum(embedded) == 2 + 3


@pytest.mark.parametrize(("micro_batch_tokens", "warmed"), [(1, False), (2, True)])
def test_what_checks_of_adapters_need_is_computed_where_examples_share_a_pass(
    runtime: Runtime, micro_batch_tokens: int, warmed: bool
) -> None:
    """Where each is computed by itself no adapter is tried out, so nothing is kept for it."""
    changed = {"cache_frozen_layers": True, "micro_batch_tokens": micro_batch_tokens}
    runtime.compute = runtime.compute.model_copy(update=changed)
    runtime.cache.forget()
    keep_settled(runtime)
    assert (runtime.cache.num_bytes > 0) == warmed
    runtime.cache.forget()
