"""Counts in place of seconds, which depend on the machine."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from shared.privacy import accounting
from shared.privacy.accountant import loss_distribution
from tests.shared.privacy.counted_cells import Cells

Array = NDArray[np.float64]


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch) -> Cells:
    """Return what is counted from here on; what was computed before is forgotten."""
    found, transform, divergence = Cells(), loss_distribution.fft.irfft, loss_distribution.step_divergence

    def composed(spectrum: NDArray[np.complex128], size: int) -> Array:
        found.composed.append(size)
        inverse: Array = transform(spectrum, size)
        return inverse

    def of_a_step(epsilons: Array, sigma: float, rate: float, removed: bool, sites: int = 1) -> tuple[Array, Array]:
        found.of_steps.append(len(epsilons) * sites)
        return divergence(epsilons, sigma, rate, removed, sites)

    monkeypatch.setattr(loss_distribution.fft, "irfft", composed)
    monkeypatch.setattr(loss_distribution, "step_divergence", of_a_step)
    for remembered in (accounting.calibrate_noise_multiplier, accounting._compose_epsilon):
        remembered.cache_clear()
    loss_distribution.forget_steps()
    return found
