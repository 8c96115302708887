"""The coordinator's production round on canary sites, in the form that the mechanism audit of `shared.privacy.audit` reads.

One record of the audit is one site whose update is known; one step is one round.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.central import CentralLedger, SitesRound
from shared.config import AggregationConfig
from shared.messages import SiteDescription
from shared.privacy.central import CentralPlan
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import Origin, SiteRandomness

DECLARED_SITES = 128


class _Uncharged:
    """Stands for the account: an audit publishes nothing about a site."""

    def charge(self, round_number: int, origin: Origin) -> None:
        """Charge nothing."""


class SitesRelease:
    """A `shared.privacy.audit.mechanism.Release` through `SitesRound.draw` and `SitesAggregation`.

    The clipping bound is fixed and the server optimiser is plain averaging, whatever the job's: both come after the noise, and
    so every round's sum can be read off the adapter.
    """

    def __init__(
        self, new_randomness: Callable[[], SiteRandomness] = SiteRandomness.from_os, *, dimension: int, rounds: int
    ) -> None:
        self.new_randomness, self.rounds = new_randomness, rounds
        # Two tensors, as adapter and head: they are to be clipped as one vector.
        self.shapes = {
            "adapter": torch.Size([dimension // 4, 2]),
            "head": torch.Size([dimension - 2 * (dimension // 4)]),
        }

    def __call__(self, plan: PrivacyPlan, gradients: NDArray[np.float64]) -> NDArray[np.float64]:
        """Run rounds over sites with these updates [sites, dimension]; return the noisy sums [rounds, dimension]."""
        central = CentralPlan(
            plan=plan, num_sites=DECLARED_SITES, target_quantile=None, clip_learning_rate=0.0, count_noise=0.0
        )
        sites = {
            node: SiteDescription(site=f"site-{node}", declared_records=1, version="") for node in range(len(gradients))
        }
        updates = [self._update(row) for row in torch.from_numpy(gradients).float()]
        start = {name: torch.zeros(shape) for name, shape in self.shapes.items()}
        sums = []
        for number in range(1, self.rounds + 1):
            attempt = SitesRound(
                central, cast(CentralLedger, _Uncharged()), AggregationConfig(), self.new_randomness(), number
            )
            drawn = attempt.draw(sites)
            aggregation = attempt.aggregation(start, {}, self.shapes)
            for node in drawn:
                aggregation.add(updates[node], 1)
            following, _ = aggregation.result()
            moved = torch.cat([following[name].double().flatten() for name in self.shapes])
            sums.append((moved * plan.sample_rate * DECLARED_SITES).numpy())
        return np.stack(sums)

    def _update(self, row: Tensor) -> dict[str, Tensor]:
        sizes = [shape.numel() for shape in self.shapes.values()]
        parts = torch.split(row, sizes)
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}
