"""Who may do what: the table, all of it, and that no route is without a line of it."""

from __future__ import annotations

import itertools

import pytest
from fastapi import FastAPI
from fastapi.responses import Response

from shared.web.application import check_gates
from shared.web.asked import Routes
from shared.web.roles import PERMISSIONS, Action, Role, allowed

# Written out once more: whoever changes the table has to mean it.
MAY = {
    "viewer": {"be a guest", "own account", "see budget", "see runs", "see results"},
    "researcher": {"be a guest", "own account", "see budget", "see runs", "make jobs", "see results"},
    "engineer": {
        "be a guest",
        "own account",
        "see budget",
        "see requests",
        "see releases",
        "see policy",
        "propose policy",
        "see health",
        "see runs",
        "steer runs",
        "see sites",
        "admit sites",
        "see results",
    },
    "officer": {
        "be a guest",
        "own account",
        "see budget",
        "see requests",
        "decide requests",
        "see releases",
        "export releases",
        "see policy",
        "propose policy",
        "accept policy",
        "see health",
        "see runs",
        "see reports",
        "sign reports",
        "see sites",
        "see results",
    },
    "administrator": {
        "be a guest",
        "own account",
        "manage accounts",
        "see budget",
        "see policy",
        "see health",
        "see runs",
        "see results",
    },
}


@pytest.mark.parametrize(("role", "action"), list(itertools.product(Role, Action)))
def test_every_role_and_action(role: Role, action: Action) -> None:
    assert allowed(role, action) == (action.value in MAY[role.value])


@pytest.mark.parametrize("action", Action)
def test_before_sign_in(action: Action) -> None:
    assert allowed(None, action) == (action is Action.BE_A_GUEST)


def test_every_action_has_a_line() -> None:
    assert set(PERMISSIONS) == set(Action)
    with pytest.raises(TypeError):
        PERMISSIONS[Action.SEE_BUDGET] = frozenset()  # type: ignore[index]


def test_an_administrator_does_not_decide() -> None:
    assert not allowed(Role.ADMINISTRATOR, Action.DECIDE_REQUESTS)
    assert not allowed(Role.ADMINISTRATOR, Action.ACCEPT_POLICY)
    assert not any(allowed(role, Action.MANAGE_ACCOUNTS) for role in Role if role is not Role.ADMINISTRATOR)


def test_no_route_is_without_an_action() -> None:
    routes = Routes()

    @routes.page("/declared", Action.SEE_BUDGET)
    def declared() -> Response:
        return Response()

    check_gates(routes.routes)

    @routes.get("/undeclared")
    def undeclared() -> Response:
        return Response()

    with pytest.raises(AssertionError, match="/undeclared declares no action"):
        check_gates(routes.routes)
    mounted = FastAPI(openapi_url=None)
    mounted.mount("/files", FastAPI())
    with pytest.raises(AssertionError, match="/files declares no action"):
        check_gates(mounted.routes)
