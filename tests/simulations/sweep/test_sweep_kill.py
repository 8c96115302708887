"""A sweep that is killed (SIGKILL) at any moment goes on: no finished trial again, a half-written one again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cli", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def complete_lines(folder: Path) -> list[str]:
    path = folder / "trials.jsonl"
    return path.read_text().split("\n")[:-1] if path.exists() else []


def begun(folder: Path) -> dict[str, Any]:
    """Return when each trial's run was made, by its folder."""
    found = {}
    for path in (folder / "trials").glob("*/run.json"):
        found[path.parent.name] = json.loads(path.read_text())["created"], path.stat().st_mtime_ns
    return found


@pytest.mark.endurance
@pytest.mark.timeout(1500)  # two processes one after the other, on a machine that may be busy
def test_a_killed_sweep_goes_on_where_it_was(
    write_scenario: Callable[..., Path], tmp_path: Path, silotune: Callable[..., Any]
) -> None:
    path = write_scenario(tmp_path, data={"kind": "public"}, training={"rounds": 3, "local_steps": 1})
    folder = tmp_path / "out"
    axis = "training.learning_rate=0.01,0.02,0.05"
    arguments = ("sweep", path, "--axis", axis, "--seeds", "0,1", "--out", folder, "--resume", "--json")
    chance, killed_in_a_trial, kept = random.Random(), 0, []
    for wanted in (1, 3):
        with start(*arguments) as process:
            deadline = time.monotonic() + 200
            # Past the wanted line, and into the trial after it.
            while process.poll() is None and time.monotonic() < deadline:
                lines = complete_lines(folder)
                halves = begun(folder).keys() - {json.loads(line)["key"] for line in lines}
                if len(lines) >= wanted and halves:
                    break
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.2))
            assert process.poll() is None, process.communicate()[1]
            process.send_signal(signal.SIGKILL)
            process.communicate()
        after = complete_lines(folder)
        assert after[: len(kept)] == kept, "finished trials are not run again"
        assert len(after) >= wanted
        kept = after
        halves = begun(folder).keys() - {json.loads(line)["key"] for line in kept}
        killed_in_a_trial += bool(halves)
    assert killed_in_a_trial, "at least one kill must meet a trial on its way"
    # What a kill can leave of a line.
    with (folder / "trials.jsonl").open("a") as file:
        file.write('{"key": "half a li')
    finished = {json.loads(line)["key"] for line in kept}
    before = begun(folder)
    resumed = silotune(*arguments)
    assert resumed.status == 0, resumed.err
    results = [json.loads(line) for line in complete_lines(folder)]
    assert complete_lines(folder)[: len(kept)] == kept
    assert len(results) == len({result["key"] for result in results}) == 6
    assert all(result["status"] == "completed" for result in results)
    after = begun(folder)
    for key in finished:
        assert after[key] == before[key], "the run of a finished trial is untouched"
    for key in before.keys() - finished:
        assert after[key][1] > before[key][1], "a half-finished trial is run anew"
        # From its first step: a site's ledger holds exactly one training, not one and a half.
        for record in (folder / "trials" / key).glob("sites/*/privacy.json"):
            assert json.loads(record.read_text())["steps_executed"] == 3
    assert json.loads(resumed.out)["trials"] == 6
    assert json.loads((folder / "sweep.json").read_text())["status"] == "completed"


def test_two_processes_do_not_write_to_one_sweep(
    write_scenario: Callable[..., Path], tmp_path: Path, silotune: Callable[..., Any]
) -> None:
    from simulations.sweep.results import locked

    path = write_scenario(tmp_path, data={"kind": "public"})
    with locked(tmp_path / "out"):
        outcome = silotune("sweep", path, "--axis", "training.learning_rate=0.1", "--out", tmp_path / "out")
    assert outcome.status == 1
    assert "another process is running a sweep" in outcome.err
    assert complete_lines(tmp_path / "out") == []
