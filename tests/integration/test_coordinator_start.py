"""A coordinator as the guide sets it up: with the names that its sites dial, and no others."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from server import commands
from shared.trust.pki import create_ca, publish
from simulations.federation.processes import HOST, Federation

ROOT = Path(__file__).parents[2]


def test_it_starts_with_one_public_name_alone_and_within_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SILOTUNE_PASSPHRASE", "words")
    federation = Federation(tmp_path, environment={"PYTHONPATH": str(ROOT), "SILOTUNE_PASSPHRASE": "words"})
    home = federation.coordinator
    create_ca(federation.ca, name="consortium", passphrase=None)
    commands.init(home.path, host=["fl.example.org"], listen_host=HOST, listen_port=federation.port)
    publish(federation.ca, home.trust)
    certificate = federation._approve(home.path / "server.csr", "server.crt", hosts=("fl.example.org",))
    commands.install(home.path, certificate=certificate, ca=federation.ca / "ca.crt")
    try:
        started = time.monotonic()
        federation.start_coordinator()
        assert time.monotonic() - started < 30  # two on a machine that is not busy
        assert home.read_status()["state"] == "running"
        assert b"PRIVATE" not in home.server_key.read_bytes()
    finally:
        federation.stop()
    assert "Traceback" not in federation.log_of("coordinator")
