"""The requests of a site, in one sealed file that the audit log bears witness to.

Every change writes the file anew, then an entry of the log that names its number and the file's SHA-256. Whoever may write the
folder but has no key of the site can neither make such a file nor put back an older one: the log says which one is the latest.

Formal guarantees (tests: tests/client/approval/test_store.py)
    * A change is on the disk, in file and log, when `write` returns; killed anywhere before, it is there in full or not at all,
      and counts only once the log has it (test_a_kill_at_any_write_leaves_a_change_or_none).
    * A file that was edited, cut, replaced, or put back from an earlier time is not read
      (test_a_file_that_was_changed_is_not_read, test_an_older_file_is_not_read), nor is one that a line added to the log
      speaks for (test_a_forged_line_speaks_for_no_file).
    * A file that was removed is an empty one: what was approved has to be approved anew (test_a_removed_file_approves_nothing).

Not guaranteed: an older copy of the whole folder, log included, is consistent in itself, see `shared.trust.audit_log`.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic import ValidationError

from client.approval.request import Request
from shared.errors import TrustError
from shared.files.atomic import write_bytes
from shared.files.bounded import read_bounded
from shared.files.json_files import canonical_json
from shared.job.parsing import Section
from shared.trust.audit_chain import BEGINNING, Held
from shared.trust.audit_log import AuditLog, Event
from shared.trust.keystore import Seal

STORE_FILE = "approvals.sealed"
MOST_FILE_BYTES = 16 << 20
EVENTS = (
    Event.APPROVAL_ASKED,
    Event.APPROVAL_GIVEN,
    Event.APPROVAL_REFUSED,
    Event.APPROVAL_WITHDRAWN,
    Event.APPROVAL_EXPIRED,
    Event.APPROVAL_BEGUN,
)
_CONTEXT = "approvals"
_LONGEST_GLANCE, _LOOK_SECONDS = 1.0, 0.02


class _Change(Section):
    """What was done, as the log tells it."""

    event: str
    details: dict[str, Any]


class _State(Section):
    """What the file holds: all requests, and the change that led to them, for a log that does not have it yet.

    `before` is the SHA-256 of the file before the change, "" if there was none.
    """

    version: Literal[1] = 1
    sequence: int
    before: str
    change: _Change
    requests: tuple[Request, ...]


@dataclass(frozen=True)
class _Witness:
    """What the log says of the latest file."""

    sequence: int = 0
    sha256: str = ""


class SealedStore:
    """See the module; any number of processes may use one file, each with an object of its own.

    Args:
        path: the file; it need not be there.
        seal, log: of the site.
    """

    def __init__(self, path: Path, *, seal: Seal, log: AuditLog) -> None:
        self.path = path
        self._seal, self._log = seal, log
        self._read_up_to = BEGINNING
        self._witness, self._reading = _Witness(), threading.Lock()

    @contextmanager
    def alone(self, *, patience: float | None = None) -> Iterator[None]:
        """Keep all others from reading and writing, for what belongs together; see `AuditLog.locked`."""
        self._read_log()  # of a long log most of it, while others may still write
        with self._log.locked(patience=patience):
            yield

    def glance(self) -> tuple[Request, ...]:
        """Return the requests without keeping anybody from writing.

        Raises:
            Held: for a second the file was none that the log names: a change of it is under way.
            TrustError: the file does not open, or the log is broken.
        """
        until = time.monotonic() + _LONGEST_GLANCE
        while True:
            found = self._found()
            if found is None:
                return ()
            state, sha256 = found
            if _Witness(state.sequence, sha256) == self._witness:
                return state.requests
            if time.monotonic() >= until:
                raise Held(self._log.folder)
            time.sleep(_LOOK_SECONDS)

    def read(self) -> tuple[Request, ...]:
        """Return the requests; inside `alone` only.

        Raises:
            TrustError: the file is not the one that this site wrote last, or the log is broken.
        """
        if (found := self._found()) is None:
            return ()
        state, sha256 = found
        if _Witness(state.sequence, sha256) == self._witness:
            return state.requests
        if (state.sequence, state.before) != (self._witness.sequence + 1, self._witness.sha256):
            self._distrust("is not the one that the audit log names: an older copy was put back")
        self._tell(state, sha256)  # a process died between the two
        return state.requests

    def write(self, requests: Sequence[Request], event: Event, **details: Any) -> None:
        """Replace the requests by what one change made of those that `read` returned; inside `alone` only.

        Args:
            event: one of `EVENTS`.
            details: for the log.

        Raises:
            RunError, TrustError: file or log cannot be written.
        """
        state = _State(
            sequence=self._witness.sequence + 1,
            before=self._witness.sha256,
            change=_Change(event=event, details=details),
            requests=tuple(requests),
        )
        content = self._seal.seal(canonical_json(state.model_dump(mode="json")).encode(), context=_CONTEXT)
        write_bytes(self.path, content)
        self._tell(state, hashlib.sha256(content).hexdigest())

    def _tell(self, state: _State, sha256: str) -> None:
        change = state.change
        self._log.append(change.event, **change.details, file_number=state.sequence, file_sha256=sha256)
        self._witness = _Witness(state.sequence, sha256)

    def _read_log(self) -> None:
        with self._reading:
            for entry, position in self._log.read_on(self._read_up_to):
                if entry.event in EVENTS:
                    number, sha256 = entry.details.get("file_number"), entry.details.get("file_sha256")
                    # A line that somebody added after the head, and that was adopted, cannot lead back to an older file.
                    if isinstance(number, int) and isinstance(sha256, str) and number > self._witness.sequence:
                        self._witness = _Witness(number, sha256)
                self._read_up_to = position

    def _found(self) -> tuple[_State, str] | None:
        """Return what the file holds, and its SHA-256, once the log was read; None if there is none."""
        self._read_log()
        if not self.path.exists():
            return None
        content, _ = read_bounded(self.path, "list of approvals", MOST_FILE_BYTES)
        return self._opened(content), hashlib.sha256(content).hexdigest()

    def _opened(self, content: bytes) -> _State:
        try:
            return _State.model_validate(json.loads(self._seal.open(content, context=_CONTEXT)))
        except (TrustError, ValidationError, ValueError, RecursionError):
            self._distrust("does not open: it was changed, or damaged")

    def _distrust(self, reason: str) -> NoReturn:
        raise TrustError(
            f"{self.path} {reason}. Nothing counts as approved, and no job that needs approval is accepted. Find out who did "
            "it, then remove the file: every job is then asked for, and approved or refused, anew."
        )
