"""The figures about shared noise on a run's report: the second promise, or what sharing would make of the same noise.

Guarantee (tests: tests/server/reports/test_promises.py): each is composed from the recorded events, and what was not executed is
called what it would be.
"""

from __future__ import annotations

from dataclasses import dataclass

from server.records.privacy import SiteRecord
from server.reports.run.formats import format_budget, format_epsilon
from server.reports.run.run_data import Arm, job_value
from shared.errors import PrivacyError
from shared.privacy.accounting import compose_epsilon
from shared.privacy.shared_noise import SharedNoise

COLLUDING = 2
"""Sites that are assumed to work with the coordinator, where a job does not say it."""


@dataclass(frozen=True)
class Promise:
    """A figure: its title, the epsilon, and what it is of."""

    title: str
    value: str
    note: str


def promise_beside(arm: Arm) -> Promise | None:
    """Return what stands beside a run's epsilon, or None if nothing can be said."""
    sites = [site for site in arm.sites if isinstance(site, SiteRecord) and site.private and site.randomness == "os"]
    if not sites or len(sites) < len(arm.sites):
        return None
    alone = [site.epsilon_alone for site in sites if site.epsilon_alone is not None]
    if sites[0].shared is not None:
        value = format_epsilon(max(alone)) if len(alone) == len(sites) else "not recorded"
        return Promise(
            "Epsilon of an upload alone", value, "if secure aggregation fails and everybody else works together"
        )
    honest = len(sites) - COLLUDING
    if honest < 2:
        return None
    shared = SharedNoise(honest=honest, colluding=COLLUDING)
    try:
        value = format_epsilon(max(_summed(shared, site) for site in sites))
    except PrivacyError:  # a record that no accountant takes is told of elsewhere
        return None
    return Promise(
        "Epsilon, were the noise shared", value, f"same noise and steps, summed securely: against {shared.against}"
    )


def alone_in_job(arm: Arm) -> str:
    """Return the job's limit on the second promise of shared noise, which may be left to a given noise multiplier."""
    limit = job_value(arm.job, "privacy", "epsilon_alone")
    return format_budget(float(limit)) if isinstance(limit, int | float) else "not set"


def _summed(shared: SharedNoise, site: SiteRecord) -> float:
    metrics = site.events[len(site.training) :]
    return compose_epsilon([*shared.summed(site.training), *metrics], site.delta)
