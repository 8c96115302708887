"""The coordinator's production round on canary sites, in the form that the mechanism audit of `simulations.audit` reads.

One record of the audit is one site whose update is known; one step is one round.

Guarantee (tests: tests/server/rounds/test_central_faults.py): the noisy sums that are returned are those of the rounds'
releases, and nothing else moved the adapter or entered the state of the server optimiser, whichever it is; otherwise
`PrivacyError` is raised. Adapter and state are computed a second time, from the releases and public numbers alone, by the
formulas of `_replay`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.rounds.central import CentralLedger, SitesRound
from shared.errors import PrivacyError
from shared.job.federation import AggregationConfig
from shared.privacy.central import CentralPlan, CentralRound, SitesSum
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import Origin, SiteRandomness
from shared.tensors.adapters import Shapes
from shared.wire.messages import SiteDescription

DECLARED_SITES = 128
_ROUNDING = 1e-5  # of float32, relative to the largest value that the optimiser reached


class _Uncharged:
    """Stands for the account: an audit publishes nothing about a site."""

    def charge(self, round_number: int, origin: Origin) -> None:
        """Charge nothing."""


class SitesRelease:
    """A `simulations.audit.mechanism.Release` through `SitesRound.draw` and `SitesAggregation`.

    The clipping bound is fixed, whatever the job's: it comes after the noise.
    """

    def __init__(
        self,
        new_randomness: Callable[[], SiteRandomness] = SiteRandomness.from_os,
        *,
        dimension: int,
        rounds: int,
        optimizer: AggregationConfig | None = None,
    ) -> None:
        """Prepare a release of `rounds` noisy rounds, by the server optimiser of a job's `[aggregation]`."""
        self.new_randomness, self.rounds = new_randomness, rounds
        self.config = optimizer or AggregationConfig()
        # Two tensors, as adapter and head: they are to be clipped as one vector.
        self.shapes = {
            "adapter": torch.Size([dimension // 4, 2]),
            "head": torch.Size([dimension - 2 * (dimension // 4)]),
        }

    def __call__(self, plan: PrivacyPlan, gradients: NDArray[np.float64]) -> NDArray[np.float64]:
        """Run rounds over sites with these updates [sites, dimension]; return the noisy sums [rounds, dimension].

        Raises:
            PrivacyError: if adapter or state moved by anything else than these sums.
        """
        central = CentralPlan(
            plan=plan, num_sites=DECLARED_SITES, target_quantile=None, clip_learning_rate=0.0, count_noise=0.0
        )
        sites = {
            node: SiteDescription(site=f"site-{node}", declared_records=1, version="") for node in range(len(gradients))
        }
        updates = [self._update(row) for row in torch.from_numpy(gradients).float()]
        current, state = {name: torch.zeros(shape) for name, shape in self.shapes.items()}, dict[str, Tensor]()
        means = []
        for number in range(1, self.rounds + 1):
            attempt = _RememberedRound(
                central, cast(CentralLedger, _Uncharged()), self.config, self.new_randomness(), number
            )
            drawn = attempt.draw(sites)
            aggregation = attempt.aggregation(current, state, self.shapes)
            for node in drawn:
                aggregation.add(updates[node], 1)
            current, state = aggregation.result()
            means.append(_flat(attempt.released.mean, self.shapes))
            self._check_moved_by(np.stack(means), current, state)
        return np.stack(means) * plan.sample_rate * DECLARED_SITES

    def _update(self, row: Tensor) -> dict[str, Tensor]:
        sizes = [shape.numel() for shape in self.shapes.values()]
        parts = torch.split(row, sizes)
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def _check_moved_by(self, means: NDArray[np.float64], current: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        """Raise `PrivacyError` unless adapter and state follow from the released `means` [rounds, dimension]."""
        if not np.isfinite(means).all():
            return  # a faulty mechanism may hand out NaN; judging it is the audit's business
        moved, moments = _replay(means, self.config)
        found = {"": _flat(current, self.shapes)}
        found |= {key: _flat({name: state[f"{name}|{key}"] for name in self.shapes}, self.shapes) for key in moments}
        for key, expected in ({"": moved} | moments).items():
            tolerance = _ROUNDING * np.abs(expected).max() + 1e-12
            if not np.allclose(found[key], expected, rtol=0, atol=tolerance):
                raise PrivacyError(
                    f"{'the server optimiser' if key else 'the global adapter'} moved by something else than the noisy mean "
                    "of the round's release; what leaves is not accounted."
                )


class _RememberedRound(SitesRound):
    """The production round, which also keeps what it released."""

    released: CentralRound

    def release(self, total: SitesSum, clip_norm: float, shapes: Shapes) -> CentralRound:
        """See `SitesRound.release`."""
        self.released = super().release(total, clip_norm, shapes)
        return self.released


def _flat(tensors: Mapping[str, Tensor], shapes: Shapes) -> NDArray[np.float64]:
    return cast(NDArray[np.float64], torch.cat([tensors[name].double().flatten() for name in shapes]).numpy())


def _replay(
    means: NDArray[np.float64], config: AggregationConfig
) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    """Return (adapter, moments by the names of the server state) that the server optimiser reaches from zero, in float64.

    Sources: FedAvgM and FedAdam of Reddi et al. 2021, algorithm 2, with beta2 0.99, epsilon 1e-8 and bias correction.
    """
    value, first, second = (np.zeros(means.shape[1]) for _ in range(3))
    rate, beta = config.server_learning_rate, config.server_momentum
    for step, mean in enumerate(means, start=1):
        if config.server_optimizer == "adam":
            first, second = beta * first + (1 - beta) * mean, 0.99 * second + 0.01 * mean**2
            value = value + rate * first / (1 - beta**step) / (np.sqrt(second / (1 - 0.99**step)) + 1e-8)
        else:
            first = (beta * first if config.server_optimizer == "momentum" else 0.0) + mean
            value = value + rate * first
    return value, {"none": {}, "momentum": {"m": first}, "adam": {"m": first, "v": second}}[config.server_optimizer]
