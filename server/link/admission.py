"""Who may be connected: a certificate of the consortium's CA that lies in the trust store and is not revoked.

Guarantee (tests: tests/integration/link/test_strangers.py): whoever is revoked, expired or taken out of the
trust store is refused from the next message on; while a trust store cannot be trusted, nobody is let in.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from shared.errors import TrustError
from shared.trust.certificates import Judge, SiteIdentity, load_certificate, parse_certificate, spki
from shared.trust.revocation import load_crl
from shared.trust.trust_store import TrustStore

log = logging.getLogger("silotune.coordinator")

REREAD_SECONDS = 10.0
"""A certificate file that was changed in place is seen by then; files that come, go or are replaced are seen at once."""
GRACE_SECONDS = 5.0
"""So long a trust store may be unreadable, because a file is on its way."""
_RETRY_SECONDS = 0.5
"""An unreadable one is not read again sooner, however many frames come."""


@dataclass(frozen=True)
class Visitor:
    """Who is at the other end of a stream, as its certificate says.

    Attributes:
        name: in the certificate.
        node: number of the key, the same whenever it connects.
        key: the public key (SubjectPublicKeyInfo).
        certificate: as it was shown.
    """

    name: str
    node: int
    key: bytes
    certificate: x509.Certificate


@dataclass(frozen=True)
class SiteFacts:
    """What the trust store says of a site.

    Attributes:
        valid: end of its certificates that count, by the number of their key; while a key is exchanged, it has two.
        refused: why the others do not, by the number of their key.
    """

    valid: Mapping[int, datetime | None]
    refused: Mapping[int, str]


@dataclass(frozen=True)
class _Snapshot:
    stamp: object = None
    read_at: float = -1e9
    names: dict[bytes, str] = field(default_factory=dict)
    reasons: dict[bytes, str] = field(default_factory=dict)
    sites: dict[str, SiteFacts] = field(default_factory=dict)
    ca: x509.Certificate | None = None
    crl: x509.CertificateRevocationList | None = None


class Admission:
    """The trust store, read again when it changes; not for more than one thread at a time, but for `read`."""

    def __init__(
        self,
        trust: Path,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._now, self._clock = trust, now, clock
        self._watched = [str(trust / name) for name in ("ca.crt", "crl.pem", "sites")]  # looked at for every frame
        self._snapshot = _Snapshot()
        self._trusted_until = self._retry_at = 0.0
        self.problem: str | None = None

    def visitor(self, pem: bytes) -> Visitor:
        """Return who shows this certificate.

        Raises:
            TrustError: if they may not be connected.
        """
        certificate = parse_certificate(pem, "the certificate")
        self.refresh()
        ca, crl = self._snapshot.ca, self._snapshot.crl
        if ca is None:
            raise TrustError("the coordinator's trust store cannot be read; it lets nobody in.")
        state, reason = Judge(ca=ca, crl=crl, now=self._now(), sites_only=True).judged(certificate)
        if state != "valid":
            raise TrustError(reason)
        key = key_bytes(certificate.public_key())
        found = Visitor(name=self._snapshot.names.get(key, ""), node=node_of(key), key=key, certificate=certificate)
        self.check(found)
        return found

    def check(self, visitor: Visitor) -> None:
        """Check that a visitor may stay; cheap, for every message.

        Raises:
            TrustError: if not, saying why.
        """
        self.refresh()
        now, certificate, snapshot = self._now(), visitor.certificate, self._snapshot
        if snapshot.names.get(visitor.key) != visitor.name or not visitor.name:
            raise TrustError(
                self.problem
                or snapshot.reasons.get(visitor.key)
                or "the certificate is genuine but does not lie in the coordinator's trust store; ask the coordinator."
            )
        crl = snapshot.crl
        if crl is not None and crl.get_revoked_certificate_by_serial_number(certificate.serial_number) is not None:
            raise TrustError(f"the certificate of {visitor.name} was revoked.")
        if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
            raise TrustError(f"the certificate of {visitor.name} is not valid now; request a new one.")

    def names(self) -> dict[int, str]:
        """Return node -> name of everybody who may connect."""
        return {node_of(key): name for key, name in self._snapshot.names.items()}

    def keys(self, name: str) -> list[bytes]:
        """Return the keys of a site that may connect (SubjectPublicKeyInfo, DER)."""
        return [key for key, known in self._snapshot.names.items() if known == name]

    def sites(self) -> dict[str, SiteFacts]:
        """Return name -> facts of every site in the trust store, those who may not connect included."""
        return self._snapshot.sites

    def refresh(self) -> None:
        """Read the trust store if one of its files came, went or was replaced."""
        if self._stamp() != self._snapshot.stamp and self._clock() >= self._retry_at:
            self.use(self.read())

    @property
    def due(self) -> bool:
        """Whether the trust store should be read again for what no time stamp tells: files changed in place, expiry."""
        return self._clock() - self._snapshot.read_at > REREAD_SECONDS

    def read(self) -> _Snapshot | str:
        """Return the trust store as it is now, or what is wrong with it."""
        stamp, read_at, now = self._stamp(), self._clock(), self._now()
        try:
            sites = TrustStore(self._folder).sites(now)
            ca = load_certificate(self._folder / "ca.crt")
            list_path = self._folder / "crl.pem"
            crl = load_crl(list_path, ca) if list_path.exists() else None
        except TrustError as error:
            return str(error)
        except OSError as error:
            return f"the trust store {self._folder} cannot be read ({error.strerror})."
        keyed = [(site, key_bytes(site.public_key)) for site in sites if site.public_key is not None]
        return _Snapshot(
            stamp=stamp,
            read_at=read_at,
            names={key: site.name for site, key in keyed if site.state == "valid"},
            reasons={key: site.reason for site, key in keyed if site.state != "valid"},
            sites=_by_name(keyed),
            ca=ca,
            crl=crl,
        )

    def use(self, read: _Snapshot | str) -> None:
        """Go by what `read` returned."""
        if isinstance(read, _Snapshot):
            self._snapshot, self.problem = read, None
            self._trusted_until = self._clock() + GRACE_SECONDS
            return
        self._retry_at = self._clock() + _RETRY_SECONDS
        if self._clock() < self._trusted_until:
            return
        if read != self.problem:
            log.error("nobody is let in: %s", read)
        self._snapshot, self.problem = _Snapshot(read_at=self._clock()), read

    def _stamp(self) -> object:
        return [_changed(path) for path in self._watched]


def _by_name(keyed: Sequence[tuple[SiteIdentity, bytes]]) -> dict[str, SiteFacts]:
    together: dict[str, list[tuple[SiteIdentity, bytes]]] = {}
    for site, key in keyed:
        together.setdefault(site.name, []).append((site, key))
    found: dict[str, SiteFacts] = {}
    for name, certificates in together.items():
        found[name] = SiteFacts(
            valid={node_of(key): site.not_after for site, key in certificates if site.state == "valid"},
            refused={
                node_of(key): f"{site.state}: {site.reason}" for site, key in certificates if site.state != "valid"
            },
        )
    return found


def _changed(path: str) -> tuple[int, int] | None:
    try:
        facts = os.stat(path)
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_ino


def key_bytes(key: object) -> bytes:
    """Return a P-256 key as SubjectPublicKeyInfo."""
    assert isinstance(key, ec.EllipticCurvePublicKey)  # noqa: S101 (certificates of other keys are not valid here)
    return spki(key)


def node_of(key: bytes) -> int:
    """Return the number by which Flower knows a key: 63 bits of its hash."""
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1
