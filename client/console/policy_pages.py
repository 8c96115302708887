"""The pages about the site's policy: what it accepts, who wants it changed, and every version that was in force.

Formal guarantees (tests: tests/client/console/test_policy_pages.py)
    * The account that is signed in is who proposes, accepts or declines; nothing in a form can name another
      (test_nobody_speaks_for_another).
    * Engineers propose and officers accept; where the policy in force wants two, or two for each job that the change would let
      in with fewer, not their own (test_who_may_do_what, test_four_eyes_are_two_accounts, test_nobody_lowers_four_eyes_alone);
      then an engineer is none of the two (test_an_engineer_and_an_officer_do_not_lower_four_eyes).
    * A proposal is made from the file that its page showed, or not at all (test_a_page_of_before_proposes_nothing).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Literal

from fastapi import Form, Path, Query
from fastapi.responses import Response

from client.approval.policy_changes import MOST_BYTES, PolicyChanges, Proposal, Stale, Version, checked_text
from client.approval.request import same_account
from client.approval.requests import MOST_REASON
from client.console.content import being_read, content_of
from client.console.request_pages import Carried, Reason
from client.console.state import PolicyText, policy_text
from client.policy.diff import SettingChange, line_diff, setting_changes
from client.policy.policy import Policy, policy_of
from shared.errors import ConfigError, RunError
from shared.web.asked import Asked, Denied, Here, Routes, address_of
from shared.web.roles import Action, allowed

ROUTES = Routes()

_MOST_LISTED = 50
_AT_LINE = re.compile(r"\bline (\d{1,6})\b")  # as `tomllib` says where a text is no TOML
Deeds = Literal["", "compare", "propose"]

Number = Annotated[int, Path(ge=1, le=2**31)]
Given = Annotated[int | None, Query(ge=1, le=2**31)]
Text = Annotated[str, Form(max_length=4 * MOST_BYTES)]
Sha256 = Annotated[str, Form(max_length=64)]
Deed = Annotated[str, Form(max_length=20)]


@ROUTES.page("/policy", Action.SEE_POLICY)
def policy(asked: Here) -> Response:
    """Show what the site accepts, what is proposed, and the versions that were in force."""
    if (later := being_read(asked)) is not None:
        return later
    changes = _changes(asked)
    versions, proposals = changes.versions(), changes.proposals()
    return asked.page(
        "policy.html",
        policy=policy_text(content_of(asked).home),
        versions=versions[:_MOST_LISTED],
        waiting=[one for one in proposals if one.state == "open"],
        others=[one for one in proposals if one.state != "open"][:_MOST_LISTED],
        needed=changes.needed,
        may_propose=allowed(asked.me().role, Action.PROPOSE_POLICY),
    )


@ROUTES.page("/policy/edit", Action.PROPOSE_POLICY)
def edit(asked: Here, version: Given = None, proposal: Given = None) -> Response:
    """Show the policy, an old version of it or what somebody proposed, to be changed."""
    now = policy_text(content_of(asked).home)
    if proposal is not None:
        found = _proposal(asked, proposal)
        return _form(asked, now, _changes(asked).text_of(found.sha256), deed="compare", compared=True)
    if version is None:
        return _form(asked, now, now.text)
    return _form(asked, now, _changes(asked).text_of(_version(asked, version).sha256), version=version)


@ROUTES.page("/policy/edit", Action.PROPOSE_POLICY, method="POST", written=("text", "reason"))
def propose(
    asked: Here,
    text: Text = "",
    base: Sha256 = "",
    reason: Reason = "",
    do: Deed = "",
    language: Deed = "",
    theme: Deed = "",
) -> Response:
    """Compare what was written with the policy, or propose it; or show it in another language or theme, compared."""
    if language or theme:
        return asked.prefer(_written(asked.preferring(language, theme), text, base, reason, ""), language, theme)
    return _written(asked, text, base, reason, do)


def _written(asked: Asked, text: str, base: str, reason: str, do: str) -> Response:
    now, reason = policy_text(content_of(asked).home), " ".join(reason.split())
    deed: Deeds = "propose" if do == "propose" else "compare"
    try:
        if deed == "compare":
            return _form(asked, now, checked_text(text).decode(), reason=reason, deed=deed, compared=True)
        me = asked.me()
        officer = allowed(me.role, Action.DECIDE_REQUESTS)
        proposal = _changes(asked).propose(text, base=base, by=me.name, reason=reason, officer=officer)
    except ConfigError as error:
        return _form(asked, now, text, reason=reason, status=422, refused=str(error), deed=deed)
    except Stale:
        problem = asked.texts("policy.problem_stale")
        return _form(asked, now, text, reason=reason, status=409, problem=problem, deed=deed, compared=True)
    except RunError as error:
        return _form(asked, now, text, reason=reason, status=409, problem=str(error), deed=deed)
    return asked.to(f"/policy/proposals/{proposal.number}")


@ROUTES.page("/policy/proposals/{number}", Action.SEE_POLICY)
def one_proposal(asked: Here, number: Number, reason: Carried = "") -> Response:
    """Show one proposal beside the policy that it was made from; `reason` was typed before a proof was wanted."""
    return _proposal_page(asked, _proposal(asked, number), typed={"accept": reason})


@ROUTES.page(
    "/policy/proposals/{number}/accept",
    Action.ACCEPT_POLICY,
    method="POST",
    proven="/policy/proposals/{number}#decide",
    carried=("reason",),
    written=("reason",),
)
def accept(asked: Here, number: Number, reason: Reason = "") -> Response:
    """Put a proposal into force."""
    found, changes, me = _proposal(asked, number), _changes(asked), asked.me()
    if found.state == "open" and changes.needed_for(found) > 1 and same_account(found.by, me.name):
        return _proposal_page(asked, found, problem=asked.texts("policy.problem_same"), status=409)
    if found.state == "open" and changes.lacks_officer(found):
        return _proposal_page(asked, found, problem=asked.texts("policy.officers"), status=409)
    return _decided(asked, number, lambda: changes.accept(number, by=me.name, reason=reason), {"accept": reason})


@ROUTES.page("/policy/proposals/{number}/decline", Action.PROPOSE_POLICY, method="POST", written=("reason",))
def decline(asked: Here, number: Number, reason: Reason = "") -> Response:
    """Decline a proposal, or take one's own back."""
    found, me = _proposal(asked, number), asked.me()
    if not (allowed(me.role, Action.ACCEPT_POLICY) or same_account(found.by, me.name)):
        raise Denied(403, "forbidden")
    declined = {"decline": reason}
    return _decided(asked, number, lambda: _changes(asked).decline(number, by=me.name, reason=reason), declined)


@ROUTES.page("/policy/versions/{number}", Action.SEE_POLICY)
def one_version(asked: Here, number: Number, against: Given = None) -> Response:
    """Show one version beside another, by default the one before."""
    changes, found = _changes(asked), _version(asked, number)
    versions = changes.versions()
    other = _version(asked, against) if against else next((one for one in versions if one.number == number - 1), None)
    text = changes.text_of(found.sha256)
    before = "" if other is None else changes.text_of(other.sha256)
    return asked.page(
        "policy-version.html",
        shown=found,
        other=other,
        versions=[one for one in versions if one.number != number][:_MOST_LISTED],
        text=text,
        lines=[] if other is None else line_diff(before, text),
        settings=[] if other is None else _settings(before, text),
        is_latest=number == versions[0].number,
        may_propose=allowed(asked.me().role, Action.PROPOSE_POLICY),
    )


def _decided(asked: Asked, number: int, act: Callable[[], object], typed: Mapping[str, str]) -> Response:
    try:
        act()
    except Stale:
        problem = asked.texts("policy.problem_changed")
        return _proposal_page(asked, _proposal(asked, number), problem=problem, status=409, typed=typed)
    except (RunError, ConfigError) as error:
        return _proposal_page(asked, _proposal(asked, number), problem=str(error), status=409, typed=typed)
    return asked.to(f"/policy/proposals/{number}")


def _form(
    asked: Asked,
    now: PolicyText,
    text: str,
    *,
    status: int = 200,
    reason: str = "",
    refused: str = "",
    problem: str = "",
    deed: Deeds = "",
    compared: bool = False,
    version: int | None = None,
) -> Response:
    officer = allowed(asked.me().role, Action.DECIDE_REQUESTS)
    return asked.page(
        "policy-edit.html",
        status=status,
        now=now,
        text=text,
        reason=reason,
        refused=refused,
        wrong_line=_wrong_line(text, refused),
        problem=problem,
        deed=deed,
        lines=line_diff(now.text, text) if compared else [],
        settings=_settings(now.text, text) if compared else [],
        compared=compared,
        lacks_officer=compared and not officer and _changes(asked).wants_officers(text),
        brought=version,
        keys=[(name, field.description or "") for name, field in Policy.model_fields.items()],
        most=MOST_REASON,
        back="/policy/edit",
        keeps={"form": "edit", "action": "/policy/edit"},
    )


def _wrong_line(text: str, refused: str) -> tuple[int, str] | None:
    """Return number and text of the line that an error speaks of; a text box shows no numbers."""
    found, lines = _AT_LINE.search(refused), text.splitlines()
    number = int(found[1]) if found else 0
    return (number, lines[number - 1]) if 1 <= number <= len(lines) else None


def _proposal_page(
    asked: Asked,
    found: Proposal,
    *,
    problem: str = "",
    status: int = 200,
    typed: Mapping[str, str] | None = None,
) -> Response:
    changes, me = _changes(asked), asked.me()
    mine = same_account(found.by, me.name)
    is_kept = found.state in ("open", "accepted") or changes.has_text(found.sha256)
    before, after = (changes.text_of(found.base), changes.text_of(found.sha256)) if is_kept else ("", "")
    officer = allowed(me.role, Action.ACCEPT_POLICY)
    needed = changes.needed_for(found) if is_kept else changes.needed
    lacks_officer = found.state == "open" and changes.lacks_officer(found)
    return asked.page(
        "policy-proposal.html",
        status=status,
        proposal=found,
        is_kept=is_kept,
        lines=line_diff(before, after),
        settings=_settings(before, after),
        problem=problem,
        needed=needed,
        mine=mine,
        lacks_officer=lacks_officer,
        may_accept=found.state == "open" and officer and not lacks_officer and (needed == 1 or not mine),
        may_propose=officer,
        may_decline=found.state in ("open", "stale") and (officer or mine),
        most=MOST_REASON,
        typed={"accept": "", "decline": "", **(typed or {})},
        back=address_of(f"/policy/proposals/{found.number}", reason=(typed or {}).get("accept", "")),
    )


def _settings(before: str, after: str) -> list[SettingChange]:
    """Return the settings that differ; none where one of the two is no policy."""
    try:
        return setting_changes(policy_of(before), policy_of(after))
    except ConfigError:
        return []


def _proposal(asked: Asked, number: int) -> Proposal:
    found = _changes(asked).find(number)
    if found is None:
        raise Denied(404, "missing")
    return found


def _version(asked: Asked, number: int) -> Version:
    found = next((one for one in _changes(asked).versions() if one.number == number), None)
    if found is None:
        raise Denied(404, "missing")
    return found


def _changes(asked: Asked) -> PolicyChanges:
    return content_of(asked).policies
