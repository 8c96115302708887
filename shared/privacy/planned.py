"""What a job plans in numbers, and what that costs: everything about a plan but its execution (`shared.privacy.plan`).

Rules, ledgers and pages judge a plan by this alone, in processes that never load PyTorch.

Formal guarantees
    * What is executed has these very numbers: `shared.privacy.plan.PrivacyPlan` is this, and adds no number
      (tests: tests/shared/privacy/test_plan.py).
    * The sampling rate is a constant of the job, so it does not depend on the number of records at the site
      (test: tests/shared/privacy/test_plan.py::test_sample_rate_does_not_depend_on_the_data).
    * The plan of a job whose sites add shares of the noise is that of one share: what it promises is what holds if everything
      else is broken. What the sum of shares promises is `of_sum`; see `shared.privacy.shared_noise`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from shared.epsilons import as_set, delta_rounded_up, rate_rounded_up
from shared.errors import PrivacyError
from shared.job.job import Job
from shared.job.privacy import PrivacyConfig
from shared.privacy.accounting import (
    MAX_MEAN_LOSS,
    GaussianSteps,
    calibrate_noise_multiplier,
    compose_epsilon,
    mean_loss,
    noise_of_share,
    noise_of_sum,
)
from shared.privacy.shared_noise import SharedNoise
from shared.privacy.sizes import default_delta


@dataclass(frozen=True, kw_only=True)
class PlannedPrivacy:
    """What one site will execute, as far as it is accounted for.

    Attributes:
        private: False where sites release unprotected updates: baselines, and sites of a trusted coordinator.
        unit: unit of privacy, "record", "patient" or "customer"; "site" where a trusted coordinator adds the noise.
        records_per_person: G, most records of one person in a step, mean of whose gradients is clipped; None for records.
        sample_rate: Poisson rate q with which each unit enters a step, in (0, 1].
        noise_multiplier: sigma, standard deviation of the noise in units of `max_grad_norm`; 0 if not private.
        max_grad_norm: clipping bound C on one unit's gradient, L2 norm over adapter and head together.
        delta: failure probability of the guarantee.
        planned_steps: steps T of a site that takes part in every round, spare attempts included.
        metrics: the release of site metrics after the last round; None if there is none.
        honest: H, least number of honest sites in a sum, if the noise is one site's share of it; None if it is all there is.
        colluding: of a share, most sites that may work together with the coordinator.
    """

    private: bool
    unit: str
    sample_rate: float
    noise_multiplier: float
    max_grad_norm: float
    delta: float
    planned_steps: int
    metrics: GaussianSteps | None = None
    records_per_person: int | None = None
    honest: int | None = None
    colluding: int = 0

    @classmethod
    def from_job(cls, job: Job) -> Self:
        """Build the plan of `job`, calibrating the noise multiplier where the job gives only a target epsilon.

        Of `privacy.mechanism` "distributed" it is what one site executes: its noise is a share, its epsilon `epsilon_alone`.

        Raises:
            PrivacyError: if no noise keeps to the target, or the job's own leaves no epsilon that says anything.
        """
        privacy, steps = job.privacy, job.charged_steps
        private, colluding = privacy.sites_add_noise, privacy.max_colluding
        honest = None if colluding is None else job.federation.min_sites - colluding
        asked = job.site_metrics
        metrics = None
        if private and asked.names:
            # No sampling: every held-out record votes once in each metric.
            metrics = GaussianSteps(noise_multiplier=asked.noise_multiplier, sample_rate=1.0, steps=len(asked.names))
        others = (metrics,) if metrics else ()
        return cls(
            private=private,
            unit=privacy.unit,
            sample_rate=privacy.sample_rate,
            noise_multiplier=_site_noise_multiplier(privacy, steps, others, honest) if private else 0.0,
            max_grad_norm=privacy.max_grad_norm,
            delta=privacy.delta,
            planned_steps=steps,
            metrics=metrics,
            records_per_person=privacy.records_per_person,
            honest=honest,
            colluding=colluding or 0,
        )

    @classmethod
    def of_coordinator(cls, job: Job) -> Self:
        """Build what a trusted coordinator executes over the sites of `job`: one step is one round, one record one site.

        Raises:
            PrivacyError: if the job's mechanism is another.
        """
        privacy, central = job.privacy, job.privacy.central
        if central is None:
            raise PrivacyError(
                f"privacy.mechanism is {privacy.mechanism!r}, so the coordinator of this job adds no noise."
            )
        steps = job.training.rounds
        return cls(
            private=True,
            unit=privacy.unit,
            sample_rate=central.site_sample_rate,
            noise_multiplier=_noise_multiplier(privacy, central.site_sample_rate, steps),
            max_grad_norm=central.clip_norm,
            delta=privacy.delta,
            planned_steps=steps,
        )

    def check_size(self, num_units: int) -> None:
        """Raise `PrivacyError` if delta would allow to publish everything about one of this many records or persons."""
        if self.private and num_units > 0 and self.delta >= 1 / num_units:
            raise PrivacyError(
                f"privacy.delta is {delta_rounded_up(self.delta)}, but with {num_units:,} {self.unit}s it must be below 1/n = "
                f"{1 / num_units:.1e}; use at most {default_delta(num_units):.1e}."
            )

    def mechanism(self, steps: int) -> GaussianSteps:
        """Return the accounting event of `steps` executed steps.

        Raises:
            PrivacyError: if the plan is not private, for then nothing can be accounted.
        """
        if not self.private:
            raise PrivacyError("this plan adds no noise, so no epsilon can be stated for it.")
        return GaussianSteps(noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate, steps=steps)

    @property
    def shared_noise(self) -> SharedNoise | None:
        """How many share the noise; None where each site adds all of it."""
        return None if self.honest is None else SharedNoise(honest=self.honest, colluding=self.colluding)

    @property
    def of_sum(self) -> Self:
        """The same steps with the noise of the honest sites' sum of shares; the plan itself where noise is not shared."""
        if self.honest is None:
            return self
        return replace(self, noise_multiplier=noise_of_sum(self.noise_multiplier, self.honest), honest=None)

    def together(self, steps: int) -> GaussianSteps | None:
        """Return the accounting event of the same steps as a sum of shares has it; None where noise is not shared."""
        return None if self.honest is None else self.of_sum.mechanism(steps)

    @property
    def events(self) -> tuple[GaussianSteps, ...]:
        """Everything that a site releases if it takes part in every round, site metrics included."""
        steps = self.mechanism(self.planned_steps)
        return (steps, self.metrics) if self.metrics else (steps,)

    def epsilon(self, steps: int | None = None) -> float:
        """Return epsilon after `steps` executed steps; by default of everything that is planned, `events`."""
        return compose_epsilon(self.events if steps is None else [self.mechanism(steps)], self.delta)

    def expected_batch_size(self, declared_size: int) -> float:
        """Return q times the declared (public) number of records or persons: the only divisor of a noisy sum."""
        return self.sample_rate * declared_size


def _site_noise_multiplier(
    privacy: PrivacyConfig, steps: int, others: tuple[GaussianSteps, ...], honest: int | None
) -> float:
    """Return what a site adds: of shares, the least that keeps to both epsilons, sum and share each beside `others`."""
    alone = privacy.epsilon_alone
    if honest is None or alone is None or privacy.noise_multiplier is not None:
        return _noise_multiplier(privacy, privacy.sample_rate, steps, others)
    together = _noise_multiplier(privacy, privacy.sample_rate, steps, others)
    by_itself = privacy.model_copy(update={"epsilon": alone})
    return max(noise_of_share(together, honest), _noise_multiplier(by_itself, privacy.sample_rate, steps, others))


def _noise_multiplier(
    privacy: PrivacyConfig, sample_rate: float, steps: int, others: tuple[GaussianSteps, ...] = ()
) -> float:
    """Return the job's noise multiplier, calibrated where the job gives only a target epsilon, beside `others`.

    Raises:
        PrivacyError: if no noise keeps to the target, or the job's own leaves no epsilon that says anything.
    """
    if privacy.noise_multiplier is None:
        return calibrate_noise_multiplier(
            epsilon=privacy.epsilon, delta=privacy.delta, sample_rate=sample_rate, steps=steps, others=others
        )
    event = GaussianSteps(noise_multiplier=privacy.noise_multiplier, sample_rate=sample_rate, steps=steps)
    if mean_loss(event) > MAX_MEAN_LOSS:
        raise PrivacyError(
            f"no epsilon can be stated for privacy.noise_multiplier {as_set(privacy.noise_multiplier)} at sampling rate "
            f"{rate_rounded_up(sample_rate)} over {steps:,} steps: it would be about a thousand or more. Raise the noise "
            "multiplier, or lower the number of steps or the rate."
        )
    return privacy.noise_multiplier
