"""Whether a site can afford a run, and the next two like it, by its account's own rule.

Formal guarantee
    * A run counts as affordable only if everything charged and the whole run are within the cap, by `spent`
      (tests/shared/tools/plan/test_planning.py::test_affordable_is_what_the_cap_allows).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shared.epsilons import as_set, delta_rounded_up
from shared.limits import MAX_NOISE_MULTIPLIER, MAX_STEPS
from shared.privacy.accountant.crossing import crossing
from shared.privacy.accounting import GaussianSteps, likely_steps
from shared.privacy.ledger_export import LedgerExport
from shared.tools.plan.planning import SIGMA_DECIMALS

NUM_RUNS = 3
"""This run and the next two like it."""
_ADVISED_LATTICE = 100  # of the noise multiplier that a site is advised to ask for


@dataclass(frozen=True, kw_only=True)
class SiteAnswer:
    """Whether one site can afford a run and the next two like it.

    Attributes:
        run: all steps of one run, by a site that is in every round.
        epsilon_now, epsilon_after: spent so far; after one, two and three such runs; by the account's own rule.
        cap, delta: of the account.
        steps_affordable: steps of the run's mechanism that still fit.
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
    cap: float
    delta: float
    steps_affordable: int
    num_runs: int
    rounds: int | None
    noise_multiplier: float | None
    refusal: str

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


def spent(export: LedgerExport, extra: Sequence[GaussianSteps]) -> float:
    """Return the spend of an account, by its own rule (`SpendingRule`), if `extra` were charged too."""
    return export.rule.epsilon([*export.mechanisms, *extra])


def can_afford(export: LedgerExport, run: GaussianSteps, *, local_steps: int, delta: float) -> SiteAnswer:
    """Return whether the account of `export` has room for `run`, once, twice and three times.

    Args:
        export: the site's account.
        run: the whole run: all steps that a site takes which is in every round.
        local_steps: steps of one round, to speak of rounds.
        delta: that of the job; a site refuses one that is weaker than its own.
    """

    def cost(steps: int, sigma: float = run.noise_multiplier) -> float:
        event = GaussianSteps(noise_multiplier=sigma, sample_rate=run.sample_rate, steps=steps)
        return spent(export, [event] if steps else [])

    after = tuple(cost(run.steps * count) for count in range(1, NUM_RUNS + 1))
    num_runs = sum(epsilon <= export.epsilon for epsilon in after)
    guess = likely_steps(
        export.mechanisms,
        noise_multiplier=run.noise_multiplier,
        sample_rate=run.sample_rate,
        budget=export.epsilon,
        delta=export.delta,
    )
    steps, _ = crossing(cost, export.epsilon, rising=True, least=1, most=MAX_STEPS, guess=guess)
    rounds = sigma = None
    if num_runs < NUM_RUNS:
        wanted = NUM_RUNS if num_runs else 1
        rounds = steps // (local_steps * wanted)
        least = math.floor(run.noise_multiplier * _ADVISED_LATTICE) + 1
        _, enough = crossing(
            lambda n: cost(run.steps * wanted, n / _ADVISED_LATTICE),
            export.epsilon,
            rising=False,
            least=least,
            most=round(MAX_NOISE_MULTIPLIER) * _ADVISED_LATTICE,
            guess=least,
        )
        sigma = enough / _ADVISED_LATTICE if enough <= MAX_NOISE_MULTIPLIER * _ADVISED_LATTICE else None
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
        epsilon_now=spent(export, []),
        epsilon_after=after,
        cap=export.epsilon,
        delta=export.delta,
        steps_affordable=steps,
        num_runs=num_runs,
        rounds=rounds,
        noise_multiplier=sigma,
        refusal=refusal,
    )
