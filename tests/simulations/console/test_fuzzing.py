"""No request makes the research console fail, whatever it holds."""

from __future__ import annotations

from tests.shared.web.fuzzing import fuzz
from tests.simulations.console.conftest import Serving


def test_no_request_makes_it_fail(serving: Serving) -> None:
    assert fuzz(serving.app, serving.console, serving.address) == []
