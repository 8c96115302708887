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
from typing import Any

from shared.epsilons import delta_rounded_up, noise_rounded_down, rate_rounded_up, rounded_up
from shared.files.json_files import finite_or_none
from shared.privacy.accounting import GaussianSteps, compose_epsilon
from shared.privacy.cross_check import CrossCheck, prv_cross_check
from shared.privacy.randomness import Origin
from shared.privacy.statement import ACCOUNTANT, PRE_TRAINING, STOPPED_EARLY, Statement, relation

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
class CentralRelease:
    """Everything that a trusted coordinator published in one run.

    Attributes:
        num_sites: declared number of sites.
        delta: failure probability.
        first_clip_norm: clipping bound of the first round.
        update_noise_multiplier: noise on the sum of updates, in units of the bound.
        count_noise: standard deviation of the noise on the count of unclipped updates; None if the bound is fixed.
        rounds_planned: noise events that the job declares; no more are executed.
        rounds: the round of every executed noise event; a recomputed round stands here twice.
        events: the same as mechanisms: multiplier of the pair of sum and count, rate of the coins.
        randomness: where coins and noise came from.
        epsilon_planned: epsilon of all planned rounds.
    """

    num_sites: int
    delta: float
    first_clip_norm: float
    update_noise_multiplier: float
    count_noise: float | None
    rounds_planned: int
    rounds: tuple[int, ...]
    events: tuple[GaussianSteps, ...]
    randomness: Origin
    epsilon_planned: float

    @property
    def protected(self) -> bool:
        """True if a guarantee can be stated at all."""
        return self.randomness == "os"

    @property
    def steps(self) -> int:
        """Executed noise events."""
        return sum(event.steps for event in self.events)

    @property
    def epsilon(self) -> float:
        """Epsilon of everything that was published; infinite without protection."""
        return compose_epsilon(self.events, self.delta) if self.protected else math.inf

    @property
    def epsilon_promised(self) -> float:
        """Epsilon of all planned rounds, never below that of the executed ones: of a run that its own rule may end early."""
        return max(self.epsilon, self.epsilon_planned) if self.protected else math.inf


def central_statement(
    release: CentralRelease, run: str, *, stopped_early: bool = False, pretrained: bool = True
) -> Statement:
    """Return the statement of a run under central DP; see `run_statement` for the two flags."""
    uncovered = (*_not_covered(pretrained), *([STOPPED_EARLY] if stopped_early and release.protected else []))
    return Statement(one_site=_sentence(release, run, stopped_early), not_covered=uncovered)


def _not_covered(pretrained: bool) -> tuple[str, ...]:
    return tuple(item for item in NOT_COVERED_CENTRAL if pretrained or item is not PRE_TRAINING)


def central_privacy_record(
    release: CentralRelease, run: str, *, stopped_early: bool = False, pretrained: bool = True
) -> dict[str, Any]:
    """Return the content of the coordinator's `privacy.json`: enough to recompute epsilon with an accountant alone."""
    check = prv_cross_check(release.events, release.delta) if release.protected else CrossCheck()
    last = release.events[-1] if release.events else None
    return {
        "released_by": "coordinator",
        "run": run,
        "unit": "site",
        "relation": SITE_RELATION,
        "trusts": ["coordinator"],
        "delta": release.delta,
        "num_sites_declared": release.num_sites,
        "sample_rate": last.sample_rate if last else None,
        "noise_multiplier": last.noise_multiplier if last else None,
        "update_noise_multiplier": release.update_noise_multiplier,
        "count_noise": release.count_noise,
        "clip_norm_first": release.first_clip_norm,
        "steps_planned": release.rounds_planned,
        "steps_executed": release.steps,
        "rounds": list(release.rounds),
        "epsilon_budget": finite_or_none(release.epsilon_planned),
        "epsilon_spent": finite_or_none(release.epsilon) if release.protected else None,
        "epsilon_spent_prv": check.epsilon,
        "epsilon_spent_prv_missing": check.reason,
        "accountant": ACCOUNTANT,
        "randomness": release.randomness,
        "private": True,
        "events": [
            {"noise_multiplier": e.noise_multiplier, "sample_rate": e.sample_rate, "steps": e.steps}
            for e in release.events
        ],
        "epsilon_planned": finite_or_none(release.epsilon_promised) if release.protected and stopped_early else None,
        "statement": _sentence(release, run, stopped_early),
        "not_covered": list(_not_covered(pretrained)),
    }


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
            f" The run ended early: this is the epsilon of all {release.rounds_planned} planned rounds, which is what was "
            f"promised; of the executed ones it is {rounded_up(release.epsilon)}."
        )
    return (
        f"Unit: one site with everything that it holds. Everything that the coordinator published in run {run}, which is all "
        f"global adapters and clipping bounds, is ({rounded_up(epsilon)}, {delta_rounded_up(release.delta)})-differentially "
        f"private under {SITE_RELATION} of {release.num_sites:,} declared ones, for {parts}{again}, by PLD accounting, against "
        f"any number of other sites and the public.{planned} TRUSTED COORDINATOR: this does not protect against the coordinator "
        "itself, which received the sites' updates unprotected, and it says nothing about single records at a site of their own."
    )
