"""The files of an audit log: entries, their chain, the head, and what a crash can leave after it.

`shared/trust/audit_log.py` says what the log as a whole guarantees.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from shared.errors import SilotuneError, TrustError
from shared.files.atomic import sync_folder, write_bytes
from shared.files.backup import Writer
from shared.files.json_files import canonical_json
from shared.trust.signing import Purpose, SigningKey, VerifyKey

MAX_LINE = 64 << 10  # bytes of one entry; larger details are left out
HEAD_FILE = "head.json"

_LOCK_FILE = "audit.lock"
_LOOK_SECONDS = 0.01  # between two looks at a lock that is somebody else's
_NO_ENTRY = "0" * 64  # what the first entry names as its predecessor
_ENTRY_FIELDS = {"sequence": int, "time": str, "event": str, "details": dict, "previous": str, "sha256": str}
_HEAD_FIELDS = {"sequence": int, "sha256": str, "file": str, "line": int, "bytes": int}


class Held(SilotuneError):
    """Others kept a log locked for longer than somebody would wait."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"another process writes to the audit log {folder} just now; try again in a moment.")


@dataclass(frozen=True)
class Entry:
    """One line of a log."""

    sequence: int  # 1, 2, ...
    time: str  # UTC, ISO 8601, milliseconds
    event: str
    details: dict[str, Any]
    previous: str  # SHA-256 of the entry before
    sha256: str  # of all the other fields, as canonical JSON

    def line(self) -> str:
        """Return the entry as it stands in the file, without the newline."""
        return canonical_json(asdict(self))


@dataclass(frozen=True, kw_only=True)
class Position:
    """A place between two entries: how far a log was written or read.

    Attributes:
        sequence: number of the entry before this place; 0 is the beginning.
        sha256: of that entry.
        number: number of the file that holds it.
        line: number of lines in that file up to here.
        size: bytes in that file up to here.
    """

    sequence: int = 0
    sha256: str = _NO_ENTRY
    number: int = 1
    line: int = 0
    size: int = 0

    def after(self, entry: Entry, line: bytes, *, number: int) -> Position:
        """Return the place after `entry`, whose `line` stands in file `number`."""
        same = number == self.number
        return Position(
            sequence=entry.sequence,
            sha256=entry.sha256,
            number=number,
            line=1 + (self.line if same else 0),
            size=len(line) + (self.size if same else 0),
        )


BEGINNING = Position()


# --- entries ---


def new_entry(head: Position, time: str, event: str, details: dict[str, Any]) -> Entry:
    """Return the entry that follows `head`; details too long for a line are replaced by their size and hash."""
    fields = {
        "sequence": head.sequence + 1,
        "time": time,
        "event": str(event),
        "details": details,
        "previous": head.sha256,
    }
    text = canonical_json(fields)
    if len(text.encode()) > MAX_LINE - 100:  # the hash and the newline are to come
        shown = canonical_json(details).encode()
        left_out = {"left_out": f"{len(shown)} bytes of details", "details_sha256": hashlib.sha256(shown).hexdigest()}
        return new_entry(head, time, event, left_out)
    return Entry(**json.loads(text), sha256=hashlib.sha256(text.encode()).hexdigest())


def _parse_entry(line: bytes, before: Position, where: str) -> Entry:
    """Return the entry of one line (with its newline) that must follow `before`."""
    if not line.endswith(b"\n"):
        distrust(where, "has no end: it was cut off, or is longer than an entry can be")
    try:
        fields = json.loads(line.decode())
        is_canonical = f"{canonical_json(fields)}\n".encode() == line
    except (ValueError, RecursionError):
        distrust(where, "is not JSON, so it was changed or damaged")
    if not (isinstance(fields, dict) and _has_fields(fields, _ENTRY_FIELDS)):
        distrust(where, "is not an entry of this log: its fields are others")
    entry = Entry(**fields)
    rest = canonical_json({name: value for name, value in fields.items() if name != "sha256"})
    if not is_canonical or hashlib.sha256(rest.encode()).hexdigest() != entry.sha256:
        distrust(where, f"(entry {entry.sequence}) was changed after it was written")
    if entry.sequence != before.sequence + 1:
        distrust(where, f"holds entry {entry.sequence}, but entry {before.sequence + 1} must stand here")
    if entry.previous != before.sha256:
        distrust(where, f"(entry {entry.sequence}) does not follow from the entry before it")
    return entry


def scan(folder: Path, start: Position, head: Position) -> Iterator[tuple[Entry, Position]]:
    """Yield every entry after `start` up to `head`, checked, with the place after it."""
    position = start
    for number in range(start.number, head.number + 1):
        path = log_file(folder, number)
        is_last = number == head.number
        if is_last and not head.size:
            break  # nothing was written yet, so there need not be a file
        line_number, offset = (start.line, start.size) if number == start.number else (0, 0)
        try:
            with _reading(path) as file:
                file.seek(offset)
                while (not is_last or offset < head.size) and (line := file.readline(MAX_LINE + 1)):
                    line_number += 1
                    offset += len(line)
                    entry = _parse_entry(line, position, f"{path}, line {line_number},")
                    position = position.after(entry, line, number=number)
                    yield entry, position
        except FileNotFoundError:
            distrust(path, f"is missing; the log goes on in it after entry {position.sequence}")
        if position.number != number:
            distrust(path, f"is empty; entry {position.sequence + 1} must stand in it")
    if position.sequence < head.sequence:
        where = f"{log_file(folder, position.number)}, line {position.line + 1},"
        distrust(where, f"is missing: the last entry found is {position.sequence}, the head names {head.sequence}")
    if position != head:
        distrust(
            folder / HEAD_FILE, f"does not fit the log, whose last entry is {position.sequence} ({position.sha256})"
        )


def onwards(folder: Path, start: tuple[int, int], end: Position) -> Iterator[bytes]:
    """Yield the lines from a place (file, byte) on up to an end, not checked."""
    number, offset = start
    while number <= end.number and end.sequence:
        try:
            with log_file(folder, number).open("rb") as file:
                file.seek(offset)
                for line in file:
                    offset += len(line)
                    if number == end.number and offset > end.size:
                        return
                    yield line
        except OSError:
            return  # `verify` tells
        number, offset = number + 1, 0


# --- the head and the end of the log ---


def _head_fields(position: Position) -> dict[str, Any]:
    return {
        "sequence": position.sequence,
        "sha256": position.sha256,
        "file": log_file(Path(), position.number).name,
        "line": position.line,
        "bytes": position.size,
    }


def write_head(folder: Path, position: Position, signer: SigningKey | None) -> None:
    """Make `position` the end of the log, atomically and durably."""
    fields = _head_fields(position)
    if signer is not None:
        fields["signature"] = signer.sign(Purpose.LOG_HEAD, fields).hex()
    write_bytes(folder / HEAD_FILE, f"{canonical_json(fields)}\n".encode())


def _head_bytes(folder: Path) -> bytes:
    path = folder / HEAD_FILE
    try:
        with _reading(path) as file:
            return file.read(MAX_LINE)
    except FileNotFoundError:
        if file_numbers(folder):
            distrust(path, "is missing, but the log's files are there")
        raise TrustError(f"{folder} holds no audit log: {HEAD_FILE} is missing; check the path.") from None


def read_head(folder: Path, key: VerifyKey | None, *, signed_is_fine: bool = False) -> Position:
    """Return the end of the log as its head names it, the signature checked if there is a `key`."""
    path = folder / HEAD_FILE
    head, fields, signature = _parsed_head(path, _head_bytes(folder))
    if key is not None and signature is None:
        distrust(path, "is not signed, but the log has a key")
    if key is None and signature is not None and not signed_is_fine:
        raise TrustError(f"{path} is signed; open the log with the key of its owner to go on with it.")
    if key is not None and signature is not None:
        try:
            key.verify(Purpose.LOG_HEAD, fields, signature)
        except TrustError as error:
            distrust(path, f"was not signed with this key ({error})")
    return head


def end_of(folder: Path) -> Position:
    """Return the end of a log as its head names it; the beginning if there is no log yet.

    Raises:
        TrustError: the head cannot be read.
    """
    if not (folder / HEAD_FILE).exists():
        return Position()
    return read_head(folder, None, signed_is_fine=True)


def _parsed_head(path: Path, content: bytes) -> tuple[Position, dict[str, Any], bytes | None]:
    """Return the end that a head names, its fields, and its signature, which is not checked."""
    try:
        fields = json.loads(content.decode())
        is_canonical = f"{canonical_json(fields)}\n".encode() == content
        text = fields.pop("signature", None)
        signature = None if text is None else bytes.fromhex(text)
        is_canonical &= signature is None or signature.hex() == text
        number = int(fields["file"][len("audit-") : -len(".jsonl")])
        well_formed = (
            is_canonical and _has_fields(fields, _HEAD_FIELDS) and fields["file"] == log_file(Path(), number).name
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        well_formed = False
    if not well_formed:
        distrust(path, "is not a head as this program writes it: it was changed or damaged")
    head = Position(
        sequence=fields["sequence"], sha256=fields["sha256"], number=number, line=fields["line"], size=fields["bytes"]
    )
    smallest, largest = min(head.sequence, head.number, head.line, head.size), max(head.sequence, head.size)
    if head != BEGINNING and not 1 <= smallest <= largest < 1 << 50:
        distrust(path, "names an end that no log can have")
    return head, fields, signature


def snapshot(folder: Path) -> tuple[bytes, Position, list[tuple[Path, int | None]]]:
    """Return the head as it is now, what it says, and the files up to it, each with the bytes that belong to it (None: all).

    Files only grow and the head is replaced at once, so this is the log at one moment, whoever writes meanwhile.
    """
    content = _head_bytes(folder)
    head = _parsed_head(folder / HEAD_FILE, content)[0]
    if not head.sequence:
        return content, head, []
    files: list[tuple[Path, int | None]] = [(log_file(folder, number), None) for number in range(1, head.number)]
    return content, head, [*files, (log_file(folder, head.number), head.size)]


def back_up(writer: Writer, folder: Path) -> int:
    """Add a log to a backup as it is at one moment, if there is one; return the number of its entries."""
    if not (folder / HEAD_FILE).exists():
        return 0
    content, head, files = snapshot(folder)
    for path, size in files:
        writer.add_file(f"{folder.name}/{path.name}", path, size=size)
    writer.add(f"{folder.name}/{HEAD_FILE}", content)
    return head.sequence


def check_last_line(folder: Path, head: Position) -> None:
    """Check that the line which the head names is there; looks at that line only."""
    if not head.sequence:
        return
    path = log_file(folder, head.number)
    start = max(0, head.size - MAX_LINE)
    try:
        with _reading(path) as file:
            file.seek(start)
            tail = file.read(head.size - start)
    except FileNotFoundError:
        distrust(path, f"is missing; the head names entry {head.sequence} in it")
    if len(tail) != head.size - start:
        distrust(
            f"{path}, line {head.line},", f"is missing or cut off: the file must have {head.size} bytes up to its end"
        )
    line = tail[tail.rfind(b"\n", 0, -1) + 1 :]
    where = f"{path}, line {head.line},"
    try:
        previous = str(json.loads(line.decode())["previous"])
    except (ValueError, TypeError, KeyError, RecursionError):
        previous = ""
    entry = _parse_entry(line, Position(sequence=head.sequence - 1, sha256=previous), where)
    if entry.sha256 != head.sha256:
        distrust(where, "is not the entry that the head names")


@dataclass(frozen=True, kw_only=True)
class Beyond:
    """What stands after the head: one entry, or a part of one (`entry` is None)."""

    path: Path
    number: int
    start: int
    data: bytes
    entry: Entry | None


def read_beyond(folder: Path, head: Position) -> Beyond | None:
    """Return what a crash left after the head; anything that a crash cannot leave is refused."""
    found = []
    # The next file is begun when this one is full, which it cannot be before the first entry.
    for number, start in ((head.number, head.size), (head.number + 1, 0))[: 2 if head.sequence else 1]:
        path = log_file(folder, number)
        if path.exists():
            with _reading(path) as file:
                file.seek(start)
                data = file.read(MAX_LINE + 1)
            if data:
                found.append((path, number, start, data))
    if not found:
        return None
    path, number, start, data = found[0]
    line_number = head.line + 1 if number == head.number else 1
    where = f"{path}, line {line_number},"
    if len(found) > 1:
        distrust(where, f"and {found[1][0].name} stand after the end that the head names; one entry at most can")
    text, newline, more = data.partition(b"\n")
    if more:
        distrust(f"{path}, line {line_number + 1},", "stands after the end that the head names; one entry at most can")
    if not newline and len(data) > MAX_LINE:
        distrust(where, "stands after the end that the head names and is longer than an entry can be")
    entry = None
    if newline and _is_json(text):  # a power cut can leave blocks of zeros before the newline
        entry = _parse_entry(data, head, where)
    return Beyond(path=path, number=number, start=start, data=data, entry=entry)


def cut(beyond: Beyond) -> None:
    """Remove an unfinished entry, durably."""
    if not beyond.start:
        beyond.path.unlink()
        sync_folder(beyond.path.parent)
        return
    with beyond.path.open("r+b") as file:
        file.truncate(beyond.start)
        os.fsync(file.fileno())


# --- small parts ---


def log_file(folder: Path, number: int) -> Path:
    """Return the path of file `number` (1, 2, ...) of a log."""
    return folder / f"audit-{number:05d}.jsonl"


def file_numbers(folder: Path) -> list[int]:
    """Return the numbers of the files that are there, in order."""
    names = (re.fullmatch(r"audit-(\d{5,})\.jsonl", path.name) for path in folder.glob("audit-*.jsonl"))
    return sorted(int(name[1]) for name in names if name)


@contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError:
        raise
    except OSError as error:
        raise TrustError(f"{path} cannot be read: {error.strerror}. Check the path and its permissions.") from error


def _has_fields(fields: dict[str, Any], expected: dict[str, type]) -> bool:
    # `type`, not `isinstance`: True would pass for the number 1
    return fields.keys() == expected.keys() and all(type(fields[name]) is kind for name, kind in expected.items())


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text.decode())
    except (ValueError, RecursionError):
        return False
    return True


@contextmanager
def folder_lock(folder: Path, *, shared: bool = False, patience: float | None = None) -> Iterator[None]:
    """Hold the folder's lock against other processes; a reader without permission for it goes on without.

    Args:
        patience: seconds to wait for it at most; None: as long as it takes.

    Raises:
        Held: it took longer.
    """
    try:
        handle = os.open(folder / _LOCK_FILE, os.O_RDONLY if shared else os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:
        if not shared:
            raise
        yield
        return
    try:
        _flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, folder, patience)
        yield
    finally:
        os.close(handle)


def _flock(handle: int, kind: int, folder: Path, patience: float | None) -> None:
    if patience is None:
        fcntl.flock(handle, kind)
        return
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= until:
                raise Held(folder) from None
            time.sleep(_LOOK_SECONDS)


def distrust(where: Path | str, what: str) -> NoReturn:
    """Raise the `TrustError` that says what is wrong, and where."""
    raise TrustError(
        f"the audit log cannot be trusted: {where} {what}. Keep the folder as it is, find out who changed it, and go on "
        "from its latest backup."
    )
