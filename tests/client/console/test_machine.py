"""The GPUs on the page of health: what the driver's program says, whatever it says, and a page without it."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.console import machine
from client.console.machine import Gpu, Gpus
from client.site.home import SiteHome
from shared.web.roles import Role
from tests.client.console.conftest import Serving, text_of
from tests.client.console.homes import say

TWO = """\
NVIDIA H200, 1024, 143771, 37, 41, 570.86.15
<script>alert(1)</script>, [N/A], [N/A], [N/A], 30, 570.86.15
"""


def pretend(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_what_the_driver_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "says").write_text(TWO)
    pretend(tmp_path, monkeypatch, f'echo "$@" > {tmp_path}/asked; cat {tmp_path}/says')
    gpus = Gpus()
    first, second = gpus.all()
    assert first == Gpu(name="NVIDIA H200", used=1 << 30, total=143771 << 20, busy=37, celsius=41, driver="570.86.15")
    assert (second.used, second.total, second.busy, second.celsius) == (None, None, None, 30)
    assert "memory.used,memory.total" in (tmp_path / "asked").read_text()
    (tmp_path / "asked").unlink()
    assert gpus.all() == [first, second]
    assert not (tmp_path / "asked").exists(), "not for every page"


@pytest.mark.parametrize(
    "script", ["exit 9", "echo no devices were found; exit 6", "echo x, y", "sleep 5", "printf '\\377,'"]
)
def test_a_driver_that_says_nothing_of_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    monkeypatch.setattr(machine, "_SECONDS", 0.3)
    pretend(tmp_path, monkeypatch, script)
    assert Gpus().all() == []


def test_no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Gpus().all() == []


def test_the_page(serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home: SiteHome = serving.home
    say(home, clock={"synchronized": False, "set_by": -3.5, "set_at": "2026-11-01T10:00:00+00:00"})
    browser = serving.signed_in("engineer")
    words = text_of(browser.get("/health").text)
    assert "no time server sets it" in words
    assert "was set by -3.5 seconds, 2026-11-01 10:00:00" in words
    assert "Backbone of the last job bert" in words
    assert "not in the policy now" in words
    (tmp_path / "says").write_text(TWO)
    pretend(tmp_path, monkeypatch, f"cat {tmp_path}/says")
    serving.console.content.gpus._kept = None
    part = browser.get("/health/gpus", headers={"hx-request": "true"})
    assert "<html" not in part.text
    assert "1.1 GB of 150.8 GB" in text_of(part.text)
    assert "<script>alert" not in part.text
    assert "<html" in browser.get("/health/gpus").text
    say(home, clock="<b>broken</b>")
    words = text_of(browser.get("/health").text)
    assert "Clock cannot be told" in words
    say(home)


def test_roles(serving: Serving) -> None:
    for role in Role:
        allowed = role in (Role.ENGINEER, Role.OFFICER, Role.ADMINISTRATOR)
        assert serving.signed_in(role.value).get("/health/gpus").status_code == (200 if allowed else 403)
