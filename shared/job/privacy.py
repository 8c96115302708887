"""What is promised, and the noise that keeps it: mechanism, unit, epsilon, delta, released metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from shared.epsilons import as_set, delta_rounded_up
from shared.job.parsing import Section
from shared.job.values import PERSON_UNITS, Delta, Epsilon, NoiseMultiplier, SampleRate, Unit
from shared.limits import MAX_GRAD_NORM, MAX_LOSS, MAX_SITES, MIN_GRAD_NORM

MIN_CENTRAL_SITES = 100
"""Sites below which the noise that hides one of them buries what they have in common."""

OF_SHARES = ("epsilon_alone", "max_colluding", "spare_attempts")
"""Settings of the mechanism `distributed` alone."""

METRICS: Mapping[str, str] = {
    "accuracy": "how many held-out records the model gets right and wrong: two counts",
    "confusion": "how many held-out records of each class the model takes for each class: a count per cell",
    "loss": "the mean loss on held-out records, each cut at site_metrics.largest_loss: two counts",
}
"""Everything that a site can release about its own data, and what it tells."""


class CentralConfig(Section):
    """Noise that a trusted coordinator adds over many sites; see `shared.privacy.central`."""

    num_sites: int = Field(ge=1, le=MAX_SITES)
    """N: declared (public) number of sites, at least 100. The noisy sum is divided by `site_sample_rate` times this."""
    site_sample_rate: SampleRate = 0.5
    """q: probability with which each site enters a round, by a secret coin of the coordinator (Poisson sampling)."""
    clip_norm: float = Field(default=0.1, ge=MIN_GRAD_NORM, le=1e6)
    """S: the largest L2 norm of one site's update over adapter and head together, in the first round."""
    target_quantile: float | None = Field(default=0.5, gt=0, lt=1)
    """Share of the updates that S is moved to leave unclipped (Andrew et al. 2021); None keeps S as it is."""
    clip_learning_rate: float = Field(default=0.2, gt=0, le=2)
    """S is multiplied by exp(-rate * (noised share of unclipped updates - `target_quantile`)) after every round."""
    count_noise: float | None = Field(default=None, gt=0, le=1e6)
    """Standard deviation of the noise on the count of unclipped updates, above half the noise multiplier; None takes
    q N / 20, or the noise multiplier if that is larger. The updates get as much more noise as the count costs."""

    @model_validator(mode="after")
    def _check_sites(self) -> Self:
        if self.num_sites < MIN_CENTRAL_SITES:
            raise ValueError(
                f"num_sites is {self.num_sites}; with fewer than {MIN_CENTRAL_SITES} sites the noise that hides one of them "
                "buries what they have in common. Use the mechanism 'dp-sgd', where every site protects its own records"
            )
        return self


class PrivacyConfig(Section):
    """Everything that changes what is protected and how much; see `shared.privacy.plan`."""

    mechanism: Literal["dp-sgd", "distributed", "central", "none"] = "dp-sgd"
    """`dp-sgd`: every site adds the whole noise. `distributed`: every site adds a share of it, and the coordinator learns only
    the sum of all sites (secure aggregation). `central`: a trusted coordinator adds it, over 100 sites or more; sites send it
    unprotected updates. `none` releases unprotected updates. A site accepts either of the last two only if its own settings say
    so."""
    unit: Unit | Literal["site"] = "record"
    """What the neighbouring data sets differ in, added or removed: one `record`; one `patient` or `customer` with all their
    records, for which each site's data must have an id column; or (with `central`, and only there) one `site`."""
    # Not written out where it is not set: jobs of older versions keep their hash.
    records_per_person: int | None = Field(default=None, ge=1, le=1000, exclude_if=lambda value: value is None)
    """G: at most so many records of each patient or customer enter a step, drawn anew each time; their mean gradient is
    clipped. It bounds time and memory; epsilon does not depend on it. Only, and always, with these units."""
    epsilon: Epsilon = 8.0
    """Target for a site that executes every planned step and releases all of `site_metrics`. Of `distributed` it is the promise
    against the coordinator and up to `max_colluding` sites together."""
    # Not written out where they are not set: jobs of older versions keep their hash.
    epsilon_alone: Epsilon | None = Field(default=None, exclude_if=lambda value: value is None)
    """Of `distributed`, where it is required unless `noise_multiplier` is given: target for what a site sends by itself, if
    secure aggregation fails completely and everybody else colludes. From `epsilon` up; the larger of the two noises is added."""
    max_colluding: int | None = Field(default=None, ge=0, le=MAX_SITES, exclude_if=lambda value: value is None)
    """Of `distributed`, where it is required: largest number of sites that may work together with the coordinator before
    `epsilon` no longer holds, of all that take part in the job. Every other site of a sum is counted on for its share of the
    noise, so `federation.min_sites` must be larger by at least two."""
    spare_attempts: int | None = Field(default=None, ge=0, le=100_000, exclude_if=lambda value: value is None)
    """Of `distributed`: repetitions, over the whole run, of rounds in which a site dropped out after it had been charged. They
    are part of both epsilons, and the run ends where they do not suffice. None: a tenth of the rounds, rounded up."""
    delta: Delta = 1e-5
    """Failure probability; must be far below 1 / number of records (or patients, customers)."""
    sample_rate: SampleRate = 0.05
    """q: probability with which each record (or patient, customer) enters a step (Poisson sampling)."""
    max_grad_norm: float = Field(default=1.0, ge=MIN_GRAD_NORM, le=MAX_GRAD_NORM)
    """C: the largest L2 norm of the gradient of one record (or patient, customer) over adapter and head together."""
    noise_multiplier: NoiseMultiplier | None = None
    """sigma; None calibrates it from epsilon, delta, sample_rate and the planned steps (`central`: site_sample_rate, rounds). Of
    `distributed` it is that of one site's share, and both epsilons follow from it."""
    central: CentralConfig | None = Field(default=None, exclude_if=lambda value: value is None)

    @model_validator(mode="after")
    def _check_unit(self) -> Self:
        if self.unit in PERSON_UNITS and self.records_per_person is None:
            raise ValueError(
                f"unit is {self.unit!r}, so records_per_person must say how many records of each {self.unit} enter a step, "
                "for example 4"
            )
        if self.unit not in PERSON_UNITS and self.records_per_person is not None:
            raise ValueError("records_per_person is for the units 'patient' and 'customer'; remove it or set the unit")
        return self

    def spare_attempts_for(self, rounds: int) -> int:
        """Return how many repetitions a plan of so many rounds has room for; 0 unless the mechanism is `distributed`."""
        if not self.shares_noise:
            return 0
        return -(-rounds // 10) if self.spare_attempts is None else self.spare_attempts

    @property
    def sites_add_noise(self) -> bool:
        """Whether each site adds noise to what it sends and keeps an account of it."""
        return self.mechanism in ("dp-sgd", "distributed")

    @property
    def shares_noise(self) -> bool:
        """Whether what sites send is added up under secure aggregation, each with a share of the noise."""
        return self.mechanism == "distributed"

    @model_validator(mode="after")
    def _check_distributed(self) -> Self:
        if not self.shares_noise:
            if found := [key for key in OF_SHARES if getattr(self, key) is not None]:
                raise ValueError(
                    f"{found[0]} is for the mechanism 'distributed', but mechanism is {self.mechanism!r}; remove "
                    f"{', '.join(found)}, or change the mechanism"
                )
            return self
        if self.max_colluding is None:
            raise ValueError(
                "mechanism is 'distributed', so max_colluding must say how many sites may work together with the coordinator "
                "before epsilon no longer holds, for example 1; nobody else can know it, so it has no default"
            )
        if self.noise_multiplier is not None:
            return self  # both epsilons follow from it
        if self.epsilon_alone is None:
            raise ValueError(
                "mechanism is 'distributed', so epsilon_alone must say what a site's own upload keeps to if secure aggregation "
                "fails and everybody else colludes, for example 8; epsilon holds only while it works"
            )
        if self.epsilon_alone < self.epsilon:
            raise ValueError(
                f"epsilon_alone is {as_set(self.epsilon_alone)} and epsilon {as_set(self.epsilon)}, but what a site's upload "
                "keeps to by itself, the sum of several keeps to as well; raise epsilon_alone or lower epsilon"
            )
        return self

    @model_validator(mode="after")
    def _check_central(self) -> Self:
        central = self.mechanism == "central"
        if central != (self.unit == "site") or central != (self.central is not None):
            raise ValueError(
                "mechanism 'central', unit 'site' and the section privacy.central belong together: give all three or none "
                f"(mechanism is {self.mechanism!r}, unit {self.unit!r}, privacy.central is "
                f"{'missing' if self.central is None else 'there'})"
            )
        if self.central is not None and self.delta >= 1 / self.central.num_sites:
            raise ValueError(
                f"delta is {delta_rounded_up(self.delta)}, but with {self.central.num_sites:,} sites it must be below 1/N = "
                f"{1 / self.central.num_sites:.1e}, best a tenth of it"
            )
        return self


class SiteMetricsConfig(Section):
    """Metrics of the sites' own held-out records, released once, after the last round; see `shared.runtime.site_metrics`."""

    names: tuple[Literal["accuracy", "confusion", "loss"], ...] = ()
    """What is asked for; none: nothing but updates leaves a site. A site's policy may forbid any of them."""
    noise_multiplier: NoiseMultiplier = 10.0
    """Standard deviation of the noise on every count, where one record is one vote. Part of the job's epsilon."""
    largest_loss: float = Field(default=5.0, gt=0, le=MAX_LOSS)
    """Of `loss`: a record's loss is cut here, so that one record cannot move the mean by more."""

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        if len(set(self.names)) != len(self.names):
            raise ValueError("site_metrics.names holds a name twice; every release costs budget, so name each once")
        return self
