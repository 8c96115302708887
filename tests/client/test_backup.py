"""A site's backup: taken while the site charges, and put back without forgetting what was spent."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import tarfile
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import client.backup as backup_module
from client.backup import back_up, put_back, verify_backup
from client.ledger.account import Budget, Charge
from client.ledger.audit_mirror import AuditMirror
from client.ledger.ledger import Ledger
from client.site.home import SiteHome, open_log, open_site
from client.site.outbox import Outbox
from shared.data.datasets import write_jsonl
from shared.errors import LedgerError, RunError, TrustError
from shared.files import backup
from shared.files.backup import LIST_FILE
from shared.privacy.accounting import GaussianSteps
from shared.trust import audit_chain, audit_log, key_changes, keystore
from shared.trust.audit_log import Event
from shared.trust.keystore import Seal, load_secret
from shared.trust.signing import SigningKey
from shared.wire.messages import TrainReply
from tests.conftest import Outcome

Command = Callable[..., Outcome]
MECHANISM = GaussianSteps(noise_multiplier=4.0, sample_rate=0.01, steps=1)
OLD, NEW = "old words", "new words"


class Node:
    """What a node does for a round: charges, stores the release, commits, notes it."""

    def __init__(self, home: SiteHome, passphrase: str | None = None) -> None:
        self.home = home
        self.log = open_log(home, passphrase=passphrase)
        self.seal = Seal(load_secret(home.storage_key, passphrase=passphrase))
        self.outbox = Outbox(home.path / "rounds", seal=self.seal)
        self.num = 0

    def ledger(self) -> Ledger:
        return Ledger(
            self.home.path / "ledger.db",
            dataset="north-records",
            unit="record",
            budget=Budget(epsilon=8.0, delta=1e-5),
            cipher=self.seal,
            mirror=AuditMirror(self.log),
        )

    def round(self, ledger: Ledger) -> None:
        self.num += 1
        number, job = self.num, "c" * 64
        request = f"{number:064x}"
        reservation = ledger.reserve(Charge(job_id=job, round=number, request_sha256=request, mechanism=MECHANISM))
        fields = {f.name: "" for f in dataclasses.fields(TrainReply)}
        reply = TrainReply(
            **{**fields, "update": b"u", "job_sha256": job, "round_number": number, "noise_multiplier": 4.0}
        )
        self.outbox.store_round(reply, request_sha256=request, optimizer_state={"m": torch.tensor([1.0])})
        ledger.commit(reservation, executed_steps=1, release_sha256="a" * 64)
        self.log.append(Event.RELEASE_STORED, round=number)


@pytest.fixture
def home(tmp_path: Path, silotune: Command) -> SiteHome:
    write_jsonl(tmp_path / "notes.jsonl", [{"text": "zyxomma", "label": "good"}] * 3)
    arguments = ["--name", "north", "--coordinator", "localhost:1", "--data", tmp_path / "notes.jsonl"]
    columns = ["--column", "text=text", "--column", "label=label"]
    signer = ["--signer", f"lead={SigningKey.generate().verify_key.text}"]
    assert silotune("site", "init", tmp_path / "north", *arguments, *columns, *signer).status == 0
    return SiteHome(tmp_path / "north")


def opens(home: SiteHome) -> int:
    """Open a folder as a node does; return the number of its charges."""
    node = Node(home)
    ledger = node.ledger()
    node.outbox.check_charged(ledger.entries())
    audit_log.verify(home.audit, verify_head=node.log._verify_key)
    return len(ledger.events())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- while the node works ---


def test_backups_while_the_site_charges_all_open(home: SiteHome, tmp_path: Path) -> None:
    node, done, failures = Node(home), threading.Event(), list[BaseException]()

    def work() -> None:
        try:
            ledger = node.ledger()
            while not done.is_set() and node.num < 60:
                node.round(ledger)
        except BaseException as error:
            failures.append(error)

    writer = threading.Thread(target=work)
    writer.start()
    taken = []
    try:
        while node.num < 2 and writer.is_alive():
            pass
        for number in range(5):
            path = tmp_path / f"{number}.tar"
            back_up(home, path)
            taken.append(path)
    finally:
        done.set()
        writer.join()
    assert not failures
    charges = []
    for number, path in enumerate(taken):
        place = SiteHome(tmp_path / f"back-{number}")
        put_back(path, place, passphrase=None, nothing_released=True)
        charges.append(opens(place))
    assert charges == sorted(charges)
    assert charges[-1] > charges[0] > 0, "nothing was charged meanwhile: the test saw nothing"


def test_whatever_happens_between_its_steps_a_backup_opens(
    home: SiteHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(home)
    ledger = node.ledger()

    def after_a_round(step: Callable[..., Any]) -> Callable[..., Any]:
        def interrupted(*given: Any) -> Any:
            node.round(ledger)
            found = step(*given)
            node.round(ledger)
            return found

        return interrupted

    steps = ((key_changes, "back_up"), (audit_chain, "back_up"), (audit_chain, "snapshot"), (backup_module, "copy_of"))
    for module, name in steps:
        monkeypatch.setattr(module, name, after_a_round(getattr(module, name)))
    back_up(home, tmp_path / "a.tar")
    place = SiteHome(tmp_path / "back")
    put_back(tmp_path / "a.tar", place, passphrase=None, nothing_released=True)
    assert opens(place) == 7  # those before the ledger was copied


@pytest.mark.parametrize("num", [0, 1, 12])
def test_a_log_of_several_files_is_copied_up_to_one_moment(tmp_path: Path, num: int) -> None:
    key = SigningKey.generate()
    log = audit_log.AuditLog(tmp_path / "audit", seal_head=key, max_bytes=700)
    for number in range(num):
        log.append(Event.NODE_STARTED, number=number)

    def copy(taken: Path) -> None:
        with backup.writing(taken, kind="site", name="north", check=lambda path: None) as writer:
            assert audit_chain.back_up(writer, log.folder) == num

    copy(tmp_path / "a.tar")
    (tmp_path / "back").mkdir()
    backup.unpack(tmp_path / "a.tar", "site", tmp_path / "back")
    found = audit_log.verify(tmp_path / "back" / "audit", verify_head=key.verify_key)
    assert (found.entries, found.notes) == (num, ())
    assert len(list((tmp_path / "back" / "audit").glob("audit-*"))) == (num + 1) // 2  # two entries fit
    audit_log.AuditLog(tmp_path / "back" / "audit", seal_head=key).append(Event.NODE_STARTED)


def test_a_backup_is_private_and_holds_no_record_and_nothing_of_the_moment(home: SiteHome, tmp_path: Path) -> None:
    node = Node(home)
    node.round(node.ledger())
    (home.path / "notes.jsonl").write_text("zyxomma")
    home.status.write_text("{}")
    (home.path / ".node.lock").touch()
    back_up(home, tmp_path / "a.tar")
    assert (tmp_path / "a.tar").stat().st_mode & 0o777 == 0o600
    assert b"zyxomma" not in (tmp_path / "a.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        names = set(tar.getnames())
    keys = {"keys/site.key", "keys/storage.key", "keys/log.key"}
    settings = {"site.toml", "policy.toml", "log.pub", "north.csr"}
    rest = {"ledger.db", "audit/audit-00001.jsonl", "audit/head.json", LIST_FILE}
    assert names == keys | settings | rest | {f"rounds/{'c' * 16}/round-00001.safetensors"}


def test_keys_of_a_change_of_the_passphrase_that_was_cut_short_are_of_one_kind(
    home: SiteHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keystore, "SCRYPT_N", 2**4)
    documents = {path.name: keystore.document(load_secret(path, passphrase=None), NEW) for path in home.key_files}
    with monkeypatch.context() as cut_short:
        cut_short.setattr(key_changes, "finish", lambda folder: None)
        key_changes.replace_together(home.key.parent, documents)
    back_up(home, tmp_path / "a.tar")
    put_back(tmp_path / "a.tar", SiteHome(tmp_path / "back"), passphrase=NEW, nothing_released=True)
    assert all(load_secret(path, passphrase=NEW) for path in SiteHome(tmp_path / "back").key_files)


def test_a_ledger_that_is_damaged_has_no_backup(home: SiteHome, tmp_path: Path) -> None:
    node = Node(home)
    node.round(node.ledger())
    data = bytearray((home.path / "ledger.db").read_bytes())
    place = data.rindex(b"sealed")
    data[place : place + 6] = b"opened"
    (home.path / "ledger.db").write_bytes(data)
    with pytest.raises(LedgerError, match="was changed after it was written"):
        back_up(home, tmp_path / "a.tar")
    assert [path.name for path in tmp_path.iterdir() if ".tar" in path.name] == []


def test_a_ledger_and_a_log_that_disagree_have_no_backup(home: SiteHome, tmp_path: Path) -> None:
    node = Node(home)
    ledger = node.ledger()
    shutil.copy(home.path / "ledger.db", tmp_path / "old.db")
    node.round(ledger)
    shutil.copy(tmp_path / "old.db", home.path / "ledger.db")
    with pytest.raises(LedgerError, match="not the one that its audit log repeats"):
        back_up(home, tmp_path / "a.tar")
    assert not (tmp_path / "a.tar").exists()


# --- putting back ---


@pytest.fixture
def world(home: SiteHome, tmp_path: Path) -> tuple[Node, Ledger, Path]:
    """A node after one round, and the backup of then."""
    node = Node(home)
    ledger = node.ledger()
    node.round(ledger)
    back_up(home, tmp_path / "a.tar")
    return node, ledger, tmp_path / "a.tar"


World = tuple[Node, Ledger, Path]


def test_putting_back_wants_a_witness(world: World, tmp_path: Path) -> None:
    _, _, taken = world
    with pytest.raises(LedgerError, match="could be spent again"):
        put_back(taken, SiteHome(tmp_path / "back"), passphrase=None)
    with pytest.raises(LedgerError, match="Say how you know"):
        put_back(taken, SiteHome(tmp_path / "back"), passphrase=None, num_entries=1, nothing_released=True)
    assert not (tmp_path / "back").exists()


def test_what_was_put_back_is_what_there_was_and_the_log_says_so(world: World, tmp_path: Path) -> None:
    node, _, taken = world
    back = SiteHome(tmp_path / "back")
    found = put_back(taken, back, passphrase=None, nothing_released=True)
    old, new = contents(node.home.path), contents(back.path)
    changes = {
        "audit/head.json",
        "audit/audit-00001.jsonl",
        "ledger.db",
    }  # an entry more; the rows, by SQLite's own copy
    assert {name: content for name, content in old.items() if name not in changes} == {
        name: content for name, content in new.items() if name not in changes
    }
    assert {path.stat().st_mode & 0o777 for path in back.path.rglob("*")} == {0o600, 0o700}
    last = list(audit_log.read(back.audit))[-1]
    assert (last.event, last.details["taken_at"]) == (Event.BACKUP_RESTORED, found.taken_at)
    assert last.details["nothing_released_since"]
    assert opens(back) == 1


def test_a_backup_older_than_the_newest_log_is_refused(world: World, tmp_path: Path) -> None:
    node, ledger, taken = world
    back = SiteHome(tmp_path / "back")
    node.round(ledger)
    with pytest.raises(LedgerError, match=r"lacks 2 of the \d+ ledger entries .* job cccccccccccc, round 2"):
        put_back(taken, back, passphrase=None, newest_log=node.home.audit)
    assert not back.path.exists()


def test_the_newest_log_takes_the_place_of_the_backup_s(world: World, tmp_path: Path) -> None:
    node, _, taken = world
    node.log.append(Event.NODE_STOPPED)
    newest = [entry.sha256 for entry in audit_log.read(node.home.audit)]
    back = SiteHome(tmp_path / "back")
    put_back(taken, back, passphrase=None, newest_log=node.home.audit)
    entries = list(audit_log.read(back.audit))
    assert [entry.sha256 for entry in entries[:-1]] == newest
    assert entries[-1].details["newest_log_entries"] == len(newest)
    assert opens(back) == 1


def test_a_log_that_a_node_goes_on_with_is_no_witness(world: World, tmp_path: Path) -> None:
    """Two nodes would charge the same records, each by itself."""
    node, _, taken = world
    back = SiteHome(tmp_path / "back")
    with node.home.locked(), pytest.raises(RunError, match=r"another node works in .*; stop it first"):
        put_back(taken, back, passphrase=None, newest_log=node.home.audit)
    assert not back.path.exists()
    put_back(taken, back, passphrase=None, newest_log=node.home.audit)


def test_a_backup_from_before_the_first_start_takes_a_log_without_charges(home: SiteHome, tmp_path: Path) -> None:
    back_up(home, tmp_path / "a.tar")
    node = Node(home)
    node.log.append(Event.NODE_STARTED)
    back = SiteHome(tmp_path / "back")
    put_back(tmp_path / "a.tar", back, passphrase=None, newest_log=home.audit)
    assert [entry.event for entry in audit_log.read(back.audit)] == [Event.NODE_STARTED, Event.BACKUP_RESTORED]


def test_what_was_compared_is_what_is_put_back(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of the backup is replaced by an older one after its charges were counted."""
    node, ledger, older = world
    node.round(ledger)
    back_up(node.home, tmp_path / "b.tar")
    compare = backup_module._compare

    def replaced(*given: Any) -> int:
        shutil.copyfile(older, tmp_path / "b.tar")
        return compare(*given)

    monkeypatch.setattr(backup_module, "_compare", replaced)
    with pytest.raises(RunError, match="was replaced while it was put back"):
        put_back(tmp_path / "b.tar", SiteHome(tmp_path / "back"), passphrase=None, newest_log=node.home.audit)
    assert not (tmp_path / "back").exists()


def test_a_backup_on_a_medium_that_is_only_read_is_checked(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, taken = world
    make = tempfile.mkdtemp

    def only_read(suffix: Any = None, prefix: Any = None, dir: Any = None) -> str:  # noqa: A002 (as it is called)
        if dir == taken.parent:
            raise OSError(errno.EROFS, "Read-only file system")
        return make(suffix, prefix, dir)

    monkeypatch.setattr(tempfile, "mkdtemp", only_read)
    assert verify_backup(taken).name == "north"
    with pytest.raises(RunError, match="No such file"):
        verify_backup(taken.parent / "none" / "a.tar")


def test_a_log_that_is_older_or_another_is_no_witness(world: World, tmp_path: Path, silotune: Command) -> None:
    node, ledger, taken = world
    shutil.copytree(node.home.audit, tmp_path / "old")
    node.round(ledger)
    back_up(node.home, tmp_path / "b.tar")
    with pytest.raises(TrustError, match="is older than the backup"):
        put_back(tmp_path / "b.tar", SiteHome(tmp_path / "back"), passphrase=None, newest_log=tmp_path / "old")
    audit_log.AuditLog(tmp_path / "foreign", seal_head=SigningKey.generate())
    with pytest.raises(TrustError, match="was not signed with this key"):
        put_back(taken, SiteHome(tmp_path / "back"), passphrase=None, newest_log=tmp_path / "foreign")


def test_a_backup_with_fewer_entries_than_were_noted_is_refused(world: World, tmp_path: Path) -> None:
    node, ledger, taken = world
    num = audit_log.verify(node.home.audit).entries
    node.round(ledger)
    with pytest.raises(LedgerError, match="would be forgotten"):
        put_back(taken, SiteHome(tmp_path / "no"), passphrase=None, num_entries=num + 1)
    put_back(taken, SiteHome(tmp_path / "back"), passphrase=None, num_entries=num)
    assert list(audit_log.read(tmp_path / "back" / "audit"))[-1].details["entries_noted"] == num


def test_a_backup_is_put_back_into_a_new_folder_only(world: World, tmp_path: Path) -> None:
    node, _, taken = world
    before = contents(node.home.path)
    with pytest.raises(RunError, match="is there already"):
        put_back(taken, node.home, passphrase=None, nothing_released=True)
    assert contents(node.home.path) == before


def test_a_backup_that_was_unpacked_by_hand_is_not_opened(world: World, tmp_path: Path) -> None:
    _, _, taken = world
    with tarfile.open(taken) as tar:
        tar.extractall(tmp_path / "back", filter="data")
    with pytest.raises(RunError, match="silotune site restore"):
        open_site(SiteHome(tmp_path / "back"), passphrase=None)
    os.unlink(tmp_path / "back" / LIST_FILE)
    assert open_site(SiteHome(tmp_path / "back"), passphrase=None)


def test_a_wrong_passphrase_leaves_no_folder(
    home: SiteHome, tmp_path: Path, silotune: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keystore, "SCRYPT_N", 2**4)
    monkeypatch.setenv("SILOTUNE_NEW_PASSPHRASE", NEW)
    assert silotune("site", "passphrase", home.path).status == 0
    back_up(home, tmp_path / "a.tar")
    with pytest.raises(TrustError, match="wrong"):
        put_back(tmp_path / "a.tar", SiteHome(tmp_path / "back"), passphrase=OLD, nothing_released=True)
    assert not (tmp_path / "back").exists()
    assert not list(tmp_path.glob(".back*"))


def test_the_commands(world: World, tmp_path: Path, silotune: Command) -> None:
    node, _, _ = world
    made = silotune("site", "backup", node.home.path, tmp_path / "b.tar")
    assert made.status == 0, made.err
    assert "log entries" in made.out
    assert "ledger entries" in made.out
    again = silotune("site", "backup", node.home.path, tmp_path / "b.tar")
    assert "is there already" in again.err
    assert "nothing was changed since" in silotune("site", "verify-backup", tmp_path / "b.tar").out
    assert "Say how you know" in silotune("site", "restore", tmp_path / "b.tar", tmp_path / "back").err
    done = silotune("site", "restore", tmp_path / "b.tar", tmp_path / "back", "--newest-log", node.home.audit)
    assert done.status == 0, done.err
    verify_backup(tmp_path / "b.tar")
