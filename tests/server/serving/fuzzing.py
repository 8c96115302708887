"""Every route of a service with whatever its schema allows and forbids, by schemathesis."""

from __future__ import annotations

from typing import Any

import requests
import schemathesis
from schemathesis import GenerationMode

from tests.shared.web.fuzzing import run_cases


def fuzz(schema: dict[str, Any], address: str, *, examples: int) -> list[str]:
    """Return the answers of a status from 500 on, each with what was asked."""
    broken: list[str] = []

    def ask(case: Any) -> None:
        asked = case.as_transport_kwargs(base_url=address)
        with requests.request(**asked, allow_redirects=False, timeout=60) as answer:
            if answer.status_code >= 500:
                broken.append(f"{answer.status_code} {case.method} {case.formatted_path} {case.body!r}"[:300])

    operations = list(schemathesis.openapi.from_dict(schema).get_all_operations())
    assert len(operations) == sum(len(methods) for methods in schema["paths"].values()) > 0, "every route is asked"
    for found in operations:
        for mode in GenerationMode:
            run_cases(found.ok().as_strategy(generation_mode=mode), ask, examples)
    return broken
