"""The site's ledger, repeated in its audit log: a second witness of what was spent.

Every ledger entry is also an event `ledger.entry` of the log, in order, in plain text by design: it names data set,
jobs and mechanisms, and holds nothing of a record.

Formal guarantees (tests: tests/client/ledger/test_audit_mirror.py)
    * When `Ledger.reserve` returns, the charge is in both (test_every_ledger_entry_is_in_the_log).
    * A crash between the two is healed at the next opening (test_entries_lost_in_a_crash_are_added_in_order,
      test_kill_at_any_moment_leaves_a_log_that_heals).
    * A ledger that lacks an entry of the log, or has another in its place, is not opened
      (test_an_older_copy_of_the_ledger_is_refused, test_a_deleted_ledger_is_refused); this holds for a copy from before an
      import or a migration too (test_a_copy_from_before_an_import_is_refused, test_an_older_version_is_mirrored_and_guarded).
    * `recount` agrees with the ledger without reading it (test_recount_agrees_with_the_ledger).
    * A `Witness` finds what opening would refuse, in a moment (test_a_witness_finds_what_opening_refuses).

Not guaranteed: an older copy of the log, beside a newer ledger, is filled up as after a crash. The entry
`log.recovered` that is written then names the entries that were missing; after a crash it is a handful at most.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import NoReturn

from client.ledger.account import Account, Promise
from client.ledger.file import Entry, hash_at
from client.ledger.ledger import Ledger
from shared.errors import LedgerError, PrivacyError, TrustError
from shared.privacy.accounting import compose_epsilon
from shared.trust import audit_chain, audit_log
from shared.trust.audit_chain import BEGINNING, end_of, onwards
from shared.trust.audit_log import AuditLog, Event

_MARK = f'"event":"{Event.LEDGER_ENTRY}"'.encode()


class AuditMirror:
    """Repeats one ledger file in `log`; use it as `Ledger(..., mirror=AuditMirror(log))`.

    The log is read in full once, at the first call; later calls read what came since. Any number of processes may
    mirror the same ledger into the same log, each with an object of its own.
    """

    def __init__(self, log: AuditLog) -> None:
        self._log = log
        self._read_up_to, self._reading = BEGINNING, threading.Lock()
        self._mirrored: list[tuple[str, str]] = []  # hash and time of logging, of every ledger entry in the log
        self._is_first_call = True

    def __call__(self, ledger: Ledger) -> None:
        """Append the entries that the log lacks.

        Raises:
            LedgerError: if the log has an entry that the ledger has not.
            TrustError: if the log is broken or cannot be written.
        """
        self._read_log()  # of a long log most of it, while others may still write
        with self._log.locked():
            # The log first: whatever it holds by now was in the ledger before, so the ledger must show it.
            self._read_log()
            entries = ledger.entries()
            self._check(ledger, entries)
            missing = entries[len(self._mirrored) :]
            if missing and self._is_first_call:
                self._log.append(
                    Event.LOG_RECOVERED,
                    reason="ledger entries that this log did not hold yet are added",
                    first_sequence=missing[0].sequence,
                    last_sequence=missing[-1].sequence,
                )
            for entry in missing:
                self._log.append(
                    Event.LEDGER_ENTRY,
                    sequence=entry.sequence,
                    kind=entry.kind,
                    payload=entry.payload,
                    entry_sha256=entry.entry_sha256,
                )
            self._is_first_call = False

    def _read_log(self) -> None:
        with self._reading:
            for entry, position in self._log.read_on(self._read_up_to):
                if entry.event == Event.LEDGER_ENTRY:
                    sequence = len(self._mirrored) + 1
                    if entry.details.get("sequence") != sequence:
                        _misplaced(self._log.folder, entry, f"ledger entry {sequence} must come next")
                    self._mirrored.append((str(entry.details.get("entry_sha256")), entry.time))
                self._read_up_to = position

    def _check(self, ledger: Ledger, entries: list[Entry]) -> None:
        for sequence, (sha256, time) in enumerate(self._mirrored, start=1):
            found = entries[sequence - 1].entry_sha256 if sequence <= len(entries) else None
            if found != sha256:
                _replaced(ledger.path, self._log.folder, sequence, len(self._mirrored), time, found)


class Witness:
    """What a log repeats of a ledger, for whoever only looks at that; read on from where it was left.

    Neither chain is checked here, which takes seconds where they are long; a lock is not taken, so nobody waits.
    """

    def __init__(self, log_folder: Path) -> None:
        self._folder = log_folder
        self._read_up_to, self._last = BEGINNING, b""

    def check(self, ledger: Path) -> None:
        """Check that a ledger holds the last entry that its log repeats; as each names the one before, it then holds them all.

        Raises:
            LedgerError: it does not, or is not there.
            TrustError: the log's head cannot be read, or the line is none that `AuditMirror` writes.
        """
        # The log first: whatever it holds by now was in the ledger before.
        self._read_log()
        if not self._last:
            return
        try:
            entry = json.loads(self._last)
            time, number, sha256 = entry["time"], entry["details"]["sequence"], entry["details"]["entry_sha256"]
        except (ValueError, KeyError, TypeError):
            raise TrustError(
                f"a line of the audit log {self._folder} is no entry; `silotune audit-log verify` says which."
            ) from None
        found = hash_at(ledger, number) if ledger.exists() else None
        if found is None or found != sha256:
            _replaced(ledger, self._folder, number, number, time, found)

    def _read_log(self) -> None:
        end, start = end_of(self._folder), self._read_up_to
        if end.sequence < start.sequence:  # put back from a backup
            start, self._last = BEGINNING, b""
        for line in onwards(self._folder, (start.number, start.size), end):
            if _MARK in line:
                self._last = line
        self._read_up_to = end


def recount(
    log_folder: Path,
    *,
    delta: float,
    dataset: str,
    unit: str,
    job_id: str | None = None,
    promise: Promise = "together",
) -> float:
    """Return the spend of one account at `delta`, or epsilon of one of its jobs by PLD, from the audit log alone.

    Reserved steps count until they are committed, then the executed ones do, and imported charges do: what
    `Ledger.spent_epsilon` says, by the composition that the account recorded last.
    The chain is checked on the way; whether the owner signed the head is for `shared.trust.audit_log.verify` to say.

    Raises:
        TrustError: if the log is broken, or an entry of it is not one that `AuditMirror` writes.
        LedgerError: if a newer version wrote an entry that this one does not know.
    """
    account = Account(dataset=dataset, unit=unit)
    for entry in audit_log.read(log_folder):
        if entry.event != Event.LEDGER_ENTRY:
            continue
        try:
            details = entry.details
            account.take(details["sequence"], details["kind"], entry.time, details["payload"])
        except (KeyError, TypeError, PrivacyError):
            _misplaced(log_folder, entry, "it is not a complete ledger entry")
    if job_id is not None or not account.caps:
        return compose_epsilon(account.events(job_id, promise=promise), delta)
    rule = account.rule(delta=delta, promise=promise)
    return rule.epsilon(account.counted(rule.composition, promise=promise))


def _replaced(ledger: Path, log_folder: Path, number: int, least: int, time: str, found: str | None) -> NoReturn:
    problem = "does not hold it" if found is None else "has another in its place"
    raise LedgerError(
        f"the ledger {ledger} was replaced by an older copy, or by another ledger: the audit log {log_folder} recorded ledger "
        f"entry {number} of {least} at {time}, and the ledger {problem}. Nothing more is charged or released. Restore the "
        f"newest copy of the ledger, the one with at least {least} entries."
    )


def _misplaced(folder: Path, entry: audit_chain.Entry, what: str) -> NoReturn:
    raise TrustError(
        f"entry {entry.sequence} of the audit log {folder} is not one that this site's ledger makes: {what}. Find out "
        "what wrote it, and restore the latest backup of log and ledger."
    )
