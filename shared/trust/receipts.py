"""What a site signs of each release: with the key of its certificate, so that later both sides can prove what came from whom.

TLS shows the coordinator who speaks; it leaves nothing that could be shown to somebody else. A receipt is a signature (ECDSA
P-256 with SHA-256, deterministic by RFC 6979) over the same envelope as all that is signed here (`shared.trust.signing`), of the
purpose "release".

Guarantee (tests: tests/shared/trust/test_receipts.py): a receipt holds for exactly one site, job, round, order (its time),
adapter and release, and for one declared size.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_der_public_key

from shared.errors import TrustError
from shared.files.json_files import canonical_json, parse_object, read_text
from shared.trust.signing import Purpose, signed_bytes

MOST_RECEIPT_BYTES = 128
"""Of a signature on P-256 in DER; 72 at most."""


@dataclass(frozen=True, kw_only=True)
class Released:
    """What a receipt is for.

    Attributes:
        site: name of the site.
        job_sha256: of the job.
        round: that was asked for; the one after the last for site metrics.
        sent_at: time in the order that it answers, which tells one attempt from the next.
        adapter_sha256: of the global adapter that was sent.
        release_sha256: of the update, or of the metrics in canonical form.
        declared_records: its size, as the site says it with this release; 0 for metrics.
    """

    site: str
    job_sha256: str
    round: int
    sent_at: str
    adapter_sha256: str
    release_sha256: str
    declared_records: int


@dataclass(frozen=True)
class Receipt:
    """A receipt as the coordinator keeps it.

    Attributes:
        what: it is for.
        key: that signed it (SubjectPublicKeyInfo, DER).
        signature: DER.
    """

    what: Released
    key: bytes
    signature: bytes

    def line(self) -> str:
        """Return it as a line of `receipts.jsonl`."""
        key, signature = (base64.b64encode(data).decode() for data in (self.key, self.signature))
        return canonical_json(asdict(self.what) | {"key": key, "signature": signature})

    @classmethod
    def of_line(cls, line: str, *, source: str) -> Receipt:
        """Read a line of `receipts.jsonl`; the signature is not checked.

        Raises:
            TrustError: it is none.
        """
        try:
            found = parse_object(line)
            key, signature = (base64.b64decode(found.pop(name), validate=True) for name in ("key", "signature"))
            what = Released(**found)
            if any(type(getattr(what, f.name)).__name__ != f.type for f in fields(Released)):
                raise TypeError
        except (KeyError, TypeError, ValueError):
            raise TrustError(f"{source} holds a line that is no receipt; it was changed, or is another file.") from None
        return cls(what, key, signature)


def read_receipts(path: Path) -> list[Receipt]:
    """Read a `receipts.jsonl`; no signature is checked. What a crash left of a line is none.

    Raises:
        TrustError: a line is no receipt.
        RunError: the file cannot be read.
    """
    whole = [line for line in read_text(path).split("\n") if line.endswith("}")]
    return [Receipt.of_line(line, source=str(path)) for line in whole]


def proven_releases(receipts: Iterable[Receipt], keys: Collection[bytes], *, site: str) -> set[tuple[str, int, str]]:
    """Return (job, round, release) of the receipts that one of a site's keys signed; SHA-256 of job and release."""
    found = set()
    for receipt in receipts:
        what = receipt.what
        with contextlib.suppress(TrustError):
            if what.site == site:
                check_release(keys, what, receipt.signature)
                found.add((what.job_sha256, what.round, what.release_sha256))
    return found


def sign_release(key: ec.EllipticCurvePrivateKey, released: Released) -> bytes:
    """Return the receipt."""
    return key.sign(
        signed_bytes(Purpose.RELEASE, asdict(released)), ec.ECDSA(hashes.SHA256(), deterministic_signing=True)
    )


def check_release(keys: Collection[bytes], released: Released, receipt: bytes) -> bytes:
    """Return which of a site's keys signed a receipt.

    Args:
        keys: of the site's certificates that count (SubjectPublicKeyInfo, DER).

    Raises:
        TrustError: none of them did.
    """
    message = signed_bytes(Purpose.RELEASE, asdict(released))
    for raw in keys:
        key = load_der_public_key(raw)
        if not isinstance(key, ec.EllipticCurvePublicKey):
            continue
        try:
            key.verify(receipt, message, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            continue
        return raw
    raise TrustError(
        f"the release is not signed with the key of {released.site}'s certificate: it, its size or what it answers was changed "
        "on the way, or somebody else made it."
    )
