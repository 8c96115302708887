"""Aggregation against formulas written down a second time."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from server.aggregation import LARGEST_VALUE, Aggregation, ExactLoraMean, WeightedMean
from shared.errors import AdapterError
from shared.job.compute import ComputeConfig
from shared.job.federation import AggregationConfig
from shared.job.job import Job
from shared.models.tunable import RESIDUAL
from shared.runtime.runtime import load_runtime
from shared.tensors.adapters import shapes_of

Adapter = dict[str, torch.Tensor]


def weighted_mean(updates: list[Adapter], weights: list[int], *, asked: int | None = None) -> Adapter:
    mean = WeightedMean(shapes_of(updates[0]), asked or sum(weights))
    for update, weight in zip(updates, weights, strict=True):
        mean.add(update, weight)
    return mean.result()


def exact_lora_mean(current: Adapter, updates: list[Adapter], weights: list[int], scaling: float) -> Adapter:
    mean = ExactLoraMean(current, shapes_of(updates[0]), sum(weights), scaling)
    for update, weight in zip(updates, weights, strict=True):
        mean.add(update, weight)
    return mean.result()


def adapters(count: int, seed: int = 0, scale: float = 1.0) -> list[Adapter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x": (3, 2), "y": (4,)}
    return [{n: torch.randn(s, generator=generator) * scale for n, s in shapes.items()} for _ in range(count)]


values_in_reach = st.floats(-LARGEST_VALUE, LARGEST_VALUE, width=32)


@given(
    values=st.lists(values_in_reach, min_size=1, max_size=40),
    weights=st.lists(st.integers(1, 1 << 40), min_size=40, max_size=40),
    silent=st.integers(0, 1 << 42),
)
def test_the_mean_keeps_its_error_bound(values: list[float], weights: list[int], silent: int) -> None:
    """Against exact arithmetic over fractions, also if much of the asked weight never came."""
    used = weights[: len(values)]
    mean = float(weighted_mean([{"x": torch.tensor([v])} for v in values], used, asked=sum(used) + silent)["x"])
    exact = sum(Fraction(v) * w for v, w in zip(values, used, strict=True)) / sum(used)
    from_grid = len(values) * 2.0**-40 * (sum(used) + silent) / sum(used)
    assert abs(Fraction(mean) - exact) <= Fraction(from_grid) + Fraction(2.0**-51) * Fraction(max(map(abs, values)))


@given(
    values=st.lists(st.lists(values_in_reach, min_size=3, max_size=3), min_size=2, max_size=12),
    sizes=st.lists(st.integers(1, 1 << 40), min_size=12, max_size=12),
    weights=st.sampled_from(["equal", "declared"]),
    order=st.randoms(use_true_random=False),
)
def test_the_order_of_adding_changes_no_bit(
    values: list[list[float]], sizes: list[int], weights: str, order: random.Random
) -> None:
    config = AggregationConfig.model_validate({"weights": weights, "server_optimizer": "adam"})
    pairs = [({"x": torch.tensor(v)}, n) for v, n in zip(values, sizes, strict=False)]
    shuffled = order.sample(pairs, len(pairs))
    start = {"x": torch.zeros(3)}
    one, other = (
        aggregate(start, [u for u, _ in some], [n for _, n in some], {}, config=config) for some in (pairs, shuffled)
    )
    for result, expected in zip(one, other, strict=True):
        assert all(torch.equal(result[name], expected[name]) for name in expected)


def test_many_small_updates_do_not_vanish_beside_a_large_one() -> None:
    large = LARGEST_VALUE
    updates = [{"x": torch.tensor([large])}] + [{"x": torch.tensor([1e-3])}] * 1000 + [{"x": torch.tensor([-large])}]
    assert float(weighted_mean(updates, [1] * 1002)["x"]) == pytest.approx(1 / 1002, rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 4097.0, -5e30])
def test_a_value_out_of_reach_is_refused_and_nothing_is_added(value: float) -> None:
    mean = WeightedMean({"x": torch.Size([2]), "y": torch.Size([1])}, 3)
    mean.add({"x": torch.tensor([1.0, 2.0]), "y": torch.tensor([3.0])})
    with pytest.raises(AdapterError, match=r"tensor 'y' holds values up to .*, expected at most 4096 in magnitude"):
        mean.add({"x": torch.tensor([1.0, 2.0]), "y": torch.tensor([value])})
    assert mean.result()["x"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("weight", [0, -1, 3])
def test_weights_are_positive_and_at_most_what_was_asked(weight: int) -> None:
    mean = WeightedMean({"x": torch.Size([])}, 2)
    with pytest.raises(ValueError, match="expected from 1 to what is left"):
        mean.add({"x": torch.zeros(())}, weight)
    with pytest.raises(ValueError, match="no update was added"):
        mean.result()
    with pytest.raises(ValueError, match="total weight is 0"):
        WeightedMean({}, 0)


def aggregate(
    current: Adapter,
    updates: list[Adapter],
    sizes: Sequence[int],
    state: Adapter,
    *,
    config: AggregationConfig,
) -> tuple[Adapter, Adapter]:
    aggregation = Aggregation(current, state, shapes_of(current), sizes, config=config, exact_scaling=None)
    for update, size in zip(updates, sizes, strict=True):
        aggregation.add(update, size)
    return aggregation.result()


def run(config: AggregationConfig, rounds: int, sizes: tuple[int, ...]) -> tuple[Adapter, list[list[Adapter]]]:
    (current,), state = adapters(1, seed=99), {}
    history = []
    for number in range(rounds):
        updates = adapters(len(sizes), seed=number)
        history.append(updates)
        current, state = aggregate(current, updates, sizes, state, config=config)
    return current, history


def start() -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy() for name, tensor in adapters(1, seed=99)[0].items()}


def mean_of(updates: list[Adapter], name: str, weights: tuple[int, ...]) -> np.ndarray:
    return np.average([u[name].double().numpy() for u in updates], axis=0, weights=weights)


@pytest.mark.parametrize(
    ("weights", "sizes", "effective"), [("equal", (8, 64), (1, 1)), ("declared", (8, 64), (8, 64))]
)
def test_plain_averaging(weights: str, sizes: tuple[int, ...], effective: tuple[int, ...]) -> None:
    config = AggregationConfig.model_validate({"weights": weights, "server_learning_rate": 0.5})
    result, history = run(config, 3, sizes)
    for name, value in start().items():
        expected = value + 0.5 * sum(mean_of(updates, name, effective) for updates in history)
        np.testing.assert_allclose(result[name].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_momentum_is_fedavgm() -> None:
    config = AggregationConfig(server_optimizer="momentum", server_learning_rate=0.7, server_momentum=0.8)
    result, history = run(config, 4, (1, 1, 1))
    for name, value in start().items():
        velocity = np.zeros_like(value)
        for updates in history:
            velocity = 0.8 * velocity + mean_of(updates, name, (1, 1, 1))
            value = value + 0.7 * velocity
        np.testing.assert_allclose(result[name].numpy(), value, rtol=1e-5, atol=1e-6)


def test_adam_is_torchs_adam_on_the_negative_mean() -> None:
    """FedAdam with bias correction is Adam (Kingma and Ba 2015) whose gradient is minus the mean update."""
    config = AggregationConfig(server_optimizer="adam", server_learning_rate=0.05, server_momentum=0.85)
    result, history = run(config, 5, (1, 1))
    for name, tensor in adapters(1, seed=99)[0].items():
        parameter = torch.nn.Parameter(tensor.double())
        optimizer = torch.optim.Adam([parameter], lr=0.05, betas=(0.85, 0.99), eps=1e-8)
        for updates in history:
            parameter.grad = -torch.from_numpy(mean_of(updates, name, (1, 1)))
            optimizer.step()
        np.testing.assert_allclose(result[name].numpy(), parameter.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_the_order_of_the_state_survives_a_stop() -> None:
    """The state is a plain dictionary of tensors, so a checkpoint can hold it."""
    config = AggregationConfig(server_optimizer="adam")
    _, state = aggregate(adapters(1)[0], adapters(2), [1, 1], {}, config=config)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert float(state["|step"]) == 1.0


# --- exact mean of products ---

SCALING = 2.0


def effective(adapter: Adapter, module: str) -> torch.Tensor:
    product = adapter[module + ".lora_B.weight"].double() @ adapter[module + ".lora_A.weight"].double()
    residual = adapter.get(module + RESIDUAL)
    return SCALING * product + (0 if residual is None else residual.double())


def lora(seed: int, *, residual: bool) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    adapter = {}
    for module in ("q", "v"):
        adapter[f"{module}.lora_A.weight"] = torch.randn(2, 5, generator=generator)
        adapter[f"{module}.lora_B.weight"] = torch.randn(6, 2, generator=generator)
        if residual:
            adapter[module + RESIDUAL] = torch.zeros(6, 5)
    adapter["head.bias"] = torch.randn(3, generator=generator)
    return adapter


@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 2, 5)])
def test_exact_mean_keeps_the_mean_of_the_effective_weights_over_rounds(weights: tuple[int, ...]) -> None:
    current = lora(0, residual=True)
    share = np.array(weights) / sum(weights)
    for number in range(4):
        updates = [lora(10 * number + i + 1, residual=False) for i in range(3)]
        moved = [current | {n: current[n] + update[n] for n in update} for update in updates]
        following = exact_lora_mean(current, updates, list(weights), SCALING)
        assert following.keys() == current.keys()
        for module in ("q", "v"):
            expected = sum(w * effective(site, module) for w, site in zip(share, moved, strict=True))
            torch.testing.assert_close(effective(following, module), expected, rtol=1e-5, atol=1e-4)
            plain = {n: t for n, t in following.items() if not n.endswith(RESIDUAL)}
            assert not torch.allclose(effective(plain, module), expected, atol=0.1), "the residual must matter"
        bias = sum(w * site["head.bias"] for w, site in zip(share, moved, strict=True))
        torch.testing.assert_close(following["head.bias"].double(), bias.double(), rtol=1e-5, atol=1e-5)
        current = following


def test_the_order_of_sites_changes_no_bit_of_the_exact_mean() -> None:
    current = lora(0, residual=True)
    sites = [(lora(i, residual=False), 1 + i) for i in range(1, 9)]
    expected = exact_lora_mean(current, [u for u, _ in sites], [n for _, n in sites], SCALING)
    for seed in range(5):
        shuffled = random.Random(seed).sample(sites, len(sites))
        found = exact_lora_mean(current, [u for u, _ in shuffled], [n for _, n in shuffled], SCALING)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_product_out_of_reach_is_refused_and_nothing_is_added() -> None:
    current = lora(0, residual=True)
    mean = ExactLoraMean(current, shapes_of(lora(1, residual=False)), 2, SCALING)
    mean.add(lora(1, residual=False))
    with pytest.raises(AdapterError, match="expected at most 4096"):
        mean.add({name: torch.full_like(tensor, 100.0) for name, tensor in lora(2, residual=False).items()})
    mean.add(lora(3, residual=False))
    expected = exact_lora_mean(current, [lora(i, residual=False) for i in (1, 3)], [1, 1], SCALING)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in mean.result().items())


def test_one_site_leaves_no_residual() -> None:
    current = lora(0, residual=True)
    following = exact_lora_mean(current, [lora(1, residual=False)], [3], SCALING)
    assert float(following["q" + RESIDUAL].abs().max()) < 1e-5


def test_the_global_model_computes_with_the_mean_of_the_sites_weights(classification_job: Callable[..., Job]) -> None:
    """End to end through the runtime: the base weight plus factors plus residual is the mean over sites."""
    job = classification_job(lora={"train": "both"}, seed=31)
    runtime = load_runtime(job, ComputeConfig(device="cpu", precision="float32"))
    current = runtime.initial_global(exact=True)
    generator = torch.Generator().manual_seed(0)
    updates = [{n: torch.randn(t.shape, generator=generator) * 0.1 for n, t in runtime.initial.items()} for _ in "abc"]

    def weights(adapter: Adapter) -> dict[str, torch.Tensor]:
        runtime.load(adapter)
        return {
            name: module.get_base_layer().weight.detach().double()
            + module.get_delta_weight("default").detach().double()
            for name, module in runtime.model._adapted()
        }

    sites = [weights(current | {n: current[n] + u[n] for n in u}) for u in updates]
    following = weights(exact_lora_mean(current, updates, [1] * 3, runtime.model.scaling))
    for name, weight in following.items():
        torch.testing.assert_close(weight, sum(site[name] for site in sites) / 3, rtol=1e-5, atol=1e-5)
    runtime.load(runtime.initial_global(exact=True))
