"""What a process knows of its machine."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from shared.service.machine import Certificate, Clock, descriptors, is_alive, machine_troubles, synchronized


def status(**changes: Any) -> dict[str, Any]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "state": "running", "updated": now} | changes


@pytest.mark.parametrize(("seconds", "alive"), [(0, True), (-58, True), (58, True), (-61, False), (61, False)])
def test_a_process_lives_if_it_said_so_lately(seconds: float, alive: bool) -> None:
    updated = (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()
    assert is_alive(status(updated=updated)) is alive
    assert not is_alive(status(updated=updated, state="stopped"))


def test_a_process_that_ended_does_not_live() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert not is_alive(status(pid=child.pid))


def test_a_process_of_another_user_lives() -> None:
    """Asked by somebody who may not send it a signal: of a process of root, or as root of this one by nobody."""
    if os.getuid():
        with pytest.raises(PermissionError):
            os.kill(1, 0)
        assert is_alive(status(pid=1))
        return
    reader, writer = os.pipe()
    child = os.fork()
    if not child:  # in here nothing is imported any more, for nobody may not read these files
        os.setuid(65534)
        try:
            os.kill(os.getppid(), 0)
        except PermissionError:
            os.write(writer, str(is_alive(status(pid=os.getppid()))).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    assert os.read(reader, 10) == b"True"
    os.close(reader)


@pytest.mark.parametrize(
    "changes",
    [
        {"pid": None},
        {"pid": "x"},
        {"pid": 0},
        {"pid": -1},
        {"pid": 10**30},
        {"updated": 5},
        {"updated": "noon"},
        {"updated": "2026-01-01T00:00:00"},
    ],
)
def test_what_no_process_of_ours_said_is_no_answer(changes: dict[str, Any]) -> None:
    with pytest.raises((OverflowError, TypeError, ValueError)):
        is_alive(status(**changes))


@pytest.mark.parametrize("missing", ["pid", "state", "updated"])
def test_a_status_without_a_key_is_none_of_ours(missing: str) -> None:
    with pytest.raises(KeyError):
        is_alive({key: value for key, value in status().items() if key != missing})
    assert not is_alive({})


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
