"""`silotune serve` as a process of its own: from its command to its end, over plain HTTP and TLS."""

from __future__ import annotations

import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from server.registry import promotion
from server.registry.references import require_version
from server.registry.registry import Registry
from server.serving.access.tokens import TokenFile
from tests.client.console.test_start import certificate
from tests.server.registry.keys import OFFICER

MARKER = "Zebrafink-4711"


@contextmanager
def served(*arguments: object, log: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start the command; gives the process and its address."""
    command = [sys.executable, "-m", "cli", "serve", *map(str, arguments), "--port", "0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with (
        log.open("a") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process,
    ):
        assert process.stdout is not None
        try:
            lines = []
            while not (lines and lines[-1].startswith("serving ")):
                line = process.stdout.readline()
                assert line, log.read_text()
                lines.append(line)
            yield process, lines[-1].split()[-1].partition("/v1")[0]
        finally:
            process.kill()
            log.open("a").write("".join(lines) + process.stdout.read())


def test_a_kill_and_a_restart_keep_what_was_used_and_logs_hold_no_text(registry: Registry, tmp_path: Path) -> None:
    file, log = TokenFile(tmp_path / "tokens.db", create=True), tmp_path / "log"
    headers = {"authorization": f"Bearer {file.add('ward', scopes=('predict',))}"}
    body = {"texts": [f"a quiet film {MARKER}", "a dull plot"]}
    options = ("films", "--registry", registry.path, "--tokens", file.path, "--engine", "torch", "--log-format", "json")
    with served(*options, log=log) as (process, address), httpx.Client(base_url=address, headers=headers) as client:
        assert client.post("/v1/predict", json=body).json()["version"] == "films:2"
        for _ in range(4):
            assert client.post("/v1/predict", json=body).status_code == 200
        promotion.promote(registry, require_version(registry, "films:1"), "champion", OFFICER)
        end = time.monotonic() + 30
        while client.post("/v1/predict", json=body).json()["version"] != "films:1":
            assert time.monotonic() < end
            time.sleep(0.2)
        used = file.usage()[0]["requests"]
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    assert used >= 6
    assert file.usage()[0]["requests"] == used
    with served(*options, log=log) as (process, address), httpx.Client(base_url=address, headers=headers) as client:
        assert client.post("/v1/predict", json=body).json()["version"] == "films:1"
        began = time.monotonic()
        file.revoke("ward")
        assert client.post("/v1/predict", json=body).status_code == 401
        assert time.monotonic() - began < 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert file.usage()[0]["requests"] == used + 1
    said = log.read_text()
    assert "films:1 answers now, before films:2" in said
    assert MARKER not in said


def test_over_tls(registry: Registry, tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "localhost")[:2]
    options = ("films", "--registry", registry.path, "--certificate", cert, "--key", key, "--engine", "torch")
    with served(*options, log=tmp_path / "log") as (_, address):
        context = ssl.create_default_context(cafile=str(cert))
        port = address.rpartition(":")[2].strip("/")
        with httpx.Client(verify=context, base_url=f"https://localhost:{port}") as client:
            assert client.post("/v1/predict", json={"texts": ["a film"]}).status_code == 200


def test_what_cannot_be_served_is_told_without_a_traceback(
    registry: Registry, silotune: Callable[..., Any], tmp_path: Path
) -> None:
    at = ("--registry", registry.path, "--port", "0", "--engine", "torch")
    unknown = silotune("serve", "filme", *at)
    assert (unknown.status, "films" in unknown.err) == (2, True)
    state = next((registry.path / "films/versions/2").rglob("silotune_state.safetensors"))
    state.write_bytes(state.read_bytes()[:-1] + b"x")
    changed = silotune("serve", "films", *at)
    assert (changed.status, "was changed after films:2 was signed" in changed.err) == (1, True)
    manifest = registry.path / "films/versions/1/manifest.json"
    raw = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**raw, "signature": "00" * 64}))
    assert silotune("serve", "films:1", *at).status == 1
    assert silotune("serve", "films:1", *at, "--tokens", tmp_path / "none.db").status == 2
    assert silotune("serve", "films", *at, "--host", "0.0.0.0").status == 2  # noqa: S104
    assert silotune("serve", "films", *at, "--queue", "0").status == 2
    assert silotune("serve", "films", *at, "--drift-window", "10").status == 2
    assert silotune("serve", "films", *at, "--drift-baseline", "monitor.json").status == 2
    shutil.rmtree(registry.path)
    assert silotune("serve", "films", *at).status == 2
