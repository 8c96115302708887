"""The word with systemd."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import shared.service.manager as manager_module
from shared.service.manager import ServiceManager
from tests.integration.service_manager import Heard


@pytest.fixture
def heard(tmp_path: Path) -> Iterator[Heard]:
    found = Heard(tmp_path, watchdog_seconds=20.0)
    yield found
    found.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(manager_module.time, "monotonic", lambda: now[0])
    return now


def test_signs_of_life_come_several_times_within_the_limit_and_only_when_given(
    heard: Heard, clock: list[float]
) -> None:
    manager = ServiceManager(heard.environment)
    manager.ready()
    assert heard.lines() == ["READY=1"]
    for _ in range(40):  # ten seconds of twenty
        manager.alive()
        clock[0] += 0.25
    assert heard.lines()[1:] == ["WATCHDOG=1"] * 2
    manager.stopping()
    assert heard.lines()[3:] == ["STOPPING=1"]


def test_a_line_for_people_is_one_line_and_told_when_it_changes(heard: Heard) -> None:
    manager = ServiceManager(heard.environment)
    for text in ("1 of 2 sites", "1 of 2 sites", "job x\nREADY=1"):
        manager.tell(text)
    assert heard.lines() == ["STATUS=1 of 2 sites", "STATUS=job x\N{REPLACEMENT CHARACTER}READY=1"]


@pytest.mark.parametrize("other", [{"WATCHDOG_USEC": ""}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_PID": "1"}])
def test_whoever_is_not_watched_gives_no_signs(heard: Heard, other: dict[str, str]) -> None:
    ServiceManager(heard.environment | other).alive()
    assert heard.lines() == []


def test_a_socket_without_a_file_is_spoken_to() -> None:
    name = f"silotune-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind("\0" + name)
        ServiceManager({"NOTIFY_SOCKET": "@" + name}).ready()
        assert other.recv(100) == b"READY=1"


@pytest.mark.parametrize("address", ["", "/nowhere/notify", "x" * 200])
def test_nobody_who_listens_is_no_trouble(address: str) -> None:
    manager = ServiceManager({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1000000"})
    manager.ready()
    manager.alive()
    manager.stopping()


def test_a_manager_that_reads_nothing_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager_module, "_SEND_SECONDS", 0.001)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
        deaf.bind(str(tmp_path / "deaf"))
        manager = ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "deaf")})
        most = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text()) + 20
        for _ in range(most):
            manager.ready()
        deaf.setblocking(False)
        came = 0
        with contextlib.suppress(BlockingIOError):
            while deaf.recv(100):
                came += 1
    assert 1 <= came < most, "its queue was full"
