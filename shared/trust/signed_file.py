"""A signature beside a file: who handed it out, when, and that no byte of it was changed since.

`FILE.sig.json` holds the SHA-256 of FILE, the signer's public key, role and name, the time, and an Ed25519 signature over
all of these for a purpose of its own, so that a signature made for a round or an audit log is none for a file.

Formal guarantees (tests: tests/shared/trust/test_signed_file.py)
    * `verify_file` raises if any byte of the file or of its signature file was changed, or one of them is missing
      (test_any_changed_byte_of_the_file_is_detected, test_any_changed_byte_of_the_signature_is_detected).
    * A signature by this key that was made for something else is refused (test_signatures_for_other_purposes_are_refused).

Not guaranteed: that the signer is who the file says. Role, name and time are the signer's own words; whoever reads them
compares the key with one that came by another way.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BufferedReader
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from shared.errors import TrustError
from shared.files.atomic import write_text
from shared.trust.signing import Purpose, SignedDocument, SigningKey, VerifyKey

Role = Literal["coordinator", "site", "key holder"]

SUFFIX = ".sig.json"


@dataclass(frozen=True, kw_only=True)
class Signer:
    """Who signs a file.

    Attributes:
        role: "coordinator" (its round key), "site" (the key of its audit log) or "key holder" (any other key).
        name: as its settings call it, or the name of the key file.
        key: the private key.
    """

    role: Role
    name: str
    key: SigningKey

    @property
    def verify_key(self) -> VerifyKey:
        """The public key that readers compare."""
        return self.key.verify_key


class FileSignature(SignedDocument):
    """`FILE.sig.json`; role, name and time are what the signer wrote.

    Attributes:
        sha256: of the file, hexadecimal.
        bytes: its size.
        role: "coordinator", "site" or "key holder".
        name: of the signer.
        signed_at: ISO 8601, UTC.
    """

    purpose = Purpose.FILE
    what = "a signature as `silotune report --sign` writes it"
    advice = "It may have been changed: do not rely on the file; ask its sender for both."
    most_bytes = 1 << 14
    header = MappingProxyType({"format": "silotune-signed-report/1"})

    format: Literal["silotune-signed-report/1"]
    sha256: str
    bytes: int
    role: str
    name: str
    signed_at: str

    def text(self) -> str:
        """Return the content of the file."""
        return json.dumps(self.model_dump(), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def fingerprint(key: VerifyKey) -> str:
    """Return the SHA-256 of the 32 bytes of a public key in groups of four digits, to be read aloud and compared."""
    digest = hashlib.sha256(key.raw).hexdigest()
    return " ".join(digest[start : start + 4] for start in range(0, len(digest), 4))


def signature_file(path: Path) -> Path:
    """Return where the signature of `path` lies: beside it."""
    return path.with_name(path.name + SUFFIX)


def sign_file(path: Path, signer: Signer, *, now: datetime) -> Path:
    """Sign the content of `path`; return the path of the signature.

    Raises:
        TrustError: if the file cannot be read.
        RunError: if the signature cannot be written.
    """
    sha256, size = sha256_and_size(path)
    signature = FileSignature.sign(
        signer.key,
        sha256=sha256,
        bytes=size,
        role=signer.role,
        name=signer.name,
        signed_at=now.astimezone(UTC).isoformat(timespec="seconds"),
    )
    place = signature_file(path)
    write_text(place, signature.text())
    return place


def verify_file(path: Path, key: VerifyKey | None = None) -> FileSignature:
    """Check `path` against the signature beside it.

    Args:
        key: the key that must have signed; None accepts any, which proves only that nothing was changed since.

    Raises:
        TrustError: the file or its signature is missing or was changed, or another key signed.
    """
    # 1. The signature, byte for byte as `sign_file` writes it, so that no byte can change unseen.
    place = signature_file(path)
    with plain_file(place) as file:
        content = file.read(FileSignature.most_bytes + 1)
    signature = FileSignature.open(content, source=str(place), key=key)
    if signature.text().encode() != content:
        raise FileSignature.refusal(str(place), "it is written in another way")

    # 2. The file itself.
    sha256, size = sha256_and_size(path)
    if (sha256, size) != (signature.sha256, signature.bytes):
        raise TrustError(
            f"{path} was changed after it was signed: its SHA-256 is {sha256} ({size} bytes), signed was "
            f"{signature.sha256} ({signature.bytes} bytes). Do not rely on it; ask its sender for the original."
        )
    return signature


def sha256_and_size(path: Path) -> tuple[str, int]:
    """Return the SHA-256 of a plain file, hexadecimal, and its size; the memory used does not grow with it.

    Raises:
        TrustError: if it cannot be read, or is a device or a pipe.
    """
    with plain_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), file.tell()


@contextmanager
def plain_file(path: Path) -> Iterator[BufferedReader]:
    """Open a file to read it; TrustError if that fails, or it is a device or a pipe."""
    try:
        # Without O_NONBLOCK, opening a pipe would wait for whoever writes to it.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise TrustError(f"{path} is no plain file; expected one that can be signed.")
            yield file
    except OSError as error:
        raise TrustError(
            f"{path} cannot be read ({error.strerror}); a signature and what it signs belong together."
        ) from None
