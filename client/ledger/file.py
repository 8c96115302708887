"""The ledger's file: append-only, hash-chained entries in one SQLite database, sealed if the site has a key.

What the entries mean is for `client.ledger.ledger` to say; here they are kept so that none is lost, changed or taken out unseen.

Formal guarantees (tests in tests/client/ledger/test_ledger.py and tests/client/ledger/test_ledger_migration.py)
    * What a transaction wrote is on the disk when it ends, whole or not at all
      (test_every_write_is_synchronised_with_the_disk, test_full_disk_charges_nothing_and_recovers).
    * An entry that was edited, deleted or moved is found whenever the chain is read
      (test_tampering_is_detected, test_tampering_behind_an_open_ledger_stops_the_next_charge).
    * With a cipher, the file shows only when entries were made and how many: no name, kind or number
      (test_sealed_ledger_shows_nothing), and nobody without the key can write an entry that opens
      (test_forged_entry_of_a_sealed_ledger_is_refused).
    * A file of version 1 is taken over with every entry and an unbroken chain; death in the middle leaves a file of one
      version or the other (test_old_files_open_with_every_charge, test_kill_between_any_two_statements_of_a_migration).

Not guaranteed
    * Without a cipher, that somebody who may write the file and computes all later hashes anew is noticed: the chain
      holds no secret. With a cipher this is left to them for cutting off the last entries, which a mirror shows.
    * Durability ends where a disk reports a write as done that is not, as some network file systems do.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NoReturn

from shared.errors import LedgerError, TrustError
from shared.files.atomic import sync_folder
from shared.trust.keystore import Seal

SCHEMA_VERSION = 2  # of version 1, the entries are the same; it knew no imports and would not have counted them
OLDEST_VERSION = 1
LOCK_TIMEOUT = 5.0  # seconds to wait for another process that is writing

_APPLICATION_ID = 0x53494C4F  # "SILO" in the file's header: this database is a ledger
NO_ENTRY = "0" * 64  # what the first entry names as its predecessor
_SEALED = "sealed"  # what stands in the place of the kind of a sealed entry
_SEALED_BLOCK = 512  # sealed contents are filled up to a multiple, so that their length does not tell the kind
_SCHEMA = (
    "CREATE TABLE entries (sequence INTEGER PRIMARY KEY,"
    " kind TEXT, time TEXT, payload TEXT, previous_sha256 TEXT, entry_sha256 TEXT)",
    "CREATE TABLE head (num_entries INTEGER, sha256 TEXT)",
    "CREATE TRIGGER no_update BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'append-only'); END",
    "CREATE TRIGGER no_delete BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'append-only'); END",
    f"INSERT INTO head VALUES (0, '{NO_ENTRY}')",  # noqa: S608 (a constant)
    f"PRAGMA application_id = {_APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)
# What to say by SQLite's primary result code.
_DIAGNOSES = {
    sqlite3.SQLITE_BUSY: "another process kept it locked; let that process finish, then try again",
    sqlite3.SQLITE_CANTOPEN: "it or its journal cannot be opened; mend the path or the permissions",
    sqlite3.SQLITE_CORRUPT: "the file is damaged; restore its latest backup and do not train until then",
    sqlite3.SQLITE_FULL: "the disk is full and nothing was written; free space, then try again",
    sqlite3.SQLITE_IOERR: "the disk failed; check it, then look at the last entry before trying again",
    sqlite3.SQLITE_NOTADB: "this is no ledger, or it is damaged; mend the path or restore the latest backup",
    sqlite3.SQLITE_READONLY: "it cannot be written, or was moved while open; mend that, then open it again",
}


@dataclass(frozen=True)
class Entry:
    """One verified line of the ledger; every `payload` names its account (`dataset`, `unit`)."""

    sequence: int
    kind: str  # see `client.ledger.ledger`
    time: str  # UTC, ISO 8601
    payload: dict[str, Any]
    previous_sha256: str
    entry_sha256: str


class LedgerFile:
    """The database at `path`; a new file is private to its owner. Every method raises `LedgerError` if it cannot be used.

    Args:
        cipher: stores every entry sealed. A ledger is sealed from its first entry on or never.
        clock: the time of each new entry.
    """

    def __init__(self, path: Path, *, cipher: Seal | None, clock: Callable[[], datetime]) -> None:
        self.path = path
        self._cipher = cipher
        self._clock = clock
        _create_private_file(path)
        uri = f"{path.absolute().as_uri()}?mode=rw"  # a file that SQLite creates by itself would be public
        with _explained(path):
            self._connection = sqlite3.connect(uri, uri=True, timeout=LOCK_TIMEOUT, isolation_level=None)
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def now(self) -> str:
        """Return the time for a new entry: UTC, ISO 8601."""
        return self._clock().astimezone(UTC).isoformat(timespec="milliseconds")

    def close(self) -> None:
        """Close the file; it cannot be used afterwards."""
        self._connection.close()

    @contextmanager
    def transaction(self, mode: Literal["DEFERRED", "IMMEDIATE"]) -> Iterator[None]:
        """All or nothing: one consistent view for reading (DEFERRED), or the only writer (IMMEDIATE)."""
        with _explained(self.path):
            self._connection.execute(f"BEGIN {mode}")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def read_chain(self) -> list[Entry]:
        """Return all entries, each checked for its place, its link to the one before, and its hash."""
        return list(self.read_on(0, NO_ENTRY))

    def read_on(self, number: int, sha256: str) -> Iterator[Entry]:
        """Yield the entries after entry `number`, checked as by `read_chain`; those up to it are taken for what they were.

        Args:
            number: of the last entry that is known; 0 for none.
            sha256: of that entry, or `NO_ENTRY`; it must still be there, with this hash.
        """
        for sequence, kind, time, payload, link, digest in _chain(self._connection, self.path, number, sha256):
            kind, content = self._unpack(sequence, kind, payload)
            yield Entry(sequence, kind, time, content, link, digest)

    def append(self, entries: Sequence[Entry], kind: str, payload: dict[str, Any]) -> Entry:
        """Write the entry that follows `entries`, and the new head; the caller holds the write lock."""
        previous = entries[-1].entry_sha256 if entries else NO_ENTRY
        sequence = len(entries) + 1
        time = self.now()
        stored_kind, text = self._pack(sequence, kind, payload)
        digest = _entry_sha256(previous, sequence, stored_kind, time, text)
        row = (sequence, stored_kind, time, text, previous, digest)
        self._connection.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?)", row)
        self._connection.execute("UPDATE head SET num_entries = ?, sha256 = ?", (sequence, digest))
        return Entry(sequence, kind, time, payload, previous, digest)

    def version(self) -> int:
        """Return the version of the file's format."""
        return int(self._connection.execute("PRAGMA user_version").fetchone()[0])

    def raise_version(self) -> None:
        """Mark the file as one of `SCHEMA_VERSION`; the caller holds the write lock and has written what is new."""
        self._connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _prepare(self) -> None:
        """Set how the file is written, and check that it is a ledger, or make it one."""
        with _explained(self.path):
            # In this journal mode a transaction is committed by deleting the journal. Only EXTRA synchronises
            # the folder afterwards; with FULL, a power cut could undo it. WAL would not stand in one file.
            (mode,) = self._connection.execute("PRAGMA journal_mode = DELETE").fetchone()
            if mode != "delete":
                raise LedgerError(f"the ledger {self.path} cannot leave journal mode {mode}; close other users.")
            self._connection.execute("PRAGMA synchronous = EXTRA")
        with self.transaction("IMMEDIATE"):
            self._check_or_create_schema()

    def _check_or_create_schema(self) -> None:
        (application_id,) = self._connection.execute("PRAGMA application_id").fetchone()
        version = self.version()
        (num_objects,) = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if (application_id, version, num_objects) == (0, 0, 0):
            for statement in _SCHEMA:
                self._connection.execute(statement)
        elif application_id != _APPLICATION_ID:
            raise LedgerError(f"{self.path} is a database, but no ledger. Mend the path in the configuration.")
        elif not OLDEST_VERSION <= version <= SCHEMA_VERSION:
            raise LedgerError(
                f"the ledger {self.path} has schema version {version}; this program knows versions up to {SCHEMA_VERSION}. "
                "Install the release of Silotune that wrote it, or a newer one."
            )

    def _pack(self, sequence: int, kind: str, payload: dict[str, Any]) -> tuple[str, str]:
        """Return kind and payload as they are stored."""
        if self._cipher is None:
            return kind, _compact_json(payload)
        content = _compact_json({"kind": kind, "payload": payload}).encode()
        content = content.ljust(-(-len(content) // _SEALED_BLOCK) * _SEALED_BLOCK)
        return _SEALED, base64.b64encode(self._cipher.seal(content, context=f"ledger/{sequence}")).decode()

    def _unpack(self, sequence: int, kind: str, stored: str) -> tuple[str, dict[str, Any]]:
        """Return kind and payload of a stored entry whose hash was checked."""
        if self._cipher is None and kind == _SEALED:
            raise LedgerError(
                f"the ledger {self.path} is sealed, and no key was given. Open it with the key that sealed it."
            )
        if self._cipher is None:
            return kind, json.loads(stored)
        if kind != _SEALED:
            raise LedgerError(
                f"the ledger {self.path} is not sealed (entry {sequence} stands in plain text), but a key was given. "
                "Restore the sealed one, or open this one without a key; a new ledger would forget what was spent."
            )
        try:
            sealed = base64.b64decode(stored, validate=True)
            content = json.loads(self._cipher.open(sealed, context=f"ledger/{sequence}"))
        except (TrustError, ValueError) as error:
            raise LedgerError(
                f"entry {sequence} of the ledger {self.path} does not open with the key that was given ({error}). Give "
                "the key that sealed it; if that is this one, restore the latest backup of the ledger."
            ) from None
        return content["kind"], content["payload"]


def copy_of(path: Path) -> tuple[bytes, int]:
    """Return the file as it is between two transactions, whoever writes to it meanwhile, and the number of its entries.

    Raises:
        LedgerError: if it cannot be read, or its chain is broken.
    """
    with _explained(path), closing(sqlite3.connect(":memory:")) as copy:
        uri = f"{path.absolute().as_uri()}?mode=rw"  # a process that died while it wrote left something to roll back
        with closing(sqlite3.connect(uri, uri=True, timeout=LOCK_TIMEOUT)) as ledger:
            ledger.backup(copy)
        num_entries = sum(1 for _ in _chain(copy, path))
        return copy.serialize(), num_entries


def head_of(path: Path) -> tuple[int, str]:
    """Return how many entries a ledger has, and the hash of the last one, as its head says; nothing is checked.

    Raises:
        LedgerError: if it cannot be read.
    """
    uri = f"{path.absolute().as_uri()}?mode=rw"  # a process that died while it wrote left something to roll back
    with _explained(path), closing(sqlite3.connect(uri, uri=True, timeout=LOCK_TIMEOUT)) as ledger:
        (found,) = ledger.execute("SELECT num_entries, sha256 FROM head").fetchall()
    return int(found[0]), str(found[1])


def hash_at(path: Path, number: int) -> str | None:
    """Return the hash of one entry as it stands there, not checked; None if there is none. Raises as `head_of`."""
    uri = f"{path.absolute().as_uri()}?mode=rw"
    with _explained(path), closing(sqlite3.connect(uri, uri=True, timeout=LOCK_TIMEOUT)) as ledger:
        row = ledger.execute("SELECT entry_sha256 FROM entries WHERE sequence = ?", (number,)).fetchone()
    return None if row is None else str(row[0])


def entry_hashes(path: Path) -> list[str]:
    """Return the hash of every entry, oldest first, each checked as far as that goes without the key of a sealed ledger.

    Raises:
        LedgerError: if the file cannot be read, or its chain is broken.
    """
    with _explained(path), closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as ledger:
        return [row[-1] for row in _chain(ledger, path)]


def checked_hash(path: Path, number: int) -> str | None:
    """Check every entry likewise, and return the hash of one, None if it is not there. Raises as `entry_hashes`."""
    with _explained(path), closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as ledger:
        return max((row[-1] for row in _chain(ledger, path) if row[0] == number), default=None)


def _chain(
    connection: sqlite3.Connection, path: Path, number: int = 0, sha256: str = NO_ENTRY
) -> Iterator[tuple[int, str, str, str, str, str]]:
    """Yield every row of a ledger after `number`, checked for its place, its link to the one before, and its hash; then check the
    head.
    """

    def broken(sequence: int, what: str) -> NoReturn:
        raise LedgerError(
            f"the ledger {path} cannot be trusted: entry {sequence} {what}. Nothing more is charged or "
            "released. Find out who changed the file and restore its latest backup."
        )

    previous, expected = sha256, number + 1
    known = connection.execute("SELECT entry_sha256 FROM entries WHERE sequence = ?", (number,)).fetchall()
    if number and known != [(sha256,)]:
        broken(number, "is another one than when it was read before")
    for row in connection.execute("SELECT * FROM entries WHERE sequence > ? ORDER BY sequence", (number,)):
        sequence, kind, time, payload, link, digest = row
        if sequence != expected:
            broken(expected, f"is missing; the next one found has number {sequence}")
        if link != previous:
            broken(expected, "does not follow from the entry before it")
        if digest != _entry_sha256(previous, sequence, kind, time, payload):
            broken(expected, "was changed after it was written")
        yield row
        previous, expected = digest, expected + 1
    heads = connection.execute("SELECT num_entries, sha256 FROM head").fetchall()
    if heads != [(expected - 1, previous)]:
        recorded = heads[0][0] if heads else "none"
        first_bad = expected - 1 if recorded == expected - 1 else expected
        broken(first_bad, f"is missing, added or replaced; the last one recorded is {recorded}")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into ones that say what to do."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the higher bits hold detail
        diagnosis = _DIAGNOSES.get(code, "nothing was charged; mend the cause, then try again")
        raise LedgerError(f"the ledger {path} cannot be used ({error}): {diagnosis}.") from error


def _create_private_file(path: Path) -> None:
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        sync_folder(path.parent)
    except FileExistsError:
        return
    except OSError as error:
        raise LedgerError(
            f"cannot create the ledger {path}: {error.strerror}. Create the folder or mend its permissions."
        ) from error


def _entry_sha256(previous: str, sequence: int, kind: str, time: str, payload: str) -> str:
    # JSON keeps the parts apart; `default` covers values of foreign types put there by tampering.
    text = json.dumps([previous, sequence, kind, time, payload], default=repr)
    return hashlib.sha256(text.encode()).hexdigest()


def _compact_json(value: dict[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
