"""The loss of one noisy sum for a person with data at several sites of it: at each, a coin of its own.

Without the person the sum is noise around what the others add; with them there is one vector more from every site whose coin
fell, together K C long at most, K binomial. In units of C, P is the mixture of N(k, sigma^2) with the weights w_k of
Bin(sites, rate), Q is N(0, sigma^2), and no other vectors lose more.

Formal guarantee
    * `shared_divergence` is the hockey-stick divergence of that pair up to a bound that it returns
      (tests/shared/privacy/test_several_sites.py, against the definition in 60 digits; whole epsilons against dp-accounting).

Why no other vectors lose more. Let A be the sites whose coins fell, c_A the sum of their vectors, so that |c_A| <= |A| C. Under Q
the density ratio of P is a sum over A of variables X_A: exp(<c_A, x> / sigma^2 - |c_A|^2 / (2 sigma^2)) times the probability of
A. The divergence is the mean of (ratio - e^epsilon)+ for a removed person, for an added one e^epsilon times that of
(e^-epsilon - ratio)+, which is the mean of (ratio - e^-epsilon)+ and a constant. For whatever d_A that add up to d,
    E(sum of X_A - d)+  <=  sum of E(X_A - d_A)+  <=  sum of E(X'_A - d_A)+,
where X'_A has the shift |A| C in one direction common to all: a lognormal variable of mean 1 varies the more the longer its
shift. All X'_A grow together, and with d_A the value of X'_A at the edge where they add up to d the right side is
E(sum of X'_A - d)+. dp-accounting's `MixtureGaussianPrivacyLoss` is the same pair (Choquette-Choo, Ganesh, Steinke, Thakurta
2024, arXiv:2310.15526).

How it is computed. Let T(x) be the sum over k >= 1 of w_k L_k(x), L_k the density ratio of N(k, sigma^2). That of P is
w_0 + T(x) and grows with x, so losses above epsilon lie beyond an edge: T(x) = e^epsilon - w_0 for a removed person,
T(x) = e^-epsilon - w_0 for an added one. With e_k = log L_k(x) and G the divergence of N(k, sigma^2) and N(0, sigma^2) at e_k,
the divergence is the sum over k >= 1 of
    w_k G(e_k) (removed),   e^epsilon w_k e^e_k G(-e_k) (added),
terms of one sign. At an edge that is found only nearly, they are the divergence at another epsilon, which bounds the error.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import erfcx, log_ndtr, logsumexp, ndtr

Array = NDArray[np.float64]

MOST_SITES = 32
"""Sites at which one person is accounted for. The least weight, 1e-9 to this power, is a number of double precision."""

_UNIT = 2.0**-53  # rounding of one operation, relative
_ROUNDS = 64  # at most, of the search for an edge, which ends after about ten
_BLOCK = 1 << 14  # epsilons at once


@lru_cache(maxsize=64)
def weights(rate: float, sites: int) -> Array:
    """Return the probabilities of 0 to `sites` coins that fall with probability `rate`, each rounded once; [sites + 1]."""
    one, chance = Fraction(1), Fraction(rate)
    return np.array([float(math.comb(sites, k) * chance**k * (one - chance) ** (sites - k)) for k in range(sites + 1)])


def shared_largest_loss(sigma: float, rate: float, sites: int, removed: bool, furthest: float) -> float:
    """Return the loss at `furthest` standard deviations of the noise, on the side where it is largest."""
    edge = (sites + furthest * sigma) / sigma**2 if removed else -furthest / sigma
    numbers = np.arange(sites + 1)
    with np.errstate(divide="ignore"):
        log_ratio = float(logsumexp(np.log(weights(rate, sites)) + numbers * edge - numbers**2 / (2 * sigma**2)))
    return log_ratio if removed else -log_ratio


def shared_divergence(epsilons: Array, sigma: float, rate: float, sites: int, removed: bool) -> tuple[Array, Array]:
    """Return the hockey-stick divergence of one step at each of `epsilons` >= 0, and a bound on its rounding.

    Args:
        epsilons: shape [n].
        sigma: standard deviation of the noise on the sum, in units of the clipping bound.
        rate: probability of each site's coin.
        sites: sites with data of the person, 1 to `MOST_SITES`.
        removed: whether the person is removed or added.
    """
    parts = [
        _divergence(epsilons[begin : begin + _BLOCK], sigma, rate, sites, removed)
        for begin in range(0, len(epsilons), _BLOCK)
    ]
    deltas, errors = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return deltas, errors


def _divergence(epsilons: Array, sigma: float, rate: float, sites: int, removed: bool) -> tuple[Array, Array]:
    ratio, rounded = _ratios(epsilons, rate, sites, removed)
    possible = ratio + rounded > 0  # elsewhere no loss is above epsilon
    deltas, errors = np.zeros_like(epsilons), np.zeros_like(epsilons)
    epsilons, rounded = epsilons[possible], rounded[possible]
    ratio, rounded = np.maximum(ratio[possible], rounded), 2 * rounded

    chances = weights(rate, sites)
    numbers = np.flatnonzero(chances)
    numbers = numbers[numbers > 0]
    chances, shift = chances[numbers, None], numbers[:, None] / sigma
    logs: Array = np.log(chances)
    edge, missed = _edge(np.log(ratio), logs, shift)
    unsampled = shift * edge - shift**2 / 2  # log L_k at the edge, [k, epsilon]
    if removed:
        near, far, weight, factor = edge - shift, edge, chances, np.ones_like(epsilons)
    else:
        near, far, weight, factor = -edge, shift - edge, np.exp(epsilons + logs + unsampled), np.exp(epsilons)
        unsampled = -unsampled
    upper = ndtr(-near)
    with np.errstate(invalid="ignore"):  # little noise: 0 times infinity, in the form that is not taken there
        tail = np.exp(-0.5 * near**2) * 0.5 * (erfcx(near / math.sqrt(2)) - erfcx(far / math.sqrt(2)))
        bulk = upper - np.exp(unsampled + log_ndtr(-far))
    deltas[possible] = (weight * np.where(near > 0, tail, bulk)).sum(axis=0)

    # Of the terms at this edge: an argument x that is rounded moves a normal probability by about x^2 units.
    arguments = 8 * near**2 + 8 * (np.abs(near) + 1) * shift + 8 * (shift * np.abs(edge) + shift**2 + epsilons - logs)
    errors[possible] = _UNIT * (weight * upper * (32 + arguments)).sum(axis=0)
    # Of the edge: the divergence changes with T as the mass of Q does beyond it, on whichever side of this one it lies.
    widest = (missed + np.log1p(rounded / ratio)) / shift[0]
    beyond = ndtr((-edge if removed else edge) + widest)
    errors[possible] += factor * beyond * (rounded + ratio * np.expm1(missed))
    return np.maximum(deltas, 0.0), errors


def _ratios(epsilons: Array, rate: float, sites: int, removed: bool) -> tuple[Array, Array]:
    """Return T at the edges, e^epsilon - w_0 or e^-epsilon - w_0, and how far rounding may have moved it."""
    none = (1 - Fraction(rate)) ** sites
    change = np.expm1(epsilons if removed else -epsilons)
    ratio, rounded = change + float(1 - none), np.abs(change) + float(1 - none)
    if not removed:
        # Far from 1 it is the other form that loses nothing.
        share = np.exp(-epsilons)
        ratio = np.where(share < 0.5, share - float(none), ratio)
        rounded = np.where(share < 0.5, share, rounded)
    return ratio, 4 * _UNIT * rounded


def _edge(log_ratio: Array, logs: Array, shift: Array) -> tuple[Array, Array]:
    """Return the edge x / sigma at which log T = `log_ratio`, about, and by how much log T differs there at most.

    log T is convex and grows, so Newton's steps from the right of the edge stay there and end at it.

    Args:
        log_ratio: shape [epsilons].
        logs, shift: log w_k and k / sigma, shape [k, 1].
    """
    starts = logs - shift**2 / 2
    edge: Array = ((log_ratio - starts) / shift).min(axis=0)  # no term is above the sum
    for _ in range(_ROUNDS):
        exponents = starts + shift * edge
        top = exponents.max(axis=0)
        powers = np.exp(exponents - top)
        total = powers.sum(axis=0)
        missed = top + np.log(total) - log_ratio
        rounded = _UNIT * (16 + 4 * (np.abs(starts) + shift * np.abs(edge)).max(axis=0) + 2 * np.abs(log_ratio))
        if np.all(np.abs(missed) <= rounded):
            break
        edge = edge - missed * total / (shift * powers).sum(axis=0)
    return edge, np.abs(missed) + rounded
