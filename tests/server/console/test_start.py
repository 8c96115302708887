"""`silotune coordinator console`: what it says, what it needs, how it ends."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.conftest import Outcome
from tests.server.console.homes import make_home, say

ROOT = Path(__file__).parents[3]


def test_it_serves_and_ends(tmp_path: Path) -> None:
    home = make_home(tmp_path, ())
    say(home, sites=())
    command = [sys.executable, "-m", "cli", "coordinator", "console", str(home.path), "--port", "0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        said = ""
        try:
            while "stop it with Ctrl-C" not in said and (line := process.stdout.readline()):
                said += line
            (address,) = re.findall(r"console of coordinator coordinator: (http://127\.0\.0\.1:\d+/)\n", said)
            assert re.search(r"type this code:\n   [A-Z0-9]{4}(-[A-Z0-9]{4}){3}\n", said)
            assert httpx.get(f"{address}sign-in").status_code == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
            assert "Traceback" not in process.stdout.read()
        finally:
            process.kill()


def test_without_the_extra_it_says_what_to_install(
    silotune: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "segno" else real(name, *rest))
    outcome = silotune("coordinator", "console", tmp_path)
    assert outcome.status == 2
    assert 'pip install "silotune[console]"' in outcome.err


def test_what_is_no_coordinator(silotune: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = silotune("coordinator", "console", tmp_path / "nothing", "--port", 0)
    assert outcome.status == 2
    assert outcome.err.startswith("error: ")
    assert not (tmp_path / "nothing").exists()
