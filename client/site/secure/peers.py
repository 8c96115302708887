"""Who may stand on a roster, as this site sees it: a valid certificate of its own consortium, of the site that it names.

The coordinator shows the rosters, so its word counts for nothing here. What counts is the CA's certificate in the site's folder
(`ca.crt`), its revocation list if one was put there (`crl.pem`; never an older one than before), and the fingerprints that the
policy pins.

Guarantees (tests: tests/client/site/secure/test_peers.py)
    * A certificate that is forged, revoked, expired, a server's, another site's or not the pinned one is refused, before anything
      is charged.
    * What is told of it follows from the roster, from what the CA publishes, from the policy's pins and from the clock.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from shared.errors import RosterError, TrustError
from shared.secure_sum.keys import certificate_of, key_in_certificate
from shared.secure_sum.messages import Ready
from shared.secure_sum.site import KeyOf
from shared.trust.certificates import Judge, fingerprint, identity
from shared.trust.trust_store import TrustStore

log = logging.getLogger("silotune.site")


def peer_keys(home: Path, *, pinned: Mapping[str, str], now: datetime) -> KeyOf:
    """Return what gives the key of the site that an entry names, for the entries of one roster: the CA's files are read once.

    Args:
        home: the site's folder, with `ca.crt` and perhaps `crl.pem`.
        pinned: name of a site -> SHA-256 of its public key in hexadecimal, with or without blanks.
        now: this site's clock.

    Raises:
        RosterError: the CA's files are not in order; what is wrong with them is for the site's own log.
    """
    try:
        judge = TrustStore(home).judge(now)
    except TrustError as error:
        log.error("nobody on a roster can be judged: %s", error)
        raise RosterError(
            "this site cannot judge who is on the roster, for its copy of the CA's certificate or of the list of revoked "
            "certificates is not in order; its own log says why. Its engineer mends that."
        ) from None
    return lambda entry: _peer_key(entry, judge, pinned)


def _peer_key(entry: Ready, judge: Judge, pinned: Mapping[str, str]) -> ec.EllipticCurvePublicKey:
    """Return the key of an entry's certificate, or raise `TrustError`: it does not count, and why."""
    certificate = certificate_of(entry)
    state, reason = judge.judged(certificate)
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
