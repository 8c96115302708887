"""Every route of a service with whatever its schema allows and forbids, by schemathesis."""

from __future__ import annotations

from typing import Any

import requests

from tests.shared.web.fuzzing import ask_every_route


def fuzz(schema: dict[str, Any], address: str, *, examples: int) -> list[str]:
    """Return the answers of a status from 500 on, each with what was asked."""
    broken: list[str] = []

    def ask(case: Any) -> None:
        asked = case.as_transport_kwargs(base_url=address)
        with requests.request(**asked, allow_redirects=False, timeout=60) as answer:
            if answer.status_code >= 500:
                broken.append(f"{answer.status_code} {case.method} {case.formatted_path} {case.body!r}"[:300])

    ask_every_route(schema, ask, examples)
    return broken
