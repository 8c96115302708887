"""The statement of a run under central DP: the unit is the site, and the coordinator is trusted.

Formal guarantees
    * Epsilon is recomputed from the rounds whose noise was charged, recomputed rounds included
      (test: tests/server/rounds/test_central.py::test_a_recomputed_round_is_a_second_charge).
    * No epsilon is printed if the coordinator's randomness was injected, and none for records
      (test: tests/shared/privacy/test_central.py::test_the_statement_names_the_unit_and_whom_it_trusts).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from shared.epsilons import delta_rounded_up, noise_rounded_down, rate_rounded_up, rounded_up
from shared.files.json_files import Count, Positive
from shared.privacy.accounting import GaussianSteps
from shared.privacy.randomness import Origin
from shared.privacy.statement import PRE_TRAINING, STOPPED_EARLY, Release, Statement, relation

SITE_RELATION = relation("site")
CHOICE_OF_SETTINGS_CENTRAL = (
    "The choice of settings: whoever tries several over the same sites and keeps the best releases more than the epsilon of the "
    "one run that is kept."
)
NOT_COVERED_CENTRAL = (
    "The coordinator: it receives every drawn site's update without noise, and so does whoever can read its memory. It is "
    "trusted to clip, to add the noise, to draw sites by secret coins, and to keep updates and draws to itself.",
    "Who was drawn in which round, as far as network, timing or the coordinator's own logs show it. If an observer knows the "
    "draws, epsilon is that of a sampling rate of 1.",
    "What a site's people do about a job or a warning that they read there, as far as it shows outside.",
    "The list of declared sites, their number, the job's settings and the backbone: all of these are public.",
    "Several sites of one organisation, and a person whose records lie at several sites: the unit is one site.",
    "Metrics that were not released through a private mechanism. Silotune releases none; training losses stay at the site.",
    PRE_TRAINING,
    CHOICE_OF_SETTINGS_CENTRAL,
    "The finite precision of floating-point noise: it is drawn in float64 and rounded to float32 after it was added; "
    "the accountant assumes real numbers.",
    "Other runs with the same sites: this account is of one run. Anything that a site or the coordinator published otherwise.",
)


@dataclass(frozen=True, kw_only=True)
class CentralRelease(Release):
    """Everything that a trusted coordinator published in one run.

    Attributes:
        num_sites_declared: declared number of sites.
        delta: failure probability.
        clip_norm_first: clipping bound of the first round.
        update_noise_multiplier: noise on the sum of updates, in units of the bound.
        count_noise: standard deviation of the noise on the count of unclipped updates; None if the bound is fixed.
        steps_planned: noise events that the job declares; no more are executed.
        rounds: the round of every executed noise event; a recomputed round stands here twice.
        events: the same as mechanisms: multiplier of the pair of sum and count, rate of the coins.
        randomness: where coins and noise came from.
        epsilon_budget: epsilon of all planned rounds; None if it is not finite.
    """

    num_sites_declared: Count
    delta: float
    clip_norm_first: Annotated[float, Field(gt=0)]
    update_noise_multiplier: Annotated[float, Field(gt=0)]
    count_noise: Annotated[float, Field(gt=0)] | None
    steps_planned: Count
    rounds: tuple[Count, ...]
    events: tuple[GaussianSteps, ...]
    randomness: Origin
    epsilon_budget: Positive | None = None
    private: bool = True

    @property
    def epsilon_promised(self) -> float:
        """Epsilon of all planned rounds, never below that of the executed ones: of a run that its own rule may end early."""
        return max(self.epsilon, self.epsilon_budget or 0.0) if self.protected else math.inf


def central_statement(
    release: CentralRelease, run: str, *, stopped_early: bool = False, pretrained: bool = True
) -> Statement:
    """Return the statement of a run under central DP; see `run_statement` for the two flags."""
    uncovered = (
        *not_covered_central(pretrained=pretrained),
        *([STOPPED_EARLY] if stopped_early and release.protected else []),
    )
    return Statement.of(_sentence(release, run, stopped_early), not_covered=uncovered)


def not_covered_central(*, pretrained: bool) -> tuple[str, ...]:
    """Return what no statement under central DP covers; see `not_covered`."""
    return tuple(item for item in NOT_COVERED_CENTRAL if pretrained or item is not PRE_TRAINING)


def _sentence(release: CentralRelease, run: str, stopped_early: bool) -> str:
    if not release.protected:
        return (
            f"NOT PRIVATE: the randomness of the coordinator in run {run} was injected for a test. Whoever knows the seed can "
            "remove the noise, so no epsilon is stated."
        )
    if not release.events:
        return f"The coordinator published nothing in run {run} that depends on a site."
    parts = "; ".join(
        f"Poisson sampling of sites at rate {rate_rounded_up(e.sample_rate)}, noise multiplier "
        f"{noise_rounded_down(e.noise_multiplier)}, {e.steps} executed rounds"
        for e in release.events
    )
    repeated = len(release.rounds) - len(set(release.rounds))
    again = f" ({repeated} of them recomputed after an interruption and counted again)" if repeated else ""
    epsilon = release.epsilon_promised if stopped_early else release.epsilon
    planned = ""
    if stopped_early:
        planned = (
            f" The run ended early: this is the epsilon of all {release.steps_planned} planned rounds, which is what was "
            f"promised; of the executed ones it is {rounded_up(release.epsilon)}."
        )
    return (
        f"Unit: one site with everything that it holds. Everything that the coordinator published in run {run}, which is all "
        f"global adapters and clipping bounds, is ({rounded_up(epsilon)}, {delta_rounded_up(release.delta)})-differentially "
        f"private under {SITE_RELATION} of {release.num_sites_declared:,} declared ones, for {parts}{again}, by PLD accounting, "
        f"against any number of other sites and the public.{planned} TRUSTED COORDINATOR: this does not protect against the "
        "coordinator itself, which received the sites' updates unprotected, and it says nothing about single records at a site "
        "of their own."
    )
