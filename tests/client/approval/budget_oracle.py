"""What a job does to a budget, computed from the account as a ledger exports it: another way than `client.budget`."""

from __future__ import annotations

from collections.abc import Sequence

from client.approval.facts import BudgetLine, Lines, planned_charges
from client.ledger.account import PROMISES, Budget, Promise
from client.policy.policy import Policy
from shared.job.job import Job
from shared.privacy.accounting import GaussianSteps
from shared.privacy.filter import SpendingRule, filter_orders
from shared.privacy.ledger_export import LedgerExport


def lines_by(account: LedgerExport | None, budget: Budget) -> Lines:
    """Return what tells of an account, None before its first charge, under these caps."""

    def lines(job: Job, policy: Policy) -> tuple[BudgetLine, ...]:
        planned = planned_charges(job, policy)
        return tuple(_line(promise, job.sha256, planned[promise], account, budget) for promise in PROMISES if planned)

    return lines


def _line(
    promise: Promise, job: str, planned: Sequence[GaussianSteps], account: LedgerExport | None, budget: Budget
) -> BudgetLine:
    cap = budget.cap(promise)
    if account is None:
        orders = filter_orders(epsilon=cap, delta=budget.delta)
        rule = SpendingRule(composition=budget.composition, delta=budget.delta, orders=orders)
        return BudgetLine(promise=promise, spent=0.0, after=rule.epsilon(planned), cap=cap)
    alone = promise == "alone"
    rule = account.rule_alone if alone else account.rule
    charged = (*account.charges, *account.held_back)
    # What this job was charged already is a part of its plan; the others stay.
    others = [one.mechanism if alone else one.together or one.mechanism for one in charged if one.job_id != job]
    spent = rule.epsilon(account.mechanisms_alone if alone else account.mechanisms)
    return BudgetLine(promise=promise, spent=spent, after=max(spent, rule.epsilon([*others, *planned])), cap=cap)
