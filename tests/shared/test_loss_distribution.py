"""Loss distributions against dp-accounting's own, cell by cell and in epsilon."""

from __future__ import annotations

import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution, from_gaussian_mechanism

from shared.privacy.loss_distribution import LossDistribution

EDGES = [
    (1.0, 1.0, 7),
    (5.0, 1.0, 1),
    (0.3, 0.001, 1),
    (0.2, 0.5, 2),
    (300.0, 0.9, 50),
    (1.0, 1e-4, 100_000),
    (2.0, 0.999, 30),
]


def random_settings(count: int) -> list[tuple[float, float, int]]:
    """Noise from 0.4 to 20, rates from 1e-4 to 1/2, up to 100,000 steps; epsilon stays below a few hundred."""
    generator = np.random.default_rng(20_260_102)
    found: list[tuple[float, float, int]] = []
    while len(found) < count:
        low, high = np.log([0.4, 1e-4, 1.0]), np.log([20.0, 0.5, 1e5])
        sigma, rate, steps = np.exp(generator.uniform(low, high)).tolist()
        if steps * rate**2 * math.expm1(1 / sigma**2) < 30:
            found.append((sigma, rate, round(steps)))
    return found


def of_dp_accounting(sigma: float, rate: float, cell: float) -> PrivacyLossDistribution:
    return from_gaussian_mechanism(
        standard_deviation=sigma,
        sampling_prob=rate,
        value_discretization_interval=cell,
        neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    )


@pytest.mark.parametrize(("sigma", "rate", "steps"), [*EDGES, *random_settings(25)])
def test_it_is_dp_accounting_s(sigma: float, rate: float, steps: int) -> None:
    theirs, ours = of_dp_accounting(sigma, rate, 1e-3), LossDistribution.of_one_step(sigma, rate, 1e-3)
    pairs = [(theirs._pmf_remove, ours._removed), (theirs._pmf_add, ours._added or ours._removed)]
    for expected, found in ((one.to_dense_pmf(), other) for one, other in pairs):
        assert (found._lower_loss, found.size) == (expected._lower_loss, expected.size)
        np.testing.assert_allclose(found._probs, expected._probs, rtol=0, atol=1e-12)
        assert found._infinity_mass == pytest.approx(expected._infinity_mass, abs=1e-15)
    many = theirs.self_compose(steps)
    for delta in (1e-3, 1e-5, 1e-6):
        assert ours.self_compose(steps).epsilon(delta) == pytest.approx(many.get_epsilon_for_delta(delta), abs=1e-7)


@pytest.mark.parametrize("rates", [(0.1, 0.02), (1.0, 0.1), (0.1, 1.0), (1.0, 1.0)])
def test_different_mechanisms_compose_as_there(rates: tuple[float, float]) -> None:
    one, other = ((2.0, rates[0], 20), (3.0, rates[1], 7))
    theirs = (
        of_dp_accounting(*one[:2], 1e-3).self_compose(20).compose(of_dp_accounting(*other[:2], 1e-3).self_compose(7))
    )
    ours = LossDistribution.of_one_step(*one[:2], 1e-3).self_compose(20)
    ours = ours.compose(LossDistribution.of_one_step(*other[:2], 1e-3).self_compose(7))
    assert ours.epsilon(1e-5) == pytest.approx(theirs.get_epsilon_for_delta(1e-5), abs=1e-9)


def test_epsilon_at_the_edges() -> None:
    step = LossDistribution.of_one_step(1.0, 0.1, 1e-3)
    assert step.epsilon(0.9) == of_dp_accounting(1.0, 0.1, 1e-3).get_epsilon_for_delta(0.9) == 0.0
    # Less than the mass that was put at infinity.
    assert step.self_compose(10).epsilon(1e-16) == math.inf


@pytest.mark.parametrize("cell", [2e-3, 1e-2, 5e-2])
def test_wider_cells_are_never_optimistic(cell: float) -> None:
    for sigma, rate, steps in random_settings(8):
        fine, wide = (LossDistribution.of_one_step(sigma, rate, width).self_compose(steps) for width in (1e-3, cell))
        assert wide.epsilon(1e-5) >= fine.epsilon(1e-5) - 1e-6
