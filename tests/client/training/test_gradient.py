"""One noisy gradient sum a round: planted faults of sample, clipping, grid, share and sum, each caught by the mechanism audit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import client.training.gradient as gradient_module
import shared.privacy.shares as shares_module
from client.training.gradient import noisy_sums
from client.training.independence import keep_settled
from client.training.trainer import LocalWork
from shared.errors import PrivacyError
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import KeyStream, SiteRandomness
from shared.privacy.shares import GRID_STEPS, IntegerSum, with_share
from shared.runtime.runtime import Runtime, load_runtime
from simulations.audit.mechanism import MechanismAudit, audit_mechanism
from simulations.audit.shares_release import SharesRelease

DIMENSION, STEPS = 64, 3
PLAN = PrivacyPlan(
    private=True,
    unit="record",
    sample_rate=0.25,
    noise_multiplier=1.1,
    max_grad_norm=0.5,
    delta=1e-5,
    planned_steps=STEPS,
)
SITES = pytest.mark.parametrize("sites", [1, 3], ids=["one share", "the sum"])


def injected(name: str) -> Callable[[], SiteRandomness]:
    counter = itertools.count()
    return lambda: SiteRandomness.injected(f"{name}/{next(counter)}")


def audit(sites: int, name: str = "shares", plan: PrivacyPlan = PLAN, **options: Any) -> MechanismAudit:
    release = SharesRelease(injected(name), dimension=DIMENSION, sites=sites)
    return audit_mechanism(release, plan, dimension=DIMENSION, **options)


def assert_violated(result: MechanismAudit, *tests: str) -> None:
    assert result.verdict == "violated", result.text()
    assert set(tests) <= set(result.failed), result.text()


# --- both promises ---


@SITES
@pytest.mark.parametrize("change", [{}, {"sample_rate": 1.0}, {"noise_multiplier": 0.4}, {"noise_multiplier": 5.0}])
def test_the_correct_path_passes(sites: int, change: dict[str, float]) -> None:
    result = audit(sites, plan=replace(PLAN, **change))
    assert result.verdict == "consistent", result.text()


def test_the_correct_path_passes_for_persons() -> None:
    result = audit(2, plan=replace(PLAN, unit="patient", records_per_person=2))
    assert result.verdict == "consistent", result.text()


def test_a_share_is_less_than_the_plan_of_the_sum() -> None:
    """What is claimed of the sum does not hold for one site's words."""
    release = SharesRelease(injected("share"), dimension=DIMENSION, sites=1)
    alone: Callable[..., NDArray[np.float64]] = lambda plan, gradients: release(  # noqa: E731
        replace(plan, noise_multiplier=plan.noise_multiplier / 3**0.5), gradients
    )
    assert_violated(audit_mechanism(alone, PLAN, dimension=DIMENSION), "noise overall")


# --- planted faults ---


@SITES
@pytest.mark.parametrize("factor", [0.5, 0.85, 1e-9])
def test_fault_a_share_that_is_too_small(monkeypatch: pytest.MonkeyPatch, sites: int, factor: float) -> None:
    monkeypatch.setattr(
        gradient_module,
        "with_share",
        lambda total, *, noise_multiplier, stream: with_share(
            total, noise_multiplier=noise_multiplier * factor, stream=stream
        ),
    )
    assert_violated(audit(sites), "noise overall")


def test_fault_a_share_that_is_used_by_all_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal shares add up in amplitude: with three of them the noise is too large, and it tells one from the others."""
    kept: dict[int, Any] = {}

    def reused(total: NDArray[np.int64], *, noise_multiplier: float, stream: KeyStream) -> NDArray[np.uint64]:
        if len(kept) != 1:
            kept[0] = (with_share(0 * total, noise_multiplier=noise_multiplier, stream=stream)).view(np.int64)
        return (total + kept[0]).view(np.uint64)

    monkeypatch.setattr(gradient_module, "with_share", reused)
    assert audit(3).verdict == "violated"


@SITES
def test_fault_a_share_that_is_reused_in_the_next_round(monkeypatch: pytest.MonkeyPatch, sites: int) -> None:
    kept: list[NDArray[np.int64]] = []
    call = itertools.count()

    def reused(total: NDArray[np.int64], *, noise_multiplier: float, stream: KeyStream) -> NDArray[np.uint64]:
        place = next(call) % sites
        if len(kept) <= place:
            kept.append(with_share(0 * total, noise_multiplier=noise_multiplier, stream=stream).view(np.int64))
        return (total + kept[place]).view(np.uint64)

    monkeypatch.setattr(gradient_module, "with_share", reused)
    assert_violated(audit(sites), "independence")


@SITES
def test_fault_rounding_of_a_continuous_gaussian_on_a_coarse_grid(monkeypatch: pytest.MonkeyPatch, sites: int) -> None:
    """A grid as coarse as the noise: the law is no Gaussian any more."""

    def coarse(total: NDArray[np.int64], *, noise_multiplier: float, stream: KeyStream) -> NDArray[np.uint64]:
        grid = GRID_STEPS * 4
        noise = np.rint(stream.normal(len(total)) * noise_multiplier * GRID_STEPS / grid) * grid
        return (total + noise.astype(np.int64)).view(np.uint64)

    monkeypatch.setattr(gradient_module, "with_share", coarse)
    assert audit(sites).verdict == "violated"


@SITES
def test_fault_no_clipping(monkeypatch: pytest.MonkeyPatch, sites: int) -> None:
    def unclipped(self: IntegerSum, gradients: Sequence[Tensor]) -> None:
        vectors = torch.cat([g.detach().flatten(1) for g in gradients], dim=1).double().nan_to_num(0.0, 0.0, 0.0)
        self._total += (vectors * (GRID_STEPS / self._max_grad_norm)).trunc_().sum(dim=0).to(torch.int64)

    monkeypatch.setattr(IntegerSum, "add", unclipped)
    assert_violated(audit(sites), "sensitivity")


@SITES
def test_fault_clip_of_the_sum_and_not_of_each(monkeypatch: pytest.MonkeyPatch, sites: int) -> None:
    add = IntegerSum.add
    monkeypatch.setattr(
        IntegerSum,
        "add",
        lambda self, gradients: add(self, [g.nan_to_num(0.0, 0.0, 0.0).sum(0, keepdim=True) for g in gradients]),
    )
    assert audit(sites).verdict != "consistent"


@SITES
def test_fault_a_shuffle_in_the_place_of_coins(monkeypatch: pytest.MonkeyPatch, sites: int) -> None:
    def shuffled(self: PrivacyPlan, num_units: int, stream: KeyStream) -> NDArray[np.intp]:
        return np.argsort(stream.uint64(num_units))[: round(self.sample_rate * num_units)]

    monkeypatch.setattr(PrivacyPlan, "sample", shuffled)
    assert_violated(audit(sites), "inclusion")


@SITES
def test_fault_the_same_coins_in_every_attempt(monkeypatch: pytest.MonkeyPatch, sites: int) -> None:
    """The same sample with new noise is one Gaussian of less noise, not two steps."""
    sample = PrivacyPlan.sample
    monkeypatch.setattr(
        PrivacyPlan,
        "sample",
        lambda self, num_units, stream: sample(
            self, num_units, SiteRandomness.injected("x").stream("sampling", round_number=1, step=1)
        ),
    )
    assert_violated(audit(sites), "inclusion")


# --- what a site gets ---


@pytest.fixture
def prepared(classification_job: Callable[..., Job], records: list[dict[str, Any]]) -> tuple[Runtime, PrivacyPlan, Any]:
    job = classification_job(
        training={"local_steps": 1},
        privacy={"mechanism": "distributed", "max_colluding": 0, "noise_multiplier": 1.0, "sample_rate": 0.5},
        federation={"min_sites": 2},
    )
    runtime = load_runtime(job, ComputeConfig(device="cpu", precision="float32"))
    return runtime, PrivacyPlan.from_job(job), runtime.encode(records)


def work(examples: Any, name: str) -> LocalWork:
    return LocalWork(examples=examples, declared_records=32, randomness=SiteRandomness.injected(name))


def test_side_by_side_each_gets_what_it_gets_alone(prepared: tuple[Runtime, PrivacyPlan, Any]) -> None:
    runtime, plan, examples = prepared
    keep_settled(runtime)  # on some processors each example gets a pass of its own
    parts = [examples[:4], examples[3:], []]
    how = {"plan": plan, "round_number": 2, "attempt": 3}
    beside = noisy_sums(runtime, [work(p, str(n)) for n, p in enumerate(parts)], runtime.initial, **how)
    for number, part in enumerate(parts):
        (alone,) = noisy_sums(runtime, [work(part, str(number))], runtime.initial, **how)
        assert np.array_equal(alone.words, beside[number].words)
        assert alone.observations.num_examples == beside[number].observations.num_examples


def test_an_empty_sample_sends_its_share_all_the_same(prepared: tuple[Runtime, PrivacyPlan, Any]) -> None:
    runtime, plan, _ = prepared
    (found,) = noisy_sums(runtime, [work([], "x")], runtime.initial, plan=plan, round_number=1, attempt=1)
    size = sum(parameter.numel() for parameter in runtime.model.trainable().values())
    assert found.words.shape == (size,)
    assert 0.9 < found.words.view(np.int64).std() / (plan.noise_multiplier * GRID_STEPS) < 1.1


def test_another_attempt_has_other_coins_and_another_share(prepared: tuple[Runtime, PrivacyPlan, Any]) -> None:
    """Also under injected randomness, where every attempt begins with the same key."""
    runtime, plan, examples = prepared
    one, two = (
        noisy_sums(runtime, [work(examples, "x")], runtime.initial, plan=plan, round_number=1, attempt=attempt)[0]
        for attempt in (1, 2)
    )
    assert not np.array_equal(one.words, two.words)


def test_a_plan_without_shares_is_refused(prepared: tuple[Runtime, PrivacyPlan, Any]) -> None:
    runtime, plan, examples = prepared
    with pytest.raises(PrivacyError, match="whole noise at every site"):
        noisy_sums(
            runtime, [work(examples, "x")], runtime.initial, plan=replace(plan, honest=None), round_number=1, attempt=1
        )


def test_a_sum_that_is_not_whole_steps_gets_no_share(
    prepared: tuple[Runtime, PrivacyPlan, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, plan, examples = prepared
    new_sum = PrivacyPlan.new_sum
    monkeypatch.setattr(PrivacyPlan, "new_sum", lambda self, shapes: new_sum(replace(self, honest=None), shapes))
    with pytest.raises(PrivacyError, match="not one of whole steps"):
        noisy_sums(runtime, [work(examples, "x")], runtime.initial, plan=plan, round_number=1, attempt=1)


def test_noise_that_is_the_sites_own_whole_is_refused_for_a_share(prepared: tuple[Runtime, PrivacyPlan, Any]) -> None:
    _, plan, _ = prepared
    with pytest.raises(PrivacyError, match="share"):
        plan.add_noise([torch.zeros(2)], SiteRandomness.injected("x").stream("noise", round_number=1, step=1))
    assert shares_module.share_variance(plan.noise_multiplier) >= (plan.noise_multiplier * GRID_STEPS) ** 2
