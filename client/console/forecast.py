"""What a site's budget will be: once the jobs that wait or run have run to their ends, and after a job that nobody asked for yet.

Both are computed by the ledger's own rule from plans that the site would execute; no epsilon is ever added to another.

Formal guarantees (tests: tests/client/console/test_forecast.py)
    * A forecast is what the ledger says once the jobs have run (tests/client/console/test_budget.py,
      test_what_would_be_spent_is_the_ledgers), and what Requests shows of each (test_one_job_is_as_its_request_says).
    * One computation runs at a time, and of one browser only the last that it asked for (test_only_the_latest_is_computed).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from client.approval.facts import BudgetLine, Promised, planned_charges, promised_by
from client.approval.request import Request, RequestState
from client.budget.accounts import AccountBudget, Plan
from client.console.requests import Requests
from client.ledger.account import Promise
from client.policy.policy import Policy
from client.policy.verdicts import Verdict, beside_numbers, numbers
from shared.errors import PrivacyError, SilotuneError
from shared.job.job import Job
from shared.job.parsing import parse
from shared.web.accounting import accounted
from shared.web.turns import Busy, Turn

MOST_JOBS = 20
_STATES: tuple[RequestState, ...] = ("begun", "approved", "waiting")  # in the order in which they will spend
_WAIT_SECONDS, _MOST_KEPT = 10, 64


@dataclass(frozen=True, kw_only=True)
class Queued:
    """A job that will spend, or may.

    Attributes:
        request, state: see `client.approval.request`.
        steps: of its plan.
        after: what will be spent once it and those before it in the list have run; None where that cannot be told.
    """

    request: Request
    state: RequestState
    steps: int
    after: dict[Promise, float] | None


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What will be spent.

    Attributes:
        jobs: those that began first, then those that were approved, then those that wait; at most `MOST_JOBS`.
        after: once all of them have run.
        left_out: how many more there are.
    """

    jobs: tuple[Queued, ...]
    after: dict[Promise, float]
    left_out: int


@dataclass(frozen=True, kw_only=True)
class WhatIf:
    """What a job would cost.

    Attributes:
        job: with the settings that were asked about.
        promised: None where it cannot be told.
        lines: of both caps; none where it cannot be told.
        rules: of the policy, as far as they judge numbers.
        unjudged: names of the others.
    """

    job: Job
    promised: Promised | None
    lines: tuple[BudgetLine, ...]
    rules: tuple[Verdict, ...]
    unjudged: tuple[str, ...]

    @property
    def told_apart(self) -> tuple[BudgetLine, ...]:
        """The caps; of two that agree the first."""
        same = len({(line.spent, line.after, line.cap) for line in self.lines}) == 1
        return self.lines[:1] if same else self.lines


class Forecasts:
    """Forecasts of one site's budget; safe to use from several threads.

    Args:
        requests: the jobs that people were asked for.
    """

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._turn = Turn()
        self._kept: tuple[tuple[object, ...], Forecast] | None = None
        self._turns, self._latest = Turn(seconds=_WAIT_SECONDS), dict[str, int]()
        self._answers: dict[tuple[object, ...], WhatIf] = {}

    def known(self, budget: AccountBudget) -> Forecast | None:
        """Return the forecast if it need not be computed, or there is nothing to foresee."""
        queued, basis = self._queued(budget)
        if not queued:
            return Forecast(jobs=(), after=budget.spent, left_out=0)
        kept = self._kept
        return kept[1] if kept is not None and kept[0] == basis else None

    def of(self, budget: AccountBudget) -> Forecast:
        """Return the forecast; takes seconds of accounting unless it is known.

        Raises:
            ConfigError, TrustError, RunError: see `ApprovalDesk`.
            Busy: others wait for theirs.
        """
        with self._turn:
            queued, basis = self._queued(budget)
            if (kept := self.known(budget)) is not None:
                return kept
            policy = self._requests.desk.policy()
            found = accounted(lambda: _foreseen(budget, policy, queued))
            self._kept = (basis, found)
            return found

    def what_if(self, budget: AccountBudget, settings: dict[str, Any], *, asker: str) -> WhatIf | None:
        """Return what a job would cost; None if the same browser has asked for another since, or others keep it waiting.

        Args:
            settings: of `Job`, but for what costs nothing.
            asker: tells one browser from another.

        Raises:
            ConfigError: there can be no such job.
        """
        policy, site = self._requests.desk.policy(), self._requests.desk.site
        job = _imagined(policy, settings)
        key = (budget.mark, policy.model_dump_json(), site, job.sha256)
        with self._asked(asker) as is_latest:
            if (known := self._answers.get(key)) is not None:
                return known
            if not is_latest:
                return None
            found = accounted(lambda: _cost(budget, policy, job, site))
            while len(self._answers) >= _MOST_KEPT:
                del self._answers[next(iter(self._answers))]
            self._answers[key] = found
            return found

    @contextmanager
    def _asked(self, asker: str) -> Iterator[bool]:
        """Wait until nobody computes; yield whether this is still what the asker wants to know."""
        number = self._latest[asker] = self._latest.get(asker, 0) + 1
        try:
            with ExitStack() as held:
                try:
                    held.enter_context(self._turns)
                except Busy:
                    is_latest = False
                else:
                    is_latest = self._latest.get(asker, number) == number
                yield is_latest
        finally:
            if self._latest.get(asker) == number:
                self._latest.pop(asker, None)

    def _queued(self, budget: AccountBudget) -> tuple[list[tuple[Request, RequestState, Job]], tuple[object, ...]]:
        """Return the jobs that will spend, and what is another value once the forecast may be another."""
        found: list[tuple[Request, RequestState, Job]] = []
        for shown in self._requests.all():
            if shown.state not in _STATES:
                continue
            try:
                job = shown.request.signed().job
            except SilotuneError:
                continue  # of another version; its own page tells
            if shown.state != "begun" or budget.steps_of(job.sha256) < job.charged_steps:
                found.append((shown.request, shown.state, job))
        found.sort(key=lambda one: (_STATES.index(one[1]), one[0].arrived))
        basis: tuple[object, ...] = (
            budget.mark,
            self._requests.desk.policy().model_dump_json(),
            *((one.id, state) for one, state, _ in found),
        )
        return found, basis


def _foreseen(budget: AccountBudget, policy: Policy, queued: Sequence[tuple[Request, RequestState, Job]]) -> Forecast:
    plans, jobs = dict[str, Plan](), list[Queued]()
    for request, state, job in queued[:MOST_JOBS]:
        plan = planned_charges(job, policy)
        after = None
        if plan:
            plans[job.sha256] = plan
            after = _after(budget, plans)
        jobs.append(Queued(request=request, state=state, steps=job.charged_steps, after=after))
    return Forecast(jobs=tuple(jobs), after=_after(budget, plans) or budget.spent, left_out=len(queued) - len(jobs))


def _cost(budget: AccountBudget, policy: Policy, job: Job, site: str) -> WhatIf:
    return WhatIf(
        job=job,
        promised=promised_by(job, policy),
        lines=budget.lines("", planned_charges(job, policy)),
        rules=tuple(numbers(policy, job, site=site)),
        unjudged=beside_numbers(policy),
    )


def _after(budget: AccountBudget, plans: dict[str, Plan]) -> dict[Promise, float] | None:
    try:
        return budget.after(plans)
    except PrivacyError:
        return None


def _imagined(policy: Policy, settings: dict[str, Any]) -> Job:
    """Return a job of these settings, on what the policy names first: what it is on costs nothing."""
    backbone = next(iter(policy.backbones))
    fixed = {
        "name": "what-if",
        "model": {"backbone": backbone},
        "task": {"kind": "sequence_classification", "labels": ["a", "b"]},
    }
    return parse(Job, fixed | settings, source="this job")
