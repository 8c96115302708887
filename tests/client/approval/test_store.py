"""The file of approvals: what is left after a kill, and what a file that somebody touched is worth."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from client.approval.store import MOST_FILE_BYTES
from shared.errors import AwaitingApproval, RunError, TrustError
from shared.files import atomic
from shared.trust import audit_log
from shared.trust.audit_log import AuditLog, Event
from tests.client.approval.conftest import COORDINATOR, LOG_KEY, NOON, Desk

WRITES = ("write", "fsync", "replace", "open")


class Killed(BaseException):
    """A process that ends here."""


@contextmanager
def dying(monkeypatch: pytest.MonkeyPatch, nth: int, *, after: bool) -> Iterator[list[int]]:
    """End the process at the `nth` call that changes the disk, just before or just after it; yield how many came."""
    calls = [0]

    def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == nth and not after:
                raise Killed
            found = real(*args, **kwargs)
            if calls[0] == nth:
                raise Killed
            return found

        return call

    with monkeypatch.context() as patch:
        for name in WRITES:
            patch.setattr(os, name, wrapped(getattr(os, name)))
        yield calls


ACTIONS: dict[str, tuple[Callable[[Desk], Any], str, str]] = {
    # What is done, and the state before and after it.
    "ask": (lambda desk: ask(desk), "", "waiting"),
    "approve": (lambda desk: desk.opened().approve("triage", desk.rules, by="ada"), "waiting", "approved"),
    "refuse": (lambda desk: desk.opened().refuse("triage", desk.rules, by="ada", reason="no"), "waiting", "refused"),
    "begin": (lambda desk: desk.opened().begin(desk.signed(), desk.rules), "approved", "begun"),
    "withdraw": (lambda desk: desk.opened().refuse("triage", desk.rules, by="ada", reason="no"), "begun", "refused"),
    "expire": (lambda desk: desk.opened().listed(desk.rules), "waiting", "expired"),
}


def ask(desk: Desk) -> None:
    with pytest.raises(AwaitingApproval):
        desk.opened().admit(desk.signed(), desk.rules)


def prepare(desk: Desk, before: str, action: str) -> None:
    desk.opened()
    if before:
        desk.asked(desk.signed())
    if before in ("approved", "begun"):
        desk.opened().approve("triage", desk.rules, by="ada")
    if before == "begun":
        desk.opened().begin(desk.signed(), desk.rules)
    if action == "expire":
        desk.now = NOON + timedelta(days=8)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("action", ACTIONS)
def test_a_kill_at_any_write_leaves_a_change_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str, after: bool
) -> None:
    act, before, then = ACTIONS[action]
    nth, ended, left = 0, False, set()
    while not ended:
        nth += 1
        desk = Desk(tmp_path / f"{nth}")
        desk.folder.mkdir()
        prepare(desk, before, action)
        log_before = desk.events()
        with dying(monkeypatch, nth, after=after) as calls:
            with suppress(Killed):
                act(desk)
            ended = calls[0] < nth
        if action == "expire":
            desk.now = NOON  # so that looking does not end it once more
        found = dict(desk.states()).get("triage", "")
        left.add(found)
        assert found in (before, then), f"killed at {nth}"
        # File and log agree, whichever it is: what counts has its entry, once.
        news = desk.events()[len(log_before) :]
        assert len(news) == (found == then), f"killed at {nth}: {news}"
        audit_log.verify(desk.folder / "audit", verify_head=LOG_KEY.verify_key)
        # And both can be gone on with.
        if found:
            desk.opened().refuse("triage", desk.rules, by="eve", reason="x") if found != "refused" else None
            assert desk.states() == {"triage": "refused"}
    assert nth > 8, "hardly anything was written: the test saw nothing"
    assert left == {before, then}


def test_every_change_is_written_through_to_the_disk(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    desk.asked(desk.signed())
    assert any(".approvals.sealed." in name for name in synced)
    assert any(name == str(desk.folder) for name in synced)
    assert any("audit-00001.jsonl" in name for name in synced)


def test_nothing_of_a_job_can_be_read_without_the_key(desk: Desk) -> None:
    desk.asked(desk.signed("a-telling-name"))
    content = desk.file.read_bytes()
    assert b"telling" not in content
    assert (desk.file.stat().st_mode & 0o777) == 0o600


# --- files that somebody touched ---


def nothing_is_approved(desk: Desk, match: str) -> None:
    for act in (
        lambda: desk.opened().admit(desk.signed(), desk.rules),
        lambda: desk.opened().begin(desk.signed(), desk.rules),
        lambda: desk.opened().listed(desk.rules),
        lambda: desk.opened().approve("triage", desk.rules, by="bob"),
        lambda: desk.opened().check_refused(desk.signed(), desk.rules),
    ):
        with pytest.raises(TrustError, match=match):
            act()


def approved(desk: Desk) -> None:
    desk.asked(desk.signed())
    desk.opened().approve("triage", desk.rules, by="ada")
    desk.opened().admit(desk.signed(), desk.rules)


def test_a_file_that_was_changed_is_not_read(desk: Desk) -> None:
    approved(desk)
    content = desk.file.read_bytes()
    for place in range(0, len(content), 97):
        changed = bytearray(content)
        changed[place] ^= 1
        desk.file.write_bytes(changed)
        nothing_is_approved(desk, "does not open: it was changed, or damaged")
    for shorter in (content[:-1], content[:50], b"", b"{}"):
        desk.file.write_bytes(shorter)
        nothing_is_approved(desk, "does not open")
    desk.file.write_bytes(content)
    desk.opened().admit(desk.signed(), desk.rules)


def test_a_file_without_an_end_is_not_read(desk: Desk) -> None:
    approved(desk)
    with desk.file.open("r+b") as file:
        file.truncate(MOST_FILE_BYTES + 1)
    nothing_is_approved(desk, "is longer than")


def test_an_older_file_is_not_read(desk: Desk) -> None:
    approved(desk)
    old = desk.file.read_bytes()
    desk.opened().refuse("triage", desk.rules, by="ada", reason="the study was stopped")
    desk.file.write_bytes(old)
    nothing_is_approved(desk, "an older copy was put back")


def test_a_file_of_another_site_is_not_read(desk: Desk, tmp_path: Path) -> None:
    other = Desk(tmp_path / "other")
    other.folder.mkdir()
    approved(other)  # under the same key, as in a copied folder
    desk.asked(desk.signed())
    desk.file.write_bytes(other.file.read_bytes())
    nothing_is_approved(desk, "an older copy was put back")


def test_an_older_log_is_not_believed(desk: Desk) -> None:
    desk.asked(desk.signed())
    shutil.copytree(desk.folder / "audit", desk.folder / "old")
    desk.opened().approve("triage", desk.rules, by="ada")
    desk.opened().refuse("triage", desk.rules, by="ada", reason="no")
    shutil.rmtree(desk.folder / "audit")
    (desk.folder / "old").rename(desk.folder / "audit")
    nothing_is_approved(desk, "is not the one that the audit log names")


def test_a_forged_line_speaks_for_no_file(desk: Desk) -> None:
    """Whoever may write the folder can add one line to the log, which is adopted: it leads back to no older file."""
    approved(desk)
    old = desk.file.read_bytes()
    desk.opened().refuse("triage", desk.rules, by="ada", reason="no")
    (given,) = [entry for entry in desk.entries() if entry.event == Event.APPROVAL_GIVEN]
    for number in (given.details["file_number"], given.details["file_number"] + 2):
        forged = Desk(desk.folder.with_name(f"forged-{number}"))
        shutil.copytree(desk.folder, forged.folder)
        keyless = AuditLog(desk.folder.with_name(f"scratch-{number}"), clock=lambda: NOON)
        with keyless.locked():
            keyless._head = AuditLog(forged.folder / "audit", seal_head=LOG_KEY)._head
            from shared.trust.audit_chain import new_entry

            details = given.details | {"file_number": number}
            line = new_entry(keyless._head, NOON.isoformat(timespec="milliseconds"), given.event, details).line()
        with (forged.folder / "audit" / "audit-00001.jsonl").open("a") as file:
            file.write(line + "\n")
        forged.file.write_bytes(old)
        nothing_is_approved(forged, "an older copy was put back")


def test_a_removed_file_approves_nothing(desk: Desk) -> None:
    approved(desk)
    desk.file.unlink()
    assert desk.states() == {}
    desk.asked(desk.signed())
    assert desk.states() == {"triage": "waiting"}
    numbers = [entry.details["file_number"] for entry in desk.entries()]
    assert numbers == [1, 2, 3]


def test_a_file_that_cannot_be_trusted_is_mended_by_removing_it(desk: Desk) -> None:
    approved(desk)
    desk.file.write_bytes(b"x")
    with pytest.raises(TrustError, match="then remove the file"):
        desk.states()
    desk.file.unlink()
    approved(desk)
    assert desk.states() == {"triage": "approved"}


def test_a_full_disk_changes_nothing(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.asked(desk.signed())
    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises((RunError, TrustError), match="No space left"):
            desk.opened().approve("triage", desk.rules, by="ada")
    assert desk.states() == {"triage": "waiting"}


def test_a_long_log_is_read_before_others_are_kept_waiting(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.asked(desk.signed())
    approvals, read, locked = desk.opened(), list[int](), AuditLog.locked

    def lock(log: AuditLog, **options: Any) -> AbstractContextManager[None]:
        read.append(approvals._store._witness.sequence)
        return locked(log, **options)

    monkeypatch.setattr(AuditLog, "locked", lock)
    assert approvals.listed(desk.rules)
    assert read[0] == 1


def test_two_that_are_open_see_each_others_changes(desk: Desk) -> None:
    node, person = desk.opened(), desk.opened()
    with pytest.raises(AwaitingApproval):
        node.admit(desk.signed(), desk.rules)
    person.approve("triage", desk.rules, by="ada")
    node.begin(desk.signed(), desk.rules)
    person.refuse("triage", desk.rules, by="ada", reason="no")
    assert [state for _, state in node.listed(desk.rules)] == ["refused"]
    details = [entry.details for entry in desk.entries()]
    assert all(one["coordinator"] == COORDINATOR.verify_key.text for one in details)
    assert json.dumps(details[-1]).count("no") >= 1
