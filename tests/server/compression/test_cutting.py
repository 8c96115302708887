"""What is cut is gone, what is kept is as it was, and what matters is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from server.compression.cutting import importance, most_important, spread, width_of, with_layers, with_width
from server.compression.network import Network
from shared.job.job import Job
from shared.models.batches import Batch, collate
from shared.runtime.export.exporting import read_model
from shared.runtime.export.parts import Parts
from shared.tasks import task_of
from tests.server.compression.kinds import KINDS, new_run


@pytest.fixture(params=["classification", "entities", "ratings", "language"])
def parts(request: pytest.FixtureRequest, task_job: Callable[..., Job], tmp_path: Path) -> Parts:
    found = read_model(new_run(tmp_path / "run", request.param, task_job))
    assert isinstance(found, Parts)
    return found


def _batch(parts: Parts) -> Batch:
    task = task_of(parts.job)
    return collate([task.probe(torch.arange(1, 5 + number % 3), number) for number in range(12)])


def _outputs(parts: Parts, batch: Batch) -> Tensor:
    with torch.no_grad():
        found: Tensor = Network(parts)(batch)[1]
    return found


@pytest.mark.parametrize(
    ("total", "count", "kept"), [(6, 3, (0, 2, 5)), (12, 6, (0, 2, 4, 6, 8, 11)), (6, 1, (5,)), (3, 2, (0, 2))]
)
def test_kept_layers_are_spread_from_the_first_to_the_last(total: int, count: int, kept: tuple[int, ...]) -> None:
    assert spread(total, count) == kept
    assert spread(total, total) == tuple(range(total))


def test_kept_layers_are_as_they_were(parts: Parts) -> None:
    cut, begin = with_layers(parts, (0, 2)), parts.architecture.layers
    for old, new in ((0, 0), (2, 1)):
        before = {n: v for n, v in parts.weights.items() if n.startswith(f"{begin}.{old}.")}
        for name, value in before.items():
            assert torch.equal(cut.weights[name.replace(f"{begin}.{old}.", f"{begin}.{new}.")], value)
    assert len(Network(cut).layers) == 2
    batch = _batch(parts)
    assert torch.equal(_outputs(with_layers(parts, (0, 1, 2)), batch), _outputs(parts, batch))


def test_neurons_that_do_nothing_go_first_and_nothing_changes(parts: Parts) -> None:
    width, batch = width_of(parts), _batch(parts)
    idle = torch.arange(0, width, 2)
    names = ("mlp.c_fc", 1) if parts.family == "gpt2" else ("intermediate.dense", 0)
    weights = {name: value.clone() for name, value in parts.weights.items()}
    for layer in range(3):
        begin = f"{parts.architecture.layers}.{layer}.{names[0]}"
        weights[f"{begin}.weight"].index_fill_(names[1], idle, 0.0)
        weights[f"{begin}.bias"].index_fill_(0, idle, 0.0)
    with_idle = Parts(parts.job, parts.config, weights, parts.head, parts.tokenizer)
    worth = importance(Network(with_idle), [batch], seed=0)
    kept = most_important(worth, width // 2)
    assert all(torch.equal(rows, torch.arange(1, width, 2)) for rows in kept)
    assert all(float(values[idle].max()) == 0 for values in worth)
    cut = with_width(with_idle, kept)
    assert (width_of(cut), width_of(parts)) == (width // 2, width)
    assert torch.allclose(_outputs(cut, batch), _outputs(with_idle, batch), atol=1e-6)


def test_what_a_neuron_is_worth_is_its_gradient_times_its_value(parts: Parts) -> None:
    """Scaling a neuron's way out by 1 + e changes the loss by e times the sum that is squared: measured, not derived."""
    if parts.job.task.target_range is None:
        pytest.skip("the drawn answers of classes are no smooth function to differentiate by hand")
    batch = collate([task_of(parts.job).probe(torch.arange(1, 6), 0)])
    network = Network(parts)
    outputs = network(batch)[1]
    drawn = outputs.detach() + torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0))

    def loss(gain: float) -> float:
        weights = dict(parts.weights)
        name = f"{parts.architecture.layers}.1.output.dense.weight"
        weights[name] = weights[name].clone()
        weights[name][:, 7] *= gain
        changed = Network(Parts(parts.job, parts.config, weights, parts.head, parts.tokenizer))
        with torch.no_grad():
            return float((changed(batch)[1] - drawn).double().square().sum() / 2)

    by_hand = ((loss(1.1) - loss(0.9)) / 0.2) ** 2
    assert importance(network, [batch], seed=0)[1][7] == pytest.approx(by_hand, rel=0.05)


def test_every_kind_of_task_has_a_worth(task_job: Callable[..., Job], tmp_path: Path) -> None:
    for kind in KINDS:
        parts = read_model(new_run(tmp_path / kind, kind, task_job))
        assert isinstance(parts, Parts)
        batch = _batch(parts)
        worth = importance(Network(parts), [batch], seed=3)
        assert all(float(values.min()) >= 0 and float(values.max()) > 0 for values in worth)
        assert all(
            torch.equal(one, other)
            for one, other in zip(worth, importance(Network(parts), [batch], seed=3), strict=True)
        )
