"""The CA's list of revoked certificates (X.509 CRL), and how a trust store remembers the newest one that it saw.

Guarantee: a certificate that was revoked stays revoked in a trust store, also if an older list is put back or the list is
removed (tests/shared/trust/test_pki.py: test_an_older_crl_is_refused, test_a_removed_crl_is_refused). Not guaranteed:
`next_update` is not enforced, and whoever can write the trust store and removes `crl.number` as well can go back to an older
list.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from shared.errors import TrustError
from shared.trust.certificates import MALFORMED, SHA256, common_name, read_file, write_public

_CRL_DAYS = 3650


def write_crl(
    folder: Path,
    ca: x509.Certificate,
    key: ec.EllipticCurvePrivateKey,
    *,
    revoked: Iterable[x509.RevokedCertificate],
    number: int,
    now: datetime,
) -> None:
    """Sign and write a list."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(ca.subject)
        .last_update(now)
        .next_update(now + timedelta(days=_CRL_DAYS))
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
    )
    for entry in revoked:
        builder = builder.add_revoked_certificate(entry)
    write_public(folder / "crl.pem", builder.sign(key, SHA256).public_bytes(serialization.Encoding.PEM))


def load_crl(path: Path, ca: x509.Certificate) -> x509.CertificateRevocationList:
    """Read a revocation list and check that `ca` signed it."""
    return parse_crl(read_file(path, "revocation list"), ca, str(path))


def parse_crl(pem: bytes, ca: x509.Certificate, what: str) -> x509.CertificateRevocationList:
    """Return the revocation list in `pem`, checked that `ca` signed it; TrustError if it is none."""
    try:
        crl = x509.load_pem_x509_crl(pem)
        check_crl(crl, ca, what)
    except MALFORMED:
        raise TrustError(f"{what} is no PEM revocation list; publish it again: silotune pki publish") from None
    return crl


def check_crl(crl: x509.CertificateRevocationList, ca: x509.Certificate, what: str) -> None:
    """Raise `TrustError` unless `ca` signed the list and it has a number."""
    key = ca.public_key()
    if not (isinstance(key, ec.EllipticCurvePublicKey) and crl.issuer == ca.subject and crl.is_signature_valid(key)):
        raise TrustError(
            f"{what} was not signed by this CA ({common_name(ca)}); find out who put it there and publish the right "
            "one: silotune pki publish"
        )
    try:
        crl_number(crl)
    except MALFORMED:
        raise TrustError(f"{what} has no number; expected a list that `silotune pki` made.") from None


def crl_number(crl: x509.CertificateRevocationList) -> int:
    """Return the number that each new list of a CA raises."""
    return crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number


def seen_crl(folder: Path) -> tuple[int, str]:
    """Return number and digest of the newest list seen in this trust store; 0 if there was none."""
    path = folder / "crl.number"
    if not path.exists():
        return 0, ""
    match = re.fullmatch(r"([0-9]{1,18}) ([0-9a-f]{64})\n", read_file(path, "CRL number").decode(errors="replace"))
    if match is None:
        raise TrustError(f"{path} is damaged; restore it from its backup, or remove it if crl.pem is the newest list.")
    return int(match[1]), match[2]


def check_newer(folder: Path, crl: x509.CertificateRevocationList, ca: x509.Certificate) -> None:
    """Refuse to put a list into a trust store that is older than the one there, or than the newest that was seen there.

    Raises:
        TrustError: naming both numbers.
    """
    seen = seen_crl(folder)
    with contextlib.suppress(TrustError):  # none, damaged, or another CA's: then what was seen decides
        present = load_crl(folder / "crl.pem", ca)
        seen = max(seen, (crl_number(present), crl_digest(present)))
    check_rollback(folder, crl, seen)


def check_rollback(folder: Path, crl: x509.CertificateRevocationList | None, seen: tuple[int, str]) -> bool:
    """Refuse a list older than the newest one seen; return whether this one is newer."""
    seen_number, seen_digest = seen
    if crl is None:
        if seen_number:
            raise TrustError(
                f"{folder} has no crl.pem, but revocation list {seen_number} was there before; without it, revoked "
                "sites could connect. Publish it again: silotune pki publish"
            )
        return False
    number = crl_number(crl)
    if number < seen_number:
        raise TrustError(
            f"{folder}: the revocation list is number {number}, but number {seen_number} was seen before; an older "
            "list could un-revoke a site. Publish the newest one: silotune pki publish"
        )
    if number == seen_number and crl_digest(crl) != seen_digest:
        raise TrustError(
            f"{folder}: there are two revocation lists of number {number}; the CA folder may have been restored from "
            "an old backup. Find the newest CA folder and publish from there."
        )
    return number > seen_number


def crl_digest(crl: x509.CertificateRevocationList) -> str:
    # Without the signature, of which there is more than one for the same list.
    """Return what tells two lists of one number apart."""
    return hashlib.sha256(crl.tbs_certlist_bytes).hexdigest()
