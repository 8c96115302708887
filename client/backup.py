"""A site's backup, taken while its node runs, and put back without forgetting what was spent.

What is copied, in this order: stored releases, settings and keys, the audit log as it is at one moment, the ledger as it is
between two transactions. A charge stands in the ledger before anything else tells of it. So the ledger of a backup has
every charge that its log or its releases know of, whatever the node did meanwhile. Records are never copied.

Formal guarantees (tests: tests/client/test_backup.py)
    * Every backup opens: unbroken log, unbroken ledger, every entry of the log's mirror in the ledger, every release charged
      (test_backups_while_the_site_charges_all_open).
    * A backup is put back only if what came after it is accounted for: compared with the newest audit log, with the number of
      entries that somebody else noted, or declared by whoever puts it back; that stands in the log from then on
      (test_a_backup_older_than_the_newest_log_is_refused, test_a_backup_with_fewer_entries_than_were_noted_is_refused,
      test_putting_back_wants_a_witness, test_a_log_that_a_node_goes_on_with_is_no_witness).
    * A folder that was unpacked by hand is not opened (test_a_backup_that_was_unpacked_by_hand_is_not_opened).

Not guaranteed: the declaration is believed. A newest log or a number that is older than the site's last charge shows nothing
of what came after it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.approval.policy_changes import FOLDER as POLICIES
from client.ledger.account import CHARGING_KINDS
from client.ledger.file import copy_of, entry_hashes
from client.site.charged_records import RECORDS_FILE
from client.site.declared import DECLARED_FILE
from client.site.home import LOCK_FILE, SiteHome, open_log
from shared.errors import LedgerError, RunError, TrustError
from shared.files import backup
from shared.files.backup import LIST_FILE, Contents
from shared.trust import audit_chain, audit_log, key_changes
from shared.trust.audit_chain import HEAD_FILE, Entry, snapshot
from shared.trust.audit_log import Event
from shared.trust.signing import load_verify_key

_LEDGER = "ledger.db"
_PLAIN = ("site.toml", "policy.toml", "ca.crt", "site.crt", "log.pub")


def back_up(home: SiteHome, destination: Path) -> Contents:
    """Write a backup of a site's folder to the new file `destination`; the node may run, and no passphrase is needed.

    Raises:
        RunError, LedgerError, TrustError: something cannot be read or written, or is damaged; there is no backup then.
    """
    name = home.load_config().name
    with backup.writing(destination, kind="site", name=name, check=verify_backup) as writer:
        writer.add_folder(home.path / "rounds", "rounds")
        for name in _PLAIN:
            writer.add_file(name, home.path / name)
        for request in sorted(home.path.glob("*.csr")):
            writer.add_file(request.name, request)
        key_changes.back_up(writer, home.key.parent)
        writer.facts["log entries"] = audit_chain.back_up(writer, home.audit)
        if (home.path / _LEDGER).exists():
            content, num_entries = copy_of(home.path / _LEDGER)
            writer.add(_LEDGER, content)
            writer.facts["ledger entries"] = num_entries
        for name in (DECLARED_FILE, RECORDS_FILE):  # written before a charge that relies on it
            writer.add_file(name, home.path / name)
        writer.add_folder(home.path / POLICIES, POLICIES)  # each text was there before the log named it
    return backup.verify(destination, "site")


def verify_backup(path: Path) -> Contents:
    """Return what a backup holds, after checking its files, its audit log, its ledger, and that the two agree.

    Raises:
        RunError, LedgerError, TrustError: what is wrong.
    """
    with _checked(path) as found:
        return found.contents


def put_back(
    path: Path,
    home: SiteHome,
    *,
    passphrase: str | None,
    newest_log: Path | None = None,
    num_entries: int | None = None,
    nothing_released: bool = False,
) -> Contents:
    """Put a backup back into a new folder, once it is clear that no charge is missing in it.

    Args:
        newest_log: the site's audit log as it was last. It takes the place of the backup's.
        num_entries: how many entries the log had, by the last line that somebody else kept.
        nothing_released: whoever puts it back declares that nothing was released since.

    Raises:
        LedgerError: a charge is missing in the backup, or nothing tells that none is.
        RunError, TrustError: the backup cannot be used, the folder is not new, or a node goes on with the newest log.
    """
    if [newest_log is not None, num_entries is not None, nothing_released].count(True) != 1:
        raise LedgerError(
            "a backup forgets what was charged after it was taken, and that could be spent again. Say how you know that nothing "
            "is missing: --newest-log FOLDER (the site's audit log as it was last), --entries NUMBER (of the log, from the last "
            "line that your compliance officer keeps), or --nothing-released-since, which is noted as your word."
        )
    with _checked(path) as found, _at_rest(newest_log), backup.new_folder(home.path) as folder:
        known: dict[str, Any] = {"nothing_released_since": True}
        if newest_log is not None:
            known = {"newest_log_entries": _compare(found, newest_log)}
        if num_entries is not None:
            _check_number(found, num_entries)
            known = {"entries_noted": num_entries}
        if backup.unpack(path, "site", folder) != found.contents:
            raise RunError(f"{path} was replaced while it was put back; try again.")
        if newest_log is not None:
            _take_log(newest_log, folder / "audit")
        (folder / LIST_FILE).unlink(missing_ok=True)
        log = open_log(SiteHome(folder), passphrase=passphrase)
        log.append(Event.BACKUP_RESTORED, taken_at=found.contents.taken_at, entries=len(found.log), **known)
        return found.contents


@dataclass(frozen=True, kw_only=True)
class _Checked:
    """A backup that holds together.

    Attributes:
        log: hash of every entry of its audit log.
        ledger: hash of every entry of its ledger.
        folder: where log, ledger and log.pub lie unpacked.
    """

    contents: Contents
    log: list[str]
    ledger: list[str]
    folder: Path


@contextlib.contextmanager
def _checked(path: Path) -> Iterator[_Checked]:
    wanted = ("audit/", _LEDGER, "log.pub")
    with backup.unpacked(path, "site", wanted=lambda file: file.startswith(wanted)) as (contents, folder):
        log, mirrored = [], []
        if (folder / "audit").exists():
            for entry in _verified(folder / "audit", folder / "log.pub"):
                log.append(entry.sha256)
                if entry.event == Event.LEDGER_ENTRY:
                    mirrored.append(str(entry.details.get("entry_sha256")))
        ledger = entry_hashes(folder / _LEDGER) if (folder / _LEDGER).exists() else []
        if mirrored != ledger[: len(mirrored)]:
            raise LedgerError(
                f"the ledger in {path} is not the one that its audit log repeats, {len(mirrored)} entries against {len(ledger)}. "
                "Take another backup."
            )
        yield _Checked(contents=contents, log=log, ledger=ledger, folder=folder)


@contextlib.contextmanager
def _at_rest(log: Path | None) -> Iterator[None]:
    """Keep the node off a log that lies in its folder: what it charges meanwhile would be missing, and later be spent twice."""
    with contextlib.ExitStack() as held:
        if log is not None and os.access(log.parent / LOCK_FILE, os.W_OK):
            held.enter_context(SiteHome(log.parent).locked())
        yield


def _verified(log: Path, key: Path) -> list[Entry]:
    audit_log.verify(log, verify_head=load_verify_key(key))
    return list(audit_log.read(log))


def _compare(found: _Checked, newest: Path) -> int:
    """Return how many entries the newest log has; raise unless the backup's log is its beginning and no charge is missing."""
    entries = _verified(newest, found.folder / "log.pub")
    if [entry.sha256 for entry in entries[: len(found.log)]] != found.log:
        raise TrustError(
            f"{newest} does not go on where the log in the backup ends: it is older than the backup ({len(entries)} entries "
            f"against {len(found.log)}), or another log. Give the newest one."
        )
    told = [entry.details for entry in entries if entry.event == Event.LEDGER_ENTRY]
    missing = told[len(found.ledger) :]
    if missing or [details["entry_sha256"] for details in told] != found.ledger[: len(told)]:
        charges = sorted({_charge(details) for details in missing if details["kind"] in CHARGING_KINDS})
        raise LedgerError(
            f"the backup of {found.contents.taken_at} lacks {len(missing)} of the {len(told)} ledger entries that {newest} "
            + (f"repeats, among them the charges of {', '.join(charges[:5])}" if charges else "repeats")
            + ". Put back, it would let that be spent again. Take a newer backup; if there is none, stop using this data set, or "
            "see the site guide (Backup and restore) for how to count what is missing."
        )
    return len(entries)


def _charge(details: dict[str, Any]) -> str:
    return f"job {str(details['payload']['job_id'])[:12]}, round {details['payload']['round']}"


def _check_number(found: _Checked, num_entries: int) -> None:
    if num_entries > len(found.log):
        raise LedgerError(
            f"the log in the backup of {found.contents.taken_at} has {len(found.log)} entries, but had {num_entries} when that "
            "was noted: the backup is older, and what was charged in between would be forgotten. Take a newer backup, or give "
            "--newest-log."
        )


def _take_log(source: Path, target: Path) -> None:
    head, _, files = snapshot(source)
    target.mkdir(exist_ok=True, mode=0o700)  # a backup from before the first start holds no log
    for path in target.iterdir():
        path.unlink()
    for file, size in files:
        content = file.read_bytes()[:size]
        _write(target / file.name, content)
    _write(target / HEAD_FILE, head)


def _write(path: Path, content: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
