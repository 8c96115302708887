"""Whether a site can afford a run, and the next two like it, by its account's own rule.

Formal guarantee
    * A run counts as affordable only if everything charged and the whole run are within both caps, by `spent`
      (tests/shared/tools/plan/test_planning.py::test_affordable_is_what_the_cap_allows;
      tests/shared/tools/plan/test_sharing.py::test_a_run_fits_only_under_both_caps).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shared.epsilons import as_set, delta_rounded_up
from shared.limits import MAX_NOISE_MULTIPLIER, MAX_STEPS
from shared.privacy.accountant.crossing import crossing
from shared.privacy.accounting import GaussianSteps, likely_steps, noise_of_sum
from shared.privacy.ledger_export import LedgerExport
from shared.tools.plan.planning import SIGMA_DECIMALS, largest

NUM_RUNS = 3
"""This run and the next two like it."""
_ADVISED_LATTICE = 100  # of the noise multiplier that a site is advised to ask for
_MOST_ADVISED = round(MAX_NOISE_MULTIPLIER) * _ADVISED_LATTICE


@dataclass(frozen=True, kw_only=True)
class SiteAnswer:
    """Whether one site can afford a run and the next two like it.

    Attributes:
        run: all steps of one run, by a site that is in every round, with the noise in what leaves it.
        epsilon_now, epsilon_after: spent so far; after one, two and three such runs; by the account's own rule.
        alone_now, alone_after: the same against the second cap, where each masked input to a sum counts by itself.
        cap, cap_alone, delta: of the account.
        steps_affordable: steps of the run's mechanism that still fit under both.
        num_runs: whole runs that fit, at most `NUM_RUNS`.
        rounds: rounds per run that would fit, where not all runs do: in one run, or in each of the three if one fits.
        noise_multiplier: the least that would make as many fit, to 0.01; None if no noise would.
        refusal: why the site refuses the job whatever its budget, or "".
    """

    site: str
    dataset: str
    composition: str
    run: GaussianSteps
    epsilon_now: float
    epsilon_after: tuple[float, ...]
    alone_now: float
    alone_after: tuple[float, ...]
    cap: float
    cap_alone: float
    delta: float
    steps_affordable: int
    num_runs: int
    rounds: int | None
    noise_multiplier: float | None
    refusal: str

    @property
    def has_two_caps(self) -> bool:
        """Whether the second cap is told apart from the first: it is higher, or something counts more against it."""
        return (self.cap_alone, self.alone_now, self.alone_after) != (self.cap, self.epsilon_now, self.epsilon_after)

    @property
    def verdict(self) -> str:
        """The answer in a few words."""
        if self.refusal:
            return "no"
        return ("no", "this run only", "this run and one more", "yes, all three")[self.num_runs]

    @property
    def advice(self) -> str:
        """What to change; "" if nothing."""
        return " ".join(part for part in (self.refusal, self._to_make_it_fit()) if part)

    def _to_make_it_fit(self) -> str:
        if self.num_runs == NUM_RUNS:
            return ""
        if self.noise_multiplier is None:
            return (
                "The budget is spent: no noise makes room. Only a higher cap would, and that is the site's to decide."
            )
        ways = [f"with privacy.noise_multiplier = {as_set(self.noise_multiplier)} or more"]
        if self.rounds:
            # With epsilon in place of the noise multiplier, fewer rounds would be calibrated to less noise.
            lattice = 10**SIGMA_DECIMALS
            sigma = math.ceil(self.run.noise_multiplier * lattice - 1e-7) / lattice
            ways.append(f"with training.rounds = {self.rounds} or less and privacy.noise_multiplier = {as_set(sigma)}")
        which = "All three would fit" if self.num_runs else "It would fit"
        return f"{which} {', or '.join(ways)}."


def spent(export: LedgerExport, extra: Sequence[GaussianSteps], *, alone: bool = False) -> float:
    """Return the spend of an account, by its own rule (`SpendingRule`), if `extra` were charged too.

    Args:
        alone: against the second cap, where each masked input counts by itself.
    """
    if alone:
        return export.rule_alone.epsilon([*export.mechanisms_alone, *extra])
    return export.rule.epsilon([*export.mechanisms, *extra])


@dataclass(frozen=True, kw_only=True)
class _Cap:
    """One of an account's two caps, and what so many steps of a run would cost under it."""

    export: LedgerExport
    run: GaussianSteps
    delta: float
    alone: bool
    honest: int

    @property
    def limit(self) -> float:
        return self.export.cap_alone if self.alone else self.export.epsilon

    def noise(self, share: float) -> float:
        """Return what counts for the noise multiplier of what leaves the site."""
        return share if self.alone else noise_of_sum(share, self.honest)

    def cost(self, steps: int, share: float) -> float:
        event = GaussianSteps(noise_multiplier=self.noise(share), sample_rate=self.run.sample_rate, steps=steps)
        return spent(self.export, [event] if steps else [], alone=self.alone)

    def steps(self) -> int:
        """Return how many steps of the run's mechanism still fit."""
        share, export = self.run.noise_multiplier, self.export
        guess = likely_steps(
            export.mechanisms_alone if self.alone else export.mechanisms,
            noise_multiplier=self.noise(share),
            sample_rate=self.run.sample_rate,
            budget=self.limit,
            delta=self.delta,
        )

        def cost(steps: int) -> float:
            return self.cost(steps, share)

        return crossing(cost, self.limit, rising=True, least=1, most=MAX_STEPS, guess=guess)[0]

    def least_noise(self, steps: int, least: int) -> int:
        """Return the least multiple of the lattice, from `least` on, with which so many steps fit; one too many if none does."""

        def cost(number: int) -> float:
            return self.cost(steps, number / _ADVISED_LATTICE)

        return crossing(cost, self.limit, rising=False, least=least, most=_MOST_ADVISED, guess=least)[1]


def can_afford(
    export: LedgerExport,
    run: GaussianSteps,
    *,
    local_steps: int,
    delta: float,
    honest: int = 1,
    spare_attempts_for: Callable[[int], int] = lambda rounds: 0,
) -> SiteAnswer:
    """Return whether the account of `export` has room for `run`, once, twice and three times.

    Args:
        export: the site's account.
        run: the whole run: all steps that a site takes which is in every round.
        local_steps: steps of one round, to speak of rounds.
        delta: that of the job; a site refuses one that is weaker than its own.
        honest: sites whose noise adds up in the sum that an input of this one goes into; 1 if it goes into none.
        spare_attempts_for: steps of a run of so many rounds beyond those of its rounds.
    """
    caps = [_Cap(export=export, run=run, delta=delta, alone=alone, honest=honest) for alone in (False, True)]
    share = run.noise_multiplier
    now = [cap.cost(0, share) for cap in caps]
    after = [tuple(cap.cost(run.steps * count, share) for count in range(1, NUM_RUNS + 1)) for cap in caps]
    num_runs = sum(one <= caps[0].limit and other <= caps[1].limit for one, other in zip(*after, strict=True))
    steps = min(cap.steps() for cap in caps)
    rounds = sigma = None
    if num_runs < NUM_RUNS:
        wanted = NUM_RUNS if num_runs else 1
        rounds = _rounds_within(steps // wanted, local_steps, spare_attempts_for)
        least = math.floor(share * _ADVISED_LATTICE) + 1
        enough = max(cap.least_noise(run.steps * wanted, least) for cap in caps)
        sigma = enough / _ADVISED_LATTICE if enough <= _MOST_ADVISED else None
    refusal = ""
    if delta > export.delta:
        refusal = (
            f"The job's delta {delta_rounded_up(delta)} is weaker than the site's {delta_rounded_up(export.delta)}, so the "
            "site refuses it. Lower it."
        )
    return SiteAnswer(
        site=export.site,
        dataset=export.dataset,
        composition=export.composition,
        run=run,
        epsilon_now=now[0],
        epsilon_after=after[0],
        alone_now=now[1],
        alone_after=after[1],
        cap=export.epsilon,
        cap_alone=export.cap_alone,
        delta=export.delta,
        steps_affordable=steps,
        num_runs=num_runs,
        rounds=rounds,
        noise_multiplier=sigma,
        refusal=refusal,
    )


def _rounds_within(steps: int, local_steps: int, spare_attempts_for: Callable[[int], int]) -> int:
    """Return the most rounds that, with their spare attempts, are no more than so many steps."""
    return largest(lambda rounds: rounds * local_steps + spare_attempts_for(rounds) <= steps, 0, steps // local_steps)
