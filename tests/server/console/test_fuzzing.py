"""No request makes a coordinator's console fail, whatever it holds."""

from __future__ import annotations

from tests.client.console.conftest import Serving
from tests.shared.web.fuzzing import fuzz


def test_no_request_makes_it_fail(serving: Serving) -> None:
    assert fuzz(serving.app, serving.console, serving.address) == []
