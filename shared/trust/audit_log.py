"""An append-only log of JSON lines that shows every change made to it afterwards; a site and the coordinator keep one.

Each line is one entry in canonical JSON and names the SHA-256 of the entry before it, across files
`audit-00001.jsonl`, `audit-00002.jsonl`, ... The small file `head.json` names the last entry and is signed if the
log has a key. All of it is plain text by design, so that a person can read it. It speaks of jobs, keys and numbers,
never of records: callers must not put data into `details`.

Formal guarantees (tests: tests/shared/trust/test_audit_log.py)
    * When `append` returns, the entry is on the disk (test_an_entry_is_on_the_disk_before_append_returns,
      test_kill_at_any_moment_loses_no_acknowledged_entry).
    * `verify` finds every edited, deleted, added, repeated or moved entry, every missing file, and a head that is
      missing or changed (test_any_changed_byte_is_detected, test_any_change_of_the_lines_is_detected).
    * With a key, nobody without it can cut off the tail and make a head that fits (test_a_forged_head_needs_the_key).
    * After a crash at any point the next opening repairs the end of the log and records that as `log.recovered`
      (test_every_partial_state_is_repaired).

Not guaranteed
    * Whoever holds the signing key can write another history. Without a key, so can whoever may write the folder.
    * An older copy of the whole folder, log and head together, is consistent in itself. A site also mirrors its
      ledger into its log (client/ledger/audit_mirror.py), so an older copy of only one of the two shows.
    * One line that somebody adds after the head cannot be told from the last line of a process that died before it
      replaced the head. It is adopted, and `log.recovered` names it.
    * Durability ends where a disk reports a write as done that is not.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from shared.errors import RunError, TrustError
from shared.files.atomic import sync_folder
from shared.trust.audit_chain import (
    BEGINNING,
    HEAD_FILE,
    Beyond,
    Entry,
    Held,
    Position,
    check_last_line,
    cut,
    distrust,
    file_numbers,
    folder_lock,
    log_file,
    new_entry,
    read_beyond,
    read_head,
    scan,
    write_head,
)
from shared.trust.signing import SigningKey, VerifyKey

MAX_FILE_BYTES = 8 << 20
MAX_TEXT = 2000  # characters of one string in `details`; the rest is cut off


class Event(StrEnum):
    """Everything that a log can tell; each member is the text that stands in the log."""

    # A site
    NODE_STARTED = "node.started"  # the site's process started
    NODE_CONNECTED = "node.connected"  # it reached the coordinator
    NODE_STOPPED = "node.stopped"  # it ended in an orderly way
    REQUEST_RECEIVED = "request.received"  # a message of the coordinator arrived
    REQUEST_REFUSED = "request.refused"  # the site said no, and why
    JOB_PREPARED = "job.prepared"  # model and data of an accepted job were loaded and proven
    RECORDS_LEFT_OUT = (
        "records.left_out"  # which records a prepared job cannot use, by row; the coordinator is not told
    )
    APPROVAL_ASKED = "approval.asked"  # a job that no rule refuses waits for people of the site
    APPROVAL_GIVEN = "approval.given"  # somebody approved it
    APPROVAL_REFUSED = "approval.refused"  # somebody refused it, and why; the coordinator learns only that
    APPROVAL_WITHDRAWN = "approval.withdrawn"  # somebody took the approval back, and why; its later rounds are refused
    APPROVAL_EXPIRED = "approval.expired"  # nobody decided in time, or what was approved did not begin in time
    APPROVAL_BEGUN = "approval.begun"  # the first round of an approved job begins: the approval stands until withdrawn
    POLICY_PROPOSED = "policy.proposed"  # somebody wants another policy, and why; nothing is changed yet
    POLICY_ACCEPTED = "policy.accepted"  # somebody accepted it, and the file is about to be replaced
    POLICY_DECLINED = "policy.declined"  # somebody declined it, or who proposed it took it back
    POLICY_CHANGED = "policy.changed"  # another version is in force: by a proposal, or found in the file
    POLICY_UNREADABLE = "policy.unreadable"  # the site's policy was changed and cannot be read; no job is accepted
    LEDGER_ENTRY = "ledger.entry"  # one entry of the privacy ledger, repeated here
    RELEASE_STORED = "release.stored"  # a finished update was stored; it has not left yet
    RELEASE_REPEATED = "release.repeated"  # one that was stored before leaves again, for the same request
    RELEASE_SENT = "release.sent"  # an update left the site
    REPLY_SENT = "reply.sent"  # a description or a refusal left the site; neither holds anything of a record
    KEY_ROTATED = "key.rotated"  # the site's key or certificate was exchanged; it connects anew
    # The coordinator
    COORDINATOR_STARTED = "coordinator.started"  # the coordinator's process started
    COORDINATOR_STOPPED = "coordinator.stopped"  # it ended in an orderly way
    SITE_REGISTERED = "site.registered"  # a site's key was added
    SITE_REMOVED = "site.removed"  # a site's key was removed
    SITE_REFUSED = "site.refused"  # a site was turned away: unknown, removed or not what it claims
    SITE_AWAITS = "site.awaits"  # a job waits for approval at a site
    JOB_SUBMITTED = "job.submitted"  # a signed job was accepted for execution
    JOB_FINISHED = "job.finished"  # it ended: completed, stopped or failed
    READY_ASKED = "ready.asked"  # the adapter went out to sites that are to be summed securely; nothing is released yet
    ROUND_ASKED = (
        "round.asked"  # the adapter went out to the sites of a round; for a secure sum, the roster of the ready ones
    )
    UPDATE_ACCEPTED = "update.accepted"  # a site's update passed all checks
    UPDATE_DOUBTED = "update.doubted"  # a site's update counts, but is shorter than its noise alone would be
    UPDATE_REFUSED = "update.refused"  # a site's update, or its refusal, does not count
    METRICS_ACCEPTED = "metrics.accepted"  # a site's metrics passed all checks
    METRICS_REFUSED = "metrics.refused"  # a site releases none, or what came does not count
    ROUND_COMPLETED = "round.completed"  # the updates were aggregated and the result is on the disk
    SITE_CONNECTED = "site.connected"  # a site's stream was opened
    SITE_DISCONNECTED = "site.disconnected"  # it ended, and why
    CONNECTION_REFUSED = "connection.refused"  # somebody with a certificate was not let in, and why
    TWIN_REFUSED = "twin.refused"  # a second process showed the key of a site that is connected
    LINK_RESTARTED = "link.restarted"  # the port for sites was opened again, and why
    SUPERLINK_RESTARTED = "superlink.restarted"  # the same in logs of versions before 0.2
    TRUST_BROKEN = "trust.broken"  # the trust store cannot be trusted, so no site may connect
    # Both
    BACKUP_RESTORED = "backup.restored"  # this folder was put back from a backup, and why nothing is missing in it
    KEYS_ENCRYPTED = "passphrase.changed"  # the keys have another passphrase; `encrypted` is false if they have none
    CONSOLE_ACTION = "console.action"  # an account signed in to a console, or did something there
    LOG_RECOVERED = "log.recovered"  # the end of the log was repaired after a crash, or missing entries were added


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What `verify` found in an unbroken log.

    Attributes:
        entries: number of entries.
        sha256: of the last entry; 64 zeros if there is none.
        first_time, last_time: of the first and the last entry; None if there is none.
        signature_checked: whether the head's signature was checked with a key.
        end_checked: whether it was looked at what stands after the last entry.
        notes: sentences for a person, for example that a process died while it wrote.
    """

    entries: int
    sha256: str
    first_time: str | None
    last_time: str | None
    signature_checked: bool
    end_checked: bool
    notes: tuple[str, ...]


class AuditLog:
    """The log in `folder`, opened for writing; any number of processes and threads may write at once.

    Opening checks the end of the log only; `verify` checks all of it.

    Args:
        folder: created, private to its owner, if it is missing.
        seal_head: the owner's key. It is needed to go on with a log that was begun with it.
        max_bytes: a file that would grow beyond this is followed by a new one.
        clock: tells the time, with a time zone.

    Raises:
        TrustError: by every method, if the end of the log or its head is not as this program left it, or the log
            cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        seal_head: SigningKey | None = None,
        max_bytes: int = MAX_FILE_BYTES,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.folder = folder
        self._signer = seal_head
        self._max_bytes = max_bytes
        self._clock = clock
        self._threads = threading.RLock()
        self._depth = 0
        self._settled = False  # whether `_head` is the end of the files; only under the lock
        self._head = BEGINNING
        with self._explained():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with folder_lock(folder):
                for leftover in folder.glob(f".{HEAD_FILE}.*"):  # of a process that died while replacing the head
                    leftover.unlink()
                if not (folder / HEAD_FILE).exists() and not file_numbers(folder):
                    # The head comes before the first line, so a missing head is never the work of a crash.
                    write_head(folder, BEGINNING, seal_head)
        with self.locked():
            pass

    def append(self, event: str, /, **details: Any) -> Entry:
        """Add an entry; it is on the disk when this returns.

        Args:
            event: a member of `Event`.
            details: JSON values. Strings are cut at `MAX_TEXT` characters; details too long for one line are
                replaced by their size and SHA-256.

        Raises:
            ValueError: if the event is unknown, or a value is not JSON (NaN and infinity are not).
        """
        name = Event(event)
        bounded = _bounded(details)
        with self.locked(), self._explained():
            return self._write(name, bounded)

    @contextmanager
    def locked(self, *, patience: float | None = None) -> Iterator[None]:
        """Keep all others from writing, for several calls that belong together; may be nested.

        Args:
            patience: seconds to wait at most for other threads, and as many for other processes; None: as long as it takes.

        Raises:
            Held: it took longer.
        """
        if not self._threads.acquire(timeout=-1 if patience is None else patience):
            raise Held(self.folder)
        with ExitStack() as stack:
            stack.callback(self._threads.release)
            if self._depth:
                yield
                return
            with self._explained():
                stack.enter_context(folder_lock(self.folder, patience=patience))
                self._settle()
            self._depth = 1
            try:
                yield
            finally:
                self._depth = 0

    def read_on(self, start: Position = BEGINNING) -> Iterator[tuple[Entry, Position]]:
        """Yield the entries after `start`, each checked and with the place after it; see `read`."""
        head = read_head(self.folder, self._verify_key)
        return scan(self.folder, start, head)

    @property
    def _verify_key(self) -> VerifyKey | None:
        return None if self._signer is None else self._signer.verify_key

    # --- writing, under the lock ---

    def _settle(self) -> None:
        """Find the end of the log, check it, and repair what a crash left behind it."""
        # 1. The head must be the owner's, must not have gone back, and must name the line that is there.
        self._settled = False
        head = read_head(self.folder, self._verify_key)
        if head.sequence < self._head.sequence or (head.sequence == self._head.sequence and head != self._head):
            distrust(
                self.folder / HEAD_FILE,
                f"names entry {head.sequence}, but entry {self._head.sequence} was written or seen before: the log was "
                "replaced by another copy while in use",
            )
        check_last_line(self.folder, head)

        # 2. At most one line may stand after it: complete, or a part.
        beyond = read_beyond(self.folder, head)
        if beyond is None:
            self._head, self._settled = head, True
            return
        details: dict[str, Any] = {"file": beyond.path.name}
        if beyond.entry is None:
            cut(beyond)
            self._head = head
            details |= {"reason": "an unfinished entry was cut off", "bytes": len(beyond.data)}
        else:
            with beyond.path.open("rb") as file:
                os.fsync(file.fileno())
            after = head.after(beyond.entry, beyond.data, number=beyond.number)
            write_head(self.folder, after, self._signer)
            self._head = after
            details |= {
                "reason": "an entry that the head did not name yet was adopted",
                "adopted_sequence": beyond.entry.sequence,
                "adopted_sha256": beyond.entry.sha256,
            }
        self._settled = True
        self._write(Event.LOG_RECOVERED, details)

    def _write(self, event: str, details: dict[str, Any]) -> Entry:
        if not self._settled:  # an earlier write under this same lock failed
            self._settle()
        # 1. The entry, and the file that it goes to.
        head = self._head
        time = self._clock().astimezone(UTC).isoformat(timespec="milliseconds")
        entry = new_entry(head, time, event, details)
        line = f"{entry.line()}\n".encode()
        number = head.number + (head.size > 0 and head.size + len(line) > self._max_bytes)
        path = log_file(self.folder, number)

        # 2. The line first, then the head: a crash in between leaves one line too many, never one too few.
        self._settled = False
        is_new = not path.exists()
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(handle, rest) :]
            os.fsync(handle)
        finally:
            os.close(handle)
        if is_new:
            sync_folder(self.folder)
        after = head.after(entry, line, number=number)
        write_head(self.folder, after, self._signer)
        self._head, self._settled = after, True
        return entry

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RunError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            reason = getattr(cause, "strerror", None) or error
            raise TrustError(
                f"the audit log {self.folder} cannot be written: {reason}. Free space or mend the permissions, then try "
                "again; a half-written entry is repaired by itself."
            ) from error


def read(folder: Path) -> Iterator[Entry]:
    """Yield the entries of a log, oldest first, each checked; the memory used does not grow with the log.

    The head is compared, but a signature on it is not checked: see `verify`.

    Raises:
        TrustError: where the chain breaks, after the entries before that place.
    """
    for entry, _ in scan(folder, BEGINNING, read_head(folder, None, signed_is_fine=True)):
        yield entry


def verify(folder: Path, *, verify_head: VerifyKey | None = None, patience: float | None = None) -> Verified:
    """Check a whole log; it may be in use, or a copy on a read-only medium.

    Args:
        verify_head: the owner's public key; without it the signature of the head is not checked.
        patience: seconds to wait at most for whoever writes. After them, what stands after the last entry is not looked at, and a
            note says so; None: wait as long as it takes.

    Raises:
        TrustError: naming the file, the line and what is wrong there.
    """
    # 1. The head, and what stands after it, at one moment at which nobody writes.
    trouble: TrustError | None = None
    beyond: Beyond | None = None
    numbers: list[int] = []
    notes, is_held = [], False
    try:
        with folder_lock(folder, shared=True, patience=patience):
            head = read_head(folder, verify_head, signed_is_fine=True)
            numbers = file_numbers(folder)
            try:
                beyond = read_beyond(folder, head)
            except TrustError as error:
                trouble = error  # a break further up says more
    except Held:  # lines up to a head stay as they are, whoever writes
        head, is_held = read_head(folder, verify_head, signed_is_fine=True), True
        notes.append(
            "another process kept the log locked, so it was not looked at whether anything stands after its last entry; check "
            "again in a moment."
        )

    # 2. Every entry up to the head.
    first: Entry | None = None
    last: Entry | None = None
    num_repairs = 0
    for entry, _ in scan(folder, BEGINNING, head):
        first, last = first or entry, entry
        num_repairs += entry.event == Event.LOG_RECOVERED

    # 3. What stands after it, and what should not be there at all.
    if trouble is not None:
        raise trouble
    for number in numbers:
        if not 1 <= number <= head.number + (head.sequence > 0):
            distrust(
                log_file(folder, number),
                f"does not belong to the log, which ends in {log_file(folder, head.number).name}",
            )
    if beyond is not None and beyond.entry is None:
        notes.append(
            f"{beyond.path.name} ends with {len(beyond.data)} bytes of an unfinished entry: a process died while it wrote. "
            "The next entry cuts them off."
        )
    elif beyond is not None and beyond.entry is not None:
        notes.append(
            f"entry {beyond.entry.sequence} ({beyond.entry.event}) was written while the process died: the head does not "
            "name it, so it is not counted here. The next entry adopts it."
        )
    if num_repairs:
        notes.append(f"repairs after a crash: {num_repairs}; look at the entries {Event.LOG_RECOVERED}.")
    if verify_head is None:
        notes.append("no key was given, so it was not checked whether the log's owner signed the head.")
    return Verified(
        entries=head.sequence,
        sha256=head.sha256,
        first_time=first.time if first else None,
        last_time=last.time if last else None,
        signature_checked=verify_head is not None,
        end_checked=not is_held,
        notes=tuple(notes),
    )


def _bounded(value: Any) -> Any:
    """Return `value` with long strings cut and half characters (lone surrogates) written out."""
    if isinstance(value, str):
        text = value if len(value) <= MAX_TEXT else f"{value[:MAX_TEXT]}... ({len(value)} characters)"
        return text.encode(errors="backslashreplace").decode()
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, list | tuple):
        return [_bounded(item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {_bounded(key): _bounded(item) for key, item in value.items()}
    raise ValueError(f"an entry of the audit log holds {value!r:.100}; expected JSON values, numbers finite")
