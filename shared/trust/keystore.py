"""Secrets on disk: key files under a passphrase or private to their owner, and sealed (encrypted) bytes.

A key file is a small JSON document. Under a passphrase the secret is encrypted with AES-256-GCM, the key being
derived by scrypt; without one the file's mode (0600) is all that protects it. `Seal` encrypts other files and
messages under a random key that is itself kept in a key file.
"""

from __future__ import annotations

import base64
import getpass
import json
import os
import secrets
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from shared.errors import TrustError
from shared.files import atomic
from shared.files.bounded import read_bounded
from shared.files.json_files import canonical_json
from shared.trust import key_changes

KEY_BYTES = 32
SCRYPT_N = 2**17  # cost of new files: 128 MiB and some tenths of a second per guess
SCRYPT_R = 8
SCRYPT_P = 1
SECRETS_FOLDERS = (Path("/run/secrets"), Path("/run/credentials"))
"""Where a container runtime (mode 0444) and systemd (0400, or 0440 with an access list) mount secrets, for one service only."""

_FORMAT = "silotune-secret"
_VERSION = 1
_MAX_FILE_BYTES = 1 << 20
_MAX_PASSPHRASE_BYTES = 4096
# A file could otherwise ask for any amount of memory and time: at most 1 GiB, four times over.
_MAX_SCRYPT_N = 2**20
_MAX_SCRYPT_P = 4
_NONCE_BYTES = 12
_TAG_BYTES = 16
_MAGIC = b"SILOSEAL\x01"
_PLAIN_FIELDS = {"format", "version", "protection", "secret"}
_ENCRYPTED_FIELDS = {"format", "version", "protection", "n", "r", "p", "salt", "nonce", "ciphertext"}


def save_secret(path: Path, secret: bytes, *, passphrase: str | None, replace: bool = False) -> None:
    """Write `secret` to a key file of mode 0600, encrypted if there is a passphrase.

    Raises:
        TrustError: if `path` exists and `replace` is false, or the passphrase is empty.
        RunError: if the file cannot be written.
    """
    if not replace and os.path.lexists(path):
        raise TrustError(f"{path} exists already and is not overwritten; choose another path, or move that file away.")
    content = document(secret, passphrase)
    with key_changes.alone(path.parent):
        key_changes.finish(path.parent)
        atomic.write_bytes(path, content)


def document(secret: bytes, passphrase: str | None) -> bytes:
    """Return what a key file with this secret holds; see `save_secret`."""
    fields: dict[str, Any] = {"format": _FORMAT, "version": _VERSION}
    if passphrase is None:
        fields |= {"protection": "none", "secret": _to_text(secret)}
    else:
        if not passphrase:
            raise TrustError("the passphrase is empty; expected at least one character.")
        salt, nonce = secrets.token_bytes(16), secrets.token_bytes(_NONCE_BYTES)
        fields |= {"protection": "passphrase", "n": SCRYPT_N, "r": SCRYPT_R, "p": SCRYPT_P}
        fields |= {"salt": _to_text(salt), "nonce": _to_text(nonce)}
        key = _derive(passphrase, salt, n=SCRYPT_N, r=SCRYPT_R, p=SCRYPT_P)
        ciphertext = AESGCM(key).encrypt(nonce, secret, canonical_json(fields).encode())
        fields["ciphertext"] = _to_text(ciphertext)
    return (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()


def load_secret(path: Path, *, passphrase: str | None) -> bytes:
    """Return the secret of a key file; the passphrase is not used if the file is not encrypted.

    Raises:
        TrustError: if the file is missing, damaged or of an unknown version; if it is not encrypted and anybody but
            its owner may read or write it; if it is encrypted and the passphrase is missing or wrong.
    """
    key_changes.finish(path.parent)
    content, mode = read_bounded(path, "key file", _MAX_FILE_BYTES)
    secret = opened(content, path, passphrase=passphrase)
    if not is_encrypted(content):
        check_private(path, mode, "holds an unencrypted key")
    return secret


def is_encrypted(content: bytes) -> bool:
    """Say whether the content of a key file claims to be encrypted."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("protection") == "passphrase"


def opened(content: bytes, path: Path, *, passphrase: str | None) -> bytes:
    """Return the secret in the content of the key file `path`; see `load_secret`, but for the mode of a file."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise _damaged(path, "it is not a key file of silotune")
    if document.get("version") != _VERSION:
        raise TrustError(
            f"{path} is a key file of version {document.get('version')!r}; this silotune reads version {_VERSION}. "
            "Install the silotune that wrote it."
        )
    try:
        if document.get("protection") == "passphrase":
            return _decrypt(path, document, passphrase)
        if document.get("protection") != "none" or document.keys() != _PLAIN_FIELDS:
            raise ValueError("its fields are not those of a key file")
        return _to_bytes(document["secret"])
    except ValueError as error:
        raise _damaged(path, str(error)) from None


def passphrase_from_environment(name: str = "SILOTUNE_PASSPHRASE") -> str | None:
    """Return the passphrase of key files: from the file SILOTUNE_PASSPHRASE_FILE, else SILOTUNE_PASSPHRASE, else None.

    Args:
        name: of the variable, also with _FILE at its end.

    Raises:
        TrustError: if one of them is set and empty (a key would be written in the clear), or see `read_passphrase`.
    """
    for variable in (f"{name}_FILE", name):
        value = os.environ.get(variable)
        if value is None:
            continue
        if not value:
            raise TrustError(f"{variable} is set but empty; give it a value, or unset it to work without a passphrase.")
        return read_passphrase(Path(value)) if variable.endswith("_FILE") else value
    return None


def old_passphrase(files: Sequence[Path]) -> str | None:
    """Return the passphrase of these key files: that of the environment, else what is typed, None if none is needed.

    Raises:
        TrustError: see `passphrase_from_environment` and `load_secret`.
    """
    found = passphrase_from_environment()
    key_changes.finish(files[0].parent)
    needed = any(is_encrypted(read_bounded(path, "key file", _MAX_FILE_BYTES)[0]) for path in files)
    return getpass.getpass("Passphrase: ") if found is None and needed and sys.stdin.isatty() else found


def new_passphrase() -> str:
    """Return the passphrase to change to: SILOTUNE_NEW_PASSPHRASE_FILE, SILOTUNE_NEW_PASSPHRASE, or what is typed twice.

    Raises:
        TrustError: if there is none, or what is typed differs or is empty.
    """
    found = passphrase_from_environment("SILOTUNE_NEW_PASSPHRASE")
    if found is not None:
        return found
    if not sys.stdin.isatty():
        raise TrustError(
            "there is no new passphrase; set SILOTUNE_NEW_PASSPHRASE_FILE to a file that holds it, or run this in a terminal, "
            "which asks for it."
        )
    typed = getpass.getpass("New passphrase: ")
    if not typed or typed != getpass.getpass("Again: "):
        raise TrustError("the two differ or are empty, so nothing was changed; try again.")
    return typed


def passphrase_changed(num_keys: int, passphrase: str | None) -> str:
    """Return what to say when `num_keys` keys have this new passphrase."""
    if passphrase is None:
        return f"{num_keys} keys are no longer encrypted: only their mode 0600 protects them."
    return (
        f"{num_keys} keys have the new passphrase. Give it to the service (SILOTUNE_PASSPHRASE_FILE) before you start it, and "
        "keep a copy apart from the backups. Older backups still open with the old one."
    )


def read_passphrase(path: Path) -> str:
    """Return the passphrase in a file, without the newline at its end.

    Raises:
        TrustError: if the file is missing, empty, longer than 4096 bytes or not UTF-8; if anybody but its owner may
            read or write it, unless it is a secret of a container or a service (below `SECRETS_FOLDERS`).
    """
    content, mode = read_bounded(path, "passphrase file", _MAX_PASSPHRASE_BYTES)
    if not any(path.resolve().is_relative_to(folder.resolve()) for folder in SECRETS_FOLDERS):
        check_private(path, mode, "holds a passphrase")
    try:
        passphrase = content.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise TrustError(f"the passphrase file {path} is not UTF-8 text; write the passphrase anew.") from None
    if not passphrase:
        raise TrustError(f"the passphrase file {path} is empty; expected the passphrase on one line.")
    return passphrase


class Seal:
    """Authenticated encryption (AES-256-GCM) of files and messages under one key.

    A sealed text opens only with the same key and the same `context`, so that one cannot be passed off as another.
    Nonces are random 96-bit numbers: seal at most 2**32 messages with one key, so that the probability of using a
    nonce twice stays below 2**-32 (NIST SP 800-38D). The length of the plaintext is not hidden.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise TrustError(f"the key has {len(key)} bytes; expected {KEY_BYTES}, as `new_key` makes them.")
        self._key = key
        self._cipher = AESGCM(key)

    def derived_key(self, purpose: str) -> bytes:
        """Return another key, 32 bytes, that follows from this one and `purpose` (HKDF, RFC 5869) and tells nothing of it."""
        return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=f"silotune: {purpose}".encode()).derive(
            self._key
        )

    def seal(self, plaintext: bytes, *, context: str) -> bytes:
        """Return `plaintext` encrypted; `context` says what it is and is not part of the result."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return _MAGIC + nonce + self._cipher.encrypt(nonce, plaintext, _MAGIC + context.encode())

    def open(self, sealed: bytes, *, context: str) -> bytes:
        """Return the plaintext of what `seal` made with this key and `context`.

        Raises:
            TrustError: if it is not sealed, was changed, or was sealed with another key or for another context.
        """
        if not is_sealed(sealed):
            raise TrustError(
                f"{context} is not sealed: expected encrypted bytes, found others or only a part of them. Use the file "
                "as silotune wrote it."
            )
        nonce, ciphertext = sealed[len(_MAGIC) :][:_NONCE_BYTES], sealed[len(_MAGIC) + _NONCE_BYTES :]
        try:
            return self._cipher.decrypt(nonce, ciphertext, _MAGIC + context.encode())
        except InvalidTag:
            raise TrustError(
                f"{context} does not open: it was sealed with another key or for another purpose, or its bytes were "
                "changed. Use the key that sealed it, or restore it from a backup."
            ) from None


def is_sealed(data: bytes) -> bool:
    """Say whether `data` looks like the result of `Seal.seal`; only `Seal.open` proves it."""
    return data.startswith(_MAGIC) and len(data) >= len(_MAGIC) + _NONCE_BYTES + _TAG_BYTES


def new_key() -> bytes:
    """Return a fresh key for `Seal` from the operating system's generator, 32 bytes."""
    return secrets.token_bytes(KEY_BYTES)


def _decrypt(path: Path, document: dict[str, Any], passphrase: str | None) -> bytes:
    """Return the secret of an encrypted key file; ValueError if it is damaged."""
    if document.keys() != _ENCRYPTED_FIELDS:
        raise ValueError("its fields are not those of a key file")
    salt, nonce, ciphertext = (_to_bytes(document[field]) for field in ("salt", "nonce", "ciphertext"))
    n, r, p = (document[field] for field in ("n", "r", "p"))
    if not (_is_cost(n, _MAX_SCRYPT_N) and n > 1 and n & (n - 1) == 0):
        raise ValueError(f"n must be a power of two, at most {_MAX_SCRYPT_N}")
    if r != SCRYPT_R or not _is_cost(p, _MAX_SCRYPT_P):
        raise ValueError(f"r must be {SCRYPT_R}, and p at most {_MAX_SCRYPT_P}")
    if len(nonce) != _NONCE_BYTES:
        raise ValueError(f"the nonce must have {_NONCE_BYTES} bytes")
    if passphrase is None:
        raise TrustError(
            f"{path} is encrypted and there is no passphrase; set SILOTUNE_PASSPHRASE_FILE to a file that holds it, "
            "or SILOTUNE_PASSPHRASE to the passphrase."
        )
    header = canonical_json({field: value for field, value in document.items() if field != "ciphertext"})
    try:
        return AESGCM(_derive(passphrase, salt, n=n, r=r, p=p)).decrypt(nonce, ciphertext, header.encode())
    except InvalidTag:
        raise TrustError(
            f"{path} does not open: the passphrase is wrong, or the file was changed. Check the passphrase; if it is "
            "right, restore the file from its backup."
        ) from None


def check_private(path: Path, mode: int, holds: str, *, group: bool = False) -> None:
    """Raise `TrustError` if anybody but the owner of `path`, which `holds` something, may read or write it.

    Args:
        group: its group may read it and write it, too: secrets of containers and of Debian's ssl-cert are given so.
    """
    if mode & (0o007 if group else 0o077):
        right = "640" if group else "600"
        raise TrustError(f"{path} {holds} and others may use the file (mode {mode:04o}); run: chmod {right} {path}")


def check_unwritable(path: Path, holds: str) -> None:
    """Raise `TrustError` if everybody on the machine may write `path`, which `holds` something, or exchange it in its folder.

    A group may: whoever answers for a file chooses it.
    """
    for place, what in ((path, "the file"), (path.absolute().parent, "its folder")):
        try:
            mode = place.stat().st_mode
        except OSError:
            continue  # whoever reads the file says it
        if mode & stat.S_IWOTH and not (place != path and mode & stat.S_ISVTX):
            raise TrustError(
                f"{path} {holds} and everybody may write {what} (mode {stat.S_IMODE(mode):04o}). Look whether somebody did, "
                f"then: chmod o-w {place}"
            )


def _derive(passphrase: str, salt: bytes, *, n: int, r: int, p: int) -> bytes:
    return Scrypt(salt=salt, length=KEY_BYTES, n=n, r=r, p=p).derive(passphrase.encode())


def _is_cost(value: Any, largest: int) -> bool:
    return type(value) is int and 1 <= value <= largest


def _to_text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _to_bytes(text: Any) -> bytes:
    if not isinstance(text, str):
        raise ValueError("a field is not text")
    return base64.b64decode(text, validate=True)


def _damaged(path: Path, reason: str) -> TrustError:
    return TrustError(f"the key file {path} is damaged: {reason}. Restore it from its backup.")
