"""How far honest rounds can have moved an adapter, from the signed job alone; a site trains on nothing beyond.

Guarantees (tests: tests/client/training/test_adapter_bounds.py)
    * Whatever sites' records, coins and noise are, the adapters of a run under privacy stay within the bound (but with
      probability below 1e-20 for each noise value).
    * The bound follows from the job and the number of the round; a refusal says nothing about records.
    * Before the first round it is zero: the adapter is the one that the job's public seed gives. No value is ever accepted
      beyond `MAX_ADAPTER_VALUE`, whatever learning rate the job names.

It is a second line. That one record moves a step by at most C does not rest on it (`client.training.independence`), for a
coordinator chooses the learning rate too, and a bound that no honest run meets leaves a hostile one room. A factor A that the
job fixes (lora.train = "b") is not in an adapter at all, so it is always the public one.

Derivation, for one coordinate and one step, with learning rate l (the schedule only lowers it), C, sigma, q and a site's
declared size n >= 1, of which it has fewer than 2 n records (`shared.privacy.sizes`):
    noisy mean   |g| <= (2 n C + Z sigma C) / (q n) <= C (2 + Z sigma) / q
    SGD          l |g| / (1 - momentum)
    AdamW        l R, with R the largest ratio of its two moments: by Cauchy and Schwarz
                 R^2 <= max over t of ((1 - b1) / (1 - b1^t))^2 * (1 - b2^t) / ((1 - b2) (1 - b1^2 / b2))
    weight decay moves a value towards zero: |value - initial| grows by at most 2 |initial|
A site's update is the sum over its steps, what an encoding lost included (it telescopes to less than one more step); the
mean over sites, by any weights, is no larger; the server's optimiser multiplies by its rate, and by 1 / (1 - momentum) or R of
its own moments. Residuals of an exact mean are covariances of factors: at most 2 r |b| |a| alpha / r a round. Everything
twice, as slack.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import assert_never

import torch
from torch import Tensor

from shared.errors import AdapterError
from shared.job.job import Job
from shared.limits import MAX_ADAPTER_VALUE
from shared.models.tunable import RESIDUAL
from shared.privacy.plan import PrivacyPlan

_Z = 10.0  # standard deviations that no noise value ever exceeds
_SLACK = 2.0
_ROUNDING = 1e-4  # the initial values on two processors, and sums of many rounds
_BETA2_SITE, _BETA2_SERVER = 0.999, 0.99


def check_bounds(
    job: Job, plan: PrivacyPlan, initial: Mapping[str, Tensor], adapter: Mapping[str, Tensor], *, rounds_before: int
) -> None:
    """Refuse an adapter that `rounds_before` rounds of the job cannot have led to.

    Args:
        job, plan: under any mechanism; without noise at the sites nothing is bounded.
        initial: values from the job's public seed, as the site drew them itself.
        adapter: finite values, names and shapes as expected.
        rounds_before: 0 for the request of round 1.

    Raises:
        AdapterError: naming the tensor, its largest value and the bound.
    """
    if not plan.private:
        return
    bounds = AdapterBounds(job, plan)
    for name, value in adapter.items():
        start = initial.get(name, torch.zeros(()))  # residuals start at zero
        largest = float((value - start).abs().max())
        limit = bounds.limit(name, rounds_before, largest_initial=float(start.abs().max()))
        if not largest <= limit or not float(value.abs().max()) <= MAX_ADAPTER_VALUE:
            raise AdapterError(
                f"tensor {name!r} is {largest:.3g} away from where the job's seed puts it; {rounds_before} rounds of this "
                f"job can have moved it by {limit:.3g} at most, and no value may exceed {MAX_ADAPTER_VALUE:g}. It is not from "
                "this run, or the run diverged: lower training.learning_rate."
            )


class AdapterBounds:
    """The bound of a job by tensor and round; see the module."""

    def __init__(self, job: Job, plan: PrivacyPlan) -> None:
        self._job = job
        training = job.training
        if training.optimizer == "adamw":
            step = largest_ratio(training.momentum, _BETA2_SITE)
        elif training.optimizer == "sgd":
            noisy = plan.max_grad_norm * (2 + _Z * plan.noise_multiplier) / plan.sample_rate
            step = noisy / (1 - training.momentum)
        else:
            assert_never(training.optimizer)
        self._round = training.local_steps * training.learning_rate * step

    def limit(self, name: str, rounds_before: int, *, largest_initial: float) -> float:
        """Return the largest distance from the initial value, for any coordinate of a tensor."""
        job = self._job
        head = name.startswith("head.")
        if not rounds_before:  # nothing has moved, also where a round has no bound: zero times infinity is no number
            return _ROUNDING
        if name.endswith(RESIDUAL):
            per_round = 2 * job.lora.alpha * self._round**2
        else:
            per_round = self._of_server(self._round * (job.training.head_learning_rate_factor if head else 1.0))
        shrunk = 2 * largest_initial if job.training.weight_decay else 0.0
        return min(_SLACK * rounds_before * per_round + shrunk + _ROUNDING, MAX_ADAPTER_VALUE)

    def _of_server(self, mean: float) -> float:
        aggregation = self._job.aggregation
        rate, beta = aggregation.server_learning_rate, aggregation.server_momentum
        if aggregation.server_optimizer == "none":
            return rate * mean
        if aggregation.server_optimizer == "momentum":
            return rate * mean / (1 - beta)
        if aggregation.server_optimizer == "adam":
            return rate * largest_ratio(beta, _BETA2_SERVER)
        assert_never(aggregation.server_optimizer)


def largest_ratio(beta1: float, beta2: float) -> float:
    """Return a bound on Adam's |first moment| / sqrt(second moment), both corrected, after any steps of any gradients."""
    if beta1**2 >= beta2:
        return math.inf
    # In t the bound falls and then rises, if at all: it is largest after one step, or after endlessly many.
    return max(math.sqrt(1 - beta2), 1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))
