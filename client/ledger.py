"""The site's durable privacy budget: noisy steps are charged here before their output may leave the site.

One SQLite file holds append-only, hash-chained entries for one or more accounts. An account is a pair
(data set, unit of privacy), so all runs, jobs and models on the same data share one cap. A round is
*reserved* before it starts and *committed* with the steps it executed; a reservation is never given back.

Formal guarantees (tests in tests/client/test_ledger.py)
    * Charge before release: when `reserve` returns, the charge is on the disk; a process killed at any moment
      has not released more than was charged (test_kill_at_any_moment_never_loses_a_charge,
      test_every_write_is_synchronised_with_the_disk).
    * Hard stop: after every successful `reserve`, the PLD composition of all charges of the account is within
      the cap; a refused charge writes nothing (test_hard_stop_exactly_at_the_cap,
      test_two_processes_race_for_the_last_affordable_charge).
    * An uncommitted reservation counts in full (test_uncommitted_reservation_counts_in_full).
    * A restart forgets nothing (test_reopening_keeps_every_charge).
    * An entry that was edited, deleted or moved is found when the ledger is opened and before each charge
      (test_tampering_is_detected, test_tampering_behind_an_open_ledger_stops_the_next_charge).
    * With a cipher, the file shows only when entries were made and how many: no name, kind or number
      (test_sealed_ledger_shows_nothing), and nobody without the key can write an entry that opens
      (test_forged_entry_of_a_sealed_ledger_is_refused).
    * With a mirror (client/audit_mirror.py), a file that was deleted or replaced by an older copy is refused at
      the next opening (tests/client/test_audit_mirror.py).

Not guaranteed by this version
    * Without a mirror, deleting the file, or restoring a whole older copy of it, is not detected.
    * Without a cipher, nor is somebody who may write the file and computes all later hashes anew: the chain
      holds no secret. With a cipher this is left to them for cutting off the last entries, which a mirror shows.
    * The composition is PLD over all declared events of the account, valid for plans that are fixed before
      they start. Runs that are chosen after looking at the results of earlier ones need a filter for adaptive
      composition across runs; that is a later step.
    * Durability ends where a disk reports a write as done that is not, as some network file systems do.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import operator
import os
import re
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol

from shared.atomic import sync_folder
from shared.errors import BudgetExceeded, LedgerError, TrustError
from shared.privacy.accounting import GaussianSteps, affordable_steps, check_delta, compose_epsilon

SCHEMA_VERSION = 1
LOCK_TIMEOUT = 5.0  # seconds to wait for another process that is writing
MAX_NAME = 500  # characters of a data set, unit or job: longer ones would be cut in the audit log

_APPLICATION_ID = 0x53494C4F  # "SILO" in the file's header: this database is a ledger
_NO_ENTRY = "0" * 64  # what the first entry names as its predecessor
_SEALED = "sealed"  # what stands in the place of the kind of a sealed entry
_SEALED_BLOCK = 512  # sealed contents are filled up to a multiple, so that their length does not tell the kind
_SCHEMA = (
    "CREATE TABLE entries (sequence INTEGER PRIMARY KEY,"
    " kind TEXT, time TEXT, payload TEXT, previous_sha256 TEXT, entry_sha256 TEXT)",
    "CREATE TABLE head (num_entries INTEGER, sha256 TEXT)",
    "CREATE TRIGGER no_update BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'append-only'); END",
    "CREATE TRIGGER no_delete BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'append-only'); END",
    f"INSERT INTO head VALUES (0, '{_NO_ENTRY}')",  # noqa: S608 (a constant)
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


class Cipher(Protocol):
    """Encrypts under the site's key, such as `shared.keystore.Seal`."""

    def seal(self, plaintext: bytes, *, context: str) -> bytes:
        """Return `plaintext` encrypted and authenticated together with `context`."""

    def open(self, sealed: bytes, *, context: str) -> bytes:
        """Return what was sealed, or raise `TrustError`."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The cap of one account.

    Attributes:
        epsilon: largest epsilon that all releases together may reach, finite and > 0.
        delta: the delta at which epsilon is computed, in (0, 1).
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise LedgerError(f"the budget's epsilon is {self.epsilon}; expected a finite number above 0.")
        check_delta(self.delta)


@dataclass(frozen=True, kw_only=True)
class Charge:
    """What a site is about to release: one round of one job.

    Attributes:
        job_id: the job, not empty.
        round: number of the round within the job, >= 0.
        request_sha256: SHA-256 of the request for the round, 64 lower-case hexadecimal digits.
        mechanism: the declared noisy steps, at least one.
    """

    job_id: str
    round: int
    request_sha256: str
    mechanism: GaussianSteps

    def __post_init__(self) -> None:
        _check_name("job_id", self.job_id)
        _check_sha256("request_sha256", self.request_sha256)
        if operator.index(self.round) < 0:
            raise LedgerError(f"round is {self.round}; expected 0 or more.")
        if operator.index(self.mechanism.steps) < 1:
            raise LedgerError(f"the charge is {self.mechanism.steps} steps; expected at least one.")


@dataclass(frozen=True)
class Entry:
    """One verified line of the ledger; every `payload` names its account (`dataset`, `unit`)."""

    sequence: int
    kind: str  # "open", "budget", "reserve" or "commit"
    time: str  # UTC, ISO 8601
    payload: dict[str, Any]
    previous_sha256: str
    entry_sha256: str


@dataclass(frozen=True, kw_only=True)
class _Reservation:
    job_id: str
    charged: GaussianSteps  # the reserved steps until committed, the executed ones from then on
    committed: bool = False


class Ledger:
    """The account (`dataset`, `unit`) in the ledger file at `path`; a new file is private to its owner.

    The cap is the site's own configuration: it may differ at each opening, and each change is recorded.
    Any number of processes may open one file; within a process, use one `Ledger` for each thread.
    Every method raises `LedgerError` if the file cannot be used or its chain of entries is broken.

    Args:
        cipher: stores every entry sealed. A ledger is sealed from its first entry on or never.
        mirror: repeats the entries elsewhere: called before the first write of an opening, after it, and after
            each charge and commit. What it raises is passed on; the charge stands, and the next call catches up.
    """

    def __init__(
        self,
        path: Path,
        *,
        dataset: str,
        unit: str,
        budget: Budget,
        cipher: Cipher | None = None,
        mirror: Callable[[Ledger], None] | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        _check_name("dataset", dataset)
        _check_name("unit", unit)
        self.budget = budget
        self._path = path
        self._account = {"dataset": dataset, "unit": unit}
        self._cipher = cipher
        self._mirror = mirror
        self._clock = clock
        _create_private_file(path)
        uri = f"{path.absolute().as_uri()}?mode=rw"  # a file that SQLite creates by itself would be public
        with self._explained():
            self._connection = sqlite3.connect(uri, uri=True, timeout=LOCK_TIMEOUT, isolation_level=None)
        try:
            self._open_account()
        except BaseException:
            self.close()
            raise

    @property
    def path(self) -> Path:
        """The ledger file."""
        return self._path

    def reserve(self, charge: Charge) -> int:
        """Charge the declared steps of one round, durably, and return the id of the reservation.

        Raises:
            BudgetExceeded: if everything charged so far with this would cross the cap; nothing is written.
        """
        # 1. Compose before taking the lock, so that nobody waits for the accountant: step 2 then finds the
        #    sum in the accountant's cache, unless another process charged in between.
        compose_epsilon([*self.events(), charge.mechanism], self.budget.delta)

        # 2. Check and charge under one lock. An epsilon that is not a number is refused too.
        reservation = None
        with self._transaction("IMMEDIATE"):
            entries = self._read_chain()
            epsilon = compose_epsilon([*self._charged(entries), charge.mechanism], self.budget.delta)
            if epsilon <= self.budget.epsilon:
                payload = {
                    "job_id": charge.job_id,
                    "round": charge.round,
                    "request_sha256": charge.request_sha256,
                    "mechanism": asdict(charge.mechanism),
                }
                reservation = self._append(entries, "reserve", payload).sequence
        if reservation is not None:
            self._call_mirror()
            return reservation

        # 3. Refuse. Finding out what would fit is slow, so the lock is free again.
        raise self._refusal(charge, epsilon)

    def commit(self, reservation_id: int, *, executed_steps: int, release_sha256: str) -> None:
        """Record what a reserved round executed and releases; steps not executed are no longer charged.

        Args:
            reservation_id: the answer of `reserve`.
            executed_steps: noisy steps that ran, between 0 and the reserved number.
            release_sha256: SHA-256 of the bytes that leave the site.

        Raises:
            LedgerError: if this account has no such reservation, or it is committed already, or was smaller.
        """
        _check_sha256("release_sha256", release_sha256)
        with self._transaction("IMMEDIATE"):
            entries = self._read_chain()
            found = self._reservations(entries).get(reservation_id)
            if found is None:
                raise LedgerError(
                    f"{self._name()} has no reservation {reservation_id}; use the id that `reserve` gave."
                )
            if found.committed:
                raise LedgerError(
                    f"reservation {reservation_id} of job {found.job_id} is committed already; a round that "
                    "runs again needs a reservation of its own."
                )
            if not 0 <= operator.index(executed_steps) <= found.charged.steps:
                raise LedgerError(
                    f"reservation {reservation_id} of job {found.job_id} covers {found.charged.steps} steps, "
                    f"but {executed_steps} are said to have run; do not release the result of this round."
                )
            payload = {
                "reservation": reservation_id,
                "executed_steps": executed_steps,
                "release_sha256": release_sha256,
            }
            self._append(entries, "commit", payload)
        self._call_mirror()

    def anticipate(self, mechanism: GaussianSteps) -> None:
        """Do now, while nobody waits, the accounting that the next charge of `mechanism` will ask for; charges nothing."""
        compose_epsilon([*self.events(), mechanism], self.budget.delta)

    def events(self, job_id: str | None = None) -> list[GaussianSteps]:
        """Return the charges of the account, or of one job: executed steps; reserved until committed."""
        return self._charged(self.entries(), job_id)

    def spent_epsilon(self, job_id: str | None = None) -> float:
        """Return epsilon at `budget.delta` of all charges of the account, or of one job."""
        return compose_epsilon(self.events(job_id), self.budget.delta)

    def affordable_steps(self, *, noise_multiplier: float, sample_rate: float) -> int:
        """Return how many more steps of one mechanism fit under the cap; takes seconds of accounting."""
        return affordable_steps(
            self.events(),
            noise_multiplier=noise_multiplier,
            sample_rate=sample_rate,
            budget=self.budget.epsilon,
            delta=self.budget.delta,
        )

    def verify(self) -> None:
        """Check every entry of the file; the `LedgerError` names the first that is missing or was altered."""
        self.entries()

    def entries(self) -> list[Entry]:
        """Return all entries of the file, of every account, verified, oldest first."""
        with self._transaction("DEFERRED"):
            return self._read_chain()

    def close(self) -> None:
        """Close the file; the ledger cannot be used afterwards."""
        self._connection.close()

    # --- the account, computed from verified entries ---

    def _open_account(self) -> None:
        """Check the file and its chain; record the account if it is new, and its cap if new or changed."""
        with self._explained():
            # In this journal mode a transaction is committed by deleting the journal. Only EXTRA synchronises
            # the folder afterwards; with FULL, a power cut could undo it. WAL would not stand in one file.
            (mode,) = self._connection.execute("PRAGMA journal_mode = DELETE").fetchone()
            if mode != "delete":
                raise LedgerError(f"the ledger {self._path} cannot leave journal mode {mode}; close other users.")
            self._connection.execute("PRAGMA synchronous = EXTRA")
        # An older copy must be refused before it is written to, so the mirror is asked first.
        with self._transaction("IMMEDIATE"):
            self._check_or_create_schema()
        self._call_mirror()
        with self._transaction("IMMEDIATE"):
            entries = self._read_chain()
            caps = [entry.payload for entry in self._of_account(entries) if entry.kind == "budget"]
            cap = {"epsilon": float(self.budget.epsilon), "delta": float(self.budget.delta)}
            if not caps:
                entries.append(self._append(entries, "open", {"schema_version": SCHEMA_VERSION}))
            if not caps or caps[-1] != self._account | cap:
                self._append(entries, "budget", cap)
        self._call_mirror()

    def _call_mirror(self) -> None:
        if self._mirror is not None:
            self._mirror(self)

    def _of_account(self, entries: Sequence[Entry]) -> Iterator[Entry]:
        return (entry for entry in entries if self._account.items() <= entry.payload.items())

    def _reservations(self, entries: Sequence[Entry]) -> dict[int, _Reservation]:
        """Return the account's reservations by id."""
        found: dict[int, _Reservation] = {}
        for entry in self._of_account(entries):
            payload = entry.payload
            if entry.kind == "reserve":
                charged = GaussianSteps(**payload["mechanism"])
                found[entry.sequence] = _Reservation(job_id=payload["job_id"], charged=charged)
            elif entry.kind == "commit":
                reserved = found[payload["reservation"]]
                executed = replace(reserved.charged, steps=payload["executed_steps"])
                found[payload["reservation"]] = replace(reserved, charged=executed, committed=True)
        return found

    def _charged(self, entries: Sequence[Entry], job_id: str | None = None) -> list[GaussianSteps]:
        return [r.charged for r in self._reservations(entries).values() if job_id in (None, r.job_id)]

    def _refusal(self, charge: Charge, epsilon: float) -> BudgetExceeded:
        sigma, q = charge.mechanism.noise_multiplier, charge.mechanism.sample_rate
        steps = self.affordable_steps(noise_multiplier=sigma, sample_rate=q)
        return BudgetExceeded(
            f"round {charge.round} of job {charge.job_id} asks for {charge.mechanism.steps} steps at noise "
            f"multiplier {sigma:g} and sample rate {q:g}. That would bring {self._name()} from epsilon "
            f"{self.spent_epsilon():.6g} to {epsilon:.6g} at delta {self.budget.delta:g}; the site's cap is "
            f"{self.budget.epsilon:.6g}. Nothing was charged. {steps} such steps still fit: ask for no more "
            "than that, for more noise or a smaller sample rate, or raise the site's cap in its settings.",
            steps_affordable=steps,
        )

    def _name(self) -> str:
        return f"data set {self._account['dataset']!r} (unit: {self._account['unit']})"

    # --- the file: schema, chain, transactions ---

    def _check_or_create_schema(self) -> None:
        (application_id,) = self._connection.execute("PRAGMA application_id").fetchone()
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        (num_objects,) = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if (application_id, version, num_objects) == (0, 0, 0):
            for statement in _SCHEMA:
                self._connection.execute(statement)
        elif application_id != _APPLICATION_ID:
            raise LedgerError(f"{self._path} is a database, but no ledger. Mend the path in the configuration.")
        elif version != SCHEMA_VERSION:
            raise LedgerError(
                f"the ledger {self._path} has schema version {version}; this program knows {SCHEMA_VERSION}. "
                "Install the release of Silotune that wrote it, or a newer one."
            )

    def _read_chain(self) -> list[Entry]:
        """Return all entries, each checked for its place, its link to the one before, and its hash."""
        entries: list[Entry] = []
        previous = _NO_ENTRY
        for row in self._connection.execute("SELECT * FROM entries ORDER BY sequence"):
            sequence, kind, time, payload, link, digest = row
            expected = len(entries) + 1
            if sequence != expected:
                self._broken(expected, f"is missing; the next one found has number {sequence}")
            if link != previous:
                self._broken(expected, "does not follow from the entry before it")
            if digest != _entry_sha256(previous, sequence, kind, time, payload):
                self._broken(expected, "was changed after it was written")
            kind, content = self._unpack(sequence, kind, payload)
            entries.append(Entry(sequence, kind, time, content, link, digest))
            previous = digest
        heads = self._connection.execute("SELECT num_entries, sha256 FROM head").fetchall()
        if heads != [(len(entries), previous)]:
            recorded = heads[0][0] if heads else "none"
            first_bad = len(entries) if recorded == len(entries) else len(entries) + 1
            self._broken(first_bad, f"is missing, added or replaced; the last one recorded is {recorded}")
        return entries

    def _broken(self, sequence: int, what: str) -> NoReturn:
        raise LedgerError(
            f"the ledger {self._path} cannot be trusted: entry {sequence} {what}. Nothing more is charged or "
            "released. Find out who changed the file and restore its latest backup."
        )

    def _append(self, entries: Sequence[Entry], kind: str, details: dict[str, Any]) -> Entry:
        """Write the entry that follows `entries`, and the new head; the caller holds the write lock."""
        payload = self._account | details
        previous = entries[-1].entry_sha256 if entries else _NO_ENTRY
        sequence = len(entries) + 1
        time = self._clock().astimezone(UTC).isoformat(timespec="milliseconds")
        stored_kind, text = self._pack(sequence, kind, payload)
        digest = _entry_sha256(previous, sequence, stored_kind, time, text)
        row = (sequence, stored_kind, time, text, previous, digest)
        self._connection.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?)", row)
        self._connection.execute("UPDATE head SET num_entries = ?, sha256 = ?", (sequence, digest))
        return Entry(sequence, kind, time, payload, previous, digest)

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
                f"the ledger {self._path} is sealed, and no key was given. Open it with the key that sealed it."
            )
        if self._cipher is None:
            return kind, json.loads(stored)
        if kind != _SEALED:
            raise LedgerError(
                f"the ledger {self._path} is not sealed (entry {sequence} stands in plain text), but a key was given. "
                "Restore the sealed one, or open this one without a key; a new ledger would forget what was spent."
            )
        try:
            sealed = base64.b64decode(stored, validate=True)
            content = json.loads(self._cipher.open(sealed, context=f"ledger/{sequence}"))
        except (TrustError, ValueError) as error:
            raise LedgerError(
                f"entry {sequence} of the ledger {self._path} does not open with the key that was given ({error}). Give "
                "the key that sealed it; if that is this one, restore the latest backup of the ledger."
            ) from None
        return content["kind"], content["payload"]

    @contextmanager
    def _transaction(self, mode: Literal["DEFERRED", "IMMEDIATE"]) -> Iterator[None]:
        """All or nothing: one consistent view for reading (DEFERRED), or the only writer (IMMEDIATE)."""
        with self._explained():
            self._connection.execute(f"BEGIN {mode}")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn SQLite's errors into ones that say what to do."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the higher bits hold detail
            diagnosis = _DIAGNOSES.get(code, "nothing was charged; mend the cause, then try again")
            raise LedgerError(f"the ledger {self._path} cannot be used ({error}): {diagnosis}.") from error


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


def _check_name(name: str, value: str) -> None:
    if not value.strip():
        raise LedgerError(f"{name} is empty; expected a name, because charges are kept under it.")
    if len(value) > MAX_NAME:
        raise LedgerError(f"{name} has {len(value)} characters; expected at most {MAX_NAME}.")


def _check_sha256(name: str, value: str) -> None:
    if not re.fullmatch("[0-9a-f]{64}", value):
        raise LedgerError(f"{name} is {value!r}; expected a SHA-256, 64 lower-case hexadecimal digits.")
