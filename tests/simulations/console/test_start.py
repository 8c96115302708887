"""`silotune console`: where it listens, what it says, what it loads and needs."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from shared.errors import ConfigError
from shared.http.serving import place_at
from shared.trust.audit_log import read, verify
from shared.trust.signing import load_verify_key
from shared.web.roles import Role
from simulations.console.start import check_places, open_console
from tests.client.console.test_start import certificate
from tests.conftest import Outcome
from tests.simulations.console.conftest import files_of, make_folder

ROOT = Path(__file__).parents[3]
FORBIDDEN = ("torch", "transformers", "peft", "opacus", "flwr", "grpc", "matplotlib", "dp_accounting", "scipy.stats")

# The console as the command starts it, with every page asked once; it tells what it loaded and how much memory it took.
SCRIPT = """
import json, re, sys, threading
from pathlib import Path
import httpx
import cli.commands, simulations.console.commands
from simulations.console.start import run_console

said = []
def say(text):
    said.append(text)
    if "stop it" in text:
        threading.Thread(target=ask, daemon=True).start()

def ask():
    address, code = re.findall(r"(http://[^/]*/)link/(\\S+)", "\\n".join(said))[0]
    with httpx.Client(base_url=address, timeout=30) as browser:
        token = re.findall(r'csrf_token" value="([0-9a-f]{64})', browser.get(f"/link/{code}").text)[0]
        sent = {"csrf_token": token, "code": code}
        told = {"link": browser.post("/link", data=sent, headers={"origin": address[:-1]}).status_code}
        page = browser.get("/runs").text
        runs = re.findall(r'name="run" value="(\\w+)"', page)
        asked = "?" + "&".join(f"run={run}" for run in runs)
        paths = ["/runs", "/sweeps", "/frontier", f"/frontier{asked}", f"/runs/compare{asked}", f"/runs/curves.json{asked}"]
        paths += ["/runs/export.csv", f"/runs/curves/export.jsonl{asked}", *(f"/runs/{run}" for run in runs)]
        told |= {path: browser.get(path).status_code for path in paths}
    peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024
    print(json.dumps({"modules": sorted(sys.modules), "megabytes": peak, "told": told, "said": said}), flush=True)
    import os, signal
    os.kill(os.getpid(), signal.SIGTERM)

run_console(Path(sys.argv[1]), host="127.0.0.1", port=0, certificate=None, key=None, accounts=None, passphrase=None, say=say)
"""


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SILOTUNE_", "COV"))}
    return kept | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def test_the_process_loads_nothing_of_training_and_writes_nothing(tmp_path: Path) -> None:
    runs = make_folder(tmp_path / "runs")
    before = files_of(runs)
    made = tmp_path / "made"
    made.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(runs)],
        capture_output=True,
        text=True,
        check=False,
        env=environment() | {"TMPDIR": str(made)},
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    found = json.loads(done.stdout)
    assert {path: status for path, status in found["told"].items() if status != 200} == {"link": 303}
    assert [name for name in FORBIDDEN if name in found["modules"]] == []
    assert found["megabytes"] < 200
    assert found["said"][0].startswith("20 runs in ")
    assert sum("link/" in text for text in found["said"]) == 2, "the next link, once one was used"
    assert files_of(runs) == before
    assert list(made.iterdir()) == [], "what it made is gone with it"


def test_it_ends_in_order(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cli", "console", str(tmp_path), "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
    ) as process:
        assert process.stdout is not None
        said = ""
        while "stop it with Ctrl-C" not in said and (line := process.stdout.readline()):
            said += line
        (address,) = re.findall(r"(http://127\.0\.0\.1:\d+/)link/", said)
        assert httpx.get(f"{address}sign-in").status_code == 200
        assert httpx.get(f"{address}runs").status_code == 303
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert "Traceback" not in process.stdout.read()


def test_beyond_this_machine_there_have_to_be_accounts(silotune: Callable[..., Outcome], tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "10.0.0.5")
    outcome = silotune("console", tmp_path, "--host", "10.0.0.5")
    assert (outcome.status, "--certificate" in outcome.err) == (2, True)
    place = place_at("10.0.0.5", 0, cert, key)
    with pytest.raises(ConfigError, match="give --accounts FOLDER"):
        check_places(tmp_path, place, None)
    check_places(tmp_path, place, tmp_path.parent / "accounts")
    for inside in (tmp_path, tmp_path / "accounts", tmp_path / "a" / ".." / "b"):
        with pytest.raises(ConfigError, match="lies among the runs"):
            check_places(tmp_path, place, inside)


def test_lasting_accounts_have_a_signed_log(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    place, folder = place_at("127.0.0.1", 0, None, None), tmp_path / "accounts"

    console = open_console(tmp_path / "runs", place=place, port=1, reports=tmp_path, accounts=folder)
    assert console.link is None
    assert console.accounts.invite_first() is not None
    account = console.accounts.from_issuer(issuer="i", subject="s", name="Amal", role=Role.ADMINISTRATOR, address="a")
    console.accounts.invite("Kim", Role.VIEWER, by=account)
    open_console(tmp_path / "runs", place=place, port=1, reports=tmp_path, accounts=folder)  # again, with what is there
    assert verify(folder / "audit", verify_head=load_verify_key(folder / "log.pub")).signature_checked
    assert [entry.details["action"] for entry in read(folder / "audit")] == ["sign-in", "account.invited"]
    assert list((tmp_path / "runs").iterdir()) == []


def test_what_is_no_folder(silotune: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = silotune("console", tmp_path / "nothing", "--port", 0)
    assert outcome.status == 2
    assert "nothing is no folder" in outcome.err


def test_without_the_extra_it_says_what_to_install(
    silotune: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "segno" else real(name, *rest))
    outcome = silotune("console", tmp_path)
    assert outcome.status == 2
    assert 'pip install "silotune[console]"' in outcome.err
