"""Privacy loss distributions of Poisson-subsampled Gaussian steps, composed so that every error of the arithmetic is bounded.

One step is discretised by connecting the dots, which is pessimistic, on a grid of cells of one width. Many steps are composed
by Fourier transforms, whose rounding is of one size in all cells: as they stand, cells with less mass than that, the very
ones that decide at a small delta, would be noise. So each distribution is first tilted, multiplied by exp(lambda loss), which
moves its weight to where delta is decided. What rounding may still have taken away is bounded and added to delta before
epsilon is found.

Formal guarantee
    * `composed_epsilon` is an upper bound at every delta from 1e-30 on, whatever was lost to rounding and to cut tails:
      against the closed form of the Gaussian mechanism, against one step in 40 digits, against sums of positive terms in place
      of transforms, and against dp-accounting where its own rounding allows (tests/shared/privacy/test_loss_distribution.py).

How delta(epsilon) is bounded. Let c be the tilted composition as computed, K = sum of T log Z the logarithm of what tilting
took out, w(l) = exp(K - lambda l) (1 - exp(epsilon - l)), for l > epsilon, what the mass of a cell counts. Then delta is at most
    sum of c w + infinite mass + mass above the window (Chernoff)
    + |rounding of the transforms|_2 |w|_2 (Cauchy, Schwarz; for the first Higham 2002, theorem 24.2)
    + max w (rounding of one step's cells, in L1, T times; mass below the window (Chernoff), which wraps around).
Mass that wraps around from above is counted twice, which only adds. Why so: docs/decisions/0016.

Sources: Doroshenko, Ghazi, Kamath, Kumar, Manurangsi 2022 (connect the dots; dp-accounting); Koskela, Jälkö, Honkela 2020
(Fourier transform); Wilson, Keich 2016 (tilting against the rounding of tails); Balle, Wang 2018 (divergence of a Gaussian).
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.optimize import brentq, minimize_scalar
from scipy.special import erfcx, log_ndtr, ndtr, ndtri_exp

from shared.privacy.accountant.several_sites import shared_divergence, shared_largest_loss

Array = NDArray[np.float64]
Event = tuple[float, float, int] | tuple[float, float, int, int]
"""Noise multiplier, sample rate, steps; and at how many sites of each step one person has data, if that is not 1."""

_UNIT = 2.0**-53  # rounding of one operation, relative
# Tilted mass on either side of the window; what it may hide is added to delta.
_LOG_OUTSIDE = math.log(1e-12)
# Mass of T steps beyond the grids of one, as a share of delta. In steps of ten, so that one step's grid can be kept.
_LOG_BEYOND, _BEYOND_STEP, _LEAST_BEYOND = math.log(1e-6), 10, 50
# Smallest tilt, and largest, in units of a cell: below exp(700) nothing overflows.
_LEAST_TILT, _MOST_TILT, _MOST_LOG = 0.05, 600.0, 600.0
# Tilted anew, up to so many times, while the bound on what was lost is more than this share of delta.
_SHARE_LOST, _MOST_TILTS, _TILT_TOLERANCE = 1e-4, 3, 0.05
# Of one composition, so that time and memory are bounded: about half a second and 100 MB; and of one step, whose rare large
# losses may need many narrow cells.
_MOST_CELLS, _MOST_CELLS_OF_A_STEP = 1 << 19, 1 << 20
_MOST_KEPT, _MOST_CELLS_KEPT = 8, 1 << 20
# By pocketfft, in `get_plan`; and of how many cells one is worth forgetting.
_LENGTHS_KEPT, _LONG_TRANSFORM = 16, 1 << 15
_BLOCK = 1 << 16  # cells of a step that are computed at once
_ROOT_TOLERANCE, _LEAST_SHARE = 1e-9, 1e-9


@dataclass(frozen=True, eq=False)
class StepLoss:
    """Loss of one step in one direction, on a grid.

    Attributes:
        cell: width of a cell; the loss of cell i is (lower + i) cell.
        lower: number of the first cell.
        probs: mass of each cell.
        errors: bounds on the rounding of each of `probs`.
        infinite: mass at infinite loss.
    """

    cell: float
    lower: int
    probs: Array
    errors: Array
    infinite: float

    @property
    def losses(self) -> Array:
        """Loss of each cell, computed anew: an array less to keep for each step."""
        found: Array = np.arange(self.lower, self.lower + len(self.probs), dtype=np.float64)
        found *= self.cell
        return found

    @cached_property
    def _logs(self) -> Array:
        with np.errstate(divide="ignore"):
            found: Array = np.log(self.probs)
        return found

    def log_moment(self, tilt: float) -> float:
        """Return log E[exp(tilt loss); loss finite]."""
        exponents = self._logs + tilt * self.losses
        top = float(exponents.max())
        return top + math.log(float(np.exp(exponents - top).sum()))

    def tilted(self, tilt: float) -> tuple[Array, float]:
        """Return the distribution proportional to probs exp(tilt loss), and a bound on its rounding in L1."""
        log_moment = self.log_moment(tilt)
        with np.errstate(divide="ignore"):
            errors = np.exp(np.log(self.errors) + tilt * self.losses - log_moment)
        # An exponent of some hundred, rounded, moves the power by some hundred units.
        return np.exp(self._logs + tilt * self.losses - log_moment), float(errors.sum()) + 1024 * _UNIT


def composed_epsilon(events: Sequence[Event], delta: float, cell: float) -> float:
    """Return an upper bound on epsilon at `delta` of all `events` composed, add-or-remove-one; `inf` if there is none.

    Args:
        events: at least one, steps >= 1.
        delta: failure probability, from 1e-30 to below 1.
        cell: width of a cell of the grid; a wider one gives a larger epsilon, and is taken where there would be too many.
    """
    while True:
        try:
            return _on_grid(events, delta, cell)
        except _TooManyCells as found:
            cell *= 2.0 ** math.ceil(math.log2(found.excess))


class _TooManyCells(Exception):
    """A composition, or one step, would take more cells than it may."""

    def __init__(self, number: int, most: int) -> None:
        """Keep how many times too many they would be."""
        self.excess = number / most


def _on_grid(events: Sequence[Event], delta: float, cell: float) -> float:
    total = sum(event[2] for event in events)
    beyond = max(math.log(total) - math.log(delta) - _LOG_BEYOND, _LEAST_BEYOND)
    beyond = math.ceil(beyond / _BEYOND_STEP) * _BEYOND_STEP
    # Without sampling the two directions are one.
    directions = (True, False) if any(event[1] < 1 for event in events) else (True,)
    return max(
        _epsilon(
            [(step_loss(sigma, rate, removed, cell, beyond, *at), steps) for sigma, rate, steps, *at in events], delta
        )
        for removed in directions
    )


class _Kept:
    """The steps that were asked for last: every round asks for the same one. Large ones give way sooner; the last one stays."""

    def __init__(self) -> None:
        self._lock, self._steps = threading.Lock(), OrderedDict[tuple[object, ...], StepLoss]()

    def get(self, key: tuple[object, ...]) -> StepLoss | None:
        with self._lock:
            if key in self._steps:
                self._steps.move_to_end(key)
            return self._steps.get(key)

    def keep(self, key: tuple[object, ...], step: StepLoss) -> None:
        with self._lock:
            self._steps[key] = step
            while len(self._steps) > 1 and (
                len(self._steps) > _MOST_KEPT or sum(len(one.probs) for one in self._steps.values()) > _MOST_CELLS_KEPT
            ):
                self._steps.popitem(last=False)

    def forget(self) -> None:
        with self._lock:
            self._steps.clear()


_KEPT = _Kept()


def step_loss(sigma: float, rate: float, removed: bool, cell: float, beyond: int, sites: int = 1) -> StepLoss:
    """Return what `_step_loss` does, computed once where it is asked for again and again."""
    key = (sigma, rate, removed, cell, beyond, sites)
    if (known := _KEPT.get(key)) is not None:
        return known
    found = _step_loss(*key)
    _KEPT.keep(key, found)
    return found


def forget_steps() -> None:
    """Give back what is kept of steps, up to 32 MB, where the next one asked for is likely another."""
    _KEPT.forget()


def _step_loss(sigma: float, rate: float, removed: bool, cell: float, beyond: int, sites: int = 1) -> StepLoss:
    """Return the loss of one Poisson-subsampled Gaussian step, for a record that is removed or one that is added.

    With `sites` above 1 it is the loss of a person whose data at so many sites add up in the step.

    About exp(-beyond) of its mass lies above the grid, at infinity, and below, in the first cell.

    The mass of a cell is the second difference, over its width, of the divergence at cells around it. For losses below 0 the
    divergence is 1 - e^epsilon, whose second difference is nothing, plus e^epsilon times the other direction's at -epsilon:
    only the latter is computed, so that small masses keep their digits on both sides.
    """
    furthest = -float(ndtri_exp(-beyond - math.log(2)))
    low = math.floor(-largest_loss(sigma, rate, not removed, furthest, sites) / cell)
    high = math.ceil(largest_loss(sigma, rate, removed, furthest, sites) / cell)
    if high - low > _MOST_CELLS_OF_A_STEP:
        raise _TooManyCells(high - low, _MOST_CELLS_OF_A_STEP)
    above, above_errors = _divergences(0, high + 1, cell, sigma, rate, removed, sites)
    below, below_errors = _divergences(1, 1 - low, cell, sigma, rate, not removed, sites)
    mirrored = np.exp(np.arange(low, 0) * cell)
    curve = np.concatenate([mirrored * below[::-1], above])
    errors = np.concatenate([mirrored * below_errors[::-1], above_errors])

    width, ratio = math.expm1(cell), math.exp(cell)
    probs = np.empty_like(curve)
    probs[1:-1] = (np.diff(curve[1:]) - np.diff(curve[:-1]) * ratio) / width
    probs[0] = (curve[1] - ratio * curve[0]) / width
    probs[-1] = (curve[-2] - curve[-1]) * ratio / width
    probs[-low] += 1.0
    around = np.convolve(errors, [1.0, 1.0 + ratio, ratio])[1:-1] / width
    return StepLoss(cell, low, np.maximum(probs, 0.0), around + _UNIT * probs, float(curve[-1] + errors[-1]))


def _divergences(
    first: int, end: int, cell: float, sigma: float, rate: float, removed: bool, sites: int
) -> tuple[Array, Array]:
    """Return `step_divergence` at `first` to `end` - 1 cells, block by block: at once it takes twenty times what it returns."""
    deltas, errors = np.empty(max(end - first, 0)), np.empty(max(end - first, 0))
    for begin in range(first, end, _BLOCK):
        until = min(begin + _BLOCK, end)
        epsilons = np.arange(begin, until, dtype=np.float64) * cell
        place = slice(begin - first, until - first)
        deltas[place], errors[place] = step_divergence(epsilons, sigma, rate, removed, sites)
    return deltas, errors


def largest_loss(sigma: float, rate: float, removed: bool, furthest: float, sites: int = 1) -> float:
    """Return the loss of one step at `furthest` standard deviations of the noise, on the side where it is largest."""
    if sites > 1:
        return shared_largest_loss(sigma, rate, sites, removed, furthest)
    if removed:
        exponent = furthest / sigma + 0.5 / sigma**2
        # log(1 - q + q e^x) without overflow.
        return float(np.logaddexp(math.log1p(-rate), math.log(rate) + exponent)) if rate < 1 else exponent
    exponent = -furthest / sigma - 0.5 / sigma**2
    return -math.log1p(rate * math.expm1(exponent)) if rate < 1 else -exponent


def step_divergence(epsilons: Array, sigma: float, rate: float, removed: bool, sites: int = 1) -> tuple[Array, Array]:
    """Return the hockey-stick divergence of one step at each of `epsilons` >= 0, and a bound on its rounding.

    P - e^epsilon Q is for a removed record q (N1 - e^e' N0), e' = log(1 + (e^epsilon - 1) / q), and for an added one
    (1 - (1 - q) e^epsilon) (N0 - e^e' N1), e' = -log(1 + (e^-epsilon - 1) / q): so written nothing cancels at small rates.
    With more sites than one, see `shared.privacy.accountant.several_sites`.
    """
    if sites > 1:
        return shared_divergence(epsilons, sigma, rate, sites, removed)
    sign = 1.0 if removed else -1.0
    change = np.expm1(sign * epsilons) / rate
    ratio, rounded = 1 + change, np.abs(change)  # and what of it was rounded
    if not removed:
        # At large rates it is the other form that loses nothing.
        share = np.exp(-epsilons)
        ratio = np.where(share < 0.5, (share - (1 - rate)) / rate, ratio)
        rounded = np.where(share < 0.5, share / rate, rounded)
    possible = ratio > 0  # elsewhere no loss is above epsilon
    deltas, errors = np.zeros_like(epsilons), np.zeros_like(epsilons)
    epsilons, change, ratio, rounded = epsilons[possible], change[possible], ratio[possible], rounded[possible]
    unsampled = sign * np.where(ratio > 0.5, np.log1p(np.maximum(change, -0.5)), np.log(ratio))
    weight = rate if removed else rate * np.exp(epsilons) * ratio
    near, far = unsampled * sigma - 0.5 / sigma, unsampled * sigma + 0.5 / sigma
    density, upper = np.exp(-0.5 * near**2) / math.sqrt(2 * math.pi), ndtr(-near)
    with np.errstate(invalid="ignore"):  # little noise: 0 times infinity, in the form that is not taken there
        tail = np.exp(-0.5 * near**2) * 0.5 * (erfcx(near / math.sqrt(2)) - erfcx(far / math.sqrt(2)))
        bulk = upper - np.exp(unsampled + log_ndtr(-far))
    deltas[possible] = weight * np.where(near > 0, tail, bulk)
    # An argument x that is rounded moves a normal probability by about x^2 units; then the rounding of `ratio`.
    arguments = upper * (16 + 4 * near**2 + 4 * epsilons + 2 / sigma)
    errors[possible] = 2 * _UNIT * weight * (arguments + 4 * rounded / ratio * (sigma * density + upper))
    return np.maximum(deltas, 0.0), errors


def _epsilon(parts: Sequence[tuple[StepLoss, int]], delta: float) -> float:
    """Return epsilon in one direction; see the module's text for what is added to delta."""

    def log_moment(tilt: float) -> float:
        return sum(count * part.log_moment(tilt) for part, count in parts)

    def exponent_at(epsilon: float) -> Callable[[float], float]:
        return lambda tilt: log_moment(tilt) - tilt * epsilon

    cell, best = parts[0][0].cell, math.inf
    tilt = _least(lambda tilt: (log_moment(tilt) - math.log(delta)) / tilt, cell)  # Chernoff's bound
    for attempt in range(_MOST_TILTS):
        try:
            divergence = TiltedDivergence(parts, tilt, log_moment)
        except _TooManyCells:
            if attempt:
                break
            raise
        best = min(best, _root(divergence, delta))
        if best in (0.0, math.inf) or divergence.lost(best) <= _SHARE_LOST * delta:
            break
        before, tilt = tilt, _least(exponent_at(best), cell)
        if abs(math.log(tilt / before)) < _TILT_TOLERANCE:
            break
    return best


def _least(value: Callable[[float], float], cell: float) -> float:
    """Return about where `value` of a tilt is least. Every tilt gives a valid bound; this one loses little."""
    bounds = (math.log(_LEAST_TILT), math.log(_MOST_TILT / cell))
    found = minimize_scalar(
        lambda log_tilt: value(math.exp(log_tilt)), bounds=bounds, options={"xatol": _TILT_TOLERANCE}
    )
    return math.exp(float(found.x))


def _root(divergence: TiltedDivergence, delta: float) -> float:
    """Return an epsilon, as small as can be found, where `divergence` was evaluated and is at most `delta`."""
    if divergence.infinite >= delta:
        return math.inf
    if divergence(0.0) <= delta:
        return 0.0

    def excess(epsilon: float) -> float:
        found = divergence(epsilon)
        return math.inf if found == math.inf else math.log(max(found, delta * _LEAST_SHARE) / delta)

    low, high = 0.0, 1.0
    while excess(high) > 0:
        low, high = high, high * 2
    while excess(low) == math.inf:  # too far below for the search by secants
        middle = (low + high) / 2
        low, high = (low, middle) if excess(middle) <= 0 else (middle, high)
    found = _between(excess, low, high)
    step = _ROOT_TOLERANCE * max(found, 1.0)
    while excess(found) > 0:
        found, step = found + step, step * 2
    return found


def _between(excess: Callable[[float], float], low: float, high: float) -> float:
    """Return about where `excess` is 0, by Brent's method."""
    held = [excess]  # SciPy keeps what it calls in a cycle, and a composition with it until Python looks for cycles
    try:
        return float(
            brentq(lambda epsilon: held[0](epsilon), low, high, xtol=_ROOT_TOLERANCE / 4, rtol=_ROOT_TOLERANCE / 4)
        )
    finally:
        held.clear()


class TiltedDivergence:
    """Upper bound on delta as a function of epsilon >= 0: of steps composed under one tilt.

    Attributes:
        infinite: what it comes down to for large epsilons.
    """

    def __init__(
        self, parts: Sequence[tuple[StepLoss, int]], tilt: float, log_moment: Callable[[float], float]
    ) -> None:
        """Compose.

        Args:
            parts: one step and how many of it, all on one grid, in one direction.
            tilt: lambda, > 0.
            log_moment: log E[exp(tilt loss)] of the composition.
        """
        self._tilt, self._log_taken, self._cell = tilt, log_moment(tilt), parts[0][0].cell
        self._low, high, whole = self._window(log_moment, parts)
        num_cells = high - self._low + 1
        if num_cells > _MOST_CELLS:
            raise _TooManyCells(num_cells, _MOST_CELLS)
        size = fft.next_fast_len(max(num_cells, *(len(part.probs) for part, _ in parts)), real=True)
        spectrum, rounding, in_steps = np.ones(size // 2 + 1, dtype=np.complex128), 1.0, 0.0
        for part, count in parts:
            probs, lost = part.tilted(tilt)
            in_steps += count * lost
            rounding += count * (1 + math.sqrt(_dot(probs, probs)))
            spectrum *= fft.rfft(probs, size) ** count
        composed = fft.irfft(spectrum, size)
        if size >= _LONG_TRANSFORM:
            _forget_transforms()
        first = sum(part.lower * count for part, count in parts)
        self._cells = np.maximum(np.roll(composed, first - self._low)[:num_cells], 0.0)

        in_transforms = 8 * _UNIT * (math.log2(size) + 1) * rounding * _norm_of_weights(tilt, self._cell)
        self._lost = in_transforms + (math.expm1(in_steps) + math.exp(_LOG_OUTSIDE)) / (1 + tilt)
        above = 0.0 if whole else math.exp(_LOG_OUTSIDE + self._log_taken - tilt * high * self._cell)
        # Of the sums here, and of the logarithms in `log_taken`.
        self._slack = 1 + 1e-10 + 128 * _UNIT * sum(count for _, count in parts)
        beyond = -math.expm1(sum(count * math.log1p(-part.infinite) for part, count in parts))
        self.infinite = (above + beyond) * self._slack

    def __call__(self, epsilon: float) -> float:
        """Return the bound; `inf` far below the epsilons that the tilt was made for."""
        lost = self.lost(epsilon)
        if lost == math.inf:
            return math.inf
        first = max(0, math.floor(epsilon / self._cell) + 1 - self._low)
        losses = self._losses_from(first)
        weights = np.exp(self._log_taken - self._tilt * losses) * np.maximum(-np.expm1(epsilon - losses), 0.0)
        return _dot(self._cells[first:], weights) * self._slack + lost + self.infinite

    def _losses_from(self, first: int) -> Array:
        """Return the losses of the cells from `first` on."""
        numbers = np.arange(first, max(first, len(self._cells)), dtype=np.float64)
        found: Array = (self._low + numbers) * self._cell
        return found

    def lost(self, epsilon: float) -> float:
        """Return the part of the bound that stands for rounding."""
        exponent = self._log_taken - self._tilt * epsilon
        return self._lost * math.exp(exponent) * self._slack if exponent < _MOST_LOG else math.inf

    def _window(
        self, log_moment: Callable[[float], float], parts: Sequence[tuple[StepLoss, int]]
    ) -> tuple[int, int, bool]:
        """Return first and last cell of the composition, and whether none lies above: Chernoff bounds on tilted mass."""
        variance, least, most = 0.0, 0, 0
        for part, count in parts:
            (probs, _), losses = part.tilted(self._tilt), part.losses
            mean = _dot(probs, losses)
            variance += count * _dot(probs, (losses - mean) ** 2)
            least, most = least + part.lower * count, most + (part.lower + len(part.probs) - 1) * count
        stride = math.sqrt(-2 * _LOG_OUTSIDE / max(variance, self._cell**2))  # best for a normal distribution
        low, high = -math.inf, math.inf
        for theta in (stride / 4, stride / 2, stride, stride * 2):
            low = max(low, (self._log_taken - log_moment(self._tilt - theta) + _LOG_OUTSIDE) / theta)
            high = min(high, (log_moment(self._tilt + theta) - self._log_taken - _LOG_OUTSIDE) / theta)
        lowest = max(least, math.floor(low / self._cell))
        highest = max(lowest + 1, min(most, math.ceil(high / self._cell)))
        return lowest, highest, highest >= most


def _dot(first: Array, second: Array) -> float:
    """Return the sum of products, to the last bit the same however many threads a process has; BLAS cuts its sums by them."""
    return float((first * second).sum())


def _forget_transforms() -> None:
    """Have SciPy give back the tables of long transforms: it keeps those of the last lengths, some eight bytes a cell each."""
    for length in range(2, 2 + _LENGTHS_KEPT):
        fft.rfft(np.zeros(length))


def _norm_of_weights(tilt: float, cell: float) -> float:
    """Return a bound on the L2 norm of exp(-tilt y) (1 - exp(-y)) over the cells y > 0: integral and largest value."""
    integral = 2 / (2 * tilt * (2 * tilt + 1) * (2 * tilt + 2))
    return math.sqrt(integral / cell + 1 / (1 + tilt) ** 2)
