"""One noisy gradient sum a round, where sites add shares of the noise (`privacy.mechanism` "distributed").

The same sample, per-example gradients and clipping as in `client.training.trainer`, once, at the round's own adapter; no step is
taken here. What leaves is the sum in whole steps of a grid with this site's share of the noise, under masks that
`shared.secure_sum` adds.

Formal guarantees (unit and relation as in the plan; tests: tests/client/training/test_gradient.py)
    * A site's words depend on its records through one Poisson-subsampled sum of vectors that have an L2 norm of at most C each,
      and one share of discrete Gaussian noise, drawn once; also where the sample is empty.
    * Coins and share come from the site's own `SiteRandomness` alone, and of each attempt from streams of their own.
    * What a site gets beside others it gets alone: all gradients are taken at one adapter, and passes are all that is shared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from client.training.trainer import (
    LocalWork,
    Observations,
    Sums,
    clipped_sums,
    draw,
    per_example_hooks,
    pool_of,
)
from shared.errors import PrivacyError
from shared.privacy.plan import PrivacyPlan
from shared.privacy.shares import IntegerSum, with_share
from shared.runtime.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class NoisySum:
    """What one site adds to the sum of a round, not masked yet: it is private, and in memory only.

    Attributes:
        words: [d] uint64, sum of the clipped gradients and of the share, in steps of the grid modulo 2^64.
        observations: private; stay at the site.
    """

    words: NDArray[np.uint64]
    observations: Observations


def noisy_sums(
    runtime: Runtime,
    works: Sequence[LocalWork],
    start: Mapping[str, Tensor],
    *,
    plan: PrivacyPlan,
    round_number: int,
    attempt: int,
    sums: Sums | None = None,
) -> list[NoisySum]:
    """Return the sums of one site, or of several simulated ones side by side.

    Args:
        runtime: loaded backbone, adapters, head and task.
        works: what each site brings, at least one; moments are not used.
        start: the global adapter, at which all gradients are taken.
        plan: what will be executed and accounted at every site.
        round_number, attempt: 1-based.
        sums: computes step 2; None is `clipped_sums`, in this process alone.

    Raises:
        PrivacyError: if the plan has no shares, plan and persons do not belong together, or the model's gradients cannot be
            clipped.
    """
    if plan.honest is None:
        raise PrivacyError("the plan has the whole noise at every site, and not a share of it; nothing was computed.")
    for work in works:
        plan.check_persons(work.persons)
    runtime.load(start)
    with per_example_hooks(runtime.model) as hooks:
        # 1. Every unit of privacy enters by its own coin.
        drawn = [draw(plan, work, round_number, attempt) for work in works]
        # 2. Each unit's gradient is clipped, cut to the grid and added to its site's sum.
        totals, losses = (sums or clipped_sums)(runtime, pool_of(works), works, drawn, plan, hooks)
    return [
        _with_share(total, work, plan, loss, drawn_here, round_number, attempt)
        for total, work, loss, drawn_here in zip(totals, works, losses, drawn, strict=True)
    ]


def _with_share(
    total: object,
    work: LocalWork,
    plan: PrivacyPlan,
    loss_sum: float,
    drawn: Sequence[Sequence[int]],
    round_number: int,
    attempt: int,
) -> NoisySum:
    if not isinstance(total, IntegerSum):
        raise PrivacyError(
            "the sum is not one of whole steps of the grid, so its share of the noise would not be exact."
        )
    # 3. One share, also when the sample is empty.
    noise = work.randomness.stream("noise", round_number=round_number, step=attempt)
    seen = Observations()
    seen.add(total, loss_sum, num_records=sum(map(len, drawn)))
    return NoisySum(
        words=with_share(total.total, noise_multiplier=plan.noise_multiplier, stream=noise), observations=seen
    )
