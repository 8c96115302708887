"""What the charts start, started as plain processes: folders of the pod are folders here, and its ports free ones of loopback."""

from __future__ import annotations

import os
import re
import socket
import ssl
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import httpx

from server.serving.access.tokens import TokenFile
from shared.trust.pki import approve, create_ca
from simulations.federation.processes import free_port
from tests.charts.rendering import COORDINATOR, NEEDED, SERVE, Values, objects, pod
from tests.client.console.test_start import certificate
from tests.integration.eventually import eventually
from tests.server.registry.conftest import filled, small_run  # noqa: F401 (fixtures)

ROOT = Path(__file__).parents[2]
HOST = "127.0.0.1"


def command(container: Values, folders: Mapping[str, Path], *, ports: Mapping[int, int]) -> list[str]:
    """Return what a container starts, with other folders and ports."""
    words = [*container.get("command", ["silotune"]), *container["args"]]
    for place, folder in sorted(folders.items(), reverse=True):
        words = [word.replace(place, str(folder)) for word in words]
    for number, free in ports.items():
        words = [re.sub(rf"(--[a-z-]*port=){number}\b", rf"\g<1>{free}", word) for word in words]
    return [word.replace("0.0.0.0", HOST) for word in words]  # noqa: S104


def environment(container: Values, folders: Mapping[str, Path], tmp_path: Path) -> dict[str, str]:
    """Return the environment of a container, in which `silotune` is that of this working tree."""
    silotune = tmp_path / "bin" / "silotune"
    silotune.parent.mkdir(exist_ok=True)
    silotune.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cli "$@"\n')
    silotune.chmod(0o755)
    given = {each["name"]: each["value"] for each in container.get("env", [])}
    for place, folder in folders.items():
        given = {name: value.replace(place, str(folder)) for name, value in given.items()}
    path = f"{silotune.parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | given


def folders_of(spec: Values, tmp_path: Path) -> dict[str, Path]:
    """Return a new folder for each place of a pod at which something is mounted, but /tmp."""
    containers = [*spec["initContainers"], *spec["containers"]]
    mounts = {mount["mountPath"]: mount["name"] for each in containers for mount in each["volumeMounts"]}
    found = {place: tmp_path / name for place, name in mounts.items() if place != "/tmp"}  # noqa: S108
    for folder in found.values():
        folder.mkdir(exist_ok=True)
    return found


def test_what_the_chart_of_serving_starts_answers(filled: Path, tmp_path: Path) -> None:  # noqa: F811
    spec = pod(objects(SERVE, {"options": {"engine": "torch"}}))
    folders, port = folders_of(spec, tmp_path), free_port()
    folders["/models"].rmdir()
    folders["/models"] = filled
    (folders["/etc/silotune"] / "registry.toml").write_bytes((filled / "registry.toml").read_bytes())
    cert, key = certificate(tmp_path, "localhost", HOST)
    cert.rename(folders["/run/secrets/tls"] / "tls.crt")
    key.rename(folders["/run/secrets/tls"] / "tls.key")
    (tokens,), (container,) = spec["initContainers"], spec["containers"]
    for _ in range(2):  # a pod that starts anew finds the file
        words = command(tokens, folders, ports={})
        subprocess.run(words, env=environment(tokens, folders, tmp_path), check=True, timeout=60)
    secret = TokenFile(folders["/var/lib/silotune"] / "tokens.db").add("ward", scopes=("predict",))
    words = command(container, folders, ports={8460: port})
    context = ssl.create_default_context(cafile=str(folders["/run/secrets/tls"] / "tls.crt"))
    with (
        subprocess.Popen(words, env=environment(container, folders, tmp_path), stdout=subprocess.DEVNULL) as process,
        httpx.Client(base_url=f"https://localhost:{port}", verify=context, timeout=30) as client,
    ):
        try:
            probe = container["readinessProbe"]["httpGet"]
            eventually(lambda: process.poll() is None and _status(client, probe["path"]) == 200, timeout=60)
            body, headers = {"texts": ["a film"]}, {"authorization": f"Bearer {secret}"}
            assert client.post("/v1/predict", json=body).status_code == 401
            assert client.post("/v1/predict", json=body, headers=headers).json()["version"] == "films:2"
            process.terminate()
            assert process.wait(30) == 0
        finally:
            process.kill()


def _status(client: httpx.Client, path: str) -> int:
    try:
        return client.get(path).status_code
    except httpx.TransportError:
        return 0


def test_the_coordinator_waits_for_its_certificate_and_starts(tmp_path: Path) -> None:
    spec = pod(objects(COORDINATOR))
    folders, port = folders_of(spec, tmp_path), free_port()
    words = folders["/run/secrets/silotune"] / "passphrase"
    words.write_text("not a real one\n")
    words.chmod(0o600)
    (prepare,), (container,) = spec["initContainers"], spec["containers"]
    script = command(prepare, folders, ports={9092: port})
    script = [
        word.replace("--listen-port", f"--listen-host={HOST} --metrics-listen=off --listen-port") for word in script
    ]
    script = [word.replace("sleep 5", "sleep 0.1") for word in script]
    home, answer = folders["/var/lib/silotune"], folders["/certificate"]
    with subprocess.Popen(
        script, env=environment(prepare, folders, tmp_path), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        told = ""
        while NEEDED[COORDINATOR]["certificate"]["secret"] not in told:
            line = process.stdout.readline()
            assert line, told
            told += line
        assert "BEGIN CERTIFICATE REQUEST" in told
        assert "PRIVATE" not in told
        assert b"passphrase" in (home / "keys" / "server.key").read_bytes(), "the keys are encrypted"
        _sign(tmp_path / "ca", home / "server.csr", answer)
        process.communicate(timeout=60)
        assert process.returncode == 0
    again = subprocess.run(
        script, env=environment(prepare, folders, tmp_path), capture_output=True, text=True, timeout=60
    )
    assert again.returncode == 0, again.stderr
    start = command(container, folders, ports={})
    with subprocess.Popen(start, env=environment(container, folders, tmp_path), stdout=subprocess.DEVNULL) as process:
        try:
            eventually(lambda: process.poll() is None and _listens(port), timeout=60)
            process.terminate()
            assert process.wait(60) == 0
        finally:
            process.kill()


def _sign(ca: Path, request: Path, answer: Path) -> None:
    from cryptography.hazmat.primitives.serialization import Encoding

    create_ca(ca, name="consortium", passphrase=None)
    hosts = NEEDED[COORDINATOR]["hosts"]
    made = approve(ca, request.read_bytes(), role="server", hosts=hosts, passphrase=None)
    (answer / "ca.crt").write_bytes((ca / "ca.crt").read_bytes())
    (answer / "server.crt").write_bytes(made.public_bytes(Encoding.PEM))


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0
