"""Central DP over sites: a trusted coordinator clips each site's update, adds up, adds noise, and adapts the bound.

The unit is one site with everything that it holds. Sites send unprotected updates, so all of this protects against whoever
sees what the coordinator publishes (global adapters, clipping bounds), and not against the coordinator.

Formal guarantees (relation: add or remove one site; tests: tests/shared/privacy/test_central.py, planted faults:
tests/server/rounds/test_central_faults.py)
    * One round's release depends on the updates only through the pair (sum of clipped updates, count of unclipped ones).
      Adding or removing one site moves the pair, each part in units of its noise, by at most 1 / noise_multiplier, whatever
      the site sent (test_one_site_moves_the_pair_by_at_most_the_bound). So a round is one Gaussian step of the plan's noise
      multiplier, and with the coordinator's coins one Poisson-subsampled step.
    * Updates are added as they come and forgotten, in whatever order, without a difference in any bit
      (test_the_order_of_sites_changes_nothing). Each clipped update is cut to a grid *towards zero*: no coordinate grows,
      so neither does the norm, and no margin is needed for it. On the grid sums are exact, so the sums with and without a
      site differ by exactly its clipped and cut update.
    * The divisor q N is a constant of the job. How many sites were drawn, or answered, scales nothing
      (test_the_divisor_does_not_depend_on_who_answered). A site that does not answer adds zero.
    * Everything else in a release, the next clipping bound included, is computed from the noisy pair and public numbers.

Sources: DP-FedAvg, McMahan et al. 2018 (arXiv:1710.06963); adaptive clipping, Andrew, Thakkar, McMahan and Ramaswamy 2021
(arXiv:1905.03871), algorithm 1 and theorem 1. Unlike there, clipped updates are summed over a Poisson sample and missing
sites count as neither clipped nor unclipped, because the number of sites in a round is private too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shared.epsilons import as_set, rounded_up
from shared.errors import PrivacyError
from shared.job.job import Job
from shared.privacy.mechanism import ClippedSum, add_gaussian_noise
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import SiteRandomness
from shared.tensors.adapters import Shapes
from shared.tensors.grid_sum import GridSum

_UPDATES, _COUNT = 0, 1  # streams of noise within one round
_FURTHEST = 1e6  # factor by which the bound may leave its first value: a bound of zero would clip nothing to nothing


@dataclass(frozen=True, kw_only=True)
class SitesSum:
    """What one round knows of its sites before the noise: private, stays with the coordinator.

    Attributes:
        updates: sum of the clipped updates, float64, one tensor per parameter in the order of the shapes.
        count: (number of unclipped - number of clipped) / 2. Each site adds 1/2 or -1/2: half the reach of a bit.
    """

    updates: list[Tensor]
    count: float


class ClippedSites:
    """The pair of one round while updates come: each is clipped over all parameters as one vector, added, and forgotten."""

    def __init__(self, shapes: Shapes, clip_norm: float, num_sites: int) -> None:
        """Begin with nobody.

        Args:
            shapes: names and shapes of every update.
            clip_norm: S.
            num_sites: N, at most as many updates come; each coordinate is at most S, so N S is the reach of the grid.
        """
        self._shapes = {name: torch.Size(shape) for name, shape in shapes.items()}
        self._clip_norm, self._num_sites = clip_norm, num_sites
        self._sum = GridSum(self._shapes, reach=num_sites * clip_norm, towards_zero=True, dtype=np.float64)
        self._num_updates = self._num_unclipped = self._num_clipped = 0

    def add(self, update: Mapping[str, Tensor]) -> None:
        """Add the delta of one site that answered; one with NaN or infinity adds zero, neither clipped nor unclipped."""
        if self._num_updates == self._num_sites:
            raise ValueError(f"an update after those of all {self._num_sites} sites")
        one = ClippedSum(list(self._shapes.values()), self._clip_norm)
        one.add([update[name].reshape(1, *shape) for name, shape in self._shapes.items()])
        self._sum.stage(dict(zip(self._shapes, one.sums, strict=True)))
        self._sum.add()
        self._num_updates += 1
        self._num_clipped += one.num_clipped
        self._num_unclipped += one.num_examples - one.num_clipped - one.num_non_finite

    def total(self) -> SitesSum:
        """Return the pair of all updates so far."""
        return SitesSum(updates=list(self._sum.total().values()), count=(self._num_unclipped - self._num_clipped) / 2)


@dataclass(frozen=True, kw_only=True)
class CentralRound:
    """What one round releases.

    Attributes:
        mean: noisy sum of the clipped updates divided by q N, float32, by name.
        clip_norm: the next round's clipping bound.
    """

    mean: dict[str, Tensor]
    clip_norm: float


@dataclass(frozen=True, kw_only=True)
class CentralPlan:
    """What a trusted coordinator executes in every round.

    Attributes:
        plan: rate of the coins q, noise multiplier z of the pair, first clipping bound, delta, planned rounds.
        num_sites: N, declared and public.
        target_quantile: share of updates that the bound is moved to leave unclipped; None keeps the bound.
        clip_learning_rate: of the geometric steps of the bound.
        count_noise: sigma_b, standard deviation of the noise on the count; not used if the bound stays.
    """

    plan: PrivacyPlan
    num_sites: int
    target_quantile: float | None
    clip_learning_rate: float
    count_noise: float

    @classmethod
    def from_job(cls, job: Job) -> CentralPlan:
        """Build the plan of `job`, calibrating the noise multiplier where the job gives only a target epsilon.

        Raises:
            PrivacyError: if the job's mechanism is another, or its noise cannot be had.
        """
        plan = PrivacyPlan.of_coordinator(job)
        central = job.privacy.central
        assert central is not None  # noqa: S101 (of_coordinator refused otherwise)
        expected = central.site_sample_rate * central.num_sites
        return cls(
            plan=plan,
            num_sites=central.num_sites,
            target_quantile=central.target_quantile,
            clip_learning_rate=central.clip_learning_rate,
            # A twentieth is what Andrew et al. recommend; as much as on the updates is always enough.
            count_noise=central.count_noise or max(expected / 20, plan.noise_multiplier),
        )

    def __post_init__(self) -> None:
        if self.adaptive and self.count_noise <= self.plan.noise_multiplier / 2:
            raise PrivacyError(
                f"privacy.central.count_noise is {as_set(self.count_noise)}, but the count alone needs more than half the noise "
                f"multiplier, {rounded_up(self.plan.noise_multiplier / 2, 4)}. Raise it, leave it out, or remove "
                "privacy.central.target_quantile to keep the clipping bound fixed."
            )

    @property
    def adaptive(self) -> bool:
        """Whether the clipping bound follows the updates."""
        return self.target_quantile is not None

    @property
    def expected_sites(self) -> float:
        """q N, the only divisor of a noisy sum."""
        return self.plan.expected_batch_size(self.num_sites)

    @property
    def update_noise_multiplier(self) -> float:
        """z_delta: noise on the sum in units of the bound, such that sum and count together have the plan's multiplier.

        Andrew et al. 2021, theorem 1: one site moves the sum by S and the count by 1/2, so in units of the noise the pair by
        sqrt(z_delta^-2 + (2 sigma_b)^-2), which has to be 1/z.
        """
        z = self.plan.noise_multiplier
        return (z**-2 - (2 * self.count_noise) ** -2) ** -0.5 if self.adaptive else z

    def new_sum(self, shapes: Shapes, clip_norm: float) -> ClippedSites:
        """Return the empty pair of one round, to which each update is added, clipped to `clip_norm` as one vector."""
        return ClippedSites(shapes, clip_norm, self.num_sites)

    def add_noise(self, total: SitesSum, clip_norm: float, randomness: SiteRandomness, round_number: int) -> SitesSum:
        """Return the pair with the noise of one round: drawn once, float64, on the CPU."""
        noise = randomness.stream("noise", round_number=round_number, step=_UPDATES)
        updates = add_gaussian_noise(total.updates, self.update_noise_multiplier * clip_norm, noise)
        if not self.adaptive:
            return SitesSum(updates=updates, count=0.0)
        noise = randomness.stream("noise", round_number=round_number, step=_COUNT)
        (count,) = add_gaussian_noise([torch.tensor([total.count], dtype=torch.float64)], self.count_noise, noise)
        return SitesSum(updates=updates, count=float(count))

    def finish(self, noisy: SitesSum, shapes: Shapes, clip_norm: float) -> CentralRound:
        """Return the release of a noisy pair: post-processing, which reads nothing else but public numbers."""
        mean = {name: (value / self.expected_sites).float() for name, value in zip(shapes, noisy.updates, strict=True)}
        return CentralRound(mean=mean, clip_norm=self._next_clip_norm(noisy.count, clip_norm))

    def _next_clip_norm(self, noisy_count: float, clip_norm: float) -> float:
        """Return S * exp(-rate * (share of unclipped - target)), Andrew et al. 2021, algorithm 1.

        The share is 1/2 + count / (q N), cut to a share: unbiased over the coins. Sites that did not answer pull it towards 1/2.
        """
        if self.target_quantile is None:
            return clip_norm
        share = min(max(0.5 + noisy_count / self.expected_sites, 0.0), 1.0)
        moved = clip_norm * math.exp(-self.clip_learning_rate * (share - self.target_quantile))
        first = self.plan.max_grad_norm
        return min(max(moved, first / _FURTHEST), first * _FURTHEST)
