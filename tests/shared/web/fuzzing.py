"""Every route of a console with whatever its schema allows and forbids, by schemathesis (Dygalo, "Schemathesis", 2022)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import requests
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as from_seed
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from shared.web.asked import token_of
from shared.web.console import Console
from shared.web.roles import Action, Role, allowed


def fuzz(app: FastAPI, console: Console, address: str, *, examples: int = 5) -> list[str]:
    """Return the answers of a status from 500 on, each with what was asked; every route is asked by a role that may.

    Args:
        app: without its guard; its schema is read, `address` is asked.
        console: gets an account for each role.
        examples: of requests to each route, in each of two ways: as its schema says, and otherwise.
    """
    broken: list[str] = []
    accounts = {
        role: console.accounts.from_issuer(issuer="i", subject=role, name=f"any {role}", role=role, address="127.0.0.1")
        for role in Role
    }

    def ask(case: Any) -> None:
        action = Action(case.operation.definition.raw["tags"][0])
        account = next(account for role, account in accounts.items() if allowed(role, action))
        # One session for each, for some end theirs.
        secret = console.sessions.begin(account.id, address="127.0.0.1", browser="schemathesis")
        cookie = f"{console.cookie('session')}={secret}"
        headers = {"cookie": cookie, "origin": address, "x-csrf-token": token_of(secret)}
        asked = case.as_transport_kwargs(base_url=address, headers=headers)
        # A stream of events has no end, so only its beginning is read.
        with requests.request(**asked, allow_redirects=False, stream=True, timeout=60) as answer:
            status = answer.status_code
        if status >= 500:
            broken.append(f"{status} {case.method} {case.formatted_path} {case.query} {case.body!r}"[:300])

    ask_every_route(app.openapi(), ask, examples)
    return broken


def ask_every_route(schema: dict[str, Any], ask: Callable[[Any], None], examples: int) -> None:
    """Ask so many requests of each route that its schema allows, and as many that it forbids."""
    operations = list(schemathesis.openapi.from_dict(schema).get_all_operations())
    assert len(operations) == sum(len(methods) for methods in schema["paths"].values()) > 0, "every route is asked"
    for found in operations:
        for mode in GenerationMode:
            _run_cases(found.ok().as_strategy(generation_mode=mode), ask, examples)


def _run_cases(cases: Any, ask: Callable[[Any], None], examples: int) -> None:
    """Ask so many requests of a strategy."""

    @from_seed(0)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=cases)
    def one(case: Any) -> None:
        ask(case)

    # A route that takes nothing cannot be asked otherwise than its schema says.
    with suppress(Unsatisfiable):
        one()
