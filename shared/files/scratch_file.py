"""A file of sealed entries that no other process can open, read or find again.

For what is as confidential as the records and may be lost at any moment: a cache. The file has no name (O_TMPFILE), so the
system frees it when the process ends, however it ends. Every entry is sealed with AES-256-GCM under a key that is drawn from
the operating system and exists in this process's memory only: what a disk keeps of freed blocks cannot be read.

Formal guarantees (tests: tests/shared/files/test_scratch_file.py)
    * Only ciphertext is written (test_the_file_holds_no_plaintext), and no file is left after SIGKILL
      (tests/shared/models/test_frozen_cache.py::test_a_kill_leaves_nothing).
    * `read` returns exactly what `append` was given under that number, or raises: bytes that were changed, cut off or moved
      from another entry are noticed (test_changed_bytes_are_noticed).
    * No nonce is used twice, also after failed writes and in forked processes (test_no_nonce_is_used_twice,
      test_a_forked_process_only_reads).

Not covered: swapped memory holds the key as it holds the records; encrypt the swap space.
"""

from __future__ import annotations

import errno
import os
import tempfile
import threading
import weakref
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

OVERHEAD = 16
"""Bytes by which a sealed entry is longer."""


class ScratchFile:
    """Numbered entries in a nameless file.

    Attributes:
        size: bytes of all entries, sealed.
    """

    def __init__(self, folder: Path) -> None:
        """Open the file in `folder`.

        Raises:
            OSError: if no file can be made there.
        """
        self._descriptor = _open_nameless(folder)
        weakref.finalize(self, os.close, self._descriptor)
        self._cipher = AESGCM(AESGCM.generate_key(bit_length=256))
        self._places: dict[int, tuple[int, int]] = {}
        self._next = 0
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self.size = 0

    def append(self, data: bytes) -> int:
        """Seal and write one entry; return its number.

        Raises:
            OSError: if it could not be written whole; then there is no such entry, and the earlier ones are as they were.
        """
        with self._lock:
            if os.getpid() != self._owner:
                # It has the key and the counter of its parent: both would seal under the same nonces.
                raise OSError(errno.EPERM, "a forked process may read this file, not write it")
            number, self._next = self._next, self._next + 1  # a number is spent even if the write fails
            sealed = memoryview(self._cipher.encrypt(_nonce(number), data, _nonce(number)))
            written = 0
            while written < len(sealed):
                count = os.pwrite(self._descriptor, sealed[written:], self.size + written)
                if count <= 0:
                    raise OSError(errno.EIO, "nothing was written")
                written += count
            self._places[number] = (self.size, len(sealed))
            self.size += len(sealed)
            return number

    def read(self, number: int) -> bytes:
        """Return the entry `number`; several threads and forked processes may read at once.

        Raises:
            OSError: if it cannot be read, or is not what was written.
        """
        place, length = self._places[number]
        sealed = os.pread(self._descriptor, length, place)
        while len(sealed) < length:  # the system may give less than what was asked for
            part = os.pread(self._descriptor, length - len(sealed), place + len(sealed))
            if not part:
                raise OSError(errno.EIO, "the file is shorter than what was written")
            sealed += part
        try:
            return self._cipher.decrypt(_nonce(number), sealed, _nonce(number))
        except InvalidTag:
            raise OSError(errno.EIO, "the bytes on the disk are not those that were written") from None


def _nonce(number: int) -> bytes:
    """Return 96 bits: a counter, under a key that seals this one file."""
    return number.to_bytes(12, "big")


def _open_nameless(folder: Path) -> int:
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except (AttributeError, OSError) as error:
        # Not every system or file system has it; a folder that cannot be written to fails below as well.
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.ENOSPC):
            raise
    descriptor, name = tempfile.mkstemp(prefix="silotune-", dir=folder)
    os.unlink(name)  # a kill just before leaves a file without content
    return descriptor
