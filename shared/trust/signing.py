"""Ed25519 signatures with a purpose: signed jobs and signed rounds.

A signature is made over `silotune/PURPOSE`, a zero byte and the payload, so that one made for a round cannot be
passed off as one for a job. A signature says who speaks, not whether to listen: whether a key is trusted is decided
by the site's own policy.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from shared.errors import TrustError
from shared.files.json_files import canonical_json
from shared.job.job import Job
from shared.job.parsing import parse
from shared.trust import keystore

MAX_SIGNED_JOB_BYTES = 1 << 20
CLOCK_TOLERANCE = timedelta(minutes=5)  # how far the clocks of two machines may be apart

_PREFIX = "ed25519:"
_FORMAT = "silotune-signed-job"
_VERSION = 1
_JOB, _ROUND = "job", "round"  # purposes
_SIGNED_JOB_FIELDS = {"format", "version", "job", "coordinator", "issued", "not_after", "signer", "signature"}
_TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"


class VerifyKey:
    """A public key, 32 bytes. Equal keys have equal bytes."""

    def __init__(self, raw: bytes) -> None:
        if len(raw) != 32:
            raise TrustError(f"a public Ed25519 key has 32 bytes; found {len(raw)}.")
        self._raw = bytes(raw)

    @classmethod
    def parse(cls, text: str, *, source: str | None = None) -> Self:
        """Read `ed25519:` and 43 characters of base64url; `source` names in errors what holds the text.

        Raises:
            TrustError: if `text` is anything else.
        """
        raw = _from_base64url(text.removeprefix(_PREFIX)) if text.startswith(_PREFIX) else None
        if raw is None or len(raw) != 32:
            shown = text if len(text) <= 80 else text[:80] + "..."
            where = "" if source is None else f"{source}: "
            raise TrustError(
                f"{where}{shown!r} is not a public key; expected {_PREFIX} followed by 43 characters of base64url, as "
                "`silotune pki signer` prints it."
            )
        return cls(raw)

    @property
    def text(self) -> str:
        """`ed25519:` and the key in base64url without padding: the form for files and people."""
        return _PREFIX + _to_base64url(self._raw)

    def verify(self, purpose: str, payload: bytes, signature: bytes) -> None:
        """Check that the owner of this key signed `payload` for `purpose`.

        Raises:
            TrustError: if not.
        """
        try:
            Ed25519PublicKey.from_public_bytes(self._raw).verify(signature, _message(purpose, payload))
        except InvalidSignature:
            raise TrustError(
                f"the signature of the {purpose} is not one by {self.text}: it was made with another key, or what was "
                "signed has changed. Do not use it; ask its sender."
            ) from None

    def __eq__(self, other: object) -> bool:
        return self._raw == other._raw if isinstance(other, VerifyKey) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._raw)

    def __repr__(self) -> str:
        return f"VerifyKey({self.text})"


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

    def sign(self, purpose: str, payload: bytes) -> bytes:
        """Return the signature of `payload` for `purpose`, 64 bytes."""
        return self._key.sign(_message(purpose, payload))

    def __repr__(self) -> str:
        return f"SigningKey({self.verify_key.text})"


@dataclass(frozen=True, kw_only=True)
class SignedJob:
    """A job, how long it stands, and the key that will sign its rounds; every instance has a valid signature.

    Attributes:
        job: what the sites are asked to do.
        coordinator: the key that will sign the rounds.
        issued: when it was signed (UTC, whole seconds).
        not_after: when it ceases to be valid (UTC, whole seconds).
        signer: the key that signed. Whether it may sign jobs is for the reader to decide.
        signature: by `signer`, over all the other fields.
    """

    job: Job
    coordinator: VerifyKey
    issued: datetime
    not_after: datetime
    signer: VerifyKey
    signature: bytes

    def __post_init__(self) -> None:
        if self.not_after <= self.issued:
            raise TrustError(
                f"the signed job is valid until {_time_text(self.not_after)}, which is not after it was issued, "
                f"{_time_text(self.issued)}; choose a later end."
            )
        self.signer.verify(_JOB, _signed_bytes(self._fields()), self.signature)

    def to_json(self) -> str:
        """Return the document that `from_json` reads."""
        return canonical_json(self._fields() | {"signature": _to_base64url(self.signature)})

    @classmethod
    def from_json(cls, text: str, *, source: str) -> SignedJob:
        """Read and verify a signed job; `source` names it in errors.

        Raises:
            TrustError: if it is longer than 1 MiB, malformed, has unknown or missing keys, or its signature is wrong.
            ConfigError: if it is signed and the job in it is not valid.
        """
        # 1. Read the envelope. Nothing in it is known to be genuine yet.
        if len(text) > MAX_SIGNED_JOB_BYTES or len(text.encode(errors="replace")) > MAX_SIGNED_JOB_BYTES:
            raise TrustError(f"{source} is longer than {MAX_SIGNED_JOB_BYTES} bytes; it is no signed job.")
        fields = _envelope(text, source)
        signature = _from_base64url(fields.pop("signature"))
        if signature is None:
            raise TrustError(f"{source}: the signature is not base64url; ask its sender for the file again.")

        # 2. Verify it before anything reads the job.
        signer = VerifyKey.parse(fields["signer"], source=source)
        try:
            signer.verify(_JOB, _signed_bytes(fields), signature)
        except TrustError as error:
            raise TrustError(f"{source}: {error}") from None

        # 3. Read the job; what was signed and what will be executed must be one and the same text.
        try:
            raw = json.loads(fields["job"])
        except (ValueError, RecursionError):
            raw = None
        if not isinstance(raw, dict):
            raise TrustError(f"{source}: its job is not a JSON object; ask its sender for the file again.")
        job = parse(Job, raw, source=f"the job in {source}")
        if job.canonical_json() != fields["job"]:
            raise TrustError(
                f"{source}: the job was tampered with or made by another version: written out by this silotune it is "
                "not the text that was signed. Use the version that signed it, or have it signed anew."
            )
        return cls(
            job=job,
            coordinator=VerifyKey.parse(fields["coordinator"], source=source),
            issued=_parse_time(fields["issued"], f"{source}: issued"),
            not_after=_parse_time(fields["not_after"], f"{source}: not_after"),
            signer=signer,
            signature=signature,
        )

    def check_time(self, now: datetime) -> None:
        """Check that the job is valid at `now` (with a time zone).

        Raises:
            TrustError: if it has expired, or was issued more than 5 minutes in the future.
        """
        if now >= self.not_after:
            raise TrustError(
                f"the signed job {self.job.name!r} expired on {_time_text(self.not_after)}, "
                f"{_duration(now - self.not_after)} ago; have it signed anew, or check the clock of this machine."
            )
        if self.issued - now > CLOCK_TOLERANCE:
            raise TrustError(
                f"the signed job {self.job.name!r} was issued on {_time_text(self.issued)}, "
                f"{_duration(self.issued - now)} in the future; check the clock of this machine and of the signer's."
            )

    def _fields(self) -> dict[str, Any]:
        return _signed_fields(self.job, self.coordinator, self.issued, self.not_after, self.signer)


def sign_job(
    job: Job, *, signer: SigningKey, coordinator: VerifyKey, issued: datetime, not_after: datetime
) -> SignedJob:
    """Sign `job`; fractions of a second in the times are cut off.

    Raises:
        TrustError: if a time has no time zone, or `not_after` is not after `issued`.
    """
    start, end = _whole_seconds(issued), _whole_seconds(not_after)
    fields = _signed_fields(job, coordinator, start, end, signer.verify_key)
    return SignedJob(
        job=job,
        coordinator=coordinator,
        issued=start,
        not_after=end,
        signer=signer.verify_key,
        signature=signer.sign(_JOB, _signed_bytes(fields)),
    )


def round_payload(*, job_sha256: str, round_number: int, adapter: bytes, sent_at: str) -> bytes:
    """Return the bytes that the coordinator signs when it sends `adapter` out for one round.

    Raises:
        TrustError: if a text cannot be written as UTF-8.
    """
    return _signed_bytes(
        {
            "job_sha256": job_sha256,
            "round": round_number,
            "adapter_sha256": hashlib.sha256(adapter).hexdigest(),
            "sent_at": sent_at,
        }
    )


def sign_round(key: SigningKey, *, job_sha256: str, round_number: int, adapter: bytes, sent_at: str) -> bytes:
    """Return the coordinator's signature of one round, 64 bytes; see `round_payload`."""
    payload = round_payload(job_sha256=job_sha256, round_number=round_number, adapter=adapter, sent_at=sent_at)
    return key.sign(_ROUND, payload)


def verify_round(
    key: VerifyKey, *, job_sha256: str, round_number: int, adapter: bytes, sent_at: str, signature: bytes
) -> None:
    """Check that the coordinator with this key sent this adapter for this round of this job at that time.

    Raises:
        TrustError: if not.
    """
    payload = round_payload(job_sha256=job_sha256, round_number=round_number, adapter=adapter, sent_at=sent_at)
    key.verify(_ROUND, payload, signature)


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
    try:
        with path.open(encoding="ascii") as file:
            text = file.read(1000)
    except FileNotFoundError:
        raise TrustError(f"the public key {path} does not exist; check the path.") from None
    except OSError as error:
        raise TrustError(f"the public key {path} cannot be read ({error.strerror}); check the path.") from None
    except UnicodeDecodeError:
        text = ""
    try:
        return VerifyKey.parse(text.strip())
    except TrustError as error:
        raise TrustError(f"{path}: {error}") from None


def _message(purpose: str, payload: bytes) -> bytes:
    if not re.fullmatch("[a-z0-9-]+", purpose):  # a zero byte in it would blur where the payload starts
        raise ValueError(f"purpose {purpose!r} must be made of lower-case letters, digits and dashes")
    return b"silotune/" + purpose.encode() + b"\0" + payload


def _signed_fields(
    job: Job, coordinator: VerifyKey, issued: datetime, not_after: datetime, signer: VerifyKey
) -> dict[str, Any]:
    """Return all fields of the document but the signature."""
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "job": job.canonical_json(),  # as text: these bytes are signed, whatever a later version makes of them
        "coordinator": coordinator.text,
        "issued": _time_text(issued),
        "not_after": _time_text(not_after),
        "signer": signer.text,
    }


def _signed_bytes(fields: dict[str, Any]) -> bytes:
    try:
        return canonical_json(fields).encode()
    except UnicodeEncodeError:
        raise TrustError("a signed text holds half a character (a lone surrogate); it cannot be verified.") from None


def _envelope(text: str, source: str) -> dict[str, Any]:
    """Return the fields of a signed job's document, each of the right type."""
    try:
        fields = json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "nested too deep"
        raise TrustError(f"{source} is not a signed job: {reason}. Ask its sender for the file again.") from None
    if not isinstance(fields, dict) or fields.get("format") != _FORMAT:
        raise TrustError(f"{source} is not a signed job; expected the JSON file that the coordinator's operator made.")
    version = fields.get("version")
    if type(version) is not int or version != _VERSION:
        raise TrustError(
            f"{source} is a signed job of version {version!r}; this silotune reads version {_VERSION}. Use the "
            "version that signed it."
        )
    unknown, missing = sorted(fields.keys() - _SIGNED_JOB_FIELDS), sorted(_SIGNED_JOB_FIELDS - fields.keys())
    if unknown or missing:
        found = [f"unknown key {key!r}" for key in unknown] + [f"{key} is missing" for key in missing]
        raise TrustError(f"{source} is not a signed job: {', '.join(found)}. Ask its sender for the file again.")
    for key in _SIGNED_JOB_FIELDS - {"version"}:
        if not isinstance(fields[key], str):
            raise TrustError(f"{source} is not a signed job: {key} is not text. Ask its sender for the file again.")
    return fields


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("it holds a key twice")
    return fields


def _parse_time(text: str, what: str) -> datetime:
    try:
        time = datetime.strptime(text, _TIME_FORMAT).replace(tzinfo=UTC)
        if _time_text(time) == text:
            return time
    except ValueError:
        pass
    raise TrustError(f"{what} is {text!r}; expected a UTC time such as 2026-01-31T12:00:00Z.")


def _time_text(time: datetime) -> str:
    # strftime would write the year 999 with three digits on some systems
    return _whole_seconds(time).isoformat().removesuffix("+00:00") + "Z"


def _whole_seconds(time: datetime) -> datetime:
    if time.tzinfo is None:
        raise TrustError(f"the time {time} has no time zone; expected one in UTC.")
    return time.astimezone(UTC).replace(microsecond=0)


def _duration(length: timedelta) -> str:
    return str(timedelta(seconds=int(length.total_seconds())))


def _to_base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _from_base64url(text: str) -> bytes | None:
    """Return the bytes, or None if `text` is not the one way of writing them."""
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except ValueError:
        return None
    return data if _to_base64url(data) == text else None
