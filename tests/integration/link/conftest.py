"""A consortium for each test, and sites that come back sooner than real ones, unless their patience is what is tested."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.link import client
from tests.integration.link.parts import Consortium


@pytest.fixture
def consortium(tmp_path: Path) -> Consortium:
    return Consortium(tmp_path)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("endurance") is None:
        monkeypatch.setattr(client, "LONGEST_BACKOFF_SECONDS", 0.5)
