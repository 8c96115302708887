"""Whose key signed an entry of a roster: of a real site that of its certificate, of a simulated one the key that it shows.

What a certificate is worth is judged where its CA is known: by each site for itself (`client.site.guard`), and by the
coordinator, which knows the keys that it lets in.
"""

from __future__ import annotations

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_der_public_key

from shared.errors import TrustError
from shared.secure_sum.messages import Ready
from shared.trust.certificates import MALFORMED, is_p256


def certificate_of(entry: Ready) -> x509.Certificate:
    """Return the certificate in an entry; nothing about it was checked.

    Raises:
        TrustError: if there is none.
    """
    try:
        return x509.load_der_x509_certificate(entry.certificate)
    except MALFORMED:
        raise TrustError(f"the entry of {entry.site} on the roster has no certificate that can be read.") from None


def key_in_certificate(entry: Ready) -> ec.EllipticCurvePublicKey:
    """Return the key of the certificate in an entry; nothing about it was checked.

    Raises:
        TrustError: if there is none, or it is of another kind than P-256.
    """
    return _p256(certificate_of(entry).public_key(), entry)


def shown_key(entry: Ready) -> ec.EllipticCurvePublicKey:
    """Return the key of a simulated site, which shows it in the place of a certificate (SubjectPublicKeyInfo, DER).

    Raises:
        TrustError: if there is none.
    """
    try:
        return _p256(load_der_public_key(entry.certificate), entry)
    except MALFORMED:
        raise TrustError(f"the entry of the simulated site {entry.site} shows no key.") from None


def _p256(key: object, entry: Ready) -> ec.EllipticCurvePublicKey:
    if not is_p256(key):
        raise TrustError(f"the key of {entry.site} on the roster is not ECDSA P-256; expected that kind.")
    assert isinstance(key, ec.EllipticCurvePublicKey)  # noqa: S101 (for the type checker)
    return key
