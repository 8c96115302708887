"""The parts of a composed loss distribution, each against its formula: grids, tilts, windows, bounds on rounding, the search."""

from __future__ import annotations

import gc
import math
import warnings
import weakref
from functools import reduce
from typing import Any

import mpmath
import numpy as np
import pytest
from numpy.typing import NDArray

import shared.privacy.accountant.loss_distribution as module
from shared.privacy.accountant.loss_distribution import (
    StepLoss,
    TiltedDivergence,
    composed_epsilon,
    forget_steps,
    largest_loss,
    step_loss,
)

UNIT = 2.0**-53
OUTSIDE = 1e-12


# --- one step ---


@pytest.mark.parametrize("removed", [True, False])
@pytest.mark.parametrize(("sigma", "rate"), [(0.7, 0.01), (2.0, 0.6), (1.3, 1.0), (0.1, 1.0)])
def test_the_largest_loss_is_that_of_the_furthest_noise(sigma: float, rate: float, removed: bool) -> None:
    """Removed: log((q N(1) + (1 - q) N(0)) / N(0)) at 1 + 5 sigma; added: log of the inverse at -5 sigma."""
    with mpmath.workdps(40):
        noise = 1 + 5 * mpmath.mpf(sigma) if removed else -5 * mpmath.mpf(sigma)
        loss = mpmath.log(rate * mpmath.exp((2 * noise - 1) / (2 * mpmath.mpf(sigma) ** 2)) + (1 - mpmath.mpf(rate)))
        assert largest_loss(sigma, rate, removed, 5.0) == pytest.approx(float(loss if removed else -loss), rel=1e-12)


@pytest.mark.parametrize("removed", [True, False])
@pytest.mark.parametrize(("sigma", "rate", "cell"), [(1.0, 0.1, 1e-2), (0.8, 1.0, 1e-2), (2.0, 0.999, 3e-3)])
def test_the_grid_of_a_step_reaches_as_far_as_it_says(sigma: float, rate: float, cell: float, removed: bool) -> None:
    part = step_loss(sigma, rate, removed, cell, 50)
    with mpmath.workdps(60):  # half of exp(-50) on either side
        furthest = float(mpmath.sqrt(2) * mpmath.erfinv(1 - mpmath.exp(-50)))
    low, high = (largest_loss(sigma, rate, way, furthest) / cell for way in (not removed, removed))
    assert part.lower == math.floor(-low)
    assert part.lower + len(part.probs) - 1 == math.ceil(high)
    assert part.losses[0] == part.lower * cell
    assert np.diff(part.losses) == pytest.approx(cell, rel=1e-9)
    assert (0 if removed is False and rate < 1 else 1e-40) <= part.infinite < math.exp(-45)
    assert float(part.probs.sum()) == pytest.approx(1.0, abs=1e-13)
    # Connecting the dots keeps what it is made of: the mean of exp(-loss), which is the mass of the other one.
    assert float(np.dot(part.probs, np.exp(-part.losses))) == pytest.approx(1.0, abs=1e-9)
    assert np.all(part.errors >= UNIT * part.probs)
    assert np.all(part.errors <= 1e-11)


@pytest.mark.parametrize("removed", [True, False])
@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_the_ends_of_a_coarse_grid_hold_what_lies_beyond(rate: float, removed: bool) -> None:
    """About exp(-5) lies above, at infinity, and as much below, in the first cell: no mass is lost."""
    part = step_loss(0.8, rate, removed, 0.05, 5)
    assert float(part.probs.sum()) + part.infinite == pytest.approx(1.0, abs=1e-13)
    if rate == 1:
        assert 1e-4 < part.infinite < math.exp(-5)
        assert part.probs[0] > 3 * part.probs[1]


def test_the_rounding_of_a_cell_is_that_of_the_three_divergences_around_it() -> None:
    cell, rate, sigma = 1e-2, 0.2, 1.1
    part = step_loss(sigma, rate, True, cell, 50)
    ratio, width = math.exp(cell), math.expm1(cell)

    def error(number: int) -> float:
        found = module.step_divergence(np.array([abs(number) * cell]), sigma, rate, number >= 0)[1]
        return float(found[0]) * math.exp(min(number, 0) * cell)

    for place in (5, -part.lower - 3, -part.lower, -part.lower + 1, 400):
        number = part.lower + place
        around = (error(number + 1) + (1 + ratio) * error(number) + ratio * error(number - 1)) / width
        assert part.errors[place] == pytest.approx(around + UNIT * part.probs[place], rel=1e-9, abs=0)


@pytest.mark.parametrize("removed", [True, False])
def test_what_lies_at_infinity_is_rounded_up(removed: bool) -> None:
    part = step_loss(1.1, 0.2, removed, 1e-2, 50)
    high = part.lower + len(part.probs) - 1
    deltas, errors = module.step_divergence(np.arange(high + 1) * 1e-2, 1.1, 0.2, removed)
    assert part.infinite == deltas[-1] + errors[-1]
    assert (part.infinite > deltas[-1]) == removed  # the loss of an added record has an end


def test_the_divergence_of_an_added_record_ends_where_its_loss_does() -> None:
    """No loss is above -log(1 - q): there and beyond, nothing is left to round either."""
    for rate in (0.5, 0.9):
        end = -math.log1p(-rate)
        deltas, errors = module.step_divergence(np.array([0.9 * end, end, end + 1e-9, 2 * end]), 1.0, rate, False)
        assert deltas[0] > errors[0] > 0
        assert np.all(np.isfinite(errors))
        assert np.all(deltas[2:] == 0)
        assert np.all(errors[2:] == 0)
    deltas, errors = module.step_divergence(np.array([math.log(2)]), 1.0, 0.5, False)
    assert (deltas[0], errors[0]) == (0.0, 0.0)  # to the last bit


@pytest.mark.parametrize("removed", [True, False])
@pytest.mark.parametrize(("sigma", "rate"), [(0.7, 0.05), (3.0, 0.6), (1.0, 1.0)])
def test_the_rounding_of_a_divergence_is_bounded_as_its_comments_say(sigma: float, rate: float, removed: bool) -> None:
    for epsilon in (0.0, 0.1, 0.4, 0.9, 2.5):
        _, (found,) = module.step_divergence(np.array([epsilon]), sigma, rate, removed)
        sign = 1.0 if removed else -1.0
        change = math.expm1(sign * epsilon) / rate
        share = math.exp(-epsilon)
        plain = removed or share >= 0.5
        ratio = 1 + change if plain else (share - (1 - rate)) / rate
        if ratio <= 0:
            assert found == 0.0
            continue
        rounded = abs(change) if plain else share / rate
        unsampled = sign * math.log(ratio)
        near = unsampled * sigma - 0.5 / sigma
        weight = rate if removed else rate * math.exp(epsilon) * ratio
        density, upper = math.exp(-(near**2) / 2) / math.sqrt(2 * math.pi), math.erfc(near / math.sqrt(2)) / 2
        arguments = upper * (16 + 4 * near**2 + 4 * epsilon + 2 / sigma)
        expected = 2 * UNIT * weight * (arguments + 4 * rounded / ratio * (sigma * density + upper))
        assert found == pytest.approx(expected, rel=1e-9, abs=0)


@pytest.mark.parametrize("rate", [1e-3, 0.3, 1.0])
def test_the_divergence_of_a_step_at_its_grid_is_that_of_its_cells(rate: float) -> None:
    cell = 1e-2
    for removed in (True, False):
        part = step_loss(1.0, rate, removed, cell, 50)
        epsilons = np.arange(0, part.lower + len(part.probs) - 1) * cell
        expected, errors = module.step_divergence(epsilons, 1.0, rate, removed)
        for place in range(0, len(epsilons), 37):
            above = part.losses > epsilons[place] + cell / 2
            found = float(np.dot(part.probs[above], -np.expm1(epsilons[place] - part.losses[above]))) + part.infinite
            assert found == pytest.approx(expected[place], rel=1e-9, abs=1e-13 + errors[place])


def test_moments_and_tilts_are_sums_over_the_cells() -> None:
    part = step_loss(0.9, 0.2, True, 1e-2, 50)
    for tilt in (0.3, 2.0, 9.0):
        weights = part.probs * np.exp(tilt * part.losses)
        assert part.log_moment(tilt) == pytest.approx(math.log(float(weights.sum())), rel=1e-12, abs=1e-14)
        found, error = part.tilted(tilt)
        np.testing.assert_allclose(found, weights / weights.sum(), rtol=1e-12, atol=0)
        lost = float(np.dot(part.errors, np.exp(tilt * part.losses))) / float(weights.sum())
        assert error == pytest.approx(lost + 1024 * UNIT, rel=1e-9, abs=0)


def test_a_cell_without_mass_has_no_tilted_mass_and_no_warning() -> None:
    part = StepLoss(0.5, -1, np.array([0.25, 0.0, 0.75]), np.array([0.0, 0.0, 1e-16]), 0.0)
    found, error = part.tilted(1.0)
    expected = np.array([0.25 * math.exp(-0.5), 0.0, 0.75 * math.exp(0.5)])
    np.testing.assert_allclose(found, expected / expected.sum(), rtol=1e-14)
    assert error == pytest.approx(1e-16 * math.exp(0.5) / expected.sum() + 1024 * UNIT, rel=1e-9, abs=0)


# --- a composition ---

PARTS = [(step_loss(1.0, 0.2, True, 1e-2, 50), 6), (step_loss(2.0, 0.7, True, 1e-2, 50), 3)]
TILT = 5.0


def log_moment(tilt: float) -> float:
    return sum(count * part.log_moment(tilt) for part, count in PARTS)


def composed(masses: list[NDArray[np.float64]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Losses and masses of all steps of `PARTS`, whose cells weigh `masses`, by plain convolution."""
    every = [mass for mass, (_, count) in zip(masses, PARTS, strict=True) for _ in range(count)]
    total = reduce(np.convolve, every)
    first = sum(part.lower * count for part, count in PARTS)
    return (first + np.arange(len(total))) * 1e-2, total


def test_a_composition_is_a_convolution_seen_through_its_tilt() -> None:
    bound = TiltedDivergence(PARTS, TILT, log_moment)
    losses, total = composed([part.probs for part, _ in PARTS])
    infinite = 1 - math.prod((1 - part.infinite) ** count for part, count in PARTS)
    assert infinite <= bound.infinite <= infinite + 1e-11
    for epsilon in (9.3, 10.0, 11.0, 12.005):
        above = losses > epsilon
        exact = float(np.dot(total[above], -np.expm1(epsilon - losses[above])))
        found = bound(epsilon)
        assert 0 < bound.lost(epsilon) < exact
        assert exact <= found
        assert found - bound.lost(epsilon) == pytest.approx(exact, rel=1e-7, abs=0)
    assert bound.lost(1.0) == pytest.approx(bound.lost(0.0) * math.exp(-TILT), rel=1e-9, abs=0)
    # Far below, where a weight would overflow, nothing is said.
    assert bound.lost((log_moment(TILT) - 599) / TILT) < math.inf
    assert bound.lost((log_moment(TILT) - 601) / TILT) == bound((log_moment(TILT) - 601) / TILT) == math.inf


def test_a_window_leaves_out_as_much_tilted_mass_as_it_says() -> None:
    # A normal distribution, for which the window is nearly the best.
    many = [(step_loss(20.0, 1.0, True, 5e-3, 50), 25)]

    def moment(tilt: float) -> float:
        return 25 * many[0][0].log_moment(tilt)

    bound = TiltedDivergence(many, 3.0, moment)
    tilted, _ = many[0][0].tilted(3.0)
    total, power, left = np.ones(1), tilted, 25
    while left:
        total, power, left = (np.convolve(total, power) if left & 1 else total), np.convolve(power, power), left >> 1
    losses = (25 * many[0][0].lower + np.arange(len(total))) * 5e-3
    found = bound._losses_from(0)
    for outside in (losses < found[0] - 1e-3, losses > found[-1] + 1e-3):
        assert 1e-15 < float(total[outside].sum()) < OUTSIDE
    np.testing.assert_allclose(
        bound._cells, total[np.searchsorted(losses, found[0] - 1e-3) :][: len(found)], rtol=0, atol=1e-14
    )
    # What lies above counts in full: Chernoff's exp(-12 log 10), seen through the tilt at the window's end.
    above = OUTSIDE * math.exp(moment(3.0) - 3.0 * found[-1])
    beyond = -math.expm1(25 * math.log1p(-many[0][0].infinite))
    assert bound.infinite == pytest.approx(above + beyond, rel=1e-9, abs=0)


def test_rounding_is_bounded_as_the_text_says() -> None:
    """Transforms in L2, their norm times that of the weights; one step's cells and what wraps around in L1."""
    bound = TiltedDivergence(PARTS, TILT, log_moment)
    size = module.fft.next_fast_len(max(len(bound._cells), *(len(part.probs) for part, _ in PARTS)), real=True)
    tilted = [(*part.tilted(TILT), count) for part, count in PARTS]
    rounding = 1 + sum(count * (1 + float(np.linalg.norm(probs))) for probs, _, count in tilted)
    transforms = 8 * UNIT * (math.log2(size) + 1) * rounding * module._norm_of_weights(TILT, 1e-2)
    steps = math.expm1(sum(count * error for _, error, count in tilted)) + OUTSIDE
    slack = 1 + 1e-10 + 128 * UNIT * 9
    expected = (transforms + steps / (1 + TILT)) * math.exp(log_moment(TILT) - TILT) * slack
    assert bound.lost(1.0) == pytest.approx(expected, rel=1e-12, abs=0)


def test_sums_round_by_as_much_as_there_are_steps() -> None:
    part = step_loss(300.0, 1e-3, True, 1e-3, 50)
    many = TiltedDivergence([(part, 1 << 20)], 50.0, lambda tilt: (1 << 20) * part.log_moment(tilt))
    assert many._slack - 1 == pytest.approx(1e-10 + 128 * UNIT * (1 << 20), rel=1e-4, abs=0)


@pytest.mark.parametrize(("tilt", "cell"), [(0.1, 1e-2), (3.0, 1e-3), (50.0, 1e-2), (400.0, 1e-2)])
def test_the_norm_of_the_weights_is_bounded_closely(tilt: float, cell: float) -> None:
    for begin in (0.01, 0.5, 1.0):
        y = (np.arange(round(60 / tilt / cell) + 10) + begin) * cell
        exact = float(np.linalg.norm(np.exp(-tilt * y) * -np.expm1(-y)))
        integral = math.sqrt((1 / (2 * tilt) - 2 / (2 * tilt + 1) + 1 / (2 * tilt + 2)) / cell)
        found = module._norm_of_weights(tilt, cell)
        assert exact <= found
        assert found == pytest.approx(math.hypot(integral, 1 / (1 + tilt)), rel=1e-9)


# --- the search ---


class Curve:
    """A divergence exp(-epsilon rate) share + infinite, nothing below `begin`, and how often it was asked."""

    def __init__(self, rate: float = 1.0, share: float = 1.0, infinite: float = 0.0, begin: float = -1.0) -> None:
        self.rate, self.share, self.infinite, self.begin, self.asked = rate, share, infinite, begin, [0.0]

    def __call__(self, epsilon: float) -> float:
        self.asked.append(epsilon)
        assert len(self.asked) < 1000, "a search without end"
        if epsilon < self.begin:
            return math.inf
        return self.share * math.exp(-epsilon * self.rate) + self.infinite


@pytest.mark.parametrize("delta", [0.3, 1e-5, 1e-30])
@pytest.mark.parametrize(("rate", "begin"), [(1.0, -1.0), (30.0, -1.0), (0.01, -1.0), (1.0, 0.9), (0.01, 100.0)])
def test_the_root_is_the_least_epsilon_that_was_tried(delta: float, rate: float, begin: float) -> None:
    curve = Curve(rate, begin=begin)
    found, exact = module._root(curve, delta), max(begin, -math.log(delta) / rate)
    assert found in curve.asked
    assert curve(found) <= delta
    assert exact <= found <= exact + 1.6e-9 * max(exact, 1.0)
    assert len(curve.asked) < 130


def test_there_is_no_root_where_nothing_reaches_delta() -> None:
    assert module._root(Curve(infinite=1e-5), 1e-5) == math.inf
    assert module._root(Curve(infinite=1e-5), 0.99e-5) == math.inf
    assert module._root(Curve(infinite=1e-5), 1.01e-5) == pytest.approx(-math.log(1e-7), abs=1e-7)
    assert module._root(Curve(share=0.5), 0.5) == 0.0
    assert module._root(Curve(share=0.5), 0.4999) == pytest.approx(2e-4, rel=1e-2)
    # A root so close to 0 that the search comes back with 0, where the bound does not hold.
    assert 1e-12 <= module._root(Curve(share=0.5 + 1e-12), 0.5) < 2e-9
    assert module._root(Curve(share=0.0), 0.5) == 0.0


def test_a_tilt_is_sought_between_its_limits() -> None:
    for best in (0.2, 5.0, 300.0):
        found = module._least(lambda tilt, best=best: math.log(tilt / best) ** 2, 1e-2)
        assert found == pytest.approx(best, rel=0.06)
    # From 0.05 to 600 over a cell.
    assert module._least(lambda tilt: tilt, 1e-2) == pytest.approx(0.05, rel=0.1)
    assert module._least(lambda tilt: -tilt, 1e-2) == pytest.approx(60_000, rel=0.1)


@pytest.mark.parametrize(
    ("event", "delta", "cell", "expected", "num"),
    [
        ((1.0, 0.1, 10), 1e-5, 1e-3, 2.8545, 1),  # the first tilt is good
        ((5.0, 1e-9, 2), 1e-9, 1e-3, 0.0, 1),  # nothing is less
        ((31.652105, 0.0117043559, 1), 3.2279358e-16, 1e-2, 0.01, 1),  # the next one would be the same
        ((0.2491342, 3.41871088e-5, 2), 1.0999287e-5, 1e-3, 1.217396, 2),  # the first: 1.2195
        ((44.08546, 0.143014223, 1), 1.60594075e-20, 1e-2, 0.03, 3),  # the first: 0.0395
    ],
)
def test_what_is_lost_under_one_tilt_is_won_under_the_next(
    event: tuple[float, float, int],
    delta: float,
    cell: float,
    expected: float,
    num: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In as few compositions as it takes: each costs up to half a second."""
    tilts: list[float] = []

    class Noted(TiltedDivergence):
        def __init__(self, parts: object, tilt: float, log_moment: object) -> None:
            tilts.append(tilt)
            super().__init__(parts, tilt, log_moment)

    monkeypatch.setattr(module, "TiltedDivergence", Noted)
    found = module._epsilon([(step_loss(*event[:2], True, cell, 60), event[2])], delta)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-12)
    assert len(tilts) == num


def test_cells_grow_until_there_are_few_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    events, tried = [(1.0, 0.1, 10)], []
    grid = module._on_grid

    def noted(events: list[tuple[float, float, int]], delta: float, cell: float) -> float:
        tried.append(cell)
        return grid(events, delta, cell)

    monkeypatch.setattr(module, "_on_grid", noted)
    fine = composed_epsilon(events, 1e-5, 1e-3)
    monkeypatch.setattr(module, "_MOST_CELLS", 500)
    wide = composed_epsilon(events, 1e-5, 1e-3)
    assert fine < wide < fine * 1.1
    # By a power of two, and no further than needed.
    assert tried[:2] == [1e-3, 1e-3]
    assert tried[-1] / 1e-3 == 2.0 ** round(math.log2(tried[-1] / 1e-3))
    monkeypatch.setattr(module, "_on_grid", grid)
    with pytest.raises(module._TooManyCells) as refused:
        grid(events, 1e-5, tried[-1] / 2)
    assert 1 < refused.value.excess <= 3


@pytest.mark.parametrize(("rates", "expected"), [((0.5, 1.0), {True, False}), ((1.0, 1.0), {True})])
def test_both_directions_count_where_there_is_sampling(
    rates: tuple[float, float], expected: set[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, original = [], module.step_loss

    def noted(sigma: float, rate: float, removed: bool, cell: float, beyond: int) -> StepLoss:
        asked.append((sigma, rate, removed, cell, beyond))
        return original(sigma, rate, removed, cell, beyond)

    monkeypatch.setattr(module, "step_loss", noted)
    module._on_grid([(2.0, rates[0], 3), (3.0, rates[1], 4)], 1e-5, 1e-2)
    assert {removed for _, _, removed, _, _ in asked} == expected
    assert {(sigma, rate, cell) for sigma, rate, _, cell, _ in asked} == {(2.0, rates[0], 1e-2), (3.0, rates[1], 1e-2)}
    assert {beyond for *_, beyond in asked} == {50}
    # log(T / delta) and six decades, in steps of ten.
    asked.clear()
    module._on_grid([(2.0, rates[0], 3)], 1e-30, 1e-2)
    assert {beyond for *_, beyond in asked} == {90}
    # Where that crosses a multiple of ten.
    for share, expected in ((1.01, 60), (0.99, 70)):
        asked.clear()
        module._on_grid([(2.0, rates[0], 3)], share * 3e6 * math.exp(-60), 1e-2)
        assert {beyond for *_, beyond in asked} == {expected}


def test_no_composition_takes_more_than_half_a_million_cells() -> None:
    step = step_loss(1.0, 1.0, True, 2e-5, 50)
    with pytest.raises(module._TooManyCells) as refused:
        TiltedDivergence([(step, 1)], 1.0, step.log_moment)
    assert 1 < refused.value.excess < 2


def test_almost_no_noise_is_no_reason_to_warn() -> None:
    """Of two forms, the one that is not taken multiplies 0 by infinity there."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for removed in (True, False):
            deltas, errors = module.step_divergence(np.array([0.0, 1e-4, 5e-4]), 0.01, 1e-3, removed)
            assert np.isfinite(errors).all()
            # The record shows whenever it is in the step.
            least = 1e-3 if removed else 1 - (1 - 1e-3) * np.exp([0.0, 1e-4, 5e-4])
            assert deltas == pytest.approx(least, rel=1e-6)


def test_exactly_the_most_cells_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused, they would be asked for again and again: cells twice as wide are for more than these."""
    step = step_loss(1.0, 1.0, True, 1e-2, 50)

    def number() -> int:
        return len(TiltedDivergence([(step, 1)], 1.0, step.log_moment)._cells)

    most = number()
    monkeypatch.setattr(module, "_MOST_CELLS", most)
    assert number() == most
    monkeypatch.setattr(module, "_MOST_CELLS", most - 1)
    with pytest.raises(module._TooManyCells) as refused:
        number()
    assert refused.value.excess == most / (most - 1)


def test_no_step_takes_more_than_a_million_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    number = len(step_loss(1.0, 1.0, True, 1e-2, 50).probs)
    twice_as_wide = composed_epsilon([(1.0, 1.0, 4)], 1e-5, 2e-2)
    module.forget_steps()
    monkeypatch.setattr(module, "_MOST_CELLS_OF_A_STEP", number - 1)
    assert len(step_loss(1.0, 1.0, True, 1e-2, 50).probs) == number
    module.forget_steps()
    monkeypatch.setattr(module, "_MOST_CELLS_OF_A_STEP", number - 2)
    with pytest.raises(module._TooManyCells):
        step_loss(1.0, 1.0, True, 1e-2, 50)
    assert composed_epsilon([(1.0, 1.0, 4)], 1e-5, 1e-2) == twice_as_wide


# --- losses that are all above epsilon, and infinite ones ---


def test_nothing_of_the_first_cell_is_lost_and_sums_are_rounded_up() -> None:
    """Two steps that always lose one or two cells: every cell of the composition lies above epsilon 0."""
    step = StepLoss(0.5, 1, np.array([0.5, 0.5]), np.zeros(2), 0.0)
    found = TiltedDivergence([(step, 2)], 1.0, lambda tilt: 2 * step.log_moment(tilt))
    exact = sum(mass * -math.expm1(-loss) for mass, loss in ((0.25, 1.0), (0.5, 1.5), (0.25, 2.0)))
    bound = found(0.0) - found.lost(0.0) - found.infinite
    assert exact * (1 + 5e-11) < bound < exact * (1 + 1e-9)


def test_infinite_losses_are_composed_and_rounded_up() -> None:
    """Of two steps, each of which loses everything with probability 0.1, 0.19 do."""
    step = StepLoss(0.5, -1, np.array([0.3, 0.3, 0.3]), np.zeros(3), 0.1)
    found = TiltedDivergence([(step, 2)], 1.0, lambda tilt: 2 * step.log_moment(tilt))
    assert 0.19 * (1 + 5e-11) < found.infinite < 0.19 * (1 + 1e-9)


@pytest.mark.parametrize(("sigma", "rate", "removed"), [(0.7, 0.3, True), (0.7, 0.3, False), (3.0, 1.0, True)])
def test_blocks_change_no_bit(sigma: float, rate: float, removed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed block by block, so as to take little memory, is what it is at once."""
    found = []
    for block in (1 << 30, 1 << 16, 997):
        monkeypatch.setattr(module, "_BLOCK", block)
        found.append(module._step_loss(sigma, rate, removed, 1e-4, 50))
    whole, *others = found
    assert len(whole.probs) > 3 * 997
    for other in others:
        np.testing.assert_array_equal(other.probs, whole.probs)
        np.testing.assert_array_equal(other.errors, whole.errors)
        assert (other.lower, other.infinite) == (whole.lower, whole.infinite)


def test_what_is_kept_of_steps_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = module._Kept()
    monkeypatch.setattr(module, "_MOST_CELLS_KEPT", 10_000)
    steps = [module._step_loss(1.0 + number / 10, 0.2, True, 1e-2, 50) for number in range(12)]
    for number, step in enumerate(steps):
        kept.keep((number,), step)
    assert kept.get((11,)) is steps[11]
    there = [number for number in range(12) if kept.get((number,)) is not None]
    assert len(there) <= 8
    assert sum(len(steps[number].probs) for number in there) <= 10_000
    monkeypatch.setattr(module, "_MOST_CELLS_KEPT", 1)
    kept.keep((12,), steps[0])
    assert [number for number in range(13) if kept.get((number,)) is not None] == [12], "the last one stays"
    kept.forget()
    assert kept.get((12,)) is None


def test_nothing_of_a_composition_waits_for_the_collector_of_cycles(monkeypatch: pytest.MonkeyPatch) -> None:
    """SciPy's search for a root calls through a cycle, and Python does not know that megabytes hang on it."""
    made: list[weakref.ref[TiltedDivergence]] = []
    initialise = TiltedDivergence.__init__

    def noted(self: TiltedDivergence, *arguments: Any) -> None:
        made.append(weakref.ref(self))
        initialise(self, *arguments)

    monkeypatch.setattr(TiltedDivergence, "__init__", noted)
    gc.disable()
    try:
        composed_epsilon([(2.0, 0.05, 30)], 1e-5, 1e-3)
        assert made
        assert [one for one in made if one() is not None] == []
    finally:
        gc.enable()


def test_no_digit_depends_on_the_number_of_threads() -> None:
    """A console and a command line with other settings of BLAS state the same of one ledger."""
    threadpoolctl = pytest.importorskip("threadpoolctl")
    found = set()
    for threads in (1, 2):
        with threadpoolctl.threadpool_limits(threads, user_api="blas"):
            forget_steps()
            found.add(composed_epsilon([(2.0, 0.25, 80)], 1e-5, 1e-4))
    assert len(found) == 1
