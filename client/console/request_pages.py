"""The pages about jobs that wait for people of the site: read, approve, refuse, withdraw.

Who decided stands in the site's audit log by the decision itself, under the account's name.

Formal guarantees (tests: tests/client/console/test_requests.py)
    * The account that is signed in is who approves; nothing in a form can name another (test_nobody_approves_for_another).
    * Two approvals are two accounts (test_four_eyes_are_two_accounts).
    * Approving is offered beside the facts, and never without; an approval that does not name what its page showed of this
      job, or would now be worse than that, does nothing (tests/client/console/test_deciding.py).
    * A reason stays in the form in which it was typed (test_a_reason_stays_in_its_own_form).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal

from fastapi import Form, Path, Query
from fastapi.responses import Response

from client.approval.grounds import Difference
from client.approval.requests import MOST_REASON, Changed
from client.console.content import being_read, content_of
from client.console.requests import Known, Requests, Shown
from shared.errors import ConfigError, RunError, SilotuneError
from shared.web.asked import Asked, Denied, Here, Routes, address_of
from shared.web.roles import Action, allowed
from shared.web.turns import Busy

ROUTES = Routes()

Id = Annotated[str, Path(max_length=64)]
Reason = Annotated[str, Form(max_length=4 * MOST_REASON)]
Carried = Annotated[str, Query(max_length=4 * MOST_REASON)]
Mark = Annotated[str, Form(max_length=64)]
Read = Annotated[str, Form(max_length=4096)]


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
def one_request(asked: Here, request: Id, reason: Carried = "") -> Response:
    """Show one request; what takes long comes later, if it is not known yet. `reason` was typed before a proof was wanted."""
    if (later := being_read(asked)) is not None:
        return later
    return _page(asked, _found(asked, request), typed={"approve": reason})


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


@ROUTES.page(
    "/requests/{request}/approve",
    Action.DECIDE_REQUESTS,
    method="POST",
    proven="/requests/{request}#decide",
    carried=("reason",),
    written=("reason",),
)
def approve(asked: Here, request: Id, reason: Reason = "", seen: Mark = "", read: Read = "") -> Response:
    """Note that the account approves a request, if what it read still holds."""
    shown, by = _found(asked, request), asked.me().name
    typed = {"approve": reason}
    if shown.mark != seen:
        return _decided(asked, shown, "approve", reason, seen)  # which tells how it stands now
    if shown.approved_by(by):
        return _page(asked, shown, problem=asked.texts("requests.problem_same"), status=409)
    try:
        since = _requests(asked).since(shown, read, by=by)
    except Busy:
        return _page(asked, shown, problem=asked.texts("errors.text_busy"), status=503, typed=typed)
    if not since.was_shown:
        return _page(asked, shown, problem=asked.texts("requests.problem_unread"), status=409, typed=typed)
    if since.against:
        with suppress(SilotuneError, Busy):  # else the page tells why
            _requests(asked).facts(shown)
        return _page(asked, shown, against=since.against, status=409, typed=typed)
    return _decided(asked, shown, "approve", reason, seen, moved=since.moved)


@ROUTES.page("/requests/{request}/refuse", Action.DECIDE_REQUESTS, method="POST", written=("reason",))
def refuse(asked: Here, request: Id, reason: Reason = "", seen: Mark = "") -> Response:
    """Note that the account refuses a request, or withdraws what was approved."""
    shown = _found(asked, request)
    if not reason.split():
        return _page(asked, shown, problem=asked.texts("requests.problem_reason"), status=422)
    return _decided(asked, shown, "refuse", reason, seen)


def _decided(
    asked: Asked,
    shown: Shown,
    decision: Literal["approve", "refuse"],
    reason: str,
    seen: str,
    *,
    moved: Mapping[str, Any] | None = None,
) -> Response:
    requests, by, request = _requests(asked), asked.me().name, shown.request.id
    text = " ".join(reason.split())
    typed: dict[str, str] = {decision: text}
    if len(text) > MOST_REASON or not text.isprintable():
        problem = asked.texts("requests.problem_text", most=MOST_REASON)
        return _page(asked, shown, problem=problem, status=422, typed=typed)
    try:
        if decision == "approve":
            requests.desk.approve(request, by=by, reason=text, seen=seen, moved=moved)
        else:
            requests.desk.refuse(request, by=by, reason=text, seen=seen)
    except Changed:
        problem = asked.texts("requests.problem_changed")
        return _page(asked, _found(asked, request), problem=problem, status=409, typed=typed)
    except RunError as error:
        return _page(asked, _found(asked, request), problem=str(error), status=409, typed=typed)
    finally:
        requests.forget_count()
    return asked.to(f"/requests/{request}")


def _page(
    asked: Asked,
    shown: Shown,
    *,
    problem: str = "",
    against: Sequence[Difference] = (),
    status: int = 200,
    typed: Mapping[str, str] | None = None,
) -> Response:
    return asked.page(
        "request.html",
        status=status,
        shown=shown,
        problem=problem,
        against=against,
        **_deciding(asked, shown, _known(asked, shown), typed=typed),
    )


def _deciding(
    asked: Asked, shown: Shown, known: Known | None, *, typed: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return what the facts and the forms to decide are made from; `typed` is each form's own reason."""
    me = asked.me()
    return {
        "facts": known.facts if known else None,
        "read": _requests(asked).shown_to(known, me.name) if known else "",
        "typed": {"approve": "", "refuse": "", **(typed or {})},
        "may_decide": allowed(me.role, Action.DECIDE_REQUESTS),
        "is_mine": shown.approved_by(me.name),
        "most": MOST_REASON,
        "back": address_of(f"/requests/{shown.request.id}", reason=(typed or {}).get("approve", "")),
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
