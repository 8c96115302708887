"""Central DP over sites: bound of the pair, noise, moving bound, statement, and the jobs that are refused."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from server.records.privacy import CoordinatorRecord
from shared.epsilons import rounded_up
from shared.errors import ConfigError, PrivacyError
from shared.job.job import Job
from shared.job.parsing import parse
from shared.privacy.accounting import GaussianSteps, compose_epsilon
from shared.privacy.central import CentralPlan, ClippedSites, SitesSum
from shared.privacy.central_statement import (
    NOT_COVERED_CENTRAL,
    CentralRelease,
    central_statement,
)
from shared.privacy.mechanism import ClippedSum
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import SiteRandomness
from shared.privacy.statement import ACCOUNTANT, PRE_TRAINING, STOPPED_EARLY

SHAPES = {"adapter.a": torch.Size([2, 3]), "adapter.b": torch.Size([4]), "head": torch.Size([2])}
DIMENSION = 12


def make_plan(
    *, z: float = 1.2, q: float = 0.5, clip: float = 0.1, count_noise: float = 2.5, target: float | None = 0.5
) -> CentralPlan:
    plan = PrivacyPlan(
        private=True,
        unit="site",
        sample_rate=q,
        noise_multiplier=z,
        max_grad_norm=clip,
        delta=1e-5,
        planned_steps=10,
    )
    return CentralPlan(
        plan=plan, num_sites=100, target_quantile=target, clip_learning_rate=0.2, count_noise=count_noise
    )


def update_of(vector: Any) -> dict[str, Tensor]:
    parts = torch.split(torch.as_tensor(vector, dtype=torch.float32), [shape.numel() for shape in SHAPES.values()])
    return {name: part.view(shape) for (name, shape), part in zip(SHAPES.items(), parts, strict=True)}


def clipped_sum(
    plan: CentralPlan, updates: Sequence[Mapping[str, Tensor]], shapes: Mapping[str, torch.Size], clip: float
) -> SitesSum:
    total = plan.new_sum(shapes, clip)
    for update in updates:
        total.add(update)
    return total.total()


def flat(sums: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in sums])


def moved(plan: CentralPlan, one: SitesSum, other: SitesSum, clip: float) -> float:
    """Return how far apart two pairs are, each part in units of its noise."""
    updates = float((flat(one.updates) - flat(other.updates)).norm()) / (plan.update_noise_multiplier * clip)
    return math.hypot(updates, (one.count - other.count) / plan.count_noise if plan.adaptive else 0.0)


# --- what one site can do ---

coordinates = st.floats(width=32, allow_nan=True, allow_infinity=True)
vectors = st.lists(coordinates, min_size=DIMENSION, max_size=DIMENSION)
scaled = st.builds(
    lambda vector, factor: [x * factor for x in vector],
    st.lists(st.floats(-1, 1, width=32), min_size=DIMENSION, max_size=DIMENSION),
    st.sampled_from([0.0, 1e-6, 0.03, 0.1, 1.0, 1e4, 1e30]),
)


@given(
    others=st.lists(vectors | scaled, max_size=5),
    added=vectors | scaled,
    clip=st.sampled_from([1e-4, 0.1, 1.0, 50.0]),
    z=st.floats(0.2, 20),
    share=st.floats(0.51, 50),
    adaptive=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_one_site_moves_the_pair_by_at_most_the_bound(
    others: list[list[float]], added: list[float], clip: float, z: float, share: float, adaptive: bool
) -> None:
    plan = make_plan(z=z, count_noise=share * z, target=0.5 if adaptive else None)
    before = [update_of(vector) for vector in others]
    for position in (0, len(before)):
        after = [*before[:position], update_of(added), *before[position:]]
        without, with_site = (clipped_sum(plan, some, SHAPES, clip) for some in (before, after))
        assert moved(plan, with_site, without, clip) <= 1 / z
        assert all(part.isfinite().all() for part in with_site.updates)


@pytest.mark.parametrize("length", [0.0999, 0.1001, 7.0])
def test_the_bound_is_not_wasted(length: float) -> None:
    """A site at the bound moves the pair by the whole of 1/z, so no more noise is added than is accounted for."""
    plan = make_plan()
    direction = torch.linspace(-1, 1, DIMENSION)
    added = update_of(direction / direction.norm() * length)
    with_site, without = (clipped_sum(plan, some, SHAPES, 0.1) for some in ([added], []))
    assert moved(plan, with_site, without, 0.1) == pytest.approx(1 / 1.2, rel=2e-3)


def test_all_parameters_are_one_vector() -> None:
    plan = make_plan()
    total = clipped_sum(plan, [update_of([1e3] * DIMENSION)], SHAPES, 0.1)
    assert float(flat(total.updates).norm()) == pytest.approx(0.1, rel=1e-4)
    assert total.count == -0.5


def many_updates() -> list[dict[str, Tensor]]:
    generator = np.random.default_rng(0)
    return [update_of(row) for row in generator.normal(size=(50, DIMENSION)) * generator.exponential(0.1, (50, 1))]


def test_the_sum_is_that_of_the_clipped_updates() -> None:
    updates = many_updates()
    total = clipped_sum(make_plan(), updates, SHAPES, 0.1)
    plain = [flat(list(update.values())).numpy() for update in updates]
    expected = np.array([vector / max(1, np.linalg.norm(vector) / 0.1) for vector in plain])
    assert torch.allclose(flat(total.updates), torch.from_numpy(expected.sum(axis=0)).double(), atol=1e-5)
    assert total.count == sum(np.linalg.norm(vector) <= 0.1 for vector in plain) - 25


def test_the_order_of_sites_changes_nothing() -> None:
    updates = many_updates()
    expected = clipped_sum(make_plan(), updates, SHAPES, 0.1)
    for seed in range(5):
        found = clipped_sum(make_plan(), random.Random(seed).sample(updates, 50), SHAPES, 0.1)
        assert torch.equal(flat(found.updates), flat(expected.updates))
        assert found.count == expected.count


@given(vector=vectors | scaled, clip=st.sampled_from([1e-7, 1e-4, 0.1, 50.0]))
@settings(deadline=None)
def test_the_grid_makes_no_coordinate_longer(vector: list[float], clip: float) -> None:
    """One update on the grid is its clipped self, cut towards zero: the norm stays within the bound without a margin."""
    clipped = ClippedSum(list(SHAPES.values()), clip)
    clipped.add([part[None] for part in update_of(vector).values()])
    on_grid = flat(clipped_sum(make_plan(), [update_of(vector)], SHAPES, clip).updates)
    assert bool((on_grid.abs() <= flat(clipped.sums).abs()).all())
    assert float((on_grid - flat(clipped.sums)).abs().max()) <= 100 * clip * 2.0**-51
    # And a site's part of any sum is exactly this.
    others = many_updates()
    difference = flat(clipped_sum(make_plan(), [*others, update_of(vector)], SHAPES, clip).updates) - flat(
        clipped_sum(make_plan(), others, SHAPES, clip).updates
    )
    assert torch.equal(difference, on_grid)


def test_the_grid_of_many_sites_is_coarse_and_still_makes_no_coordinate_longer() -> None:
    """With ten million sites it is coarser than that of the clipped vectors, so it does round: towards zero."""
    update = update_of(np.random.default_rng(3).normal(size=DIMENSION))
    clipped = ClippedSum(list(SHAPES.values()), 0.1)
    clipped.add([part[None] for part in update.values()])
    total = ClippedSites(SHAPES, 0.1, 10_000_000)
    total.add(update)
    found, exact = flat(total.total().updates), flat(clipped.sums)
    assert not torch.equal(found, exact)
    assert bool((found.abs() <= exact.abs()).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_neither_clipped_nor_unclipped(bad: float) -> None:
    total = clipped_sum(make_plan(), [update_of([bad] + [0.01] * (DIMENSION - 1))], SHAPES, 0.1)
    assert total.count == 0.0
    assert torch.equal(flat(total.updates), torch.zeros(DIMENSION, dtype=torch.float64))


def test_no_more_updates_than_declared_sites() -> None:
    total = make_plan().new_sum(SHAPES, 0.1)
    for _ in range(100):
        total.add(update_of([0.5] * DIMENSION))
    with pytest.raises(ValueError, match="after those of all 100 sites"):
        total.add(update_of([0.5] * DIMENSION))


# --- noise ---


@pytest.mark.parametrize(
    ("z", "count_noise", "expected"), [(1.0, 2.5, 1.0206207), (1.2, 1.2, 1.3856406), (3.0, 2.5, 3.75)]
)
def test_the_updates_get_the_noise_that_the_count_leaves(z: float, count_noise: float, expected: float) -> None:
    """Andrew et al. 2021, theorem 1: (z^-2 - (2 sigma_b)^-2)^(-1/2), by hand."""
    plan = make_plan(z=z, count_noise=count_noise)
    assert plan.update_noise_multiplier == pytest.approx(expected, rel=1e-6)
    # Two independent Gaussians with these sensitivities are one with the sum of their squared signals.
    assert plan.update_noise_multiplier**-2 + (0.5 / count_noise) ** 2 == pytest.approx(z**-2)
    assert make_plan(z=z, target=None, count_noise=0.0).update_noise_multiplier == z


def test_a_count_with_too_little_noise_is_refused() -> None:
    with pytest.raises(
        PrivacyError, match=r"count_noise is 0\.6, but the count alone needs more than half .* 0\.6000\. Raise"
    ):
        make_plan(z=1.2, count_noise=0.6)


def noise_of(plan: CentralPlan, rounds: int, clip: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the noise on updates and counts, in units of what it should be."""
    total = clipped_sum(plan, [update_of([3.0] * DIMENSION)], SHAPES, clip)
    updates, counts = [], []
    for number in range(1, rounds + 1):
        noisy = plan.add_noise(total, clip, SiteRandomness.injected("central noise"), number)
        difference = flat(noisy.updates) - flat(total.updates)
        updates.append((difference / (plan.update_noise_multiplier * clip)).numpy())
        counts.append((noisy.count - total.count) / plan.count_noise)
    return np.concatenate(updates), np.array(counts)


def p_value(standardised: np.ndarray) -> float:
    tail = stats.chi2.cdf((standardised**2).sum(), len(standardised))
    return float(2 * min(tail, 1 - tail))


def test_noise_has_the_promised_scale_and_no_other() -> None:
    updates, counts = noise_of(make_plan(), rounds=300, clip=0.37)
    assert updates.dtype == np.float64
    assert p_value(updates) > 1e-3
    assert p_value(counts) > 1e-3
    assert stats.kstest(updates, "norm").pvalue > 1e-3
    for factor in (0.9, 1.1):
        assert p_value(factor * updates) < 1e-3, "the test must reject another scale"
    for factor in (0.8, 1.25):
        assert p_value(factor * counts) < 1e-3
    # Updates and count do not share their noise.
    assert abs(np.corrcoef(updates.reshape(300, -1)[:, 0], counts)[0, 1]) < 0.25


@pytest.mark.parametrize("adaptive", [True, False])
def test_noise_is_that_of_the_round_s_two_streams(adaptive: bool) -> None:
    plan = make_plan(z=1.2, count_noise=2.5, target=0.5 if adaptive else None)
    total = clipped_sum(plan, [update_of([3.0] * DIMENSION)] * 4, SHAPES, 0.37)
    noisy = plan.add_noise(total, 0.37, SiteRandomness.injected("two"), 9)
    source = SiteRandomness.injected("two")
    updates, counts = (source.stream("noise", round_number=9, step=step) for step in (0, 1))
    scale = plan.update_noise_multiplier * 0.37
    assert torch.equal(flat(noisy.updates), flat(total.updates) + scale * torch.from_numpy(updates.normal(DIMENSION)))
    assert (total.count, noisy.count) == (-2.0, -2.0 + 2.5 * counts.normal(1)[0] if adaptive else 0.0)


# --- after the noise ---


@pytest.mark.parametrize(
    ("count", "share"), [(0.0, 0.5), (10.0, 0.7), (-10.0, 0.3), (25.0, 1.0), (1e3, 1.0), (-25.0, 0.0), (-1e3, 0.0)]
)
def test_the_bound_moves_by_the_share_of_unclipped_updates(count: float, share: float) -> None:
    """S exp(-rate (share - target)) with rate 0.2, and share 1/2 + count / 50 cut to [0, 1], by hand."""
    plan = make_plan(q=0.5, clip=0.1, target=0.3)
    empty = SitesSum(updates=[torch.zeros(shape) for shape in SHAPES.values()], count=count)
    for clip in (0.1, 0.05):
        assert plan.finish(empty, SHAPES, clip).clip_norm == pytest.approx(
            clip * math.exp(0.06 - 0.2 * share), rel=1e-12
        )
    assert plan.finish(empty, SHAPES, 1e9).clip_norm == 1e5
    assert plan.finish(empty, SHAPES, 1e-9).clip_norm == pytest.approx(1e-7)


def test_no_more_updates_come_than_sites_were_declared() -> None:
    total = make_plan().new_sum(SHAPES, 0.1)
    for _ in range(100):
        total.add(update_of([1.0] * DIMENSION))
    with pytest.raises(ValueError, match="an update after those of all 100 sites"):
        total.add(update_of([1.0] * DIMENSION))


def test_the_divisor_does_not_depend_on_who_answered() -> None:
    plan = make_plan(clip=10.0)
    for number in (0, 1, 77):
        total = clipped_sum(plan, [update_of([0.5] * DIMENSION)] * number, SHAPES, 10.0)
        released = plan.finish(total, SHAPES, 10.0)
        assert torch.allclose(released.mean["head"], torch.full((2,), 0.5 * number / 50), rtol=1e-4)
        assert all(part.dtype == torch.float32 for part in released.mean.values())


@pytest.mark.parametrize("target", [0.3, 0.8])
def test_the_bound_finds_the_quantile(target: float) -> None:
    plan = replace(make_plan(q=1.0, clip=5.0), target_quantile=target)
    lengths = np.random.default_rng(1).lognormal(mean=-1.0, sigma=0.5, size=100)
    updates = [update_of(np.eye(DIMENSION)[i % DIMENSION] * length) for i, length in enumerate(lengths)]
    clip = 5.0
    for _ in range(200):
        clip = plan.finish(clipped_sum(plan, updates, SHAPES, clip), SHAPES, clip).clip_norm
    assert clip == pytest.approx(np.quantile(lengths, target), rel=0.05)


def test_the_bound_stays_where_it_is_not_adapted_and_never_reaches_zero() -> None:
    fixed = make_plan(target=None, count_noise=0.0)
    assert fixed.finish(clipped_sum(fixed, [], SHAPES, 0.1), SHAPES, 0.1).clip_norm == 0.1
    plan, clip = make_plan(q=1.0), 0.1
    for _ in range(160):
        clip = plan.finish(
            clipped_sum(plan, [update_of([0.0] * DIMENSION)] * 100, SHAPES, clip), SHAPES, clip
        ).clip_norm
    assert clip == pytest.approx(1e-7)


# --- jobs ---

CENTRAL = {"mechanism": "central", "unit": "site", "central": {"num_sites": 120}}


def make_job(**sections: Any) -> Job:
    raw: dict[str, Any] = {
        "name": "central",
        "task": {"kind": "sequence_classification", "labels": ["x", "y"]},
        "training": {"rounds": 8, "local_steps": 3},
        "privacy": CENTRAL,
        "federation": {"min_sites": 100},
    }
    return parse(Job, raw | sections, source="test")


def test_the_noise_is_calibrated_over_rounds_and_sites() -> None:
    plan = CentralPlan.from_job(make_job(privacy=CENTRAL | {"epsilon": 3.0}))
    assert plan.plan.unit == "site"
    assert (plan.plan.sample_rate, plan.plan.planned_steps, plan.expected_sites) == (0.5, 8, 60.0)
    assert 2.99 < plan.plan.epsilon() <= 3.0
    assert plan.count_noise == max(3.0, plan.plan.noise_multiplier)
    given = CentralPlan.from_job(make_job(privacy=CENTRAL | {"noise_multiplier": 5.0}))
    assert (given.plan.noise_multiplier, given.count_noise) == (5.0, 5.0)


def test_a_site_of_such_a_job_adds_no_noise() -> None:
    local = PrivacyPlan.from_job(make_job())
    assert (local.private, local.noise_multiplier) == (False, 0.0)
    with pytest.raises(PrivacyError, match="the coordinator of this job adds no noise"):
        PrivacyPlan.of_coordinator(make_job(privacy={}, federation={}))


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"privacy": CENTRAL | {"central": {"num_sites": 99}}}, "with fewer than 100 sites"),
        ({"privacy": CENTRAL | {"unit": "record"}}, "belong together"),
        ({"privacy": {"mechanism": "central", "unit": "site"}}, "privacy.central is missing"),
        ({"privacy": CENTRAL | {"mechanism": "dp-sgd"}}, "belong together"),
        ({"privacy": CENTRAL | {"mechanism": "none"}}, "belong together"),
        ({"privacy": {"unit": "site"}}, "belong together"),
        ({"privacy": CENTRAL | {"delta": 0.01}}, "below 1/N = 8.3e-03"),
        ({"aggregation": {"weights": "declared"}}, "aggregation.weights 'declared' would change what one site can add"),
        ({"lora": {"train": "both"}}, "Set lora.train to 'b'"),
        ({"federation": {"min_sites": 100, "sites_per_round": 110}}, "draws a fixed number of sites by a public seed"),
        ({"federation": {"min_sites": 99}}, "from 100 to privacy.central.num_sites"),
        ({"federation": {"min_sites": 121}}, "from 100 to privacy.central.num_sites"),
    ],
)
def test_jobs_that_could_not_keep_the_promise_are_refused(sections: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make_job(**sections)
    assert reason in str(refused.value)


def test_any_rule_of_aggregation_but_the_mean_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that this version does not have: what is not known to come after the noise has to stay at its default."""
    from shared.job import job as module
    from shared.job.federation import AggregationConfig

    class Robust(AggregationConfig):
        rule: str = "mean"

    job = make_job(aggregation={"server_optimizer": "adam", "server_learning_rate": 0.1, "server_momentum": 0.5})
    monkeypatch.setattr(module, "AggregationConfig", Robust)
    for rule in ("mean", "median"):
        changed = job.model_copy(update={"aggregation": Robust(rule=rule, weights="equal")})
        if rule == "mean":
            changed._check_central()
        else:
            with pytest.raises(ValueError, match=r"aggregation\.rule 'median'"):
                changed._check_central()


# --- statement ---


def release(**changes: Any) -> CentralRelease:
    given: dict[str, Any] = {
        "num_sites_declared": 120,
        "delta": 1e-5,
        "clip_norm_first": 0.1,
        "update_noise_multiplier": 1.3,
        "count_noise": 3.0,
        "steps_planned": 8,
        "rounds": (1, 2, 2, 3),
        "events": (GaussianSteps(noise_multiplier=1.2, sample_rate=0.5, steps=4),),
        "randomness": "os",
        "epsilon_budget": 9.0,
    }
    return CentralRelease(**given | changes)


def privacy_record(release: CentralRelease, run: str, **how: bool) -> dict[str, Any]:
    """Return the coordinator's `privacy.json` as it is read back."""
    return written(CoordinatorRecord.of(release, run, **how))


def written(record: Any) -> dict[str, Any]:
    """Return what a record is as JSON."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(record), allow_nan=False))
    return found


def test_the_statement_names_the_unit_and_whom_it_trusts() -> None:
    statement = written(central_statement(release(), "r"))
    epsilon = compose_epsilon([GaussianSteps(noise_multiplier=1.2, sample_rate=0.5, steps=4)], 1e-5)
    text = statement["one_site"]
    assert text.startswith("Unit: one site with everything that it holds.")
    assert f"({math.ceil(epsilon * 1000) / 1000:.3f}, 1e-05)-differentially private" in text
    assert "TRUSTED COORDINATOR: this does not protect against the coordinator itself" in text
    assert "4 executed rounds (1 of them recomputed after an interruption and counted again)" in text
    assert "add or remove one site" in text
    assert "one record" not in statement["text"]
    assert statement["up_to_m_sites"] == []
    assert any(item.startswith("The coordinator:") for item in statement["not_covered"])
    record = privacy_record(release(), "r")
    assert (record["unit"], record["released_by"], record["trusts"]) == ("site", "coordinator", ["coordinator"])
    assert record["epsilon_spent"] == pytest.approx(epsilon)
    assert record["epsilon_spent_prv"] == pytest.approx(epsilon, rel=0.02)
    # An accountant needs nothing else.
    assert compose_epsilon([GaussianSteps(**event) for event in record["events"]], record["delta"]) == epsilon
    json.dumps(record, allow_nan=False)


def test_injected_randomness_of_the_coordinator_prints_no_epsilon() -> None:
    injected = release(randomness="injected")
    assert injected.epsilon == math.inf
    assert "differentially private" not in central_statement(injected, "r").one_site
    assert privacy_record(injected, "r")["epsilon_spent"] is None


def test_nothing_published_is_said_to_be_nothing() -> None:
    nothing = release(events=(), rounds=())
    assert nothing.epsilon == 0.0
    assert "published nothing" in central_statement(nothing, "r").one_site


EVENTS = (
    GaussianSteps(noise_multiplier=1.2, sample_rate=0.5, steps=4),
    GaussianSteps(noise_multiplier=2.0, sample_rate=0.25, steps=3),
)


@pytest.mark.parametrize("stopped_early", [False, True])
def test_the_whole_record_of_the_coordinator(stopped_early: bool) -> None:
    made = release(events=EVENTS, rounds=(1, 2, 2, 3, 4, 5, 6), steps_planned=20, epsilon_budget=5.5)
    spent = compose_epsilon(EVENTS, 1e-5)
    assert spent < 5.5
    found = privacy_record(made, "r", stopped_early=stopped_early, pretrained=False)
    assert found.pop("epsilon_spent_prv") == pytest.approx(spent, rel=0.02)
    told = f"({rounded_up(5.5 if stopped_early else spent)}, 1e-05)-differentially private"
    early = (
        " The run ended early: this is the epsilon of all 20 planned rounds, which is what was promised; of the executed ones it "
        f"is {rounded_up(spent)}."
    )
    statement = (
        "Unit: one site with everything that it holds. Everything that the coordinator published in run r, which is all global "
        f"adapters and clipping bounds, is {told} under add or remove one site of {made.num_sites_declared:,} declared ones, for "
        "Poisson sampling of sites at rate 0.5, noise multiplier 1.2000, 4 executed rounds; Poisson sampling of sites at rate "
        "0.25, noise multiplier 2.0000, 3 executed rounds (1 of them recomputed after an interruption and counted again), by PLD "
        f"accounting, against any number of other sites and the public.{early if stopped_early else ''} TRUSTED COORDINATOR: "
        "this does not protect against the coordinator itself, which received the sites' updates unprotected, and it says "
        "nothing about single records at a site of their own."
    )
    uncovered = [item for item in NOT_COVERED_CENTRAL if item is not PRE_TRAINING]
    assert found == {
        "released_by": "coordinator",
        "run": "r",
        "unit": "site",
        "relation": "add or remove one site",
        "trusts": ["coordinator"],
        "delta": 1e-5,
        "num_sites_declared": made.num_sites_declared,
        "sample_rate": 0.25,
        "noise_multiplier": 2.0,
        "update_noise_multiplier": made.update_noise_multiplier,
        "count_noise": made.count_noise,
        "clip_norm_first": made.clip_norm_first,
        "steps_planned": 20,
        "steps_executed": 7,
        "rounds": [1, 2, 2, 3, 4, 5, 6],
        "epsilon_budget": 5.5,
        "epsilon_spent": spent,
        "epsilon_spent_prv_missing": None,
        "accountant": ACCOUNTANT,
        "randomness": "os",
        "private": True,
        "events": [asdict(event) for event in EVENTS],
        "epsilon_planned": 5.5 if stopped_early else None,
        "statement": statement,
        "not_covered": uncovered,
    }
    text = central_statement(made, "r", stopped_early=stopped_early)
    assert text.one_site == statement
    once = central_statement(replace(made, rounds=tuple(range(1, 8))), "r", stopped_early=stopped_early)
    again = " (1 of them recomputed after an interruption and counted again)"
    assert once.one_site == statement.replace(again, "") != statement
    assert list(text.not_covered) == [*NOT_COVERED_CENTRAL, *([STOPPED_EARLY] if stopped_early else [])]
    assert privacy_record(made, "r")["epsilon_planned"] is None
    # What was executed counts where it is more than the plan.
    assert release(events=EVENTS, epsilon_budget=0.1).epsilon_promised == spent
    # And where the plan has no finite epsilon, however little was executed.
    little = (GaussianSteps(noise_multiplier=9.0, sample_rate=0.25, steps=1),)
    assert release(events=little, epsilon_budget=None).epsilon_promised == compose_epsilon(little, 1e-5) < 1


def test_the_whole_statements_where_nothing_is_promised() -> None:
    injected = release(randomness="injected", events=EVENTS)
    assert (injected.epsilon, injected.epsilon_promised) == (math.inf, math.inf)
    statement = central_statement(injected, "r", stopped_early=True)
    assert statement.one_site == (
        "NOT PRIVATE: the randomness of the coordinator in run r was injected for a test. Whoever knows the seed can remove "
        "the noise, so no epsilon is stated."
    )
    assert list(statement.not_covered) == list(NOT_COVERED_CENTRAL)
    record = privacy_record(injected, "r", stopped_early=True)
    names = ("epsilon_spent", "epsilon_spent_prv", "epsilon_spent_prv_missing", "epsilon_planned")
    assert [record[name] for name in names] == [None] * 4
    nothing = release(events=(), rounds=())
    assert central_statement(nothing, "r").one_site == (
        "The coordinator published nothing in run r that depends on a site."
    )
    record = privacy_record(nothing, "r")
    assert [record[name] for name in ("sample_rate", "noise_multiplier", "steps_executed")] == [None, None, 0]
