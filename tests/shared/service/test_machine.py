"""What a process knows of its machine."""

from __future__ import annotations

import os
import resource
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import pytest

from shared.service.machine import Certificate, Clock, descriptors, machine_troubles, synchronized


def test_descriptors_are_counted_against_the_soft_limit() -> None:
    before = descriptors()
    handle = os.open("/dev/null", os.O_RDONLY)
    try:
        assert descriptors() == {"used": before["used"] + 1, "limit": resource.getrlimit(resource.RLIMIT_NOFILE)[0]}
    finally:
        os.close(handle)


def test_a_clock_that_is_set_is_noticed_and_one_that_is_slowed_is_not() -> None:
    wall, steady = [1_800_000_000.0], [50.0]
    clock = Clock(lambda: wall[0], lambda: steady[0])
    for _ in range(1000):  # five hours at 500 parts in a million
        wall[0] += 18.009
        steady[0] += 18.0
        assert clock.facts()["set_at"] is None
    wall[0] -= 3600
    found = clock.facts()
    assert found["set_by"] == -3600.0
    assert datetime.fromisoformat(found["set_at"]).timestamp() == int(wall[0])
    wall[0] += 1
    steady[0] += 1
    assert {key: clock.facts()[key] for key in ("set_by", "set_at")} == {"set_by": -3600.0, "set_at": found["set_at"]}


def test_the_kernel_is_asked_whether_the_clock_is_kept() -> None:
    assert synchronized() in (True, False, None)


def test_what_a_version_before_did_not_say_is_no_trouble(tmp_path: Path) -> None:
    assert machine_troubles(tmp_path, {}, []) == []


def test_each_thing_that_is_wrong_is_one_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**20))
    now = datetime.now(UTC)
    said = {
        "descriptors": {"used": 9, "limit": 10},
        "clock": {"set_by": 5.0, "set_at": (now - timedelta(minutes=59)).isoformat()},
    }
    ends = [
        Certificate("server", "", now + timedelta(days=6), "a."),
        Certificate("site", "b", now + timedelta(days=8), "b."),
        Certificate("crl", "", now - timedelta(days=1), "c."),
    ]
    found = machine_troubles(tmp_path, said, ends)
    assert [trouble.kind for trouble in found] == ["disk", "descriptors", "clock", "certificate", "certificate"]
    assert found[-1].text == f"the revocation list ends on {now - timedelta(days=1):%Y-%m-%d}; c."
    later = {"clock": {"set_by": 5.0, "set_at": (now - timedelta(minutes=61)).isoformat()}}
    assert "clock" not in [trouble.kind for trouble in machine_troubles(tmp_path, later, [])]
