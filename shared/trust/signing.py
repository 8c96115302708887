"""Ed25519 keys, and the one envelope of all that is signed: jobs, rounds, files, folders and the heads of audit logs.

Signed are the bytes `silotune/PURPOSE`, a zero byte, and the fields in canonical JSON; a document holds the fields, the signer's
public key and the signature. This is the shape of DSSE (payload type, payload, signatures), in JSON that a person can read. A
signature says who speaks, not whether to listen: whether a key is trusted is decided by the site's own policy.

Formal guarantees (tests: tests/shared/trust/test_signing.py)
    * A signature that was made for one purpose is none for another, whatever was signed
      (test_a_signature_of_one_kind_is_none_of_another, test_no_two_purposes_sign_the_same_bytes).
    * `SignedDocument.open` raises unless the document has the fields of its kind and no others, none twice, each of its type, and
      the expected key signed them (test_signed_documents.py: test_what_is_no_such_document_is_refused).
    * A signature has one way of writing it (test_signed_documents.py: test_a_signature_is_written_in_one_way).

Not guaranteed: that the signer is who the document says. Names, roles and times are the signer's own words; whoever reads them
compares the key with one that came by another way.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, ValidationError

from shared.errors import TrustError, excerpt
from shared.files.bounded import read_bounded
from shared.files.json_files import canonical_json, parse_object
from shared.job.parsing import explain
from shared.trust import keystore

_PREFIX = "ed25519:"
_PRIME = 2**255 - 19
# The y of the points of order 1, 2, 4 and 8, also written with the prime added: under such a key everybody can sign, and the
# library below does not refuse it.
_EIGHTH = int.from_bytes(bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), "little")
_SMALL_ORDER = {0, 1, _PRIME - 1, _PRIME, _PRIME + 1, _EIGHTH, _PRIME - _EIGHTH}


class Purpose(StrEnum):
    """What a signature is made for; the text is a part of what is signed."""

    JOB = "job"
    ROUND = "round"
    FILE = "report"
    FOLDER = "folder"
    LOG_HEAD = "audit-log-head"
    RELEASE = "release"  # by the key of a certificate; see shared.trust.receipts
    READY = "secure-sum-ready"  # likewise; see shared.secure_sum.messages
    MASKED = "secure-sum-masked"
    MODEL = "model"
    MODEL_ALIAS = "model-alias"


# --- keys ---


@dataclass(frozen=True, repr=False)
class VerifyKey:
    """A public key, 32 bytes. Equal keys have equal bytes."""

    raw: bytes

    def __post_init__(self) -> None:
        if len(self.raw) != 32:
            raise TrustError(f"a public Ed25519 key has 32 bytes; found {len(self.raw)}.")
        if int.from_bytes(self.raw, "little") % 2**255 in _SMALL_ORDER:
            raise TrustError(f"{self.text} is a key under which everybody can sign; find out who made it.")

    @classmethod
    def parse(cls, text: str, *, source: str | None = None) -> Self:
        """Read `ed25519:` and 43 characters of base64url; `source` names in errors what holds the text.

        Raises:
            TrustError: if `text` is anything else.
        """
        raw = _from_base64(text.removeprefix(_PREFIX), url_safe=True) if text.startswith(_PREFIX) else None
        if raw is None or len(raw) != 32:
            # Of a file nothing is shown: it may be the private key, given by mistake.
            shown = excerpt(text) if source is None else f"{source}: what it holds"
            raise TrustError(
                f"{shown} is not a public key; expected {_PREFIX} followed by 43 characters of base64url, as "
                "`silotune pki signer` prints it."
            )
        return cls(raw)

    @property
    def text(self) -> str:
        """`ed25519:` and the key in base64url without padding: the form for files and people."""
        return _PREFIX + _to_base64(self.raw, url_safe=True)

    def verify(self, purpose: Purpose, fields: Mapping[str, Any], signature: bytes) -> None:
        """Check that the owner of this key signed `fields` for `purpose`.

        Raises:
            TrustError: if not.
        """
        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, signed_bytes(purpose, fields))
        except InvalidSignature:
            raise TrustError(
                f"the signature of the {purpose} is not one by {self.text}: it was made with another key, or what was "
                "signed has changed. Do not use it; ask its sender."
            ) from None

    def __repr__(self) -> str:
        return f"VerifyKey({self.text})"


def check_keys(keys: Mapping[str, str]) -> None:
    """Check public keys by the names of their owners, as policies hold them.

    Raises:
        ValueError: one is no public key, or two names have the same.
    """
    names: dict[VerifyKey, str] = {}
    for name, text in keys.items():
        try:
            key = VerifyKey.parse(text)
        except TrustError as error:
            raise ValueError(f"{name!r} is not a public key: {error}") from None
        if key in names:
            raise ValueError(f"{name!r} and {names[key]!r} are the same key; removing one name would not revoke it")
        names[key] = name


class SigningKey:
    """A private key; its `repr` shows only the public one."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    @classmethod
    def generate(cls) -> Self:
        """Make a new key from the operating system's generator."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_bytes(cls, secret: bytes) -> Self:
        """Return the key with these `secret_bytes`.

        Raises:
            TrustError: if there are not 32 of them.
        """
        if len(secret) != 32:
            raise TrustError(f"a private Ed25519 key has 32 bytes; found {len(secret)}. Is this a key of another kind?")
        return cls(Ed25519PrivateKey.from_private_bytes(secret))

    @property
    def secret_bytes(self) -> bytes:
        """The 32 bytes that must stay secret."""
        return self._key.private_bytes_raw()

    @property
    def verify_key(self) -> VerifyKey:
        """The public key that belongs to this one."""
        return VerifyKey(self._key.public_key().public_bytes_raw())

    def sign(self, purpose: Purpose, fields: Mapping[str, Any]) -> bytes:
        """Return the signature of `fields` for `purpose`, 64 bytes."""
        return self._key.sign(signed_bytes(purpose, fields))

    def __repr__(self) -> str:
        return f"SigningKey({self.verify_key.text})"


def save_signing_key(path: Path, key: SigningKey, passphrase: str | None, *, replace: bool = False) -> None:
    """Write a private key to a key file; see `shared.trust.keystore.save_secret` for the errors."""
    keystore.save_secret(path, key.secret_bytes, passphrase=passphrase, replace=replace)


def load_signing_key(path: Path, passphrase: str | None) -> SigningKey:
    """Read a private key from a key file.

    Raises:
        TrustError: if the file does not open (see `shared.trust.keystore.load_secret`) or holds a key of another kind.
    """
    secret = keystore.load_secret(path, passphrase=passphrase)
    try:
        return SigningKey.from_bytes(secret)
    except TrustError as error:
        raise TrustError(f"{path}: {error}") from None


def load_verify_key(path: Path) -> VerifyKey:
    """Read a public key from a text file of one line.

    Raises:
        TrustError: if the file cannot be read or holds anything else.
    """
    content, _ = read_bounded(path, "public key", 1000)
    return VerifyKey.parse(content.decode(errors="replace").strip(), source=str(path))


def find_verify_key(text: str) -> VerifyKey:
    """Return the public key that a user named: itself, `ed25519:...`, or its file.

    Raises:
        TrustError: if it is neither; see `load_verify_key`.
    """
    return VerifyKey.parse(text) if text.startswith(_PREFIX) else load_verify_key(Path(text))


# --- documents ---


class SignedDocument(BaseModel):
    """JSON with a signature: a subclass for each kind names its fields and says what the class variables are.

    Attributes:
        purpose: what signatures of this kind are made for.
        what: a document of this kind is, for errors.
        advice: what to do about one that is not.
        most_bytes: a longer document is refused unread.
        header: what stands in each, such as a version, in fields that a subclass names.
        url_safe: whether the signature is written in base64url without padding; else in base64.
        signer: the key that signed, as text.
        signature: as text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    purpose: ClassVar[Purpose]
    what: ClassVar[str]
    advice: ClassVar[str]
    most_bytes: ClassVar[int]
    header: ClassVar[Mapping[str, Any]] = {}
    url_safe: ClassVar[bool] = False

    signer: str
    signature: str

    @classmethod
    def sign(cls, key: SigningKey, **fields: Any) -> Self:
        """Return the document with these fields, signed by `key`.

        Raises:
            TrustError: if a text cannot be written as UTF-8.
        """
        unsigned = cls(**cls.header, **fields, signer=key.verify_key.text, signature="")
        signature = key.sign(cls.purpose, unsigned.signed_fields())
        return unsigned.model_copy(update={"signature": _to_base64(signature, url_safe=cls.url_safe)})

    @classmethod
    def open(cls, content: bytes, *, source: str, key: VerifyKey | None = None) -> Self:
        """Read and verify a document; `source` names it in errors.

        Args:
            key: the key that must have signed; None accepts any, which proves only that nothing was changed since.

        Raises:
            TrustError: if it is too long or malformed, has unknown or missing fields, or another key signed.
        """
        # 1. Read it, in the only way there is: no key twice, no field more or less. Nothing in it is known to be genuine yet.
        if len(content) > cls.most_bytes:
            raise cls.refusal(source, f"it is longer than {cls.most_bytes} bytes")
        try:
            document = cls.model_validate(parse_object(content.decode()))
        except ValidationError as error:
            raise cls.refusal(source, explain(cls, error.errors()[0])) from None
        except ValueError as error:
            raise cls.refusal(source, str(error)) from None

        # 2. Who says that they signed it.
        signer = VerifyKey.parse(document.signer, source=source)
        if key is not None and signer != key:
            raise TrustError(
                f"{source} was signed by {signer.text}, expected {key.text}. Do not rely on it; ask its sender."
            )

        # 3. That they did, before anything else reads its fields.
        try:
            document.verify()
        except TrustError as error:
            raise TrustError(f"{source}: {error}") from None
        return document

    def verify(self) -> None:
        """Check the signature.

        Raises:
            TrustError: if it is not one by `signer`, or not in the one way of writing it.
        """
        signature = _from_base64(self.signature, url_safe=self.url_safe)
        if signature is None:
            raise TrustError(f"the signature is not {'base64url' if self.url_safe else 'base64'}. {self.advice}")
        VerifyKey.parse(self.signer).verify(self.purpose, self.signed_fields(), signature)

    def signed_fields(self) -> dict[str, Any]:
        """Return what is signed: all fields but the signature."""
        return self.model_dump(exclude={"signature"})

    @classmethod
    def refusal(cls, source: str, reason: str) -> TrustError:
        """Return the error for what is no such document."""
        short = reason if len(reason) <= 200 else f"{reason[:200]}..."
        return TrustError(f"{source} is not {cls.what}: {short}. {cls.advice}")


def signed_bytes(purpose: Purpose, fields: Mapping[str, Any]) -> bytes:
    """Return the bytes that a signature of `fields` for `purpose` is over."""
    try:
        return f"silotune/{Purpose(purpose)}\0{canonical_json(fields)}".encode()
    except UnicodeEncodeError:
        raise TrustError(
            "a signed text holds half a character (a lone surrogate); it can be neither signed nor verified."
        ) from None


def _to_base64(data: bytes, *, url_safe: bool) -> str:
    """Return `data` in base64url without padding, or in base64."""
    return base64.urlsafe_b64encode(data).decode().rstrip("=") if url_safe else base64.b64encode(data).decode()


def _from_base64(text: str, *, url_safe: bool) -> bytes | None:
    """Return the bytes, or None if `text` is not the one way of writing them."""
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), b"-_" if url_safe else None)
    except ValueError:
        return None
    return data if _to_base64(data, url_safe=url_safe) == text else None
