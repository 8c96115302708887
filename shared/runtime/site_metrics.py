"""Metrics of the sites' own data, released once under differential privacy: every record hands out one vote.

A metric is a set of bins. Each held-out record, or person, splits one vote among them: right or wrong, a cell of the
confusion matrix, a share of the largest loss. A site adds up its votes, adds Gaussian noise to every bin, charges its ledger
and releases the counts; the coordinator adds those of all sites and reads the metric off.

Formal guarantees (relation and unit as in the plan; tests: tests/shared/runtime/test_site_metrics.py)
    * Adding or removing one record, or one person with all records, moves the counts of one metric by at most 1 in L2 norm,
      whatever the model puts out (test_one_unit_moves_the_counts_by_at_most_one_vote).
    * `noisy_counts` is a Gaussian mechanism with this sensitivity and standard deviation `noise_multiplier`
      (test_the_noise_has_the_stated_standard_deviation); rounding to a grid comes after the noise.
    * `estimate` reads noisy counts and public numbers only: post-processing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from shared.errors import ConfigError
from shared.files.json_files import Count, Finite, Positive
from shared.job.job import Job
from shared.models.batches import Example, collate
from shared.privacy.mechanism import ClippedSum, add_gaussian_noise
from shared.privacy.randomness import KeyStream
from shared.runtime.runtime import Runtime

# Noisy counts are rounded to this after the noise, so that their last bits tell nothing of the sum (Mironov 2012).
_GRID = 1.0 / 1024
# Fewer votes than so many standard deviations of their sum's noise are no ground for a ratio.
_LEAST_VOTES = 3.0


def num_bins(metric: str, job: Job) -> int:
    """Return how many counts `metric` has."""
    return len(job.task.labels) ** 2 if metric == "confusion" else 2


def votes(metric: str, job: Job, *, losses: Tensor, classes: tuple[Tensor, Tensor] | None) -> Tensor:
    """Return each record's vote, float [B, bins]: not negative, of sum 1, so of L2 norm at most 1.

    Args:
        losses: per record, [B].
        classes: (predicted, true) per record, [B]; for "accuracy" and "confusion".
    """
    if metric == "loss":
        share = (losses.double() / job.site_metrics.largest_loss).nan_to_num(nan=1.0).clamp(0.0, 1.0)
        return torch.stack([share, 1.0 - share], dim=1)
    if classes is None:
        raise ConfigError(
            f"site_metrics.names: task.kind {job.task.kind!r} has no classes, so it cannot release {metric!r}."
        )
    predicted, true = classes
    cell = true * len(job.task.labels) + predicted if metric == "confusion" else (predicted != true).long()
    return torch.nn.functional.one_hot(cell, num_bins(metric, job)).double()


def cast_votes(runtime: Runtime, examples: Sequence[Example], job: Job) -> dict[str, Tensor]:
    """Return the votes of all `examples` in every metric of the job, [examples, bins] each; not private.

    Each record is evaluated alone: in a batch, the rounding of its neighbours' padding could turn a vote.

    Args:
        runtime: with the adapter loaded that is measured.
    """
    names = job.site_metrics.names
    cast: dict[str, list[Tensor]] = {name: [torch.zeros(0, num_bins(name, job), dtype=torch.float64)] for name in names}
    for example in examples:
        batch = collate([example]).to(runtime.model.device)
        with torch.no_grad(), runtime.autocast():
            outputs = runtime.model(batch)
        losses, classes = runtime.task.per_example_loss(outputs, batch), runtime.task.classes(outputs, batch)
        for name in names:
            cast[name].append(votes(name, job, losses=losses, classes=classes).cpu())
    return {name: torch.cat(parts) for name, parts in cast.items()}


def count_votes(cast: Tensor, owners: NDArray[np.intp] | None = None) -> Tensor:
    """Return the sum of all votes, float64 [bins]; not private.

    Args:
        cast: one vote per record, [records, bins].
        owners: number of each record's person, if persons are the unit: their votes are averaged, so a person has one.
    """
    if owners is not None and len(owners):
        sizes = torch.from_numpy(np.bincount(owners)).double()
        by_person = torch.zeros(len(sizes), cast.shape[1], dtype=torch.float64)
        by_person.index_add_(0, torch.from_numpy(owners), cast.double())
        cast = by_person[sizes > 0] / sizes[sizes > 0, None]
    # The same clipping as of gradients, although no vote is longer than 1.
    total = ClippedSum([torch.Size([cast.shape[1]])], max_grad_norm=1.0)
    total.add([cast])
    return total.sums[0]


def noisy_counts(counts: Tensor, *, noise_multiplier: float, stream: KeyStream) -> list[float]:
    """Return what may leave the site: `counts` with the noise of one release."""
    (noisy,) = add_gaussian_noise([counts], noise_multiplier, stream)
    return [round(value / _GRID) * _GRID for value in noisy.tolist()]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What noisy counts say about a metric.

    Attributes:
        metric: name.
        value: the estimate; None if there are too few votes for the noise.
        standard_error: of `value`, from noise and from the finite number of records; an upper bound for "loss".
        votes: noisy number of votes.
        sites: number of sites whose counts were added.
    """

    metric: str
    value: Finite | None
    standard_error: Positive | None
    votes: Finite
    sites: Annotated[Count, Field(ge=1)]


def estimate(metric: str, counts: Sequence[Sequence[float]], job: Job) -> Estimate:
    """Return the estimate from the noisy counts of several sites.

    Args:
        counts: one list of `num_bins` counts for each site.
    """
    sums = np.sum(np.array(counts, dtype=np.float64), axis=0)
    variance = len(counts) * job.site_metrics.noise_multiplier**2  # of each bin
    if metric == "confusion":
        size = len(job.task.labels)
        hits = np.eye(size, dtype=bool).ravel()
    else:
        hits = np.array([True, False])
    total, yes = float(sums.sum()), float(sums[hits].sum())
    value = error = None
    if total >= max(1.0, _LEAST_VOTES * math.sqrt(variance * len(sums))):
        share = min(max(yes / total, 0.0), 1.0)
        # Delta method for yes / total, and the binomial spread of the records themselves.
        noise = variance * (int(hits.sum()) * (1 - share) ** 2 + int((~hits).sum()) * share**2) / total**2
        scale = job.site_metrics.largest_loss if metric == "loss" else 1.0
        value, error = share * scale, math.sqrt(noise + share * (1 - share) / total) * scale
    return Estimate(metric=metric, value=value, standard_error=error, votes=total, sites=len(counts))
