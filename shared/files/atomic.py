"""Writes that are either there in full or not at all, also after a kill or a power cut."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from shared.errors import RunError


def write_bytes(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replace `path` by `data` atomically and durably (temporary file, fsync, rename, fsync of the folder).

    Args:
        mode: of the new file, which is private to its owner until it is complete.

    Raises:
        RunError: if the disk is full or the folder cannot be written; `path` keeps its old content.
    """
    temporary = ""
    try:
        require_file_or_nothing(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(handle, mode)
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise RunError(
            f"could not write {path}: {error.strerror or error}. The old content is untouched; free space or mend "
            "the permissions, then resume the run."
        ) from error


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Raise `OSError` where a library written in Rust (safetensors, tokenizers) could not write, in words of its own."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from error


def require_file_or_nothing(path: Path) -> None:
    """Raise `RunError` if a link, a folder or a device lies at `path`: a rename would put a file in its place."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise RunError(f"{path} is no plain file, so it is not replaced; name another file, or move it away.")


def write_text(path: Path, text: str) -> None:
    """Replace `path` by UTF-8 `text`; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value`, a dataclass as well, as indented JSON with sorted keys; NaN is refused. See `write_bytes`."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


@contextlib.contextmanager
def exclusive_lock(path: Path, busy: str | None) -> Iterator[None]:
    """Hold the lock file `path`, which is free again when this process ends, however it ends.

    Args:
        busy: what to say if another process holds it; None waits until it is free.

    Raises:
        RunError: `busy`; or if the file cannot be made.
    """
    try:
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    except OSError as error:
        raise RunError(f"the folder {path.parent} cannot be used: {error.strerror}; check the path.") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if busy is None else fcntl.LOCK_NB))
        except OSError as error:
            raise RunError(busy or f"the folder {path.parent} cannot be locked: {error.strerror}.") from None
        yield
    finally:
        os.close(handle)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file and wait until it is on the disk; what a crash left of one before is ended first.

    Raises:
        RunError: if it cannot be written.
    """
    try:
        with path.open("a+b") as file:
            if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                file.write(b"\n")
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror}).") from error


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
