"""What `site.toml` says no to. What a site accepts beyond that is `client.policy.policy`.

Guarantee (tests: tests/client/site/test_site.py, tests/client/site/test_oracles.py): the answer follows from the job and from
what the site declares, never from a record, so its text may be sent to the coordinator.
"""

from __future__ import annotations

from client.site.config import SiteConfig
from shared.data.datasets import PERSON_ROLE
from shared.epsilons import delta_rounded_up
from shared.errors import PolicyError
from shared.job.job import Job
from shared.job.kinds import RULES
from shared.job.values import PERSON_UNITS
from shared.privacy.sizes import default_delta, least_delta_refused


def check_terms(config: SiteConfig, job: Job, *, declared_records: int) -> None:
    """Refuse a job that does not fit what the site declares.

    Args:
        declared_records: the site's public size, in the unit of its budget.

    Raises:
        PolicyError: with the reason.
    """
    if job.privacy.mechanism == "none" and not config.allow_non_private:
        raise PolicyError(
            f"site {config.name} accepts only private jobs, but privacy.mechanism is 'none'. Use 'dp-sgd'."
        )
    if job.privacy.mechanism == "central":
        if not config.allow_trusted_coordinator:
            raise PolicyError(
                f"site {config.name} protects its own records, but privacy.mechanism is 'central': the coordinator "
                "would see unprotected updates. Use 'dp-sgd', or have the site engineer set allow_trusted_coordinator in "
                "site.toml."
            )
    else:
        _check_unit(config, job)
    _check_delta(config, job, declared_records)
    _check_data(config, job)


def _check_unit(config: SiteConfig, job: Job) -> None:
    # Exactly the same: a release by the record has no bound by the person, and one account must hold every release.
    asked, own = job.privacy.unit, config.budget.unit
    if asked == own:
        return
    reason = f"site {config.name} keeps its budget by the {own}, but the job's privacy.unit is {asked!r}."
    if asked in PERSON_UNITS and PERSON_ROLE not in config.data.columns:
        reason += f" Its data has no id column, so it cannot tell which records are one {asked}'s."
    raise PolicyError(f"{reason} It accepts only jobs with privacy.unit = {own!r}.")


def _check_delta(config: SiteConfig, job: Job, declared_records: int) -> None:
    delta = job.privacy.delta
    if delta > config.budget.delta:
        raise PolicyError(
            f"the job's delta {delta_rounded_up(delta)} is weaker than this site's "
            f"{delta_rounded_up(config.budget.delta)}; lower it."
        )
    limit = least_delta_refused(declared_records)
    if job.privacy.sites_add_noise and delta >= limit:
        raise PolicyError(
            f"site {config.name} declares {declared_records:,} {config.budget.unit}s and may have up to twice as many, so the "
            f"job's delta {delta_rounded_up(delta)} must be below {limit:.1e}; use at most "
            f"{default_delta(2 * declared_records):.1e}."
        )


def _check_data(config: SiteConfig, job: Job) -> None:
    """Judge by the declared columns and labels; whether the records keep to them is the site's own business."""
    if missing := [role for role in RULES[job.task.kind].roles if role not in config.data.columns]:
        raise PolicyError(
            f"site {config.name} has no column for {', '.join(missing)}, which a job of task.kind {job.task.kind!r} needs; its "
            "engineer names it in data.columns of site.toml."
        )
    labels = job.task.labels
    if labels and (unknown := [label for label in config.labels if label not in labels]):
        raise PolicyError(
            f"site {config.name} declares the label {unknown[0]!r} for its records, which is not among task.labels "
            f"({', '.join(labels)}); add it to the job, or have the site engineer change labels in site.toml."
        )
