"""Where a command may write: what somebody else put there is neither overwritten nor removed.

Guarantees (tests: tests/shared/files/test_outputs.py, tests/integration/test_foreign_files.py)
    * A file is replaced only if Silotune made it, which a mark inside says; any other one stays, and the error names it.
    * Links, devices and folders in the place of a file, and files in the place of a folder, are refused and left alone.
    * The checks write nothing, so a command makes them before it works.
    * Folders above what is written are made by every command alike, and only once there is something to write.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterable
from pathlib import Path

from shared.errors import RunError

HTML_MARK = b'<meta name="generator" content="Silotune">'
PDF_MARK = b"(Silotune)"
PNG_MARK = b"Software\0silotune"
CERTIFICATE_MARK, CSR_MARK = b"-----BEGIN CERTIFICATE-----", b"-----BEGIN CERTIFICATE REQUEST-----"
JSON_MARK = b'"format": "silotune'
_MOST_BYTES = 1 << 28  # no file of ours is larger


def check_file(path: Path, mark: bytes | None, *, way_out: str = "choose another file") -> None:
    """Raise unless a command may write `path`: nothing is there, or an earlier file of ours.

    Args:
        mark: what every file of ours holds; None: no such file can be told from others, so
            one that is there is never replaced.
        way_out: what to do instead.

    Raises:
        RunError: naming what is there.
    """
    found = _kind(path)
    if found is None:
        check_parent(path)
    elif found != "file":
        raise RunError(f"{path} is a {found}, which is not replaced; {way_out}.")
    elif mark is None or not _holds(path, mark):
        raise RunError(f"{path} is there already and Silotune did not make it, so it is not replaced; {way_out}.")


def check_new_files(folder: Path, names: Iterable[str]) -> None:
    """Raise if one of `names` is in `folder` already, or `folder` cannot be one.

    Raises:
        RunError: naming what is there.
    """
    check_folder(folder)
    if found := sorted(name for name in names if os.path.lexists(folder / name)):
        raise RunError(f"{folder} holds {', '.join(found)} already, which would be overwritten; choose another folder.")


def check_folder(folder: Path) -> None:
    """Raise unless `folder` is a folder, or can be made one as far as can be seen without writing.

    Raises:
        RunError: naming what is in the way.
    """
    found = _kind(folder)  # first, for it explains impossible paths
    if found is None:
        check_parent(folder)
    elif not folder.is_dir():
        raise RunError(f"{folder} is a {found}; choose a folder.")
    elif not os.access(folder, os.W_OK | os.X_OK):
        raise RunError(f"the folder {folder} cannot be written; choose another, or mend the permissions.")


def make_folder(folder: Path) -> None:
    """Make `folder` and those above it, if they are not there.

    Raises:
        RunError: saying why not.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"the folder {folder} cannot be made: {error.strerror}; choose another.") from None


def check_own_folder(folder: Path, *, marker: str, own: Collection[str], what: str) -> None:
    """Raise unless `folder` is new, empty, or holds `marker`, with which `what` begins.

    Args:
        own: what may lie there before the marker does, such as a lock.

    Raises:
        RunError: naming what is in the way, or the first foreign file.
    """
    check_folder(folder)
    if not folder.is_dir() or (folder / marker).exists():
        return
    half_made = f".{marker}."  # a write that was cut short
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise RunError(f"the folder {folder} cannot be read: {error.strerror}; choose another.") from None
    if foreign := [name for name in names if name not in own and not name.startswith(half_made)]:
        raise RunError(
            f"{folder} is not empty and holds no {what} (no {marker}, but {listed(foreign)}); what is there is left "
            "alone. Choose another folder."
        )


def check_parent(path: Path) -> None:
    """Raise if `path`, which does not exist, could not be made: a file stands in its way, or the folder is read-only.

    Raises:
        RunError: naming what is in the way.
    """
    for folder in path.absolute().parents:
        found = _kind(folder)
        if found is None:
            continue
        if not folder.is_dir():
            raise RunError(f"{path} cannot be made: {folder} is a {found}; choose another place.")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise RunError(f"{path} cannot be made: {folder} cannot be written; choose another place.")
        return


def listed(names: Collection[str], most: int = 3) -> str:
    """Return the first of `names` for an error message, and how many more there are."""
    shown = ", ".join(sorted(names)[:most])
    return shown + (f" and {len(names) - most:,} more" if len(names) > most else "")


def _kind(path: Path) -> str | None:
    """Return what is at `path`, links not followed; None if nothing is.

    Raises:
        RunError: if the path itself is impossible, such as one that is too long.
    """
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RunError(f"{_short(path)} cannot be used: {reason}; choose another path.") from None
    for test, name in (
        (stat.S_ISREG, "file"),
        (stat.S_ISDIR, "folder"),
        (stat.S_ISLNK, "symbolic link"),
    ):
        if test(mode):
            return name
    return "device"


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"{text[:100]}…{text[-60:]} ({len(text):,} characters)"


def _holds(path: Path, mark: bytes) -> bool:
    try:
        return path.stat().st_size <= _MOST_BYTES and mark in path.read_bytes()
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}; choose another file.") from None
