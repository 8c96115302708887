"""The image and compose file of serving, run as plain processes: what compose starts answers, and its health check tells."""

from __future__ import annotations

import os
import re
import ssl
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from server.serving.access.tokens import TokenFile
from tests.client.console.test_start import certificate
from tests.integration.test_docker import PROBE, STATE, service, stage
from tests.server.registry.conftest import filled, small_run  # noqa: F401 (fixtures)

SECRETS = "/run/secrets"


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the image of serving holds."""
    folder: Path = tmp_path_factory.mktemp("serve") / "staged"
    stage.stage("serve", folder)
    return folder


def environment(staged: Path, home: Path) -> dict[str, str]:
    """Return an environment in which the staged code runs, and not this repository's; see `test_docker.run_staged`."""
    path = os.pathsep.join([str(staged), sysconfig.get_path("purelib")])
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return kept | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1", "HOME": str(home)}


@contextmanager
def started(words: list[str], staged: Path, home: Path, **variables: str) -> Iterator[str]:
    """Run `silotune WORDS` from the staged tree; gives the address where it answers, and lets it end as Docker would."""
    process = subprocess.Popen(
        [sys.executable, "-S", "-P", "-m", "cli", *words],
        cwd=home,
        env=environment(staged, home) | variables,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        try:
            lines = iter(process.stdout.readline, "")
            yield next(line.split()[-1].partition("/v1")[0] for line in lines if line.startswith("serving "))
            process.terminate()
            assert process.wait(30) == 0
        finally:
            process.kill()


def probed(staged: Path, home: Path, url: str) -> int:
    """Return how the health check ends."""
    command = [sys.executable, "-S", "-P", *PROBE[1:-1], url]
    return subprocess.run(command, cwd=home, env=environment(staged, home), check=False, timeout=60).returncode


def test_what_compose_starts_answers_and_is_healthy(staged: Path, filled: Path, tmp_path: Path) -> None:  # noqa: F811
    """Only the container's folders are replaced, and the address and port by others of this machine."""
    cert, key = certificate(tmp_path, "localhost", "127.0.0.1")
    cert.rename(tmp_path / "silotune_certificate")
    key.rename(tmp_path / "silotune_certificate_key")
    file = TokenFile(tmp_path / "tokens.db", create=True)
    words = [re.sub(r"\$\{SILOTUNE_MODEL:.*\}", "films", word) for word in service("serve")["command"]]
    words = [re.sub(r"\$\{SILOTUNE_THREADS:-(\d)\}", r"\1", word) for word in words]
    words = [word.replace(SECRETS, str(tmp_path)).replace(STATE, str(tmp_path)) for word in words]
    words = [re.sub(r"=0\.0\.0\.0$", "=127.0.0.1", re.sub(r"^--port=.*", "--port=0", word)) for word in words]
    models = {"SILOTUNE_MODELS": str(filled), "SILOTUNE_MODELS_POLICY": str(filled / "registry.toml")}
    headers = {"authorization": f"Bearer {file.add('ward', scopes=('predict',))}"}
    context = ssl.create_default_context(cafile=str(tmp_path / "silotune_certificate"))
    with started([*words, "--engine=torch"], staged, tmp_path, **models) as address:
        with httpx.Client(base_url=address, verify=context, timeout=30) as client:
            assert client.post("/v1/predict", json={"texts": ["a film"]}).status_code == 401
            answer = client.post("/v1/predict", json={"texts": ["a film"]}, headers=headers)
        assert answer.json()["version"] == "films:2"
        assert probed(staged, tmp_path, f"{address}/healthz") == 0
        assert probed(staged, tmp_path, f"{address}/v1/models") == 1
    assert probed(staged, tmp_path, f"{address}/healthz") == 1


def test_serving_keeps_secrets_in_files_and_models_read_only() -> None:
    found = service("serve")
    targets = {mount["target"]: mount["read_only"] for mount in found["volumes"][1:]}
    assert targets == {"/models": True, "/etc/silotune/registry.toml": True}
    options = dict(word[2:].split("=", 1) for word in found["command"] if word.startswith("--"))
    assert [f"{SECRETS}/{name}" for name in found["secrets"]] == [options["certificate"], options["key"]]
    assert options["tokens"] == found["environment"]["SILOTUNE_TOKENS"]
    assert options["tokens"].startswith(f"{STATE}/"), "use is booked there"
    assert found["ports"][0].endswith(f":{options['port']}")
