"""The units for systemd: systemd understands them, and they name the commands and folders of the guides."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UNITS = {"coordinator": "silotune-coordinator.service", "site": "silotune-site@.service"}

CONSOLES = {"site": "silotune-site-console@.service", "coordinator": "silotune-coordinator-console.service"}


def keys(side: str) -> dict[str, list[str]]:
    """Return the values of each key."""
    name = CONSOLES[side.removesuffix("-console")] if side.endswith("-console") else UNITS[side]
    text = (ROOT / "systemd" / name).read_text(encoding="utf-8")
    found: dict[str, list[str]] = {}
    for key, value in re.findall(r"^(\w+)=(.*)$", text, flags=re.MULTILINE):
        found.setdefault(key, []).append(value)
    return found


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="this machine has no systemd")
def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    names = [*UNITS.values(), *CONSOLES.values()]
    for name in names:
        text = (ROOT / "systemd" / name).read_text(encoding="utf-8")
        # The one thing that this machine may lack.
        (tmp_path / name).write_text(text.replace("/opt/silotune/bin/silotune", "/bin/sh"), encoding="utf-8")
    command = ["systemd-analyze", "verify", *(str(tmp_path / name.replace("@", "@st-anna")) for name in names)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    ours = [line for line in done.stderr.splitlines() if "silotune" in line]
    assert (done.returncode, ours) == (0, [])


@pytest.mark.parametrize("side", UNITS)
def test_a_unit_starts_what_says_when_it_is_ready_and_restarts_what_died(side: str) -> None:
    found = keys(side)
    folder = "/srv/silotune/" + {"coordinator": "coordinator", "site": "%i"}[side]
    assert found["ExecStart"] == [f"/opt/silotune/bin/silotune {side} start {folder}"]
    assert found["ReadWritePaths"] == [folder]
    assert (found["Type"], found["WatchdogSec"], found["Restart"]) == (["notify"], ["3min"], ["on-failure"])
    assert found["StartLimitIntervalSec"] == ["0"]
    assert int(found["RestartSec"][0]) <= {"coordinator": 1, "site": 5}[side]
    assert "AF_UNIX" in found["RestrictAddressFamilies"][0], "nothing could be said to systemd"
    assert int(found["LimitNOFILE"][0]) >= 4096


@pytest.mark.parametrize("side", UNITS)
def test_the_passphrase_reaches_the_service_alone(side: str) -> None:
    found = keys(side)
    (source,) = found["LoadCredential"]
    assert source.startswith("passphrase:/srv/silotune/")
    assert "SILOTUNE_PASSPHRASE_FILE=%d/passphrase" in found["Environment"]
    assert not any(value.startswith("SILOTUNE_PASSPHRASE=") for value in found["Environment"])


def test_both_units_lock_their_process_up_alike() -> None:
    differ = {
        key
        for key in keys("site").keys() | keys("coordinator").keys()
        if keys("site").get(key) != keys("coordinator").get(key)
    }
    assert differ == {
        "Description",
        "Documentation",
        "TimeoutStartSec",
        "TimeoutStopSec",
        "RestartSec",
        "LoadCredential",
        "ExecStart",
        "LimitNOFILE",
        "ReadWritePaths",
    }


@pytest.mark.parametrize("side", CONSOLES)
def test_a_console_gives_way_to_what_it_shows(side: str) -> None:
    found, node = keys(f"{side}-console"), keys(side)
    folder = "/srv/silotune/" + {"coordinator": "coordinator", "site": "%i"}[side]
    assert found["ExecStart"] == [f"/opt/silotune/bin/silotune {side} console {folder}"]
    for key in (
        "User",
        "LoadCredential",
        "ReadWritePaths",
        "ProtectSystem",
        "CapabilityBoundingSet",
        "NoNewPrivileges",
    ):
        assert found[key] == node[key], key
    assert int(found["Nice"][0]) > 0
    assert "MemoryMax" in found
    assert "Requires" not in found, "the one runs without the other"
