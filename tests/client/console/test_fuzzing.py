"""No request makes a site's console fail, whatever it holds."""

from __future__ import annotations

import pytest

from client.console import pages
from tests.client.console.conftest import Serving
from tests.shared.web.fuzzing import fuzz


def test_no_request_makes_it_fail(serving: Serving) -> None:
    assert fuzz(serving.app, serving.console, serving.address) == []


def test_a_route_that_fails_is_found(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "health", lambda *given: 1 / 0)
    found = fuzz(serving.app, serving.console, serving.address, examples=1)
    assert found
    assert all(one.startswith("500 GET /health ") for one in found)
