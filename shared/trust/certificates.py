"""X.509 certificates as this project issues them: read, judged, shown.

A certificate names its holder (CN) and its role (OU): `server` for the coordinator's TLS, `site` for a site's node key. All
keys are ECDSA P-256, which node authentication and TLS both take. Only `SiteIdentity.state` says whether one is genuine.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from shared.errors import TrustError, printable
from shared.files import atomic
from shared.files.bounded import read_bounded
from shared.job.values import NAME_PATTERN

Role = Literal["server", "site"]
State = Literal[
    "valid", "expired", "not yet valid", "revoked", "not signed by this CA", "not a site's certificate", "unreadable"
]
_MAX_FILE_BYTES = 16 << 20  # a revocation list grows by some 40 bytes an entry
SHA256 = hashes.SHA256()

# What `cryptography` raises for bytes that are no certificate, some of it only when a field is read.
MALFORMED = (
    ValueError,
    TypeError,
    KeyError,  # a name of an unknown kind of text
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


@dataclass(frozen=True, kw_only=True)
class SiteIdentity:
    """A certificate file and whether its holder may connect; also used for the list of a CA folder.

    Attributes:
        path: the file.
        name: the holder as the certificate says, or the file's name if that cannot be read.
        role: `server` or `site`.
        serial: the certificate's serial number.
        not_after: when it expires (UTC).
        public_key: the holder's P-256 key.
        state: `valid`, or why not.
        reason: the state as a sentence; empty if valid.

    All but path, name, state and reason are None if the file cannot be read as a certificate of the kind that `approve`
    issues. Nothing but `state` says whether a certificate is genuine.
    """

    path: Path
    name: str
    role: Role | None = None
    serial: int | None = None
    not_after: datetime | None = None
    public_key: ec.EllipticCurvePublicKey | None = None
    state: State
    reason: str = ""


def identity(cert: x509.Certificate) -> tuple[str, Role]:
    """Return the name and the role that a certificate gives its holder; says nothing about its being genuine.

    Raises:
        TrustError: if it is not a certificate as `approve` issues them.
    """
    name, role = read_subject(cert.subject, "the certificate")
    if not is_p256(cert.public_key()):
        raise TrustError(f"the certificate of {name} holds a key that is not ECDSA P-256; expected that kind.")
    return name, role


def check_name(name: str) -> None:
    """Check that `name` is a `shared.job.values.Name`.

    Raises:
        TrustError: if not.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise TrustError(
            f"the name is {name!r}; expected 1 to 64 letters, digits, dots, dashes and underscores, the first a letter "
            "or digit."
        )


def spki(public_key: ec.EllipticCurvePublicKey) -> bytes:
    """Return a public key as bytes: SubjectPublicKeyInfo, DER."""
    return public_key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def fingerprint(public_key: ec.EllipticCurvePublicKey) -> str:
    """Return the SHA-256 of a public key (its SubjectPublicKeyInfo) in groups of four digits, for reading aloud."""
    digest = hashlib.sha256(spki(public_key)).hexdigest()
    return " ".join(digest[i : i + 4] for i in range(0, len(digest), 4))


def expiry_warning(cert: x509.Certificate, now: datetime, days: int = 30) -> str | None:
    """Return a sentence if the certificate expires within `days` days or has expired, else None."""
    end, name = cert.not_valid_after_utc, common_name(cert)
    if now > end:
        return f"the certificate of {name} expired on {date_text(end)}; request a new one."
    if end - now > timedelta(days=days):
        return None
    left = (end - now).days
    return f"the certificate of {name} expires in {left} day{'s' * (left != 1)}, on {date_text(end)}; renew it."


def load_certificate(path: Path) -> x509.Certificate:
    """Read a PEM file of one certificate.

    Raises:
        TrustError: if the file is missing or holds anything else.
    """
    return parse_certificate(read_file(path, "certificate"), str(path))


def certificate_end(path: Path) -> datetime:
    """Return when the certificate in a file ends; for whoever asks often: the file is read again only when it changed.

    Raises:
        TrustError: as for `load_certificate`.
    """
    try:
        stamp = path.stat().st_mtime_ns
    except OSError:
        stamp = None  # what is wrong with it is told by reading it
    return _read_end(path, stamp)


@functools.lru_cache(maxsize=16)
def _read_end(path: Path, stamp: int | None) -> datetime:
    return load_certificate(path).not_valid_after_utc


def write_public(path: Path, data: bytes) -> None:
    """Replace a file that holds no secret (mode 0644) atomically; there is no moment in which others cannot read it.

    Raises:
        RunError: if it cannot be written.
    """
    atomic.write_bytes(path, data, mode=0o644)


@dataclass(frozen=True, kw_only=True)
class Judge:
    """What certificates are judged by.

    Attributes:
        ca: the consortium's certificate.
        crl: its list of revoked certificates, checked before; None if there is none.
        now: the time.
        sites_only: whether a certificate must be a site's.
    """

    ca: x509.Certificate
    crl: x509.CertificateRevocationList | None
    now: datetime
    sites_only: bool = False

    def files(
        self, paths: Iterable[Path], *, concerns: Callable[[x509.Certificate], bool] | None = None
    ) -> list[SiteIdentity]:
        """Return one identity per file, by name and expiry; never fails because of one file.

        Args:
            paths: of certificates.
            concerns: leaves out certificates that it returns False of, before they are checked; unreadable files stay.
        """
        found = []
        for path in paths:
            if path.name.startswith("."):
                continue
            try:
                certificate = load_certificate(path)
            except TrustError as error:
                found.append(
                    SiteIdentity(path=path, name=printable(path.stem, "?"), state="unreadable", reason=str(error))
                )
                continue
            if concerns is None or concerns(certificate):
                found.append(identity_of(path, certificate, *self.judged(certificate)))
        return sorted(found, key=lambda i: (i.name, i.not_after or datetime.max.replace(tzinfo=UTC), i.path))

    def judged(self, cert: x509.Certificate) -> tuple[State, str]:
        """Return the state of a certificate and the reason."""
        try:
            cert.verify_directly_issued_by(self.ca)
        except (InvalidSignature, *MALFORMED):
            return "not signed by this CA", (
                f"the certificate of {common_name(cert)} was not signed by this CA ({common_name(self.ca)}); ask the "
                "consortium's CA for one."
            )
        try:
            name, role = identity(cert)
        except (TrustError, *MALFORMED) as error:
            return "unreadable", f"the certificate is not of the kind that this CA issues: {error}"
        entry = self.crl.get_revoked_certificate_by_serial_number(cert.serial_number) if self.crl is not None else None
        if entry is not None:
            return "revoked", f"the certificate of {name} was revoked on {date_text(entry.revocation_date_utc)}."
        for holder, checked in ((name, cert), ("the CA", self.ca)):
            if self.now > checked.not_valid_after_utc:
                end = date_text(checked.not_valid_after_utc)
                return "expired", f"the certificate of {holder} expired on {end}; request a new one."
            if self.now < checked.not_valid_before_utc:
                start, now = date_text(checked.not_valid_before_utc), date_text(self.now)
                return "not yet valid", (
                    f"the certificate of {holder} is not valid before {start}, and now is {now}; check the clock."
                )
        if self.sites_only and role != "site":
            return "not a site's certificate", f"the certificate of {name} is one for a server, not a site."
        return "valid", ""


def identity_of(path: Path, cert: x509.Certificate, state: State, reason: str) -> SiteIdentity:
    """Return a certificate file with its state, as far as it can be read."""
    found = SiteIdentity(path=path, name=printable(path.stem, "?"), state=state, reason=reason)
    try:
        name, role = identity(cert)
        public_key, end = cert.public_key(), cert.not_valid_after_utc
    except (TrustError, *MALFORMED):
        return found
    if not isinstance(public_key, ec.EllipticCurvePublicKey):
        return found
    return replace(found, name=name, role=role, serial=cert.serial_number, not_after=end, public_key=public_key)


def read_subject(subject: x509.Name, what: str) -> tuple[str, Role]:
    """Return the name and role in a subject; TrustError if it holds anything else."""
    fields = {attribute.oid: str(attribute.value) for attribute in subject}
    if fields.keys() != {NameOID.COMMON_NAME, NameOID.ORGANIZATIONAL_UNIT_NAME} or len(list(subject)) != 2:
        raise TrustError(f"{what} must name its holder (CN) and its role (OU), and nothing else.")
    name, role = fields[NameOID.COMMON_NAME], fields[NameOID.ORGANIZATIONAL_UNIT_NAME]
    check_name(name)
    return name, check_role(role)


def check_role(role: str) -> Role:
    """Return `role` if it is one; TrustError if not."""
    if role == "server":
        return "server"
    if role == "site":
        return "site"
    raise TrustError(f"the role is {role!r}; expected server or site.")


def is_p256(key: object) -> bool:
    """Return whether `key` is a public ECDSA P-256 key."""
    return isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)


def parse_certificate(pem: bytes, source: str) -> x509.Certificate:
    """Return the one certificate in `pem`; TrustError if there is another number of them."""
    try:
        certificates = x509.load_pem_x509_certificates(pem)
    except MALFORMED:
        certificates = []
    if len(certificates) != 1:
        raise TrustError(f"{source} is not a PEM file of one certificate; it may be half copied. Copy it again.")
    return certificates[0]


def read_file(path: Path, what: str) -> bytes:
    """Return the content of a certificate, a list or a key; TrustError if it cannot be read or is too long."""
    return read_bounded(path, what, _MAX_FILE_BYTES)[0]


def file_name(cert: x509.Certificate) -> str:
    """Return the name under which a certificate is stored."""
    return f"{identity(cert)[0]}-{hex_serial(cert.serial_number)}.crt"


def pem_bytes(cert: x509.Certificate) -> bytes:
    """Return a certificate as PEM."""
    return cert.public_bytes(serialization.Encoding.PEM)


def common_name(cert: x509.Certificate) -> str:
    """Return the holder's name for a message, whatever it holds."""
    try:
        found = cert.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except MALFORMED:
        found = []
    return printable(str(found[0].value), "?") if found else "without a name"


def hex_serial(serial: int | None) -> str:
    """Return a serial number as it is shown."""
    return "" if serial is None else format(serial, "x")


def date_text(time: datetime | None) -> str:
    """Return a time as it is shown."""
    return "" if time is None else f"{time.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def whole_seconds(now: datetime | None) -> datetime:
    """Return `now`, or the time, in UTC without fractions, as certificates hold it."""
    return (now or datetime.now(UTC)).astimezone(UTC).replace(microsecond=0)
