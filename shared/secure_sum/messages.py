"""The two messages of secure aggregation and the roster between them: bounded, in one way of writing, signed.

A round has two exchanges (Bonawitz et al. 2017 without its recovery of drop-outs): each site says `Ready` with a fresh X25519
key; the coordinator shows all of them the roster; each answers `Masked`. Both are signed with the P-256 key of the site's
certificate (ECDSA with SHA-256, deterministic by RFC 6979) over the envelope of all that is signed here
(`shared.trust.signing`), under purposes of their own.

Formal guarantees (tests: tests/shared/secure_sum/test_messages.py)
    * What is read was written by `to_bytes`, byte for byte, within bounds that are checked before anything is built; any other
      bytes are a `TrustError` (test_hostile_bytes_are_one_error, test_there_is_one_way_of_writing_a_message).
    * A public key in a `Ready` is canonical: two that give the same secrets are equal bytes
      (test_a_key_in_another_writing_is_refused).
    * `context` differs for any two rosters that differ in a byte (test_every_byte_of_a_roster_is_in_its_context).

Not guaranteed by reading one: that it is signed by whom it names; `verify` raises unless it is.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from shared.errors import TrustError
from shared.job.values import NAME_PATTERN
from shared.limits import MAX_RECORDS, MAX_STEPS, MAX_SUMMED_SITES
from shared.secure_sum.masks import check_canonical
from shared.trust.signing import Purpose, signed_bytes

MOST_SITES = MAX_SUMMED_SITES
"""Of one roster."""
MOST_WORDS = 1 << 24
"""Of one masked input: 128 MiB, half of the longest message of the link."""
MOST_CERTIFICATE_BYTES = 4096
"""In DER; one that this project issues has about 600."""
MOST_SIGNATURE_BYTES = 72
"""Of a signature on P-256 in DER."""
CONTEXT_BYTES = 32
MOST_READY_BYTES = MOST_CERTIFICATE_BYTES + 512
MOST_ROSTER_BYTES = 64 + MOST_SITES * (4 + MOST_READY_BYTES)
MOST_MASKED_BYTES = 8 * MOST_WORDS + 512

_READY, _ROSTER, _MASKED = b"silotune/ready/2", b"silotune/roster/1", b"silotune/masked/1"
_CONTEXT = b"silotune/secure-sum/1\0"
_ECDSA = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)
# A roster of a hundred is a hundred times all of this, at every site.
_NAME, _DIGEST = re.compile(NAME_PATTERN), re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A site has drawn and computed, and will take part in the sum of this attempt.

    Attributes:
        site: its name.
        job_sha256: of the job, in hexadecimal.
        round_number: of the round.
        attempt: at this round; each has fresh keys.
        adapter_sha256: of the global adapter that it was asked with, in hexadecimal.
        declared_records: its size, as it says it to all.
        public_key: X25519 (RFC 7748), 32 bytes, canonical; fresh for this attempt.
        certificate: of the site, DER; empty in a simulation.
        signature: of all of this, DER; empty until it is signed.

    Raises:
        TrustError: if a field is out of its bounds.
    """

    site: str
    job_sha256: str
    round_number: int
    attempt: int
    adapter_sha256: str
    declared_records: int
    public_key: bytes
    certificate: bytes
    signature: bytes = b""
    # What it was read from, for there is one way of writing it. No field: it is no part of what is compared, signed or replaced.
    _read: ClassVar[bytes] = b""

    def __post_init__(self) -> None:
        _check_name(self.site)
        _check_digest("job_sha256", self.job_sha256)
        _check_digest("adapter_sha256", self.adapter_sha256)
        _check_number("round_number", self.round_number, 0, MAX_STEPS)
        _check_number("attempt", self.attempt, 0, MAX_STEPS)
        _check_number("declared_records", self.declared_records, 1, MAX_RECORDS)
        check_canonical(self.public_key, self.site)
        _check_bytes("certificate", self.certificate, MOST_CERTIFICATE_BYTES)
        _check_bytes("signature", self.signature, MOST_SIGNATURE_BYTES)

    def signed_by(self, key: ec.EllipticCurvePrivateKey) -> Ready:
        """Return it with the signature of `key`."""
        return replace(self, signature=key.sign(signed_bytes(Purpose.READY, self._fields()), _ECDSA))

    def verify(self, key: ec.EllipticCurvePublicKey) -> None:
        """Check the signature.

        Raises:
            TrustError: if it is not one by `key` over exactly this.
        """
        _verify(key, signed_bytes(Purpose.READY, self._fields()), self.signature, "ready", self.site)

    def to_bytes(self) -> bytes:
        """Return it as bytes; `from_bytes` reads them."""
        return self._read or _pack(
            _READY,
            self.site.encode(),
            bytes.fromhex(self.job_sha256),
            _number(self.round_number),
            _number(self.attempt),
            bytes.fromhex(self.adapter_sha256),
            _number(self.declared_records),
            self.public_key,
            self.certificate,
            self.signature,
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Ready:
        """Read what `to_bytes` wrote; the signature is not checked.

        Raises:
            TrustError: if `data` is anything else.
        """
        site, job, number, attempt, adapter, records, public_key, certificate, signature = _unpack(
            data, _READY, count=9, most=MOST_READY_BYTES
        )
        found = cls(
            site=_text(site),
            job_sha256=job.hex(),
            round_number=_whole(number),
            attempt=_whole(attempt),
            adapter_sha256=adapter.hex(),
            declared_records=_whole(records),
            public_key=public_key,
            certificate=certificate,
            signature=signature,
        )
        object.__setattr__(found, "_read", data)
        return found

    def _fields(self) -> dict[str, Any]:
        return {
            "site": self.site,
            "job_sha256": self.job_sha256,
            "round": self.round_number,
            "attempt": self.attempt,
            "adapter_sha256": self.adapter_sha256,
            "declared_records": self.declared_records,
            "public_key": self.public_key.hex(),
            "certificate_sha256": hashlib.sha256(self.certificate).hexdigest(),
        }


Roster = tuple[Ready, ...]
"""Who takes part in one attempt, in the order of their names."""


def context(roster: Roster) -> bytes:
    """Return what stands for a roster wherever it counts: SHA-256 over all of it, each part with its length; 32 bytes."""
    return hashlib.sha256(_CONTEXT + pack_roster(roster)).digest()


def pack_roster(roster: Roster) -> bytes:
    """Return a roster as bytes; `unpack_roster` reads them."""
    return _pack(_ROSTER, *(ready.to_bytes() for ready in roster))


def unpack_roster(data: bytes) -> Roster:
    """Read what `pack_roster` wrote; nothing of what it says is checked.

    Raises:
        TrustError: if `data` is anything else, or of more than `MOST_SITES`.
    """
    return tuple(Ready.from_bytes(part) for part in _unpack(data, _ROSTER, count=None, most=MOST_ROSTER_BYTES))


@dataclass(frozen=True, kw_only=True)
class Masked:
    """A site's input to the sum under its masks.

    Attributes:
        site: its name.
        context: of the roster that the masks are for (`context`), 32 bytes.
        words: the masked input modulo 2^64, unsigned, eight bytes each, little-endian; one or more.
        signature: of all of this and of job, round and attempt, DER; empty until it is signed.

    Raises:
        TrustError: if a field is out of its bounds.
    """

    site: str
    context: bytes
    words: bytes
    signature: bytes = b""

    def __post_init__(self) -> None:
        _check_name(self.site)
        _check_bytes("context", self.context, CONTEXT_BYTES, least=CONTEXT_BYTES)
        _check_bytes("words", self.words, 8 * MOST_WORDS, least=8)
        if len(self.words) % 8:
            raise _no_message(f"its words are {len(self.words):,} bytes, not eight each")
        _check_bytes("signature", self.signature, MOST_SIGNATURE_BYTES)

    def signed_by(self, key: ec.EllipticCurvePrivateKey, entry: Ready) -> Masked:
        """Return it with the signature of `key`; `entry` is the site's own on the roster."""
        return replace(self, signature=key.sign(signed_bytes(Purpose.MASKED, self._fields(entry)), _ECDSA))

    def verify(self, key: ec.EllipticCurvePublicKey, entry: Ready) -> None:
        """Check the signature; `entry` is the site's own on the roster.

        Raises:
            TrustError: if it is not one by `key` over exactly this, for the job, round and attempt of `entry`.
        """
        _verify(key, signed_bytes(Purpose.MASKED, self._fields(entry)), self.signature, "masked", self.site)

    def to_bytes(self) -> bytes:
        """Return it as bytes; `from_bytes` reads them."""
        return _pack(_MASKED, self.site.encode(), self.context, self.words, self.signature)

    @classmethod
    def from_bytes(cls, data: bytes) -> Masked:
        """Read what `to_bytes` wrote; the signature is not checked.

        Raises:
            TrustError: if `data` is anything else.
        """
        site, found, words, signature = _unpack(data, _MASKED, count=4, most=MOST_MASKED_BYTES)
        return cls(site=_text(site), context=found, words=words, signature=signature)

    def _fields(self, entry: Ready) -> dict[str, Any]:
        return {
            "site": self.site,
            "context": self.context.hex(),
            "words_sha256": hashlib.sha256(self.words).hexdigest(),
            "job_sha256": entry.job_sha256,
            "round": entry.round_number,
            "attempt": entry.attempt,
        }


def check_equal(expected: Mapping[str, object], found: Ready) -> None:
    """Check that a message is of the same job, round, attempt and adapter.

    Raises:
        TrustError: naming the first in which it is not.
    """
    for name, value in expected.items():
        if getattr(found, name) != value:
            raise TrustError(
                f"the ready message of {found.site} has the {name} {getattr(found, name)}, expected {value}; it is of another "
                "attempt, or somebody shows sites different things. Nothing is sent in this attempt."
            )


def _verify(key: ec.EllipticCurvePublicKey, message: bytes, signature: bytes, kind: str, site: str) -> None:
    try:
        key.verify(signature, message, _ECDSA)
    except InvalidSignature:
        raise TrustError(
            f"the {kind} message of {site} is not signed with the key of its certificate: it was changed on the way, or "
            "somebody else made it."
        ) from None


def _pack(*parts: bytes) -> bytes:
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def _unpack(data: bytes, kind: bytes, *, count: int | None, most: int) -> list[bytes]:
    """Return the parts of a message of this kind after its name; `count` of them, or up to `MOST_SITES`."""
    if len(data) > most:
        raise _no_message(f"it is longer than {most:,} bytes")
    end, at = len(data), 0
    parts: list[bytes] = []
    for _ in range(1 + (MOST_SITES if count is None else count)):
        if at >= end:
            break
        start = at + 4
        at = start + int.from_bytes(data[at:start], "big")
        parts.append(data[start:at])
    if at != end:
        raise _no_message("it has too many parts" if at < end else "it is cut off")
    if parts[:1] != [kind] or (count is not None and len(parts) != count + 1):
        raise _no_message(f"it is no {kind.decode()}")
    return parts[1:]


def _number(value: int) -> bytes:
    return value.to_bytes(8, "big")


def _whole(part: bytes) -> int:
    if len(part) != 8:
        raise _no_message("a number in it has not eight bytes")
    return int.from_bytes(part, "big")


def _text(part: bytes) -> str:
    return part.decode("ascii", errors="replace")  # what is no ASCII is no name


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _no_message("its name is no name")


def _check_digest(name: str, value: object) -> None:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise _no_message(f"its {name} is no SHA-256 in hexadecimal")


def _check_number(name: str, value: object, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise _no_message(f"its {name} is not a whole number from {least} to {most:,}")


def _check_bytes(name: str, value: object, most: int, *, least: int = 0) -> None:
    if not isinstance(value, bytes) or not least <= len(value) <= most:
        raise _no_message(f"its {name} must be {least} to {most:,} bytes")


def _no_message(reason: str) -> TrustError:
    return TrustError(
        f"a message of the secure sum cannot be read: {reason}. Both sides must run versions that fit; else it was changed on "
        "the way."
    )
