"""Noise shares: what a site's own upload promises, and what the sum of all uploads promises.

Every site adds a share of the noise to its clipped gradients, and the coordinator learns nothing but the sum over the sites
(`privacy.mechanism` "distributed"). So there are two promises, both for one record (patient, customer) of an honest site:

* `together`, against the coordinator and up to `privacy.max_colluding` sites that work with it, all of them active. At least
  H = `federation.min_sites` - `privacy.max_colluding` sites of every sum are honest, and their shares are noise of variance
  H sigma^2. It holds as long as secure aggregation does.
* `share`, against everybody, if secure aggregation fails completely and all other sites collude: one share of sigma^2.

Why the sum of H shares protects a record of an honest site: fix all other sites' coins and records, and everything that
colluders add. What they learn of a round is a function of the honest sites' noisy sum and of what they know anyway; that sum is
a Poisson-subsampled Gaussian step of noise multiplier sigma sqrt(H), for who is in it was chosen before, and independently of,
the noise. Shares beyond the H-th are post-processing. The next round's adapter may be chosen by all of this: rounds compose
adaptively, under a plan that is fixed. It takes one step a round: a second local step would start from the site's own share,
which the sum does not determine.

Every attempt of a round is a step, whether its sum was opened or not, so the plan has `spare_attempts` more than rounds. Site
metrics are released by each site by itself, with their own noise, and count fully in both promises.

Formal guarantees (tests/shared/privacy/test_distributed.py)
    * The accounted noise of the sum is never above the shares' (test_the_noise_of_a_sum_is_never_above_that_of_its_shares).
    * Both promises keep to the job's targets, and the noise is the least that does
      (test_both_promises_are_kept_with_the_least_noise).

Sources: Dwork, Kenthapadi, McSherry, Mironov, Naor 2006 ("Our data, ourselves") and Kairouz, Liu, Steinke 2021 ("The distributed
discrete Gaussian mechanism for federated learning with secure aggregation") for noise that sites add in shares.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from shared.errors import PrivacyError
from shared.job.job import Job
from shared.privacy.accounting import noise_of_sum
from shared.privacy.plan import PrivacyPlan


@dataclass(frozen=True, kw_only=True)
class DistributedPlan:
    """The two promises of one job.

    Attributes:
        share: what one site executes; its `epsilon()` is what holds if everything else is broken.
        together: the same steps with the noise of the honest sites' sum; its `epsilon()` holds while secure aggregation does.
        honest: H, number of sites whose shares are counted on in every sum, at least 2.
        spare_attempts: steps beyond the rounds, part of both plans.
    """

    share: PrivacyPlan
    together: PrivacyPlan
    honest: int
    spare_attempts: int

    @classmethod
    def from_job(cls, job: Job) -> DistributedPlan:
        """Build the plan of `job`, calibrating the share where the job gives only its two targets.

        Raises:
            PrivacyError: if the job's mechanism is another, or its noise cannot be had.
        """
        share = PrivacyPlan.from_job(job)
        if share.honest is None:
            raise PrivacyError(
                f"privacy.mechanism is {job.privacy.mechanism!r}, so sites of this job add no shares of noise."
            )
        return cls(
            share=share,
            together=replace(share, noise_multiplier=noise_of_sum(share.noise_multiplier, share.honest), honest=None),
            honest=share.honest,
            spare_attempts=job.spare_attempts,
        )
