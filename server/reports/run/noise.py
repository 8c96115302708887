"""Who brings the noise of a run: each site's share of the weight and of the noise, from what the sites declared."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from server.records.privacy import SiteRecord
from server.reports.run.formats import natural_key
from server.reports.run.run_data import Arm, job_value
from shared.job.federation import AggregationConfig
from shared.site_weights import SiteShare, site_shares


def arm_shares(arm: Arm) -> Sequence[SiteShare]:
    """Return the shares of all sites in a round where every one answers, in natural order.

    Where only the sum of all sites is seen, each adds the same. Empty if sites add no noise of their own, there are fewer than
    two, the weights are not recorded, or a robust rule stands in for the mean.
    """
    if of_shares(arm):
        return _equal_shares(arm)
    weights = job_value(arm.job, "aggregation", "weights")
    sites = sorted(arm.sites, key=lambda site: natural_key(site.site))
    sizes = {site.site: site.declared_records for site in sites if isinstance(site, SiteRecord)}
    robust = job_value(arm.job, "aggregation", "robust")
    if not arm.private or weights is None or len(sizes) < 2 or robust not in (None, "none"):
        return ()
    limit = job_value(arm.job, "aggregation", "largest_share")
    try:
        config = AggregationConfig.model_validate({"weights": weights, "largest_share": limit})
    except ValidationError:
        return ()  # of a later version
    return site_shares(sizes, config)


def of_shares(arm: Arm) -> bool:
    """Whether the sites of a training add shares of the noise, of which only the sum is seen."""
    return any(isinstance(site, SiteRecord) and site.shared is not None for site in arm.sites)


def _equal_shares(arm: Arm) -> Sequence[SiteShare]:
    sites = sorted(
        (site for site in arm.sites if isinstance(site, SiteRecord)), key=lambda site: natural_key(site.site)
    )
    total = sum(max(site.declared_records, 1) for site in sites)
    if len(sites) < 2:
        return ()
    return [
        SiteShare(
            site=site.site,
            records=max(site.declared_records, 1) / total,
            weight=1 / len(sites),
            noise=1 / len(sites),
            far_above=False,
        )
        for site in sites
    ]
