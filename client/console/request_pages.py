"""The pages about jobs that wait for people of the site: read, approve, refuse, withdraw.

Who decided stands in the site's audit log by the decision itself, under the account's name.

Formal guarantees (tests: tests/client/console/test_requests.py)
    * The account that is signed in is who approves; nothing in a form can name another (test_nobody_approves_for_another).
    * Two approvals are two accounts (test_four_eyes_are_two_accounts).
    * Approving is offered beside the facts, and never without; an approval that does not name the facts of this job, with the
      budget as it is, does nothing (tests/client/console/test_deciding.py).
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Form, Path
from fastapi.responses import Response

from client.approval.requests import MOST_REASON, Changed
from client.console.content import being_read, content_of
from client.console.requests import Known, Requests, Shown
from shared.errors import ConfigError, RunError, SilotuneError
from shared.web.asked import Asked, Denied, Here, Routes
from shared.web.roles import Action, allowed

ROUTES = Routes()

Id = Annotated[str, Path(max_length=64)]
Reason = Annotated[str, Form(max_length=4 * MOST_REASON)]
Mark = Annotated[str, Form(max_length=64)]


@ROUTES.page("/requests", Action.SEE_REQUESTS)
def requests(asked: Here) -> Response:
    """Show all requests, those that wait first."""
    if (later := being_read(asked)) is not None:
        return later
    found = _requests(asked)
    shown, problem, asks_people = found.all(), "", True
    try:
        asks_people = found.desk.policy().approval == "required"
    except ConfigError as error:
        problem = str(error).replace(str(content_of(asked).home.policy), "policy.toml")
    return asked.page(
        "requests.html",
        waiting=[one for one in shown if one.state == "waiting"],
        others=[one for one in shown if one.state != "waiting"],
        asks_people=asks_people,
        problem=problem,
    )


@ROUTES.page("/requests/{request}", Action.SEE_REQUESTS)
def one_request(asked: Here, request: Id) -> Response:
    """Show one request; what takes long comes later, if it is not known yet."""
    if (later := being_read(asked)) is not None:
        return later
    return _page(asked, _found(asked, request))


@ROUTES.page("/requests/{request}/facts", Action.SEE_REQUESTS)
def facts(asked: Here, request: Id) -> Response:
    """Show what is to be known of a request; a part of its page."""
    shown = _found(asked, request)
    template = "request-facts-part.html" if asked.is_fragment else "request-facts-page.html"
    try:
        found, problem = _requests(asked).facts(shown), ""
    except SilotuneError as error:
        if not asked.is_fragment:
            raise
        found, problem = None, str(error)
    return asked.page(template, shown=shown, problem=problem, **_deciding(asked, shown, found))


@ROUTES.page("/requests/{request}/approve", Action.DECIDE_REQUESTS, method="POST", proven="/requests/{request}")
def approve(asked: Here, request: Id, reason: Reason = "", seen: Mark = "", read: Mark = "") -> Response:
    """Note that the account approves a request, whose facts it read as they are now."""
    shown = _found(asked, request)
    if shown.mark == seen and shown.approved_by(asked.me().name):
        return _page(asked, shown, problem=asked.texts("requests.problem_same"), status=409)
    if shown.mark == seen and not _requests(asked).are_read(shown, read):
        return _page(asked, shown, problem=asked.texts("requests.problem_unread"), status=409, typed=reason)
    return _decided(asked, shown, "approve", reason, seen)


@ROUTES.page("/requests/{request}/refuse", Action.DECIDE_REQUESTS, method="POST")
def refuse(asked: Here, request: Id, reason: Reason = "", seen: Mark = "") -> Response:
    """Note that the account refuses a request, or withdraws what was approved."""
    shown = _found(asked, request)
    if not reason.split():
        return _page(asked, shown, problem=asked.texts("requests.problem_reason"), status=422)
    return _decided(asked, shown, "refuse", reason, seen)


def _decided(asked: Asked, shown: Shown, decision: str, reason: str, seen: str) -> Response:
    requests, by, request = _requests(asked), asked.me().name, shown.request.id
    text = " ".join(reason.split())
    if len(text) > MOST_REASON or not text.isprintable():
        problem = asked.texts("requests.problem_text", most=MOST_REASON)
        return _page(asked, shown, problem=problem, status=422, typed=text)
    try:
        if decision == "approve":
            requests.desk.approve(request, by=by, reason=text, seen=seen)
        else:
            requests.desk.refuse(request, by=by, reason=text, seen=seen)
    except Changed:
        problem = asked.texts("requests.problem_changed")
        return _page(asked, _found(asked, request), problem=problem, status=409, typed=text)
    except RunError as error:
        return _page(asked, _found(asked, request), problem=str(error), status=409, typed=text)
    finally:
        requests.forget_count()
    return asked.to(f"/requests/{request}")


def _page(asked: Asked, shown: Shown, *, problem: str = "", status: int = 200, typed: str = "") -> Response:
    return asked.page(
        "request.html",
        status=status,
        shown=shown,
        problem=problem,
        **_deciding(asked, shown, _known(asked, shown), typed=typed),
    )


def _deciding(asked: Asked, shown: Shown, known: Known | None, *, typed: str = "") -> dict[str, Any]:
    """Return what the facts and the forms to decide are made from."""
    me = asked.me()
    return {
        "facts": known.facts if known else None,
        "read": known.mark if known else "",
        "typed": typed,
        "may_decide": allowed(me.role, Action.DECIDE_REQUESTS),
        "is_mine": shown.approved_by(me.name),
        "most": MOST_REASON,
    }


def _known(asked: Asked, shown: Shown) -> Known | None:
    try:
        return _requests(asked).known_facts(shown)
    except SilotuneError:
        return None  # where they are asked for, the page tells why


def _found(asked: Asked, request: str) -> Shown:
    found = _requests(asked).find(request)
    if found is None:
        raise Denied(404, "missing")
    return found


def _requests(asked: Asked) -> Requests:
    return content_of(asked).requests
