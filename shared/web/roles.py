"""Who may do what in a console: the one table of permissions.

Every route of every console declares one `Action` (`shared.web.asked.Routes`), and `allowed` decides by this table alone.

Formal guarantees (tests: tests/shared/web/test_roles.py)
    * An action that is not in the table is allowed to nobody (test_every_action_has_a_line).
    * Every route of a console declares an action, or the console does not start (test_no_route_is_without_an_action).
    * Roles do not contain one another: whoever manages accounts decides nothing by that
      (test_an_administrator_does_not_decide).
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType


class Role(StrEnum):
    """What an account is there for; each account has one."""

    VIEWER = "viewer"  # sees how much of the budget is spent, and how runs go
    RESEARCHER = "researcher"  # sees runs and budgets, makes jobs, decides nothing
    ENGINEER = "engineer"  # keeps the machine, its policy and its connections; stops and resumes runs
    OFFICER = "officer"  # answers for privacy: sees everything that left, decides about jobs at a site, signs reports
    ADMINISTRATOR = "administrator"  # manages accounts


class Action(StrEnum):
    """Everything that a console can be asked to do."""

    BE_A_GUEST = "be a guest"  # pages before sign-in, style sheets and scripts
    OWN_ACCOUNT = "own account"  # one's own password, sessions, language
    MANAGE_ACCOUNTS = "manage accounts"
    SEE_BUDGET = "see budget"
    SEE_REQUESTS = "see requests"
    DECIDE_REQUESTS = "decide requests"
    SEE_RELEASES = "see releases"
    EXPORT_RELEASES = "export releases"
    SEE_POLICY = "see policy"
    PROPOSE_POLICY = "propose policy"
    ACCEPT_POLICY = "accept policy"
    SEE_HEALTH = "see health"
    SEE_RUNS = "see runs"
    STEER_RUNS = "steer runs"  # stop, and resume
    SEE_REPORTS = "see reports"  # make and export them; they quote what sites said and released
    SIGN_REPORTS = "sign reports"
    SEE_SITES = "see sites"
    ADMIT_SITES = "admit sites"  # and shut them out
    MAKE_JOBS = "make jobs"
    SEE_RESULTS = "see results"  # of simulations, which nobody's budget paid for


_ALL = frozenset(Role)
_V, _R, _E, _O, _A = Role
PERMISSIONS: Mapping[Action, frozenset[Role]] = MappingProxyType(
    {
        Action.BE_A_GUEST: _ALL,
        Action.OWN_ACCOUNT: _ALL,
        Action.MANAGE_ACCOUNTS: frozenset({_A}),
        Action.SEE_BUDGET: _ALL,
        Action.SEE_REQUESTS: frozenset({_E, _O}),
        Action.DECIDE_REQUESTS: frozenset({_O}),
        Action.SEE_RELEASES: frozenset({_E, _O}),
        Action.EXPORT_RELEASES: frozenset({_O}),
        Action.SEE_POLICY: frozenset({_E, _O, _A}),
        Action.PROPOSE_POLICY: frozenset({_E, _O}),
        Action.ACCEPT_POLICY: frozenset({_O}),
        Action.SEE_HEALTH: frozenset({_E, _O, _A}),
        Action.SEE_RUNS: _ALL,
        Action.STEER_RUNS: frozenset({_E}),
        Action.SEE_REPORTS: frozenset({_O}),
        Action.SIGN_REPORTS: frozenset({_O}),
        Action.SEE_SITES: frozenset({_E, _O}),
        Action.ADMIT_SITES: frozenset({_E}),
        Action.MAKE_JOBS: frozenset({_R}),
        Action.SEE_RESULTS: _ALL,
    }
)
WITHOUT_SIGN_IN = frozenset({Action.BE_A_GUEST})


def allowed(role: Role | None, action: Action) -> bool:
    """Return whether an account of this role, or somebody who has not signed in (None), may do it."""
    if role is None:
        return action in WITHOUT_SIGN_IN
    return role in PERMISSIONS.get(action, frozenset())
