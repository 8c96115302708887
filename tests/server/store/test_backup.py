"""A coordinator's backup: taken while jobs are written to, and put back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from server.coordinator.supervisor import Supervisor
from server.store import backup as backup_module
from server.store.backup import back_up, put_back
from server.store.home import CoordinatorHome
from shared.errors import RunError
from shared.files import atomic, backup
from shared.files.backup import LIST_FILE
from shared.trust import audit_log
from shared.trust.audit_log import Event
from tests.conftest import Outcome

Command = Callable[..., Outcome]


@pytest.fixture
def home(tmp_path: Path, silotune: Command) -> CoordinatorHome:
    assert silotune("coordinator", "init", tmp_path / "hub", "--host", "localhost").status == 0
    place = CoordinatorHome(tmp_path / "hub")
    log = place.open_log(place.load_round_key(None))
    log.append(Event.COORDINATOR_STARTED, pid=1)
    (place.trust / "ca.crt").write_text("ca")
    job = place.jobs / "0001-pilot"
    (job / "run").mkdir(parents=True)
    for name in ("state.json", "run/checkpoint", "run/metrics.jsonl"):
        (job / name).write_text("0")
    return place


def test_a_backup_comes_back_as_it_was(home: CoordinatorHome, tmp_path: Path, silotune: Command) -> None:
    home.status.write_text("{}")
    assert "1 log entries" in silotune("coordinator", "backup", home.path, tmp_path / "a.tar").out
    assert silotune("coordinator", "verify-backup", tmp_path / "a.tar").status == 0
    done = silotune("coordinator", "restore", tmp_path / "a.tar", tmp_path / "back")
    assert done.status == 0, done.err
    back = CoordinatorHome(tmp_path / "back")
    for name in ("coordinator.toml", "keys/round.key", "keys/server.key", "trust/ca.crt", "jobs/0001-pilot/state.json"):
        assert (back.path / name).read_bytes() == (home.path / name).read_bytes()
    assert not back.status.exists()
    assert [entry.event for entry in audit_log.read(back.audit)] == [Event.COORDINATOR_STARTED, Event.BACKUP_RESTORED]
    with pytest.raises(RunError, match="is there already"):
        put_back(tmp_path / "a.tar", home, passphrase=None)


def test_a_job_that_is_being_written_is_copied_at_one_moment(home: CoordinatorHome, tmp_path: Path) -> None:
    """The writer keeps two files in step, one after the other, as a run keeps checkpoint and metrics."""
    run, done = home.jobs / "0001-pilot" / "run", threading.Event()

    def work() -> None:
        number = 0
        while not done.wait(0.02):
            number += 1
            atomic.write_text(run / "checkpoint", str(number))
            atomic.write_text(run / "metrics.jsonl", str(number))

    writer = threading.Thread(target=work)
    writer.start()
    seen = set()
    try:
        for number in range(4):
            back_up(home, tmp_path / f"{number}.tar")
            folder = tmp_path / str(number)
            folder.mkdir()
            backup.unpack(tmp_path / f"{number}.tar", "coordinator", folder)
            ahead, behind = (
                int((folder / "jobs/0001-pilot/run" / name).read_text()) for name in ("checkpoint", "metrics.jsonl")
            )
            assert ahead - behind in (0, 1)
            seen.add(ahead)
    finally:
        done.set()
        writer.join()
    assert len(seen) > 1, "nothing was written meanwhile: the test saw nothing"


def test_a_job_that_is_written_to_all_the_time_has_no_backup(
    home: CoordinatorHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backup_module, "_PAUSE_SECONDS", 0.0)
    state, number = backup_module._state, iter(range(1000))

    def busy(job: Path) -> dict[str, tuple[int, int, int]]:
        (job / "state.json").write_text("x" * next(number))
        return state(job)

    monkeypatch.setattr(backup_module, "_state", busy)
    with pytest.raises(RunError, match="faster than it can be copied"):
        back_up(home, tmp_path / "a.tar")
    assert not (tmp_path / "a.tar").exists()


def test_a_backup_that_was_unpacked_by_hand_is_not_started(home: CoordinatorHome) -> None:
    (home.path / LIST_FILE).touch()
    with pytest.raises(RunError, match="silotune coordinator restore"):
        Supervisor(home).run()
