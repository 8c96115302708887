"""The sealed, nameless file: what lies in it, what is noticed, what is left."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from shared.files.scratch_file import OVERHEAD, ScratchFile

SECRET = b"activations of a record" * 50


def content(file: ScratchFile) -> bytes:
    return Path(f"/proc/self/fd/{file._descriptor}").read_bytes()


@pytest.fixture(params=["nameless", "unlinked"])
def file(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ScratchFile:
    if request.param == "unlinked":
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY | os.O_WRONLY)  # as where a file system does not know it
    made = ScratchFile(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert os.fstat(made._descriptor).st_mode & 0o777 == 0o600
    return made


def test_entries_come_back(file: ScratchFile) -> None:
    entries = [SECRET, b"", os.urandom(100_000), b"x"]
    assert [file.append(entry) for entry in entries] == [0, 1, 2, 3]
    assert [file.read(number) for number in (3, 2, 1, 0)] == entries[::-1]
    assert file.size == len(content(file)) == sum(map(len, entries)) + 4 * OVERHEAD


def test_the_file_holds_no_plaintext(file: ScratchFile) -> None:
    for _ in range(3):
        file.append(SECRET)
    held = content(file)
    assert all(SECRET[start : start + 8] not in held for start in range(len(SECRET) - 8))
    third = len(held) // 3
    assert len({held[k * third : (k + 1) * third] for k in range(3)}) == 3  # equal entries do not look equal


def test_changed_bytes_are_noticed(file: ScratchFile) -> None:
    for letter in (b"a", b"b", b"c", b"d"):
        file.append(letter * 100)
    length = 100 + OVERHEAD
    os.pwrite(file._descriptor, bytes([content(file)[5] ^ 1]), 5)  # one bit
    os.pwrite(file._descriptor, content(file)[2 * length : 3 * length], length)  # another entry, in full
    os.ftruncate(file._descriptor, 3 * length + 10)
    for number, text in ((0, "not those"), (1, "not those"), (3, "shorter")):
        with pytest.raises(OSError, match=text):
            file.read(number)
    assert file.read(2) == b"c" * 100


def test_no_nonce_is_used_twice(file: ScratchFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after writes that failed: their ciphertext may be on the disk."""
    nonces: list[bytes] = []

    class Watched:
        def encrypt(self, nonce: bytes, data: bytes, associated: bytes) -> bytes:
            assert associated == nonce
            nonces.append(nonce)
            return cipher.encrypt(nonce, data, associated)

        def decrypt(self, nonce: bytes, data: bytes, associated: bytes) -> bytes:
            return cipher.decrypt(nonce, data, associated)

    cipher = file._cipher
    monkeypatch.setattr(file, "_cipher", Watched())
    file.append(b"one")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space"):
            file.append(b"two")
    number = file.append(b"three")
    assert (file.read(0), file.read(number)) == (b"one", b"three")
    assert len(set(nonces)) == len(nonces) == 3


def test_a_write_in_pieces_is_whole_or_nothing(file: ScratchFile, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, place: write(descriptor, data[:7], place))
    number = file.append(SECRET)
    pieces = iter((7, 7))

    def ends(descriptor: int, data: memoryview, place: int) -> int:
        return write(descriptor, data[: next(pieces, 0)], place)

    monkeypatch.setattr(os, "pwrite", ends)
    with pytest.raises(OSError, match="nothing was written"):
        file.append(b"y" * 100)
    monkeypatch.setattr(os, "pwrite", write)
    after = file.append(b"z" * 50)
    assert (file.read(number), file.read(after)) == (SECRET, b"z" * 50)
    with pytest.raises(KeyError):
        file.read(after - 1)


def test_every_file_has_a_key_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[bytes] = []
    make = AESGCM.generate_key
    monkeypatch.setattr(AESGCM, "generate_key", lambda bit_length: keys.append(make(bit_length)) or keys[-1])
    for _ in range(3):
        ScratchFile(tmp_path)
    assert len(set(keys)) == 3
    assert {len(key) for key in keys} == {32}


def test_several_readers_at_once(file: ScratchFile) -> None:
    entries = [os.urandom(5_000) for _ in range(50)]
    for entry in entries:
        file.append(entry)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(file.read, [*range(50)] * 4)) == entries * 4


def test_a_forked_process_only_reads(file: ScratchFile) -> None:
    """It shares key and counter, so its own entries would be sealed under nonces that its parent uses too."""
    file.append(SECRET)
    child = os.fork()
    if not child:
        code = 1
        try:
            assert file.read(0) == SECRET
            file.append(b"child")
        except PermissionError:
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert file.read(file.append(b"parent")) == b"parent"


def test_the_descriptor_is_closed_with_the_file(tmp_path: Path) -> None:
    file = ScratchFile(tmp_path)
    descriptor = file._descriptor
    del file
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(descriptor)


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        ScratchFile(tmp_path / "missing")
