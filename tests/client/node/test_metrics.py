"""The node's pages: what they tell, and that nothing of it follows from a record."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from client.node import metrics
from client.node.health import KINDS
from client.node.status import StatusFile
from client.site.home import SiteHome
from shared.service.page import Page
from simulations.federation.processes import Federation


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> SiteHome:
    federation = Federation(tmp_path_factory.mktemp("federation"))
    federation.found()
    return federation.join("st-anna", [{"text": f"note {i}", "label": "good"} for i in range(20)], epsilon=8.0)


def page(home: SiteHome, path: str, told: dict[str, Any]) -> Page:
    return metrics.pages(home, "st-anna", lambda: told)[path]()


def samples(made: Page) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(made.body.decode())
    return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}


@pytest.fixture
def status(home: SiteHome) -> StatusFile:
    made = StatusFile(home)
    made.say("connected", coordinator="fl.example.org:9092", problem=None)
    made.say()
    return made


def test_a_connected_node_is_well(home: SiteHome, status: StatusFile) -> None:
    found = samples(page(home, "/metrics", status.facts()))
    now = datetime.now(UTC).timestamp()
    assert found["silotune_healthy",] == found["silotune_node_connected", "st-anna"] == 1
    assert found["silotune_node_waiting_seconds", "st-anna"] == 0
    assert abs(found["silotune_node_last_connected_time_seconds", "st-anna"] - now) < 60
    assert found["silotune_certificate_end_time_seconds", "site", "st-anna"] > now
    assert {key[1]: value for key, value in found.items() if key[0] == "silotune_trouble"} == dict.fromkeys(KINDS, 0)
    made = page(home, "/healthz", status.facts())
    assert (made.status, json.loads(made.body)) == (200, {"healthy": True, "troubles": []})


def test_a_node_that_waits_says_how_long_and_why(home: SiteHome, status: StatusFile) -> None:
    status.say("waiting", problem="fl.example.org:9092 cannot be reached")
    before = datetime.now(UTC) - timedelta(hours=1)
    told = status.facts() | {"since": before.isoformat()}
    found = samples(page(home, "/metrics", told))
    assert found["silotune_node_connected", "st-anna"] == 0
    assert abs(found["silotune_node_waiting_seconds", "st-anna"] - 3600) < 60
    assert "silotune_node_last_connected_time_seconds" in {key[0] for key in found}, "it was connected"
    made = page(home, "/healthz", told)
    assert made.status == 503
    assert json.loads(made.body)["troubles"] == [
        {"kind": "disconnected", "text": "fl.example.org:9092 cannot be reached"}
    ]


def test_a_node_that_hangs_is_down(home: SiteHome, status: StatusFile) -> None:
    before = datetime.now(UTC) - timedelta(minutes=2)
    told = status.facts() | {"looked": before.isoformat()}
    assert json.loads(page(home, "/healthz", told).body)["troubles"][0]["kind"] == "down"


def test_nothing_on_the_pages_follows_from_records(
    home: SiteHome, status: StatusFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that trains, and has left records out, has the same pages as one that waits for a request."""
    idle = status.facts()
    seconds = iter(range(60))
    monkeypatch.setattr("client.node.status._now", lambda: f"2027-01-01T00:00:{next(seconds):02d}+00:00")
    status.say("working", message_type="train")
    status.say("connected", left_out=None)
    busy = status.facts()
    assert [busy[key] for key in ("looked", "last_connected")] == [idle[key] for key in ("looked", "last_connected")]
    at_work = idle | {
        "state": "working",
        "since": "2026-01-01T00:00:00+00:00",
        "updated": "2026-01-01T00:00:00+00:00",
        "message_type": "train",
        "left_out": "2 of 80 records cannot be used; row 8, 21",
        "descriptors": idle["descriptors"] | {"used": idle["descriptors"]["used"] + 3},
    }
    for path in ("/metrics", "/healthz"):
        assert page(home, path, at_work).body == page(home, path, idle).body
    names = set(re.findall(r"^# HELP (\w+)", page(home, "/metrics", idle).body.decode(), flags=re.MULTILINE))
    assert names == {
        "silotune_build_info",
        "silotune_start_time_seconds",
        "silotune_status_time_seconds",
        "silotune_healthy",
        "silotune_trouble",
        "silotune_certificate_end_time_seconds",
        "silotune_clock_synchronized",
        "silotune_clock_set_seconds",
        "silotune_descriptors_limit",
        "silotune_node_connected",
        "silotune_node_last_connected_time_seconds",
        "silotune_node_waiting_seconds",
    }
