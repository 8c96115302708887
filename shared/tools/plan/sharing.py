"""A plan whose sites add shares of the noise: what each of its two promises costs (`shared.privacy.shared_noise`).

A site's share has to keep to both, so the larger of two noises is added: that which, summed over the honest sites, keeps to
epsilon, and that which keeps to epsilon alone by itself. Every attempt at a round is a step, spare ones included.

Formal guarantees (tests: tests/shared/tools/plan/test_sharing.py)
    * Both epsilons are those of the share's noise multiplier as it is returned, also after it was rounded
      (test_both_epsilons_are_those_of_the_numbers_beside_them).
    * What was solved for keeps to both targets (test_the_larger_noise_keeps_to_both).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from shared.epsilons import as_set
from shared.errors import ConfigError
from shared.job.job import Job
from shared.limits import MAX_EPSILON, MAX_NOISE_MULTIPLIER, MAX_SUMMED_SITES, MIN_EPSILON
from shared.privacy.accounting import (
    GaussianSteps,
    calibrate_noise_multiplier,
    compose_epsilon,
    noise_of_share,
    noise_of_sum,
)
from shared.tools.plan.planning import SIGMA_DECIMALS, Question, Setting, check_statable, solve

if TYPE_CHECKING:
    from shared.privacy.plan import PrivacyPlan

FEWEST_HONEST = 2
_MOST_DRAWN = 128  # honest sites that a curve shows


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """Who shares the noise, and what an upload by itself is to keep to.

    Attributes:
        sites: least number of sites in a sum.
        colluding: most of them that may work together with the coordinator.
        epsilon_alone: the most that may be spent if everything else is broken; None where the noise is given.
        spare_attempts: repetitions of rounds that the plan has room for; None is a tenth of the rounds, rounded up.
    """

    sites: int
    colluding: int
    epsilon_alone: float | None = None
    spare_attempts: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.sites <= MAX_SUMMED_SITES or self.colluding < 0:
            raise ConfigError(
                f"--sites is {self.sites:,} and --colluding {self.colluding:,}; expected 1 to "
                f"{MAX_SUMMED_SITES:,} sites, as many as one sum can be of, and 0 or more of them that may collude."
            )
        if self.honest < FEWEST_HONEST:
            least = self.colluding + FEWEST_HONEST
            way_out = f"--sites {least} or more" if least <= MAX_SUMMED_SITES else "a smaller --colluding"
            raise ConfigError(
                f"of {self.sites} sites, {self.colluding} of which may collude, {max(self.honest, 0)} stay honest; besides those "
                f"who collude, at least two must be in every sum. Give {way_out}."
            )
        if self.spare_attempts is not None and self.spare_attempts < 0:
            raise ConfigError(f"--spare-attempts is {self.spare_attempts}; expected 0 or more.")

    @classmethod
    def asked(
        cls, sites: int | None, colluding: int | None, epsilon_alone: float | None, spare_attempts: int | None
    ) -> Sharing | None:
        """Return who shares the noise; None if nothing says that it is shared, `ConfigError` if too little says how."""
        if sites is None and colluding is None:
            for given, option in ((epsilon_alone, "--epsilon-alone"), (spare_attempts, "--spare-attempts")):
                if given is not None:
                    raise ConfigError(f"{option} speaks of sites that share the noise; add --sites and --colluding.")
            return None
        if sites is None or colluding is None:
            raise ConfigError(
                "--sites and --colluding say together how many stay honest; give both, for example 8 and 2, or with --job "
                "neither: the job says it."
            )
        return cls(sites=sites, colluding=colluding, epsilon_alone=epsilon_alone, spare_attempts=spare_attempts)

    @property
    def honest(self) -> int:
        """H, number of sites whose shares are counted on."""
        return self.sites - self.colluding


@dataclass(frozen=True, kw_only=True)
class Price:
    """What one noise multiplier of a share costs: epsilon of the sum, and of an upload alone."""

    noise_multiplier: float
    epsilon: float
    epsilon_alone: float


@dataclass(frozen=True, kw_only=True)
class SharesPlan:
    """Both promises of one plan.

    Attributes:
        sharing: who shares the noise.
        share: what a site executes and its upload promises alone; its steps are rounds and spare attempts.
        together: the same with the noise of the honest sites' sum.
        rounds, spare_attempts: of `share.steps`.
        without_spare: the same noise without spare attempts.
        by_epsilon, by_epsilon_alone: had only this target been asked for; None where the noise was given.
        others: what each site releases beside its shares.
    """

    sharing: Sharing
    share: Setting
    together: Setting
    rounds: int
    spare_attempts: int
    without_spare: Price
    by_epsilon: Price | None
    by_epsilon_alone: Price | None
    others: tuple[GaussianSteps, ...] = ()

    @property
    def ruled_by(self) -> str:
        """The target that asks for more noise: "epsilon" or "epsilon alone"; "" where the noise was given."""
        if self.by_epsilon is None or self.by_epsilon_alone is None:
            return ""
        more = self.by_epsilon.noise_multiplier >= self.by_epsilon_alone.noise_multiplier
        return "epsilon" if more else "epsilon alone"

    @property
    def whole_sum(self) -> Setting | None:
        """The sum of all sites if each has as many records, to judge its signal; None if these are not known."""
        records = self.share.records
        if records is None:
            return None
        noise = noise_of_sum(self.share.noise_multiplier, self.sharing.sites)
        return replace(self.together, records=records * self.sharing.sites, noise_multiplier=noise)

    def warnings(self) -> dict[str, str]:
        """Return what is to be minded about this plan, by its subject, each with what to change."""
        found = {subject: text for subject, text in self.together.warnings().items() if subject != "noise"}
        if self.whole_sum is not None and "noise" in (of_sum := self.whole_sum.warnings()):
            found["noise"] = of_sum["noise"]
        return found

    def by_honest(self) -> list[tuple[int, float]]:
        """Return (honest sites, epsilon) of the sum at this share, from one site to twice as many as there are."""
        most = min(2 * self.sharing.sites, _MOST_DRAWN)
        counts = sorted({*range(1, min(most, 16) + 1), *(round(16 * 1.3**n) for n in range(9)), self.sharing.honest})
        share = self.share
        return [
            (count, _epsilon(noise_of_sum(share.noise_multiplier, count), share, share.steps, self.others))
            for count in counts
            if count <= max(most, self.sharing.honest)
        ]


def solve_shares(question: Question, sharing: Sharing) -> SharesPlan:
    """Return the plan with the least share that keeps to both epsilons, or both epsilons of a given share.

    Raises:
        ConfigError: if a number is out of range, too few or too many are given, or nothing fits.
    """
    rate = question.batch_size is not None or question.sample_rate is not None
    if not rate or (question.steps is None and question.epochs is None):
        raise ConfigError(
            "with --sites the noise is found, or both epsilons are; give --batch-size (or --sample-rate) and --steps (or "
            "--epochs), one step a round."
        )
    sigma, epsilon, alone = question.noise_multiplier, question.epsilon, sharing.epsilon_alone
    if sigma is None and (epsilon is None or alone is None):
        raise ConfigError("with --sites, give both --epsilon and --epsilon-alone, or --noise-multiplier of one share.")
    if sigma is not None and (epsilon is not None or alone is not None):
        raise ConfigError(
            "both epsilons follow from --noise-multiplier of one share; leave out --epsilon and --epsilon-alone, or it."
        )
    if epsilon is not None and alone is not None:
        _check_targets(epsilon, alone)
    # Range of every number, rate, length and delta, at a noise for which an epsilon can always be stated.
    asked = solve(replace(question, noise_multiplier=sigma or MAX_NOISE_MULTIPLIER, epsilon=None))
    spare = -(-asked.steps // 10) if sharing.spare_attempts is None else sharing.spare_attempts
    targets = None
    if epsilon is not None and alone is not None:

        def least(target: float) -> float:
            return calibrate_noise_multiplier(
                epsilon=target,
                delta=asked.delta,
                sample_rate=asked.sample_rate,
                steps=asked.steps + spare,
                decimals=SIGMA_DECIMALS,
            )

        targets = _up(noise_of_share(least(epsilon), sharing.honest)), least(alone)
    return _plan(
        replace(asked, solved_for="epsilon" if targets is None else "noise"),
        sharing,
        sigma=sigma or max(targets or (0.0,)),
        spare=spare,
        targets=targets,
    )


def shares_of_job(job: Job, share: PrivacyPlan, setting: Setting) -> SharesPlan:
    """Return the plan of a job of the mechanism "distributed".

    Args:
        share: the plan of one of its sites.
        setting: the same, as the planner takes it.

    Raises:
        PrivacyError: if its noise cannot be had.
    """
    privacy = job.privacy
    alone, others = privacy.epsilon_alone, share.events[1:]
    sharing = Sharing(
        sites=job.federation.min_sites,
        colluding=privacy.max_colluding or 0,
        epsilon_alone=alone,
        spare_attempts=privacy.spare_attempts,
    )
    targets = None
    if privacy.noise_multiplier is None and alone is not None:

        def least(target: float) -> float:
            return calibrate_noise_multiplier(
                epsilon=target,
                delta=share.delta,
                sample_rate=share.sample_rate,
                steps=share.planned_steps,
                others=others,
            )

        targets = noise_of_share(least(privacy.epsilon), sharing.honest), least(alone)
    asked = replace(setting, steps=job.training.rounds)
    return _plan(asked, sharing, sigma=share.noise_multiplier, spare=job.spare_attempts, targets=targets, others=others)


def _plan(
    asked: Setting,
    sharing: Sharing,
    *,
    sigma: float,
    spare: int,
    targets: tuple[float, float] | None,
    others: tuple[GaussianSteps, ...] = (),
) -> SharesPlan:
    """Return the plan of the share `sigma`; the steps of `asked` are rounds, `targets` the share that each epsilon asks for."""
    steps = asked.steps + spare

    def epsilon(noise: float, number: int) -> float:
        return _epsilon(noise, asked, number, others)

    def price(share: float, number: int) -> Price:
        return Price(
            noise_multiplier=share,
            epsilon=epsilon(noise_of_sum(share, sharing.honest), number),
            epsilon_alone=epsilon(share, number),
        )

    check_statable(GaussianSteps(noise_multiplier=sigma, sample_rate=asked.sample_rate, steps=steps))
    summed = noise_of_sum(sigma, sharing.honest)
    return SharesPlan(
        sharing=sharing,
        share=replace(asked, noise_multiplier=sigma, steps=steps, epsilon=epsilon(sigma, steps)),
        together=replace(asked, noise_multiplier=summed, steps=steps, epsilon=epsilon(summed, steps)),
        rounds=asked.steps,
        spare_attempts=spare,
        without_spare=price(sigma, asked.steps),
        by_epsilon=None if targets is None else price(targets[0], steps),
        by_epsilon_alone=None if targets is None else price(targets[1], steps),
        others=others,
    )


def _epsilon(noise: float, setting: Setting, steps: int, others: Iterable[GaussianSteps]) -> float:
    event = GaussianSteps(noise_multiplier=noise, sample_rate=setting.sample_rate, steps=steps)
    return compose_epsilon([event, *others], setting.delta)


def _up(sigma: float) -> float:
    """Return the least multiple of the last decimal that is not below."""
    lattice: int = 10**SIGMA_DECIMALS
    number = math.ceil(sigma * lattice)
    # The product was rounded, perhaps down to a whole number.
    return number / lattice if number / lattice >= sigma else (number + 1) / lattice


def _check_targets(epsilon: float, alone: float) -> None:
    for option, value in (("--epsilon", epsilon), ("--epsilon-alone", alone)):
        if not MIN_EPSILON <= value <= MAX_EPSILON:
            raise ConfigError(
                f"{option} is {as_set(value)}; expected a number from {MIN_EPSILON:g} to {MAX_EPSILON:g}."
            )
    if alone < epsilon:
        raise ConfigError(
            f"--epsilon-alone is {as_set(alone)} and --epsilon {as_set(epsilon)}, but what an upload keeps to by itself, the sum "
            "of several keeps to as well; raise --epsilon-alone or lower --epsilon."
        )
