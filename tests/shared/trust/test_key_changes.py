"""A change of the passphrase: of a folder's keys all or none, whatever is killed, and nothing of it can be planted."""

from __future__ import annotations

import base64
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from client.site.home import SiteHome
from server.store.home import CoordinatorHome
from shared.errors import RunError, TrustError
from shared.files import atomic
from shared.trust import audit_log, key_changes, keystore
from shared.trust.audit_log import Event
from shared.trust.key_changes import DECISION_FILE, finish, replace_together
from shared.trust.keystore import load_secret, save_secret
from shared.trust.node_keys import change_passphrase, load_server_key, save_server_key
from shared.trust.pki import make_request
from shared.trust.signing import SigningKey

ROOT = Path(__file__).parents[3]
SECRETS = {"a.key": b"first", "b.key": b"second"}
OLD, NEW = "old words", "new words"

# Changes the passphrase of two keys and a server's key in a child of its own, which dies before a given call to the system.
WORKER = """
import fcntl, os, posix, signal, sys
from pathlib import Path
from shared.trust import key_changes, keystore
from shared.trust.key_changes import replace_together
from shared.trust.node_keys import change_passphrase
keystore.SCRYPT_N = 2**4
os.fsync = os.fstat  # a kill is no power cut, and this one is quick
for line in sys.stdin:
    folder, old, new, num = line.rstrip("\\n").split("|")
    if not (child := os.fork()):
        left = int(num)
        def step(frame, event, function):
            global left
            owner = getattr(function, "__self__", None)
            if event == "c_call" and (owner in (posix, fcntl) or type(owner).__module__ == "_io"):
                if not left:
                    signal.raise_signal(signal.SIGKILL)
                left -= 1
        files = [Path(folder, name) for name in ("a.key", "b.key")]
        key_changes.replace_together = lambda *given: (sys.setprofile(step), replace_together(*given))
        change_passphrase(files, old=old or None, new=new or None, server_key=Path(folder, "server.key"))
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(autouse=True)
def _quick_and_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keystore, "SCRYPT_N", 2**4)
    for name in ("SILOTUNE_PASSPHRASE", "SILOTUNE_NEW_PASSPHRASE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(f"{name}_FILE", raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, secret in SECRETS.items():
        save_secret(tmp_path / "keys" / name, secret, passphrase=OLD)
    save_server_key(tmp_path / "keys" / "server.key", SERVER_KEY, OLD)
    return tmp_path / "keys"


SERVER_KEY, _ = make_request(name="coordinator", role="server", hosts=["localhost"])


def opens_with(folder: Path, passphrase: str | None) -> bool:
    """Whether all keys of the folder open with this passphrase (None: are plain); `AssertionError` if only some do."""
    found = []
    for path in sorted(folder.glob("*.key")):
        is_plain = not keystore.is_encrypted(path.read_bytes())
        try:
            if path.name == "server.key":
                key = load_server_key(path, passphrase)
                assert key.private_numbers() == SERVER_KEY.private_numbers()
            else:
                assert load_secret(path, passphrase=passphrase) == SECRETS[path.name]
            found.append(is_plain == (passphrase is None))
        except TrustError:
            found.append(False)
    assert len(found) == 3
    assert len({*found}) == 1, f"some keys open with {passphrase} and some do not"
    return found[0]


def files_of(folder: Path) -> list[Path]:
    return [folder / name for name in SECRETS]


# --- a kill ---


def test_a_kill_at_any_call_leaves_one_of_both_passphrases(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", os.fstat)
    nursery = subprocess.Popen(
        [sys.executable, "-c", WORKER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert nursery.stdin is not None
    assert nursery.stdout is not None
    original = {path: path.read_bytes() for path in folder.iterdir()}
    found, outcome, halves = set(), -1, 0
    try:
        for num in range(1000):
            for path in folder.iterdir():
                path.unlink()
            for path, content in original.items():
                path.write_bytes(content)
                path.chmod(0o600)
            nursery.stdin.write(f"{folder}|{OLD}|{NEW}|{num}\n")
            nursery.stdin.flush()
            outcome = int(nursery.stdout.readline())
            assert outcome in (0, int(signal.SIGKILL)), f"killed before call {num}"
            halves += (folder / DECISION_FILE).exists()
            finish(folder)
            is_new = opens_with(folder, NEW)
            assert is_new or {path: path.read_bytes() for path in original} == original
            found.add(is_new)
            assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
            if outcome == 0:
                break
    finally:
        nursery.kill()
        nursery.communicate()
    assert outcome == 0, "the change never came to its end"
    assert found == {False, True}
    assert num > 60, "too few calls: the test saw nothing"
    assert halves > 30, "hardly any kill fell between the decision and its end"
    assert {path.name for path in folder.iterdir()} == {*SECRETS, "server.key"}


def test_whoever_opens_a_key_carries_out_what_was_decided(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_changes, "finish", lambda folder: None)
    change_passphrase(files_of(folder), old=OLD, new=NEW, server_key=folder / "server.key")
    assert (folder / DECISION_FILE).exists()
    monkeypatch.undo()
    monkeypatch.setattr(keystore, "SCRYPT_N", 2**4)
    assert load_secret(folder / "b.key", passphrase=NEW) == SECRETS["b.key"]
    assert not (folder / DECISION_FILE).exists()
    assert opens_with(folder, NEW)


def test_what_a_kill_before_the_decision_left_is_removed_by_the_next_change(folder: Path) -> None:
    leftover = folder / f".{DECISION_FILE}.abcd_123"
    leftover.write_text("half")
    change_passphrase(files_of(folder), old=OLD, new=NEW, server_key=folder / "server.key")
    assert not leftover.exists()


# --- nothing is changed unless everything can be ---


def test_what_a_kill_left_of_a_key_is_removed_by_the_next_change_too(folder: Path) -> None:
    """After `--none` it may hold a key that no passphrase protects."""
    leftover, others = folder / ".a.key.0123abcd", folder / ".a.key.backup"
    leftover.write_bytes(keystore.document(b"first", None))
    others.write_bytes(b"somebody else's")
    change_passphrase(files_of(folder), old=OLD, new=NEW)
    assert not leftover.exists()
    assert others.exists()


def test_a_key_that_is_a_link_stops_the_change_before_it_is_decided(folder: Path, tmp_path: Path) -> None:
    (folder / "b.key").rename(tmp_path / "elsewhere.key")
    (folder / "b.key").symlink_to(tmp_path / "elsewhere.key")
    with pytest.raises(RunError, match=r"b\.key is no plain file, so it is not replaced"):
        change_passphrase(files_of(folder), old=OLD, new=NEW, server_key=folder / "server.key")
    assert opens_with(folder, OLD)


def test_of_several_changes_at_once_none_is_lost(folder: Path) -> None:
    """`pki passphrase` for each key of a folder, all at the same time."""
    for num in range(3):
        save_secret(folder / f"{num}.key", bytes([num]), passphrase=OLD)
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(change_passphrase, [folder / f"{num}.key"], old=OLD, new=NEW) for num in range(3)]
        assert [one.result() for one in asked] == [None] * 3
    assert [load_secret(folder / f"{num}.key", passphrase=NEW) for num in range(3)] == [
        bytes([num]) for num in range(3)
    ]


def test_whoever_replaces_a_key_waits_for_a_change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`site rotate` beside `site passphrase`: else the change would put back the key that it had read."""
    begun, rotated = threading.Event(), threading.Event()

    def slow(folder: Path, contents: dict[str, bytes]) -> None:
        begun.set()
        assert not rotated.wait(0.05)
        replace_together(folder, contents)

    def rotate() -> None:
        begun.wait()
        save_secret(folder / "a.key", b"rotated", passphrase=OLD, replace=True)
        rotated.set()

    monkeypatch.setattr(key_changes, "replace_together", slow)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(rotate)
        change_passphrase(files_of(folder), old=OLD, new=NEW)
    assert load_secret(folder / "a.key", passphrase=OLD) == b"rotated"
    assert load_secret(folder / "b.key", passphrase=NEW) == b"second"


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"{}"), Path.unlink], ids=["damaged", "missing"])
@pytest.mark.parametrize("name", [*SECRETS, "server.key"])
def test_a_key_that_does_not_open_stops_the_change(folder: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(folder / name)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(TrustError, match=name):
        change_passphrase(files_of(folder), old=OLD, new=NEW, server_key=folder / "server.key")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("old", [None, "other words"])
def test_the_old_passphrase_is_needed(folder: Path, old: str | None) -> None:
    with pytest.raises(TrustError, match=r"a\.key"):
        change_passphrase(files_of(folder), old=old, new=NEW)
    assert opens_with(folder, OLD)


def test_the_same_passphrase_again_is_refused_unless_a_key_is_plain(folder: Path) -> None:
    with pytest.raises(TrustError, match="is the old one"):
        change_passphrase(files_of(folder), old=OLD, new=OLD, server_key=folder / "server.key")
    (folder / "server.key").unlink()
    save_server_key(folder / "server.key", SERVER_KEY, None)  # as every folder of before 0.2 has it
    change_passphrase(files_of(folder), old=OLD, new=OLD, server_key=folder / "server.key")
    assert opens_with(folder, OLD)


def test_a_full_disk_before_the_decision_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left"):
        change_passphrase(files_of(folder), old=OLD, new=NEW, server_key=folder / "server.key")
    monkeypatch.undo()
    monkeypatch.setattr(keystore, "SCRYPT_N", 2**4)
    assert opens_with(folder, OLD)


# --- a decision that was planted ---


def planted(folder: Path, content: str | None = None, *, name: str = "a.key") -> Path:
    text = base64.b64encode(keystore.document(b"planted", None)).decode()
    path = folder / DECISION_FILE
    path.write_text(content or json.dumps({"format": "silotune-key-change", "files": {name: text}}))
    path.chmod(0o600)
    return path


def test_a_decision_of_somebody_else_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = planted(folder)
    path.chmod(0o644)
    with pytest.raises(TrustError, match="can be used by others"):
        finish(folder)
    path.chmod(0o600)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    os.chown(folder, -1, -1)
    status = folder.stat()
    monkeypatch.setattr(Path, "stat", lambda self: os.stat_result((*status[:4], os.getuid() + 2, *status[5:])))
    with pytest.raises(TrustError, match="belongs to another user"):
        finish(folder)
    monkeypatch.undo()
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TrustError, match="is no plain file"):
        finish(folder)
    path.unlink()
    os.mkfifo(path, 0o600)
    with pytest.raises(TrustError, match="is no plain file"):
        finish(folder)


@pytest.mark.parametrize("name", ["../a.key", "/a.key", "", ".", "..", "sub/a.key", ".a.key", "a\0", "\ud800"])
def test_a_decision_about_other_places_is_refused(folder: Path, name: str) -> None:
    planted(folder, name=name)
    with pytest.raises(TrustError, match="names a file elsewhere"):
        load_secret(folder / "a.key", passphrase=OLD)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"format": "x", "files": {}}', "[" * 10_000, '{"files": 3}'])
def test_a_decision_that_is_damaged_is_refused(folder: Path, content: str) -> None:
    planted(folder, content or " ")
    with pytest.raises(TrustError, match="is damaged"):
        load_secret(folder / "a.key", passphrase=OLD)


def test_replacing_together_replaces(tmp_path: Path) -> None:
    replace_together(tmp_path, {"one": b"1", "two": b"2"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"one": b"1", "two": b"2"}


# --- the commands ---

Command = Callable[..., Any]


@pytest.fixture
def site(tmp_path: Path, silotune: Command) -> SiteHome:
    (tmp_path / "notes.csv").write_text("note,outcome\na,b\n")
    arguments = ["--name", "north", "--coordinator", "localhost:1", "--data", tmp_path / "notes.csv"]
    signer = f"lead={SigningKey.generate().verify_key.text}"
    columns = ["--column", "text=note", "--column", "label=outcome", "--signer", signer]
    assert silotune("site", "init", tmp_path / "north", *arguments, *columns).status == 0
    assert silotune("site", "rotate", tmp_path / "north").status == 0  # brings a fourth key
    return SiteHome(tmp_path / "north")


@pytest.fixture
def coordinator(tmp_path: Path, silotune: Command, monkeypatch: pytest.MonkeyPatch) -> CoordinatorHome:
    monkeypatch.setenv("SILOTUNE_PASSPHRASE", OLD)
    made = silotune("coordinator", "init", tmp_path / "hub", "--host", "localhost")
    assert "its keys are encrypted" in made.out
    return CoordinatorHome(tmp_path / "hub")


def test_a_site_goes_from_none_to_one_to_another_to_none(
    site: SiteHome, silotune: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = site.key_files
    assert len(keys) == 4
    secrets = [load_secret(path, passphrase=None) for path in keys]
    for old, new in ((None, OLD), (OLD, NEW), (NEW, None)):
        if old is not None:
            monkeypatch.setenv("SILOTUNE_PASSPHRASE", old)
        monkeypatch.setenv("SILOTUNE_NEW_PASSPHRASE", new or "unused")
        done = silotune("site", "passphrase", site.path, *([] if new else ["--none"]))
        assert done.status == 0, done.err
        assert OLD not in done.out + done.err
        assert NEW not in done.out + done.err
        assert [load_secret(path, passphrase=new) for path in keys] == secrets
        assert [keystore.is_encrypted(path.read_bytes()) for path in keys] == [new is not None] * 4
    said = [entry.details["encrypted"] for entry in audit_log.read(site.audit) if entry.event == Event.KEYS_ENCRYPTED]
    assert said == [True, True, False]


def test_the_new_passphrase_of_a_site_can_be_a_file(
    site: SiteHome, silotune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "new.passphrase"
    atomic.write_text(file, f"{NEW}\n")
    monkeypatch.setenv("SILOTUNE_NEW_PASSPHRASE_FILE", str(file))
    assert silotune("site", "passphrase", site.path).status == 0
    assert all(load_secret(path, passphrase=NEW) for path in site.key_files)


def test_without_a_new_passphrase_and_without_a_terminal_nothing_changes(site: SiteHome, silotune: Command) -> None:
    done = silotune("site", "passphrase", site.path)
    assert done.status == 1
    assert "SILOTUNE_NEW_PASSPHRASE_FILE" in done.err
    assert all(load_secret(path, passphrase=None) for path in site.key_files)


def test_what_is_typed_counts_if_it_is_typed_twice(
    site: SiteHome, silotune: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([NEW, OLD, NEW, NEW, NEW, OLD, OLD])
    monkeypatch.setattr("getpass.getpass", lambda prompt: next(answers))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert "differ or are empty" in silotune("site", "passphrase", site.path).err
    assert silotune("site", "passphrase", site.path).status == 0
    assert all(load_secret(path, passphrase=NEW) for path in site.key_files)
    assert silotune("site", "passphrase", site.path).status == 0  # now the old one is asked for as well
    assert all(load_secret(path, passphrase=OLD) for path in site.key_files)


def test_while_the_node_or_the_coordinator_runs_nothing_changes(
    site: SiteHome, coordinator: CoordinatorHome, silotune: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SILOTUNE_NEW_PASSPHRASE", NEW)
    for home, name in ((site, "site"), (coordinator, "coordinator")):
        with home.locked():
            done = silotune(name, "passphrase", home.path)
        assert done.status == 1
        assert "stop it first" in done.err
    assert load_secret(coordinator.round_key, passphrase=OLD)


def test_a_coordinator_changes_both_keys_and_its_server_key_is_encrypted(
    coordinator: CoordinatorHome, silotune: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = load_server_key(coordinator.server_key, OLD)
    assert b"BEGIN" not in coordinator.server_key.read_bytes()
    monkeypatch.setenv("SILOTUNE_NEW_PASSPHRASE", NEW)
    assert silotune("coordinator", "passphrase", coordinator.path).status == 0
    assert load_server_key(coordinator.server_key, NEW).private_numbers() == key.private_numbers()
    assert coordinator.load_round_key(NEW)
    with pytest.raises(TrustError, match="passphrase"):
        load_server_key(coordinator.server_key, OLD)
    monkeypatch.setenv("SILOTUNE_PASSPHRASE", NEW)
    assert silotune("coordinator", "passphrase", coordinator.path, "--none").status == 0
    assert b"BEGIN PRIVATE KEY" in coordinator.server_key.read_bytes()  # what versions before 0.2 read too
    assert load_server_key(coordinator.server_key, None).private_numbers() == key.private_numbers()


def test_the_key_of_a_ca_changes_its_passphrase(
    tmp_path: Path, silotune: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SILOTUNE_PASSPHRASE", OLD)
    assert silotune("pki", "init", tmp_path / "ca", "--name", "Group").status == 0
    monkeypatch.setenv("SILOTUNE_NEW_PASSPHRASE", NEW)
    assert silotune("pki", "passphrase", tmp_path / "ca" / "ca.key").status == 0
    assert load_secret(tmp_path / "ca" / "ca.key", passphrase=NEW)
