"""Noise shares: what a site's own upload promises, what the sum of all uploads promises, and both in words.

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

What secure aggregation does: docs/secure-aggregation.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from shared.epsilons import delta_rounded_up, rounded_up
from shared.privacy.accountant.several_sites import MOST_SITES
from shared.privacy.accounting import GaussianSteps, epsilon_at_sites, noise_of_sum

COMPUTATIONAL = (
    "The first promise is computational: whoever records the traffic and later breaks X25519, or takes a site's memory during a "
    "round, is left with the second."
)
ASSUMED_HONEST = (
    "The first promise counts on the shares of all sites of a roster but those that may collude: sites that run this software "
    "unchanged, on their own random numbers. A CA that makes up sites is a colluder, unless the sites pin each other's keys; so "
    "is a site that was copied, or restored from a backup, while it was at an attempt. Over several jobs it holds against one "
    "and the same coalition, small enough for each of them."
)
STILL_LEARNED = (
    "What the coordinator learns: the sum of every round, which sites took part and when, and their declared sizes. It chooses "
    "the adapters, may leave sites out down to the least number, and may break an attempt off, which costs everybody in it one "
    "step. Any site can add anything to a sum; there is no proof of range."
)


@dataclass(frozen=True, kw_only=True)
class SharedNoise:
    """How many share the noise.

    Attributes:
        honest: H, least number of honest sites in a sum.
        colluding: most sites that may work together with the coordinator.
    """

    honest: int
    colluding: int

    def summed(self, events: Iterable[GaussianSteps]) -> tuple[GaussianSteps, ...]:
        """Return steps of one share as steps of the sum of the honest sites' shares."""
        return tuple(
            replace(event, noise_multiplier=noise_of_sum(event.noise_multiplier, self.honest)) for event in events
        )

    def epsilon_at_sites(
        self,
        shares: Iterable[GaussianSteps],
        most: int,
        delta: float,
        *,
        apart: Iterable[GaussianSteps] = (),
    ) -> dict[int, float]:
        """Return the first promise's epsilon by the number of honest sites, from 1 to `most`, at which a person has data.

        Args:
            shares: what each site executes.
            most: number of sites; more than `MOST_SITES` are not accounted for.
            delta: failure probability.
            apart: what each site releases by itself besides.
        """
        summed = self.summed(shares)
        counts = [count for count in (1, 2, 3, 4, 5, 8, 16, MOST_SITES) if count < most] + [min(most, MOST_SITES)]
        return {count: epsilon_at_sites(summed, count, delta, apart=apart) for count in counts}

    @property
    def against(self) -> str:
        """Against whom the first promise holds, in words."""
        if not self.colluding:
            return "the coordinator"
        sites = "1 site that works" if self.colluding == 1 else f"{self.colluding} sites that work"
        return f"the coordinator and up to {sites} with it"

    def promises(
        self,
        *,
        epsilon: float,
        executed: float,
        alone: float,
        delta: float,
        relation: str,
        planned: int,
        at_most: bool = False,
    ) -> str:
        """Return both promises in words.

        Args:
            epsilon, alone: of the first and the second, of all planned attempts.
            executed: of the first, of the attempts that were made.
            at_most: `executed` is the most of several sites that made different numbers of them.
            delta: of both.
            relation: between neighbouring data sets.
            planned: number of attempts.
        """
        few = delta_rounded_up(delta)
        return (
            f"First promise, against {self.against}: what they learn is ({rounded_up(epsilon)}, {few})-differentially private "
            f"under {relation}, by PLD accounting; at least {self.honest} honest sites share the noise of every sum. Second "
            f"promise, against everybody else together, if secure aggregation fails completely: ({rounded_up(alone)}, {few}). "
            f"Both are of all {planned} planned attempts; of those that were made the first is "
            f"{'at most ' if at_most else ''}{rounded_up(executed)}."
        )


def largest_at(sites: Sequence[tuple[str, float, float]]) -> str:
    """Return in words of which sites the promises of a run are; what would be printed alike is the same.

    Args:
        sites: name, first promise and second promise of each. Their order decides nothing.
    """
    if len({(rounded_up(first), rounded_up(second)) for _, first, second in sites}) == 1:
        return "both promises are the same at every site"
    most = [max(site[number] for site in sites) for number in (1, 2)]
    named = [[name for name, *found in sites if found[i] == most[i]] for i in (0, 1)]
    both = set(named[0]) & set(named[1])
    first, second = (min(both or names, key=lambda name: (len(name), name)) for names in named)
    if first == second:
        return f"both promises are the largest of a site, {first}"
    return f"the first promise is the largest of a site, {first}, and the second that of a site, {second}"
