"""Whether a site's whole budget holds one job of those that its policy accepts.

Both limits are the site's own numbers, and a job's epsilon is that of its plan (PLD composition), while the budget is spent by
the account's rule: under "adaptive" the same steps cost a tenth more, or much more. A job that the policy accepts at its limit
then stops before its last round.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from client.ledger.account import Budget, Promise
from shared.epsilons import as_set, rounded_up
from shared.errors import PrivacyError
from shared.privacy.accounting import GaussianSteps, calibrate_noise_multiplier
from shared.privacy.filter import SpendingRule, filter_orders


def unfinished(budget: Budget, policy: Mapping[str, Any]) -> str:
    """Return a clause for each cap of the budget that a job at all of the policy's limits at once costs more than; else "".

    Args:
        budget: of a site that has spent nothing.
        policy: `max_epsilon_per_job`, `max_steps`, `max_sample_rate`, `min_noise_multiplier` and, if set, `max_epsilon_alone` of
            policy.toml; the job is at the budget's delta.
    """
    limits: tuple[tuple[Promise, str, str], ...] = (
        ("together", "max_epsilon_per_job", "epsilon"),
        ("alone", "max_epsilon_alone", "epsilon_alone"),
    )
    found = []
    for promise, limit, setting in limits:
        if (epsilon := policy.get(limit)) is None:
            continue  # as much as max_epsilon_per_job, of a budget that is no smaller
        cap, cost = budget.cap(promise), _cost(budget, budget.cap(promise), policy, epsilon)
        if cost > cap:
            unset = promise == "alone" and budget.epsilon_alone is None
            found.append(
                f"a job of {setting} {as_set(epsilon)}, which policy.toml accepts, may need {rounded_up(cost, 2)} of the budget "
                f"({budget.composition} composition), which is {as_set(cap)}"
                + (", as budget.epsilon_alone is not set" if unset else "")
                + f", and would stop before its last round: lower {limit}, or {'set' if unset else 'raise'} budget.{setting} in "
                "site.toml"
            )
    return "; ".join(found)


def _cost(budget: Budget, cap: float, policy: Mapping[str, Any], epsilon: float) -> float:
    """Return what a job at the policy's limits costs by the account's rule; 0 if no noise within reach makes such a job."""
    rate, steps = policy["max_sample_rate"], policy["max_steps"]
    try:
        sigma = calibrate_noise_multiplier(epsilon=epsilon, delta=budget.delta, sample_rate=rate, steps=steps)
    except PrivacyError:
        return 0.0
    noise = max(sigma, policy["min_noise_multiplier"])
    orders = filter_orders(epsilon=cap, delta=budget.delta)
    rule = SpendingRule(composition=budget.composition, delta=budget.delta, orders=orders)
    return rule.epsilon([GaussianSteps(noise_multiplier=noise, sample_rate=rate, steps=steps)])
