"""Reading files beneath the folder of runs: no link is followed, and whether something changed is told by looking at its stamp.

Formal guarantees (tests: tests/simulations/console/test_index.py)
    * Only plain files are read, at most `MOST_BYTES` of each; a link, a pipe or a device is told as damage
      (test_no_link_is_followed, test_odd_files_end_in_a_reason).
    * Nothing is written (test_nothing_is_written).
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from shared.files.json_files import RecordT, damaged, parse_record

MOST_BYTES = 32 << 20
# JSON may hold half of a character, which no page and no file can; whole ones are written as two such escapes.
_HIGH, _LOW = r"\\u[dD][89abAB][0-9a-fA-F]{2}", r"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_LONE_SURROGATE = re.compile(f"{_HIGH}(?!{_LOW})|(?<!{_HIGH}){_LOW}")

Stamp = tuple[int, int, int] | None
"""Modified (ns), size, inode; None if there is nothing."""


def stamp_of(path: Path) -> Stamp:
    """Return what changes when a file or folder does."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


class Reader:
    """Reads files and remembers the stamp of each place that it looked at.

    Attributes:
        stamps: of every file and folder, before it was read.
    """

    def __init__(self) -> None:
        self.stamps: dict[Path, Stamp] = {}

    def text(self, path: Path) -> str | None:
        """Return the text of a file, None if there is none.

        Raises:
            RunError: it is no plain file of text, or too long.
        """
        self.stamps[path] = stamp_of(path)
        if self.stamps[path] is None:
            return None
        try:
            text = read_plain(path).decode("utf-8")
        except UnicodeDecodeError:
            raise damaged(path, "it is no UTF-8 text") from None
        return _LONE_SURROGATE.sub(r"\\ufffd", text) if "\\u" in text else text

    def record(self, path: Path, kind: type[RecordT]) -> RecordT | None:
        """Return the record in a file, None if there is no file; raises `RunError` for one that is damaged."""
        text = self.text(path)
        return None if text is None else parse_record(text, kind, path)

    def seen(self, path: Path) -> bool:
        """Return whether a file is there."""
        self.stamps[path] = stamp_of(path)
        return path.is_file() and not path.is_symlink()

    def folders(self, parent: Path) -> Iterator[Path]:
        """Yield the folders in a folder, by name, without links and hidden ones."""
        self.stamps[parent] = stamp_of(parent)
        yield from (parent / name for name, is_folder in sorted(entries(parent).items()) if is_folder)


def unchanged(stamps: Mapping[Path, Stamp]) -> bool:
    """Return whether everything is as it was read."""
    return all(stamp_of(path) == known for path, known in stamps.items())


def entries(folder: Path) -> dict[str, bool]:
    """Return name -> whether it is a folder, of what is in a folder that can be read; links and hidden names are left out."""
    try:
        if not stat.S_ISDIR(os.lstat(folder).st_mode):
            return {}
        with os.scandir(folder) as found:
            return {
                entry.name: entry.is_dir(follow_symlinks=False)
                for entry in found
                if not entry.name.startswith(".") and not entry.is_symlink()
            }
    except OSError:
        return {}


def read_plain(path: Path) -> bytes:
    """Return the content of a plain file; raises `RunError` if it is none, cannot be read or is too long."""
    try:
        # Without waiting for the other end of a pipe.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise damaged(path, "it is a link" if path.is_symlink() else error.strerror or "it cannot be read") from None
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise damaged(path, "it is no plain file")
        if found.st_size > MOST_BYTES:
            raise damaged(path, f"it is longer than {MOST_BYTES:,} bytes")
        with open(handle, "rb", closefd=False) as file:
            return file.read(MOST_BYTES)
    finally:
        os.close(handle)
