"""Who brings the noise of a run: each site's share of the weight and of the noise, from what the sites declared."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from server.reports.run.formats import natural_key
from server.reports.run.run_data import Arm, job_value
from shared.job.federation import AggregationConfig
from shared.site_weights import SiteShare, site_shares


def arm_shares(arm: Arm) -> Sequence[SiteShare]:
    """Return the shares of all sites in a round where every one answers, in natural order.

    Empty if sites add no noise of their own, there are fewer than two, or a size or the weights are not recorded.
    """
    weights = job_value(arm.job, "aggregation", "weights")
    sizes = {site.site: site.declared_records for site in sorted(arm.sites, key=lambda site: natural_key(site.site))}
    known = {site: size for site, size in sizes.items() if size is not None}
    if not arm.private or arm.central_sites is not None or weights is None or len(known) < max(len(sizes), 2):
        return ()
    limit = job_value(arm.job, "aggregation", "largest_share")
    try:
        config = AggregationConfig.model_validate({"weights": weights, "largest_share": limit})
    except ValidationError:
        return ()  # of a later version
    return site_shares(known, config)
