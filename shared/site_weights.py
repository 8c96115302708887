"""What each site counts in a round's mean, and what share of the mean's noise it brings.

Under local differential privacy every site adds noise of its own, and divides it by its expected batch: a site that declares n
records adds noise of standard deviation sigma C / (q n) to its update. With equal weights the smallest site's noise rules.
Guarantee: weights depend on declared (public) sizes and on the job alone (tests/shared/test_site_weights.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shared.job.federation import AggregationConfig

FAR_ABOVE = 2.0
"""A site's share of the noise is far above its share of the records from so many times it."""
ABOVE_EQUAL = 1.5
"""And it must be so many times the share that it would have if all sites brought the same noise."""


class SiteWeights:
    """The weights of one round: whole numbers, so that weighted sums can be exact."""

    def __init__(self, sizes: Sequence[int], config: AggregationConfig) -> None:
        """Settle the weights.

        Args:
            sizes: declared size of each site that is asked.
            config: the job's.
        """
        self._kind = config.weights
        weights = sorted(map(self._uncapped, sizes))
        self._most: int | None = None
        share = config.largest_share
        # Of two sites one always has half or more; and a share of half or more is passed by one site at most.
        if share is not None and share < 1 and len(weights) > 2:
            self._most = max(int(sum(weights[:-1]) * share / (1 - share)), 1)
        self.total = sum(map(self.of, sizes))

    def of(self, size: int) -> int:
        """Return the weight of a site that was asked and declares `size`."""
        weight = self._uncapped(size)
        return weight if self._most is None else min(weight, self._most)

    def _uncapped(self, size: int) -> int:
        # Sizes come from the sites' own descriptions, unchecked; reading less than one would break the sums.
        known = max(size, 1)
        return {"equal": 1, "declared": known, "inverse-variance": known**2}[self._kind]


@dataclass(frozen=True, kw_only=True)
class SiteShare:
    """One site's part in a round where every site answers; the parts of all sites add up to 1.

    Attributes:
        site: its name.
        records: of all declared records.
        weight: in the mean.
        noise: of the variance of the mean's noise.
        far_above: whether the noise is far above what the site's records and the number of sites would explain.
    """

    site: str
    records: float
    weight: float
    noise: float
    far_above: bool


def site_shares(sizes: Mapping[str, int], config: AggregationConfig) -> list[SiteShare]:
    """Return each site's share of records, weight and noise, in the order of `sizes` (declared sizes by site name).

    All sites execute the same noise multiplier, clipping norm and sampling rate: they are the job's.
    """
    weights = SiteWeights(list(sizes.values()), config)
    records = sum(max(size, 1) for size in sizes.values())
    noise = {site: (weights.of(size) / max(size, 1)) ** 2 for site, size in sizes.items()}
    shares = []
    for site, size in sizes.items():
        of_records, of_noise = max(size, 1) / records, noise[site] / sum(noise.values())
        shares.append(
            SiteShare(
                site=site,
                records=of_records,
                weight=weights.of(size) / weights.total,
                noise=of_noise,
                far_above=of_noise >= FAR_ABOVE * of_records and of_noise >= ABOVE_EQUAL / len(sizes),
            )
        )
    return shares


def noise_warnings(sizes: Mapping[str, int], config: AggregationConfig) -> list[str]:
    """Return what is to be minded about the sites' shares of the noise, each with what to change; mostly nothing."""
    remedy = (
        "Leave the site out, or let it join with more records"
        if config.weights != "equal"
        else 'Set aggregation.weights = "declared", or leave the site out'
    )
    if config.robust != "none":  # shares of a mean
        return []
    return [
        f"{share.site} declares {sizes[share.site]:,} records, {share.records:.1%} of all, but brings {share.noise:.1%} of the "
        f"noise of every round (aggregation.weights is {config.weights!r}). {remedy}."
        for share in site_shares(sizes, config)
        if share.far_above
    ]
