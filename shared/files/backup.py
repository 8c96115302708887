"""Backups: one tar file with a list of what it holds and the SHA-256 of each file, made while the originals are in use.

What may be copied when, and in which order, is for `client.backup` and `server.store.backup` to say.

Formal guarantees (tests: tests/shared/files/test_backup.py)
    * A backup stands at its place whole and read back, mode 0600, or not at all; nothing is ever overwritten
      (test_nothing_is_overwritten, test_a_kill_leaves_no_backup).
    * A byte that was changed, a file that was added, removed, renamed or made a link is found, before anything is written
      (test_any_changed_byte_is_found, test_a_foreign_member_is_refused).
    * Unpacking writes plain files below a new folder and nothing else (test_names_that_lead_out_are_refused).

Not guaranteed: that nobody made the backup anew with hashes that fit. What is sealed or signed inside still proves itself.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import stat
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Literal, NoReturn

from shared.errors import RunError, printable
from shared.files.atomic import sync_folder
from shared.files.json_files import Count, canonical_json, parse_record
from shared.files.outputs import check_parent
from shared.version import silotune_version

LIST_FILE = "backup.json"
"""The list in a backup, and in a folder that was unpacked by hand: such a folder is not put in use."""

Kind = Literal["site", "coordinator"]

_MOST_LIST_BYTES = 64 << 20
_CHUNK = 1 << 20
# Names of ours: no hidden file, no way up or to the root.
_NAME = re.compile(r"[^./\\\x00][^/\\\x00]*(/[^./\\\x00][^/\\\x00]*)*")


@dataclass(frozen=True, kw_only=True)
class Contents:
    """`backup.json`.

    Attributes:
        kind: whose folder it is of.
        name: of the site or the coordinator.
        taken_at: ISO 8601, UTC.
        version: of Silotune.
        files: name -> (SHA-256, bytes).
        facts: numbers for people, by what they count: how many entries the ledger has.
        sha256: of everything else in the list.
    """

    format: Literal["silotune-backup/1"] = "silotune-backup/1"
    kind: Kind
    name: str
    taken_at: str
    version: str
    files: dict[str, tuple[str, Count]]
    facts: dict[str, Count] = field(default_factory=dict)
    sha256: str = ""

    def own_sha256(self) -> str:
        """Return what `sha256` must be."""
        return hashlib.sha256(canonical_json(asdict(replace(self, sha256=""))).encode()).hexdigest()


class Writer:
    """A backup that is being written.

    Attributes:
        facts: of `Contents`; fill in before the end.
    """

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        self.files: dict[str, tuple[str, int]] = {}
        self.facts: dict[str, int] = {}

    def add(self, name: str, content: bytes) -> None:
        """Add a file with this content."""
        self._add(name, io.BytesIO(content), len(content))

    def add_file(self, name: str, path: Path, *, size: int | None = None) -> bool:
        """Add a file as it is now, or its first `size` bytes; return False if there is none.

        A file that is replaced meanwhile is copied as it was, one that grows up to where it ended.

        Raises:
            RunError: if it is no plain file or cannot be read.
        """
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise RunError(f"{path} cannot be backed up: {error.strerror}; expected a plain file.") from None
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise RunError(f"{path} cannot be backed up: it is no plain file.")
            self._add(name, file, status.st_size if size is None else size)
        return True

    def add_folder(self, folder: Path, name: str) -> None:
        """Add every file below `folder` that is not hidden, as `name/...`."""
        for place, folders, files in os.walk(folder):
            folders[:] = sorted(found for found in folders if not found.startswith("."))
            for link in (Path(place, found) for found in folders if Path(place, found).is_symlink()):
                raise RunError(f"{link} is a link, which a backup does not follow; move what it names to its place.")
            for found in sorted(file for file in files if not file.startswith(".")):
                path = Path(place, found)
                self.add_file(f"{name}/{path.relative_to(folder).as_posix()}", path)

    def _add(self, name: str, file: IO[bytes], size: int) -> None:
        if not _NAME.fullmatch(name):
            raise RunError(f"{name!r} cannot be backed up: its name is none of ours. Move it out of the folder.")
        digest = hashlib.sha256()
        info = tarfile.TarInfo(name)
        info.size, info.mode = size, 0o600
        self._tar.addfile(info, _Hashing(file, digest.update))  # raises if the file became shorter
        self.files[name] = (digest.hexdigest(), size)


class _Hashing(io.RawIOBase):
    """A file that tells what is read of it."""

    def __init__(self, file: IO[bytes], heard: Callable[[bytes], object]) -> None:
        self._file, self._heard = file, heard

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes."""
        data = self._file.read(size)
        self._heard(data)
        return data


@contextmanager
def writing(path: Path, *, kind: Kind, name: str, check: Callable[[Path], object]) -> Iterator[Writer]:
    """Write a backup to `path`; it appears there at the end of the block, after `check` has read it back.

    Raises:
        RunError: if `path` exists, or something cannot be read or written.
    """
    if os.path.lexists(path):
        raise RunError(f"{path} is there already, and a backup overwrites nothing; choose another name.")
    check_parent(path)
    taken_at = datetime.now(UTC).isoformat(timespec="milliseconds")
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                writer = Writer(tar)
                yield writer
                contents = Contents(
                    kind=kind,
                    name=name,
                    taken_at=taken_at,
                    version=silotune_version(),
                    files=dict(writer.files),
                    facts=writer.facts,
                )
                text = _json(contents)
                info = tarfile.TarInfo(LIST_FILE)
                info.size, info.mode = len(text), 0o600
                tar.addfile(info, io.BytesIO(text))
            file.flush()
            os.fsync(file.fileno())
        check(Path(temporary))
        _move_to_new(temporary, path)
        sync_folder(path.parent)
    except (OSError, tarfile.TarError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"the backup {path} was not made: {reason}. Mend that, then try again.") from None
    finally:
        if temporary:
            with suppress(FileNotFoundError):  # it was moved
                os.unlink(temporary)


def _move_to_new(temporary: str, path: Path) -> None:
    try:
        os.link(temporary, path)  # unlike a rename, it fails if somebody was quicker
    except FileExistsError:
        raise
    except OSError:  # a stick or a share that knows no hard links: the moment between look and move is left
        if os.path.lexists(path):
            raise
        os.rename(temporary, path)


def told(contents: Contents) -> str:
    """Return what a backup holds, for people."""
    size = sum(num_bytes for _, num_bytes in contents.files.values())
    facts = "".join(f", {number:,} {what}" for what, number in contents.facts.items())
    return (
        f"backup of {contents.kind} {printable(contents.name)} of {printable(contents.taken_at)}, {len(contents.files):,} files, "
        f"{size:,} bytes{facts}"
    )


def verify(path: Path, kind: Kind) -> Contents:
    """Return what a backup holds, after comparing every file with its hash.

    Raises:
        RunError: it is none, is damaged, or is of the other kind.
    """
    return _read(path, kind, lambda name: None)


def unpack(path: Path, kind: Kind, folder: Path, *, wanted: Callable[[str], bool] = lambda name: True) -> Contents:
    """Write the files of a backup below `folder`, which must be empty; return what the backup holds.

    Raises:
        RunError: as `verify`; `folder` then holds no file that was not compared with its hash.
    """
    verify(path, kind)

    def open_file(name: str) -> IO[bytes] | None:
        if not wanted(name):
            return None
        target = folder / name
        for above in reversed(target.relative_to(folder).parents):
            (folder / above).mkdir(exist_ok=True, mode=0o700)
        return os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb")

    return _read(path, kind, open_file)


@contextmanager
def unpacked(path: Path, kind: Kind, *, wanted: Callable[[str], bool]) -> Iterator[tuple[Contents, Path]]:
    """Unpack to a folder that is gone after the block; yields what the backup holds, and that folder.

    Raises:
        RunError: as `verify`.
    """
    try:  # where there is room for a backup, there is for a part of it
        scratch = tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.")
    except OSError:  # a medium that is only read
        scratch = tempfile.TemporaryDirectory()
    with scratch as name:
        yield unpack(path, kind, Path(name), wanted=wanted), Path(name)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Fill a folder that appears at the end of the block under its name, whole; yields where to write.

    Raises:
        RunError: if `folder` exists and is not empty, or cannot be made.
    """
    if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir() or any(folder.iterdir())):
        raise RunError(
            f"{folder} is there already, and only a new folder is written to. Choose another, or move it away."
        )
    check_parent(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield temporary
        for place, _, _ in os.walk(temporary):
            sync_folder(Path(place))
        os.rename(temporary, folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise RunError(f"{folder} cannot be made: {error.strerror}; mend that, then try again.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_unpacked(folder: Path, command: str) -> None:
    """Raise `RunError` if a backup was unpacked to `folder` by hand: `command` compares and puts it in use."""
    if os.path.lexists(folder / LIST_FILE):
        raise RunError(
            f"{folder} is a backup that was unpacked ({LIST_FILE} lies there), and is not used as it is: what happened after "
            f"it was taken would be forgotten. Put it back with: {command}"
        )


def _read(path: Path, kind: Kind, open_file: Callable[[str], IO[bytes] | None]) -> Contents:
    found: dict[str, tuple[str, int]] = {}
    listed: bytes | None = None
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                # Of a sparse file a few bytes stand for any number of zeros.
                is_plain = member.isreg() and not member.issparse() and _NAME.fullmatch(member.name) is not None
                if not is_plain or member.name in found or listed is not None:
                    _damaged(path, f"{member.name!r} does not belong there")
                source = tar.extractfile(member)
                assert source is not None  # noqa: S101 (it is a file)
                if member.name == LIST_FILE:
                    listed = source.read(_MOST_LIST_BYTES)
                    continue
                found[member.name] = (_copied(source, open_file(member.name)), member.size)
    except (OSError, tarfile.TarError, ValueError, OverflowError) as error:
        _damaged(path, str(getattr(error, "strerror", None) or error))
    if listed is None:
        _damaged(path, f"it holds no {LIST_FILE}")
    try:
        text = listed.decode()
    except UnicodeDecodeError:
        _damaged(path, f"{LIST_FILE} is not text")
    contents = parse_record(text, Contents, path, where=f"{LIST_FILE}: ")
    if contents.sha256 != contents.own_sha256():
        _damaged(path, f"{LIST_FILE} was changed")
    for name in sorted({*found, *contents.files}):
        if found.get(name) != contents.files.get(name):
            missing, added = name not in found, name not in contents.files
            _damaged(path, f"{name!r} {'is missing' if missing else 'was added' if added else 'was changed'}")
    if contents.kind != kind:
        raise RunError(f"{path} is the backup of a {contents.kind}, not of a {kind}.")
    return contents


def _copied(source: IO[bytes], target: IO[bytes] | None) -> str:
    digest = hashlib.sha256()
    try:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            if target is not None:
                target.write(chunk)
        if target is not None:
            target.flush()
            os.fsync(target.fileno())
    finally:
        if target is not None:
            target.close()
    return digest.hexdigest()


def _json(contents: Contents) -> bytes:
    contents = replace(contents, sha256=contents.own_sha256())
    return (json.dumps(asdict(contents), indent=1, sort_keys=True) + "\n").encode()


def _damaged(path: Path, what: str) -> NoReturn:
    raise RunError(f"the backup {path} cannot be used: {what}. Take another one; nothing was put back.")
