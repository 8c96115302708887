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

    VIEWER = "viewer"  # sees how much of the budget is spent
    RESEARCHER = "researcher"  # sees runs and budgets, decides nothing
    ENGINEER = "engineer"  # keeps the machine, its policy and its connection
    OFFICER = "officer"  # answers for privacy: sees everything that left, decides about jobs
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
    }
)
WITHOUT_SIGN_IN = frozenset({Action.BE_A_GUEST})


def allowed(role: Role | None, action: Action) -> bool:
    """Return whether an account of this role, or somebody who has not signed in (None), may do it."""
    if role is None:
        return action in WITHOUT_SIGN_IN
    return role in PERMISSIONS.get(action, frozenset())
