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

import base64
import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from shared.errors import TrustError
from shared.files.atomic import write_text
from shared.files.json_files import canonical_json
from shared.trust.signing import SigningKey, VerifyKey

Role = Literal["coordinator", "site", "key holder"]

SUFFIX = ".sig.json"
_PURPOSE = "report"
_FORMAT = "silotune-signed-report/1"
_FIELDS = {"format", "sha256", "bytes", "role", "name", "signed_at", "signer", "signature"}
_MAX_SIGNATURE_BYTES = 1 << 14


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


@dataclass(frozen=True, kw_only=True)
class FileSignature:
    """A signature that was checked; role, name and time are what the signer wrote.

    Attributes:
        sha256: of the file, hexadecimal.
        num_bytes: its size.
        role: "coordinator", "site" or "key holder".
        name: of the signer.
        signed_at: ISO 8601, UTC.
        signer: the key that signed.
    """

    sha256: str
    num_bytes: int
    role: str
    name: str
    signed_at: str
    signer: VerifyKey


def fingerprint(key: VerifyKey) -> str:
    """Return the SHA-256 of the 32 bytes of a public key in groups of four digits, to be read aloud and compared."""
    raw = base64.urlsafe_b64decode(key.text.partition(":")[2] + "=")
    digest = hashlib.sha256(raw).hexdigest()
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
    content = _read(path, "the file to sign")
    fields: dict[str, Any] = {
        "format": _FORMAT,
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "role": signer.role,
        "name": signer.name,
        "signed_at": now.astimezone(UTC).isoformat(timespec="seconds"),
        "signer": signer.verify_key.text,
    }
    signature = signer.key.sign(_PURPOSE, canonical_json(fields).encode())
    place = signature_file(path)
    write_text(place, _text(fields | {"signature": base64.b64encode(signature).decode("ascii")}))
    return place


def verify_file(path: Path, key: VerifyKey | None = None) -> FileSignature:
    """Check `path` against the signature beside it.

    Args:
        key: the key that must have signed; None accepts any, which proves only that nothing was changed since.

    Raises:
        TrustError: the file or its signature is missing or was changed, or another key signed.
    """
    # 1. The signature file, byte for byte as `sign_file` writes it.
    place = signature_file(path)
    fields = _fields(place)

    # 2. The signature, before anything in it is believed.
    signer = VerifyKey.parse(fields["signer"], source=str(place))
    if key is not None and signer != key:
        raise TrustError(f"{path} was signed by {signer.text}, expected {key.text}. Do not rely on it; ask its sender.")
    try:
        text = fields.pop("signature")
        signature = base64.b64decode(text, validate=True)
        if base64.b64encode(signature).decode("ascii") != text:  # the last digit has bits that mean nothing
            raise ValueError
    except ValueError:
        raise _not_a_signature(place) from None
    signer.verify(_PURPOSE, canonical_json(fields).encode(), signature)

    # 3. The file itself.
    content = _read(path, "the signed file")
    found = hashlib.sha256(content).hexdigest()
    if (found, len(content)) != (fields["sha256"], fields["bytes"]):
        raise TrustError(
            f"{path} was changed after it was signed: its SHA-256 is {found} ({len(content)} bytes), signed was "
            f"{fields['sha256']} ({fields['bytes']} bytes). Do not rely on it; ask its sender for the original."
        )
    return FileSignature(
        sha256=found,
        num_bytes=len(content),
        role=fields["role"],
        name=fields["name"],
        signed_at=fields["signed_at"],
        signer=signer,
    )


def _fields(place: Path) -> dict[str, Any]:
    content = _read(place, "the signature")
    if len(content) > _MAX_SIGNATURE_BYTES:
        raise _not_a_signature(place)
    try:
        fields = json.loads(content.decode())
        if fields.keys() != _FIELDS or fields["format"] != _FORMAT or type(fields["bytes"]) is not int:
            raise ValueError
        if not all(isinstance(fields[name], str) for name in _FIELDS - {"bytes"}):
            raise ValueError
        if _text(fields).encode() != content:  # one way of writing it, so that no byte can change unseen
            raise ValueError
    except (ValueError, AttributeError, RecursionError):
        raise _not_a_signature(place) from None
    return dict(fields)


def _text(fields: dict[str, Any]) -> str:
    return json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TrustError(f"{what} {path} cannot be read ({error.strerror}); it belongs beside the other.") from None


def _not_a_signature(place: Path) -> TrustError:
    return TrustError(
        f"{place} is not a signature as `silotune report --sign` writes it, or it was changed. Do not rely on the file; "
        "ask its sender for both."
    )
