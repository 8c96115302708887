"""Run folders: one writer, one job, and files that follow the checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from server.records.rounds import RoundRecord
from server.runs.folder import RunFolder, load_job
from server.store.checkpoint import Checkpoint
from shared.errors import RunError
from shared.job.job import Job
from shared.privacy.accounting import GaussianSteps, compose_epsilon
from shared.privacy.statement import SiteRelease


@pytest.fixture
def job(classification_job: Callable[..., Job]) -> Job:
    return classification_job()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def make_checkpoint(job: Job) -> Checkpoint:
    event = GaussianSteps(noise_multiplier=1.0, sample_rate=0.25, steps=4)
    release = SiteRelease(
        site="north",
        delta=1e-5,
        max_grad_norm=1.0,
        declared_records=32,
        randomness="os",
        epsilon_budget=50.0,
        steps_planned=6,
        events=(event,),
        rounds=(1, 2),
    )
    history = [RoundRecord(round=n, metrics={"loss": 1.0 / (n + 1)}) for n in range(3)]
    return Checkpoint(
        job_sha256=job.sha256,
        round_number=2,
        adapter={"w": torch.ones(2)},
        releases={"north": release},
        history=history,
    )


def test_a_second_writer_is_refused_while_the_first_is_there(tmp_path: Path, job: Job) -> None:
    path = tmp_path / "run"
    with RunFolder(path, job, resume=False):
        before = snapshot(path)
        with pytest.raises(RunError, match="another process is running in"):
            RunFolder(path, job, resume=True)
        assert snapshot(path) == before
    RunFolder(path, job, resume=True).__exit__(None, None, None)


def test_the_lock_holds_between_processes_and_ends_with_them(tmp_path: Path, job: Job) -> None:
    path = tmp_path / "run"
    RunFolder(path, job, resume=False).__exit__(None, None, None)
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom server.runs.folder import RunFolder, load_job\n"
        "path = Path(sys.argv[1])\nheld = RunFolder(path, load_job(path), resume=True)\n"
        "print('locked', flush=True)\ntime.sleep(600)\n"
    )
    root = Path(__file__).parents[3]
    with subprocess.Popen([sys.executable, "-c", program, path], cwd=root, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"locked\n"
        with pytest.raises(RunError, match="another process is running in"):
            RunFolder(path, job, resume=True)
        child.kill()
        child.wait()
    RunFolder(path, job, resume=True).__exit__(None, None, None)


def test_a_run_is_not_overwritten_nor_resumed_as_another(
    tmp_path: Path, job: Job, classification_job: Callable[..., Job]
) -> None:
    path = tmp_path / "run"
    RunFolder(path, job, resume=False).__exit__(None, None, None)
    before = snapshot(path)
    with pytest.raises(RunError, match="holds a run already; resume it with --resume"):
        RunFolder(path, job, resume=False)
    with pytest.raises(RunError, match="another configuration"):
        RunFolder(path, classification_job(seed=9), resume=True)
    assert snapshot(path) == before
    assert load_job(path) == job


def test_a_run_that_appears_between_check_and_lock_is_seen(
    tmp_path: Path, job: Job, classification_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    import server.runs.folder as module

    path, real = tmp_path / "run", module._take_lock

    def slow(handle: int, where: Path) -> None:
        monkeypatch.setattr(module, "_take_lock", real)
        RunFolder(path, classification_job(seed=9), resume=False).__exit__(None, None, None)
        real(handle, where)

    monkeypatch.setattr(module, "_take_lock", slow)
    with pytest.raises(RunError, match="another configuration"):
        RunFolder(path, job, resume=False)
    assert load_job(path).seed == 9


def test_a_folder_that_cannot_be_made_is_an_error_for_people(tmp_path: Path, job: Job) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="is a file; choose a folder"):
        RunFolder(tmp_path / "file", job, resume=False)
    with pytest.raises(RunError, match=r"cannot be made: .*file is a file"):
        RunFolder(tmp_path / "file" / "run", job, resume=False)


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no job\.json"):
        load_job(tmp_path)
    (tmp_path / "job.json").write_text("{")
    with pytest.raises(RunError, match=r"job\.json is damaged"):
        load_job(tmp_path)


def test_metrics_and_privacy_follow_the_checkpoint(tmp_path: Path, job: Job) -> None:
    checkpoint = make_checkpoint(job)
    with RunFolder(tmp_path / "run", job, resume=False) as folder:
        assert folder.load_checkpoint() is None
        folder.save_checkpoint(checkpoint)
        folder.write_privacy(checkpoint)
    path = tmp_path / "run"
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2]
    assert lines[2]["metrics"]["loss"] == 1 / 3
    record = json.loads((path / "sites" / "north" / "privacy.json").read_text())
    expected = compose_epsilon([GaussianSteps(noise_multiplier=1.0, sample_rate=0.25, steps=4)], 1e-5)
    assert record["epsilon_spent"] == expected
    assert record["steps_executed"] == 4
    statement = json.loads((path / "statement.json").read_text())
    assert f"({expected:.3f}, 1e-05)" in statement["text"]
    # A kill between the two writes leaves old metrics; a resume writes them again.
    (path / "metrics.jsonl").unlink()
    with RunFolder(path, job, resume=True) as folder:
        back = folder.load_checkpoint()
        assert back is not None
        folder.save_checkpoint(back)
    assert [json.loads(line)["round"] for line in (path / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2]


def test_injected_randomness_states_no_epsilon(tmp_path: Path, job: Job) -> None:
    checkpoint = make_checkpoint(job)
    injected = replace(checkpoint.releases["north"], randomness="injected")
    with RunFolder(tmp_path / "run", job, resume=False) as folder:
        folder.write_privacy(replace(checkpoint, releases={"north": injected}))
    record = json.loads((tmp_path / "run" / "sites" / "north" / "privacy.json").read_text())
    assert record["epsilon_spent"] is None
    assert "NOT PRIVATE" in record["statement"]
    assert "NOT PRIVATE" in json.loads((tmp_path / "run" / "statement.json").read_text())["one_site"]


def test_run_info_keeps_its_beginning_over_a_resume(tmp_path: Path, job: Job) -> None:
    with RunFolder(tmp_path / "run", job, resume=False) as folder:
        folder.write_run_info("running", {"mode": "test"})
        first = json.loads((folder.path / "run.json").read_text())
        folder.write_run_info("stopped", {"mode": "test"})
    with RunFolder(tmp_path / "run", job, resume=True) as folder:
        folder.write_run_info("running", {"mode": "test"})
        running = json.loads((folder.path / "run.json").read_text())
        folder.write_run_info("completed", {"mode": "test"})
        done = json.loads((folder.path / "run.json").read_text())
    assert (first["status"], running["status"], done["status"]) == ("running", "running", "completed")
    assert first["created"] == running["created"] == done["created"]
    assert running["finished"] is None
    assert done["finished"] is not None
    assert done["versions"]["torch"]
    assert done["mode"] == "test"
    assert done["machine"]["cpu_count"] == os.cpu_count()


def test_the_run_file_of_central_dp_does_not_tell_how_long_it_took(
    classification_job: Callable[..., Job], tmp_path: Path
) -> None:
    """The time of a run is that of its rounds, and these take as long as the sites that were drawn in secret."""
    privacy = {"mechanism": "central", "unit": "site", "central": {"num_sites": 100}}
    job = classification_job(privacy=privacy, federation={"min_sites": 100})
    for resume in (False, True):
        with RunFolder(tmp_path / "run", job, resume=resume) as folder:
            folder.write_run_info("running", {"mode": "test"})
            folder.write_run_info("completed", {"mode": "test"})
        written = json.loads((tmp_path / "run" / "run.json").read_text())
        assert [written[key] for key in ("finished", "seconds", "peak_rss_mb")] == [None, None, None]
        assert written["seconds_before"] == 0.0
        assert written["status"] == "completed"
        assert written["created"]
