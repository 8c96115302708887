"""The pages about the site's budget: what is spent, what will be, and what would be if."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import Query
from fastapi.responses import JSONResponse, Response

from client.budget.accounts import AccountBudget
from client.console.content import SiteContent, being_read, content_of
from client.console.forecast import Forecast
from client.console.pages import Id, told_waiting
from client.ledger.account import PROMISES
from shared.errors import ConfigError, SilotuneError
from shared.numbers import read_number, read_whole
from shared.web.accounting import accounted
from shared.web.asked import Asked, Denied, Here, Routes
from shared.web.roles import Action, allowed

ROUTES = Routes()

_LEAST_NOISE, _MOST_EPSILON, _MOST_STEPS = 0.3, 100.0, 100_000
"""Of a job that is only imagined: outside of them accounting takes long, and says nothing."""

Typed = Annotated[str, Query(max_length=20)]


@ROUTES.page("/budget", Action.SEE_BUDGET)
def budget(asked: Here) -> Response:
    """Show every account of the ledger."""
    if (later := being_read(asked)) is not None:
        return later
    content = content_of(asked)
    current = content.budgets.current()
    return asked.page(
        "budget.html",
        budgets=content.budgets.all(),
        current=current,
        forecast=_known_forecast(asked, current),
        config=content.home.load_config(),
        num_waiting=told_waiting(asked),
        may_see_requests=_may_see_requests(asked),
    )


@ROUTES.page("/budget/{account}/line.json", Action.SEE_BUDGET)
def budget_line(asked: Here, account: Id) -> Response:
    """Return what was spent after each charge, for the chart."""
    found, t = _account(asked, account), asked.texts
    series: list[dict[str, Any]] = []
    times: list[float] = []
    for promise in PROMISES[: 2 if found.tells_both else 1]:
        points = accounted(partial(found.line, promise))
        times = [point.time for point in points]
        series.append(
            {
                "label": t(f"budget.line_{promise}"),
                "values": [point.spent for point in points],
                "cap": found.caps[promise],
                "cap_label": t(f"budget.cap_{promise}"),
            }
        )
    return JSONResponse({"times": times, "series": series, "epsilon": t("budget.epsilon"), "time": t("budget.time")})


@ROUTES.page("/budget/{account}/jobs", Action.SEE_BUDGET)
def budget_jobs(asked: Here, account: Id) -> Response:
    """Show what each job has charged; a part of the page, which comes later as it takes longer."""
    found = _account(asked, account)
    names = {job.job: content_of(asked).releases.name_of(job.job) for job in accounted(lambda: found.jobs)}
    return asked.page("budget-jobs.html" if asked.is_fragment else "budget-jobs-page.html", budget=found, names=names)


@ROUTES.page("/budget/{account}/forecast", Action.SEE_BUDGET)
def forecast(asked: Here, account: Id) -> Response:
    """Show what will be spent once all jobs that are known here have run; a part of the page, as it may take seconds."""
    found, content = _account(asked, account), content_of(asked)
    problem, foreseen = "", None
    try:
        foreseen = content.forecasts.of(found)
    except SilotuneError as error:
        problem = str(error)
    return asked.page(
        "budget-forecast.html" if asked.is_fragment else "budget-forecast-page.html",
        one=found,
        forecast=foreseen,
        problem=problem if _may_see_requests(asked) else "",
        may_see_requests=_may_see_requests(asked),
    )


@ROUTES.page("/budget/{account}/what-if", Action.SEE_BUDGET)
def what_if(
    asked: Here,
    account: Id,
    steps: Typed = "100",
    rate: Typed = "0.05",
    by: Typed = "epsilon",
    value: Typed = "2",
    alone: Typed = "",
    summed: Typed = "",
    sites: Typed = "5",
    colluding: Typed = "1",
) -> Response:
    """Show what a job would cost that nobody asked for yet."""
    found, content = _account(asked, account), content_of(asked)
    typed = {"steps": steps, "rate": rate, "by": by, "value": value, "alone": alone}
    typed |= {"summed": summed, "sites": sites, "colluding": colluding}
    answer, problem, busy = None, "", False
    try:
        settings = _settings(typed, found)
    except ValueError:
        problem = asked.texts("what_if.numbers", least=_LEAST_NOISE, most=_MOST_EPSILON, steps=f"{_MOST_STEPS:,}")
    else:
        try:
            asker = asked.session.label if asked.session else ""
            answer = content.forecasts.what_if(found, settings, asker=asker)
            busy = answer is None
        except SilotuneError as error:
            problem = str(error)
    if busy and asked.is_fragment:
        return Response(status_code=204)  # the answer to what was asked later replaces it
    return asked.page(
        "what-if-answer.html" if asked.is_fragment else "what-if.html",
        one=found,
        typed=typed,
        answer=answer,
        problem=asked.texts("what_if.busy") if busy else problem,
        most_steps=_most_steps(content),
        accuracy=content.accuracy,
    )


def _most_steps(content: SiteContent) -> int:
    """Return how many steps a job may have; of a policy that cannot be read the answer tells."""
    try:
        return min(content.requests.desk.policy().max_steps, _MOST_STEPS)
    except ConfigError:
        return _MOST_STEPS


def _settings(typed: dict[str, str], budget: AccountBudget) -> dict[str, Any]:
    """Return the settings of a job from what was typed.

    Raises:
        ValueError: something is no number, or beyond what is accounted for here.
    """
    steps, rate, value = read_whole(typed["steps"]), read_number(typed["rate"]), read_number(typed["value"])
    privacy: dict[str, Any] = {"sample_rate": rate, "delta": budget.delta}
    by_noise = typed["by"] == "noise"
    privacy["noise_multiplier" if by_noise else "epsilon"] = value
    settings: dict[str, Any] = {
        "training": {"rounds": steps, "local_steps": 1},
        "privacy": privacy,
        "federation": {"min_sites": read_whole(typed["sites"])},
    }
    if not 1 <= steps <= _MOST_STEPS or not 1e-6 <= rate <= 1:
        raise ValueError("steps or rate")
    if (value < _LEAST_NOISE) if by_noise else (not 0.01 <= value <= _MOST_EPSILON):
        raise ValueError("value")
    if typed["summed"]:
        privacy |= {"mechanism": "distributed", "max_colluding": read_whole(typed["colluding"])}
        if not by_noise:
            privacy["epsilon_alone"] = read_number(typed["alone"] or typed["value"])
            if not value <= privacy["epsilon_alone"] <= _MOST_EPSILON:
                raise ValueError("alone")
    if budget.account.unit in ("patient", "customer"):
        privacy |= {"unit": budget.account.unit, "records_per_person": 1}
    return settings


def _known_forecast(asked: Asked, budget: AccountBudget) -> Forecast | None:
    try:
        return content_of(asked).forecasts.known(budget)
    except SilotuneError:
        return None  # where it is asked for, the part of the page tells why


def _may_see_requests(asked: Asked) -> bool:
    return allowed(asked.me().role, Action.SEE_REQUESTS)


def _account(asked: Asked, account: str) -> AccountBudget:
    found = content_of(asked).budgets.find(account)
    if found is None:
        raise Denied(404, "missing")
    return found
