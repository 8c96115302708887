"""Central DP over sites: a trusted coordinator clips each site's update, adds up, adds noise, and adapts the bound.

The unit is one site with everything that it holds. Sites send unprotected updates, so all of this protects against whoever
sees what the coordinator publishes (global adapters, clipping bounds), and not against the coordinator.

Formal guarantees (relation: add or remove one site; tests: tests/shared/test_central.py, planted faults:
tests/server/test_central_faults.py)
    * One round's release depends on the updates only through the pair (sum of clipped updates, count of unclipped ones).
      Adding or removing one site moves the pair, each part in units of its noise, by at most 1 / noise_multiplier, whatever
      the site sent (test_one_site_moves_the_pair_by_at_most_the_bound). So a round is one Gaussian step of the plan's noise
      multiplier, and with the coordinator's coins one Poisson-subsampled step.
    * The divisor q N is a constant of the job. How many sites were drawn, or answered, scales nothing
      (test_the_divisor_does_not_depend_on_who_answered). A site that does not answer adds zero.
    * Everything else in a release, the next clipping bound included, is computed from the noisy pair and public numbers.

Sources: DP-FedAvg, McMahan et al. 2018 (arXiv:1710.06963); adaptive clipping, Andrew, Thakkar, McMahan and Ramaswamy 2021
(arXiv:1905.03871), algorithm 1 and theorem 1. Unlike there, clipped updates are summed over a Poisson sample and missing
sites count as neither clipped nor unclipped, because the number of sites in a round is private too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.adapters import Shapes
from shared.config import Job
from shared.errors import PrivacyError
from shared.privacy.mechanism import ClippedSum, add_gaussian_noise
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import SiteRandomness

_UPDATES, _COUNT = 0, 1  # streams of noise within one round
_MOST_COORDINATES = 1 << 22  # clipped at once, so that many large updates fit into memory
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
                f"privacy.central.count_noise is {self.count_noise:g}, but the count alone needs more than half the noise "
                f"multiplier, {self.plan.noise_multiplier / 2:.4g}. Raise it, leave it out, or remove "
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

    def clipped_sum(self, updates: Sequence[Mapping[str, Tensor]], shapes: Shapes, clip_norm: float) -> SitesSum:
        """Return the pair of one round, each update clipped to `clip_norm` over all parameters as one vector.

        Args:
            updates: one delta per site that answered; NaN and infinity count as zero and as neither clipped nor unclipped.
            shapes: names and shapes of every update.
            clip_norm: S.
        """
        total = ClippedSum([torch.Size(shape) for shape in shapes.values()], clip_norm)
        for some in _chunks(updates, sum(shape.numel() for shape in shapes.values())):
            total.add([torch.stack([update[name].flatten() for update in some]) for name in shapes])
        unclipped = total.num_examples - total.num_clipped - total.num_non_finite
        return SitesSum(updates=total.sums, count=(unclipped - total.num_clipped) / 2)

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


def _chunks(updates: Sequence[Mapping[str, Tensor]], num_coordinates: int) -> Iterator[Sequence[Mapping[str, Tensor]]]:
    size = max(1, _MOST_COORDINATES // max(num_coordinates, 1))
    for begin in range(0, len(updates), size):
        yield updates[begin : begin + size]
