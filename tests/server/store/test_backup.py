"""A coordinator's backup: taken while jobs are written to, and put back."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from server.coordinator.supervisor import Supervisor
from server.store import backup as backup_module
from server.store.backup import back_up, put_back
from server.store.home import CoordinatorHome
from shared.errors import RunError, TrustError
from shared.files import atomic, backup
from shared.files.backup import LIST_FILE
from shared.trust import audit_log
from shared.trust.audit_log import Event
from shared.trust.pki import approve, create_ca, make_request, revoke
from shared.trust.trust_store import TrustStore
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


def list_of_a_revoked_site(ca: Path, name: str) -> Path:
    """Admit a site and revoke it; return the CA's list."""
    approve(ca, make_request(name=name, role="site")[1], role="site", passphrase=None)
    revoke(ca, name, passphrase=None)
    return ca / "crl.pem"


@pytest.fixture
def lists(home: CoordinatorHome, tmp_path: Path) -> list[Path]:
    """Revocation lists number 1 to 3 of the CA whose certificate lies in the coordinator's folder."""
    create_ca(tmp_path / "ca", name="ca", passphrase=None)
    (home.trust / "ca.crt").write_bytes((tmp_path / "ca" / "ca.crt").read_bytes())
    found = [shutil.copy(tmp_path / "ca" / "crl.pem", tmp_path / "1.pem")]
    for number in (2, 3):
        newest = list_of_a_revoked_site(tmp_path / "ca", f"site-{number}")
        found.append(shutil.copy(newest, tmp_path / f"{number}.pem"))
        shutil.copytree(tmp_path / "ca", tmp_path / f"ca-{number}")
    return found


@pytest.mark.parametrize(
    ("own", "given", "in_force", "said"),
    [
        (1, 3, 3, r"is the one given, number 3 of [-\d]{10}; that of the backup is number 1 of [-\d]{10}\."),
        (3, 2, 3, r"is that of the backup, number 3 of [-\d]{10}; the one given is older, number 2 of [-\d]{10}\."),
        (2, 2, 2, r"is the one given, number 2 of [-\d]{10}, which the backup holds as well\."),
        (0, 2, 2, r"is the one given, number 2 of [-\d]{10}; the backup holds none that can be used\."),
        (
            2,
            0,
            2,
            r"is that of the backup, number 2 of [-\d]{10}; who was revoked since could connect\.\nNext: .* install",
        ),
        (0, 0, 0, r"it holds no revocation list that can be used\.\nNext: .* install .* --crl"),
    ],
)
def test_of_two_revocation_lists_the_newer_is_kept(
    home: CoordinatorHome,
    tmp_path: Path,
    lists: list[Path],
    silotune: Command,
    own: int,
    given: int,
    in_force: int,
    said: str,
) -> None:
    if own:
        (home.trust / "crl.pem").write_bytes(lists[own - 1].read_bytes())
    back_up(home, tmp_path / "a.tar")
    more = ["--crl", lists[given - 1]] if given else []
    done = silotune("coordinator", "restore", tmp_path / "a.tar", tmp_path / "back", *more)
    assert done.status == 0, done.err
    assert re.search(said, done.out), done.out
    put = tmp_path / "back" / "trust" / "crl.pem"
    assert (put.read_bytes() if put.exists() else b"") == (lists[in_force - 1].read_bytes() if in_force else b"")
    if in_force:
        assert TrustStore(put.parent).sites(datetime.now(UTC)) == []


@pytest.mark.parametrize(
    "wrong", ["of another CA", "a second one of that number", "older than one seen", "none at all"]
)
def test_a_revocation_list_that_may_not_be_used_leaves_no_folder(
    home: CoordinatorHome, tmp_path: Path, lists: list[Path], wrong: str
) -> None:
    (home.trust / "crl.pem").write_bytes(lists[1].read_bytes())
    newest = lists[2]
    if wrong == "of another CA":
        create_ca(tmp_path / "other", name="ca", passphrase=None)
        newest = tmp_path / "other" / "crl.pem"
    elif wrong == "a second one of that number":  # of a CA's folder that was put back
        (home.trust / "crl.pem").write_bytes(lists[2].read_bytes())
        newest = list_of_a_revoked_site(tmp_path / "ca-2", "another")
    elif wrong == "older than one seen":
        (home.trust / "crl.number").write_text(f"9 {'0' * 64}\n")
    else:
        newest.write_text("nonsense")
    back_up(home, tmp_path / "a.tar")
    with pytest.raises(
        TrustError, match=r"not signed by this CA|two revocation lists of number 3|number 9 was seen|no PEM"
    ):
        put_back(tmp_path / "a.tar", CoordinatorHome(tmp_path / "back"), passphrase=None, newest_list=newest)
    assert not (tmp_path / "back").exists()


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
