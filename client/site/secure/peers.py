"""Who may stand on a roster, as this site sees it: a valid certificate of its own consortium, of the site that it names.

The coordinator shows the rosters, so its word counts for nothing here. What counts is the CA's certificate in the site's folder
(`ca.crt`), its revocation list if one was put there (`crl.pem`; never an older one than before), and the fingerprints that the
policy pins.

Guarantee (tests: tests/client/site/secure/test_peers.py): a certificate that is forged, revoked, expired, a server's, another
site's or not the pinned one is refused, before anything is charged.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from shared.errors import TrustError
from shared.secure_sum.keys import certificate_of, key_in_certificate
from shared.secure_sum.messages import Ready
from shared.trust.certificates import fingerprint, identity
from shared.trust.trust_store import TrustStore


def peer_key(entry: Ready, *, home: Path, pinned: Mapping[str, str], now: datetime) -> ec.EllipticCurvePublicKey:
    """Return the key of the site that an entry of a roster names.

    Args:
        home: the site's folder, with `ca.crt` and perhaps `crl.pem`.
        pinned: name of a site -> SHA-256 of its public key in hexadecimal, with or without blanks.
        now: this site's clock.

    Raises:
        TrustError: the entry's certificate does not count, and why.
    """
    certificate = certificate_of(entry)
    state, reason = TrustStore(home).judge(now).judged(certificate)
    if state != "valid":
        raise TrustError(f"{entry.site} on the roster: {reason}")
    if (name := identity(certificate)[0]) != entry.site:
        raise TrustError(f"{entry.site} on the roster shows the certificate of {name}.")
    key = key_in_certificate(entry)
    if (wanted := pinned.get(entry.site)) is not None and _plain(fingerprint(key)) != _plain(wanted):
        raise TrustError(
            f"{entry.site} on the roster has a certificate for the key {fingerprint(key)}, but this site's policy pins another "
            "under [peers]. If that site made a new key, have it read out over the telephone and change the policy."
        )
    return key


def _plain(text: str) -> str:
    return "".join(text.split()).lower()
