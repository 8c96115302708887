"""Sites trained side by side over one backbone: each gets what it gets alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import client.training.per_example as per_example_module
import client.training.trainer as trainer_module
from client.training.per_example import PerExampleHooks, slices_by_owner
from client.training.trainer import LocalRound, LocalWork, per_example_hooks, train_local_rounds
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.models.batches import Example, collate
from shared.models.packing import whole_rows
from shared.privacy.mechanism import per_example_gradients
from shared.privacy.persons import Persons
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import SiteRandomness
from shared.runtime.runtime import Runtime, load_runtime
from shared.tensors.optimizers import steps_taken

Records = list[dict[str, Any]]
CPU = ComputeConfig(device="cpu", precision="float32", cache_frozen_layers=False, micro_batch_tokens=90)
SIZES = (11, 0, 1, 30, 18)  # an empty site, one with a single record, sizes that share micro-batches unevenly


def away_from_zero(runtime: Runtime) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in sorted(runtime.initial.items())}


def works_of(examples: list[Example]) -> list[LocalWork]:
    works, begin = [], 0
    for number, size in enumerate(SIZES):
        works.append(
            LocalWork(
                examples=examples[begin : begin + size],
                declared_records=16 * (number + 1),
                randomness=SiteRandomness.injected(f"site {number}"),
            )
        )
        begin += size
    return works


def train(
    runtime: Runtime, works: list[LocalWork], job: Job, plan: PrivacyPlan, round_number: int = 1
) -> list[LocalRound]:
    start = away_from_zero(runtime)
    # A source gives a stream once; these trainings are to meet the same coins and noise again.
    works = [replace(work, randomness=SiteRandomness(work.randomness._key, "injected")) for work in works]
    return train_local_rounds(runtime, works, start, training=job.training, plan=plan, round_number=round_number)


def middling_norm(runtime: Runtime, examples: list[Example]) -> float:
    """A bound that some gradients exceed and some do not, and none is so near to that rounding would decide."""
    runtime.load(away_from_zero(runtime))
    parameters, batch = list(runtime.model.trainable().values()), collate(examples)
    with per_example_hooks(runtime.model):
        runtime.task.per_example_loss(runtime.model(batch), batch).sum().backward()
        gradients = per_example_gradients(parameters, len(examples))
    norms = torch.cat([gradient.flatten(1) for gradient in gradients], dim=1).norm(dim=1).sort().values
    middle = norms[len(norms) // 4 : -(len(norms) // 4)]
    widest = int(middle.diff().argmax())
    return float((middle[widest] + middle[widest + 1]) / 2)


def assert_same_round(found: LocalRound, expected: LocalRound) -> None:
    assert found.delta.keys() == expected.delta.keys()
    assert found.optimizer_state.keys() == expected.optimizer_state.keys()
    for name, value in expected.delta.items():
        assert found.delta[name].shape == value.shape
        assert float(value.abs().max()) > 0
        difference = float((found.delta[name] - value).norm() / value.norm())
        assert difference < 2e-4, (name, difference)
    for name, value in expected.optimizer_state.items():
        torch.testing.assert_close(found.optimizer_state[name], value, rtol=2e-3, atol=2e-6)
    assert found.executed_steps == expected.executed_steps
    assert found.observations.num_examples == expected.observations.num_examples
    assert found.observations.num_clipped == expected.observations.num_clipped
    torch.testing.assert_close(
        torch.tensor(found.observations.losses),
        torch.tensor(expected.observations.losses),
        rtol=1e-4,
        atol=1e-5,
        equal_nan=True,
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    ("task", "train_factors"),
    [
        ("classification", "b"),
        ("classification", "both"),
        ("classification", "none"),
        ("language", "b"),
        ("language", "both"),
    ],
)
def test_a_site_trained_with_others_is_trained_as_if_alone(
    classification_job: Callable[..., Job],
    language_job: Callable[..., Job],
    records: Records,
    task: str,
    train_factors: str,
    optimizer: str,
) -> None:
    builder = classification_job if task == "classification" else language_job
    # Adam divides by the root of its second moment, which makes the rounding of tiny gradients large ones.
    rate = 0.05 if optimizer == "sgd" else 1e-3
    job = builder(lora={"train": train_factors}, training={"optimizer": optimizer, "learning_rate": rate})
    runtime = load_runtime(job, CPU)
    examples = runtime.encode(records[:60])
    bound = middling_norm(runtime, examples)
    plan = replace(PrivacyPlan.from_job(job), sample_rate=0.5, max_grad_norm=bound)
    together = train(runtime, works_of(examples), job, plan)
    alone = [train(runtime, [work], job, plan)[0] for work in works_of(examples)]
    for found, expected in zip(together, alone, strict=True):
        assert_same_round(found, expected)
    # Two sites are as good as many.
    assert_same_round(train(runtime, works_of(examples)[3:], job, plan)[1], alone[4])
    assert 0 < sum(r.observations.num_clipped for r in together) < sum(r.observations.num_examples for r in together)
    # The comparison can fail: another site's update is not this one's.
    with pytest.raises(AssertionError):
        assert_same_round(together[3], alone[4])


def test_moments_are_kept_by_site(classification_job: Callable[..., Job], records: Records) -> None:
    job = classification_job(training={"optimizer": "adamw", "learning_rate": 1e-3, "rounds": 2})
    runtime = load_runtime(job, CPU)
    examples, plan = runtime.encode(records[:60]), PrivacyPlan.from_job(job)

    def two_rounds(works: list[LocalWork]) -> list[LocalRound]:
        first = train(runtime, works, job, plan)
        again = [replace(w, optimizer_state=r.optimizer_state) for w, r in zip(works, first, strict=True)]
        return train(runtime, again, job, plan, round_number=2)

    together = two_rounds(works_of(examples))
    for found, work in zip(together, works_of(examples), strict=True):
        assert_same_round(found, two_rounds([work])[0])
    ahead = train(runtime, works_of(examples)[:1], job, plan)[0].optimizer_state
    with pytest.raises(ValueError, match="equally many steps"):
        train(runtime, [replace(works_of(examples)[0], optimizer_state=ahead), works_of(examples)[3]], job, plan)


def test_how_far_an_optimiser_has_come() -> None:
    one = torch.ones(2)
    assert steps_taken({}) == (0.0, False)
    assert steps_taken({"a|momentum_buffer": one}) == (0.0, True)
    assert steps_taken({"a|step": torch.tensor(3.0), "a|exp_avg": one, "b|step": torch.tensor(3.0)}) == (3.0, True)


def test_persons_of_several_sites_are_clipped_by_site(classification_job: Callable[..., Job], records: Records) -> None:
    privacy = {"unit": "patient", "records_per_person": 3, "sample_rate": 0.6, "max_grad_norm": 0.2}
    job = classification_job(privacy=privacy, training={"optimizer": "sgd", "learning_rate": 0.05})
    runtime = load_runtime(job, CPU)
    plan = PrivacyPlan.from_job(job)
    works = [
        replace(work, persons=Persons.from_ids([f"p{row % 7}" for row in range(len(work.examples))]))
        for work in works_of(runtime.encode(records[:60]))
    ]
    for found, work in zip(train(runtime, works, job, plan), works, strict=True):
        assert_same_round(found, train(runtime, [work], job, plan)[0])


def test_noise_of_sites_is_their_own(classification_job: Callable[..., Job], records: Records) -> None:
    """Two sites with the same records and different randomness get independent noise; an empty one gets noise too."""
    job = classification_job(training={"optimizer": "sgd", "momentum": 0.0, "learning_rate": 1.0})
    runtime = load_runtime(job, CPU)
    plan = replace(PrivacyPlan.from_job(job), noise_multiplier=5.0, sample_rate=1e-9)
    one, two, three = (
        torch.cat([value.flatten() for value in result.delta.values()]).double()
        for result in train(
            runtime,
            [replace(work, examples=works_of(runtime.encode(records[:60]))[3].examples) for work in works_of([])[:3]],
            job,
            plan,
        )
    )
    for first, second in ((one, two), (two, three), (one, three)):
        correlation = float(first @ second / (first.norm() * second.norm()))
        assert abs(correlation) < 5 / len(first) ** 0.5
    # Deviation by each site's own divisor: 16, 32 and 48 declared records.
    assert float(one.norm() / two.norm()) == pytest.approx(2, rel=0.1)
    assert float(one.norm() / three.norm()) == pytest.approx(3, rel=0.1)


def test_values_of_another_site_are_seen_by_the_comparison(
    classification_job: Callable[..., Job], records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted fault: every example meets the values of the first site."""
    job = classification_job(training={"optimizer": "sgd", "learning_rate": 0.5})
    runtime = load_runtime(job, CPU)
    plan = replace(PrivacyPlan.from_job(job), sample_rate=0.5)
    works = works_of(runtime.encode(records[:60]))
    expected = train(runtime, works[3:4], job, plan)[0]
    value = PerExampleHooks._value

    def mixed(self: PerExampleHooks, parameter: Tensor) -> Tensor:
        if self.owners is not None:
            self.owners = torch.zeros_like(self.owners)
        return value(self, parameter)

    monkeypatch.setattr(PerExampleHooks, "_value", mixed)
    with pytest.raises(AssertionError):
        assert_same_round(train(runtime, works, job, plan)[3], expected)


def test_the_model_is_as_before_after_an_error(
    classification_job: Callable[..., Job], records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = classification_job()
    runtime = load_runtime(job, CPU)
    plan = PrivacyPlan.from_job(job)
    works = works_of(runtime.encode(records[:60]))

    def interrupted(*_: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "per_example_gradients", interrupted)
        with pytest.raises(MemoryError):
            train(runtime, works, job, plan)
    assert not any("forward" in vars(module) for module in runtime.model.modules())
    assert not any(hasattr(p, "grad_sample") for p in runtime.model.parameters())
    assert_same_round(train(runtime, works, job, plan)[3], train(runtime, works[3:4], job, plan)[0])


class Convolution(nn.Module):
    """Something that Opacus samples, and a linear layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(3, 4, 2)
        self.linear = nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.convolution(inputs).transpose(1, 2)
        return self.linear(self.linear(hidden).tanh()).square().sum(dim=(1, 2))


def test_other_layers_are_left_to_opacus_and_a_layer_may_be_used_twice() -> None:
    torch.manual_seed(0)
    model, inputs = Convolution(), torch.randn(5, 3, 6)
    parameters = list(model.parameters())
    with per_example_hooks(model):
        model(inputs).sum().backward()
        found = per_example_gradients(parameters, 5)
    for row in range(5):
        expected = torch.autograd.grad(model(inputs[row : row + 1])[0], parameters)
        for many, one in zip(found, expected, strict=True):
            torch.testing.assert_close(many[row], one, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="only if everything trained is a linear layer"):
        PerExampleHooks(model, {p: p.detach().unsqueeze(0) for p in parameters})


def test_gradients_held_back_are_handed_over_in_pieces_of_any_size(
    classification_job: Callable[..., Job], records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = classification_job(training={"optimizer": "sgd", "learning_rate": 0.05})
    runtime = load_runtime(job, CPU)
    plan = replace(PrivacyPlan.from_job(job), sample_rate=0.5)
    works = works_of(runtime.encode(records[:60]))
    expected = train(runtime, works, job, plan)
    monkeypatch.setattr(per_example_module, "_MOST_HELD_BYTES", 0)
    for found, other in zip(train(runtime, works, job, plan), expected, strict=True):
        assert_same_round(found, other)


def test_a_layer_meets_whole_rows_whoever_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[int] = []
    linear = nn.functional.linear

    def noted(inputs: Tensor, *others: Any) -> Tensor:
        met.append(len(inputs))
        return linear(inputs, *others)

    monkeypatch.setattr(nn.functional, "linear", noted)
    weight, bias = torch.randn(2, 3), torch.randn(2)
    for shape in ((1, 3), (7, 3), (whole_rows(1), 3), (5, 11, 3)):
        inputs = torch.randn(shape)
        found = per_example_module._linear(inputs, weight, bias, None)
        torch.testing.assert_close(found, inputs @ weight.T + bias)
        assert met.pop() == whole_rows(inputs[..., 0].numel())


def test_slices_by_owner() -> None:
    assert list(slices_by_owner([0, 0, 2, 2, 2, 5])) == [(0, slice(0, 2)), (2, slice(2, 5)), (5, slice(5, 6))]
    assert list(slices_by_owner([])) == []
