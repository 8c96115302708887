"""A coordinator as the guide sets it up: with the names that its sites dial, and no others."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from server import commands
from shared.trust.pki import create_ca, publish
from simulations.federation.processes import HOST, Federation, change_toml
from tests.integration.eventually import eventually
from tests.integration.service_manager import Heard

ROOT = Path(__file__).parents[2]


def test_it_starts_with_one_public_name_alone_and_within_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SILOTUNE_PASSPHRASE", "words")
    heard = Heard(tmp_path, watchdog_seconds=1.0)
    environment = {"PYTHONPATH": str(ROOT), "SILOTUNE_PASSPHRASE": "words", **heard.environment}
    federation = Federation(tmp_path, environment=environment)
    home = federation.coordinator
    create_ca(federation.ca, name="consortium", passphrase=None)
    commands.init(home.path, host=["fl.example.org"], listen_host=HOST, listen_port=federation.port)
    publish(federation.ca, home.trust)
    change_toml(home.config, log_format="json")
    certificate = federation._approve(home.path / "server.csr", "server.crt", hosts=("fl.example.org",))
    commands.install(home.path, certificate=certificate, ca=federation.ca / "ca.crt")
    try:
        started = time.monotonic()
        federation.start_coordinator()
        assert time.monotonic() - started < 30  # two on a machine that is not busy
        assert home.read_status()["state"] == "running"
        assert b"PRIVATE" not in home.server_key.read_bytes()
        # The service manager is told, and goes on hearing of it.
        assert heard.lines()[0] == "READY=1"
        eventually(lambda: heard.lines().count("WATCHDOG=1") >= 2)
        assert "STATUS=0 of 0 sites connected" in heard.lines()
    finally:
        federation.stop()
    assert heard.lines()[-1] == "STOPPING=1"
    lines = [json.loads(line) for line in federation.log_of("coordinator").splitlines() if line[0] == "{"]
    assert f"sites connect to {HOST}:{federation.port} (mutual TLS 1.3)" in [line["message"] for line in lines]
    assert home.log.read_text().count("\n") == len(lines)
    assert "Traceback" not in federation.log_of("coordinator")
