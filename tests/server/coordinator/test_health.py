"""What of a coordinator's folder is worth waking somebody for."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from server.coordinator import health
from server.store.home import CoordinatorHome
from tests.conftest import Outcome

ONLINE = {"online": True, "until": "2027-01-01", "last_seen": None}


@pytest.fixture
def home(tmp_path: Path) -> CoordinatorHome:
    (tmp_path / "coordinator.toml").write_text("")
    return CoordinatorHome(tmp_path)


def said(home: CoordinatorHome, **changes: Any) -> dict[str, Any]:
    now = datetime.now(UTC)
    facts = {
        "pid": os.getpid(),
        "updated": now.isoformat(),
        "state": "running",
        "sites": {"a": ONLINE},
        "certificate_until": (now + timedelta(days=100)).isoformat(),
    }
    home.status.write_text(json.dumps(facts | changes))
    return home.read_status()


def test_a_coordinator_with_sites_is_well(home: CoordinatorHome, silotune: Callable[..., Outcome]) -> None:
    assert health.troubles(home, said(home), job_waits=True) == []
    shown = silotune("coordinator", "status", home.path)
    assert (shown.status, "trouble" in shown.out) == (0, False)
    assert json.loads(silotune("coordinator", "status", home.path, "--json").out)["healthy"] is True


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"sites": {}}, "no site is admitted; with its certificate: silotune coordinator install"),
        ({"sites": {"a": ONLINE | {"online": False}}}, "a job is open and no site is connected"),
        ({"state": "troubled", "problem": "audit: No space left on device"}, "No space left on device"),
        ({"trust_problem": "the revocation list is number 1"}, "the revocation list is number 1"),
        ({"state": "starting"}, "it is starting."),
        ({"state": "stopped"}, "it does not run; start it with: silotune coordinator start"),
        ({"updated": (datetime.now(UTC) - timedelta(seconds=61)).isoformat()}, "it does not run"),
        (
            {"certificate_until": (datetime.now(UTC) + timedelta(days=6)).isoformat()},
            "the server's certificate ends on",
        ),
        (
            {"sites": {"a": ONLINE | {"until": str(datetime.now(UTC) + timedelta(days=6))}}},
            "the certificate of a ends on",
        ),
        (
            {"descriptors": {"used": 900, "limit": 1024}},
            "more than 80% of 1024 file descriptors are in use; raise LimitNOFILE",
        ),
        (
            {"clock": {"set_by": -3600.0, "set_at": datetime.now(UTC).isoformat(), "synchronized": True}},
            "the clock was set by -3600.0 s at",
        ),
    ],
)
def test_what_is_wrong_is_said_and_status_ends_with_1(
    home: CoordinatorHome, silotune: Callable[..., Outcome], changes: dict[str, Any], text: str
) -> None:
    (found,) = health.troubles(home, said(home, **changes), job_waits=True)
    assert text in found.text
    assert found.kind in health.KINDS
    if "no site is connected" in text:  # no job is open there
        return
    shown = silotune("coordinator", "status", home.path)
    assert shown.status == 1
    assert f"trouble: {found.text}" in shown.out
    told = json.loads(silotune("coordinator", "status", home.path, "--json").out)
    assert (told["healthy"], told["troubles"]) == (False, [found.text])


def test_a_disk_that_is_nearly_full_is_said(home: CoordinatorHome, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(300 * 2**20))
    (found,) = health.troubles(home, said(home), job_waits=False)
    assert found.text == f"less than 1 GB is free at {home.path}; make room."


def test_a_coordinator_that_never_ran_does_not_run(home: CoordinatorHome) -> None:
    (found,) = health.troubles(home, home.read_status(), job_waits=False)
    assert found.text.startswith("it does not run")


@pytest.mark.parametrize(
    "changes",
    [
        {"certificate_until": "soon"},
        {"certificate_until": "2027-01-01"},
        {"certificate_until": 5},
        {"updated": 1_790_000_000},
        {"updated": "2126-01-01T00:00:00+00:00"},
        {"sites": {"a": ONLINE | {"last_seen": [1]}}},
        {"sites": []},
        {"descriptors": {"used": "many", "limit": 1}},
        {"descriptors": 7},
        {"clock": {"set_by": 1, "set_at": "noon", "synchronized": None}},
        {"pid": "1"},
    ],
)
def test_a_status_that_no_coordinator_wrote_is_of_none(
    home: CoordinatorHome, silotune: Callable[..., Outcome], changes: dict[str, Any]
) -> None:
    said(home, **changes)
    shown = silotune("coordinator", "status", home.path)
    assert shown.status == 1
    assert "it does not run" in shown.out
