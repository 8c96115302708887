"""The consortium's certificate authority (CA): who may be the coordinator, and which sites may connect.

Three folders, on three kinds of machine:
    CA folder     `ca.key`, `ca.crt`, `issued/NAME-SERIAL.crt`, `crl.pem`; may stay offline. It is the only record of
                  what was issued, so it needs a backup.
    trust store   `ca.crt`, `crl.pem`, `sites/NAME-SERIAL.crt`; beside the coordinator, which reads it again and again.
                  `crl.number` remembers the newest revocation list that was seen there.
    anywhere      a private key is made where it is used and never leaves; a request (CSR) travels to the CA and a
                  certificate comes back.

All keys are ECDSA P-256: flwr's node authentication and TLS both take them. A certificate names its holder (CN) and
its role (OU): `server` for the coordinator's TLS, `site` for a site's node key.

Guarantees (tests in tests/shared/test_pki.py)
    * A certificate that was revoked stays revoked in a trust store, also if an older list is put back or the list is
      removed (test_an_older_crl_is_refused, test_a_removed_crl_is_refused).
    * A key that was revoked is never certified again (test_a_revoked_key_never_comes_back).
    * What a request asks for beyond its name, role and hosts is not granted (test_wishes_of_a_request_are_ignored).

Not guaranteed
    * Sites do not see the revocation of a server certificate: gRPC reads no revocation list. Give server certificates
      a short life.
    * `next_update` of the list is not enforced: an old list that was never replaced stays in force.
    * Whoever can write the trust store and removes `crl.number` as well can go back to an older list.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shared import atomic, keystore
from shared.config import NAME_PATTERN
from shared.errors import RunError, TrustError

Role = Literal["server", "site"]
State = Literal[
    "valid", "expired", "not yet valid", "revoked", "not signed by this CA", "not a site's certificate", "unreadable"
]

MAX_DAYS = 36_500
BACKDATING = timedelta(minutes=5)  # so that a machine whose clock is a little late accepts a new certificate

_CRL_DAYS = 3650
_MAX_FILE_BYTES = 16 << 20  # a revocation list grows by some 40 bytes an entry
_SHA256 = hashes.SHA256()
# What `cryptography` raises for bytes that are no certificate, some of it only when a field is read.
_MALFORMED = (
    ValueError,
    TypeError,
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


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a request (CSR) asks for: a certificate for `public_key` under this name, role and hosts."""

    name: str
    role: Role
    hosts: tuple[str, ...]
    public_key: ec.EllipticCurvePublicKey


def create_ca(
    folder: Path, *, name: str, days: int = 3650, passphrase: str | None, now: datetime | None = None
) -> x509.Certificate:
    """Make a CA with a new key and an empty revocation list; `name` is 1 to 64 printable characters.

    Raises:
        TrustError: if the folder holds a CA already, or the name or the number of days is out of bounds.
        RunError: if the folder cannot be written.
    """
    if not (0 < len(name) <= 64 and name.isprintable() and name.strip() == name):
        raise TrustError(f"the CA's name is {name!r}; expected 1 to 64 printable characters.")
    _check_days(days)
    for file in ("ca.key", "ca.crt"):
        if os.path.lexists(folder / file):
            raise TrustError(f"{folder} holds a CA already ({file}); choose another folder.")
    now = _whole_seconds(now)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = (
        _builder(subject, subject, key.public_key(), now, timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, _SHA256)
    )
    save_private_key(folder / "ca.key", key, passphrase)
    _write_crl(folder, certificate, key, revoked=(), number=1, now=now)
    write_public(folder / "ca.crt", _pem(certificate))
    return certificate


def make_request(*, name: str, role: str, hosts: Sequence[str] = ()) -> tuple[ec.EllipticCurvePrivateKey, bytes]:
    """Make a new private key and a request for its certificate.

    Args:
        name: of the holder, a `shared.config.Name`.
        role: `server` or `site`.
        hosts: DNS names and IP addresses under which sites reach a server; none for a site.

    Returns:
        The key, to be saved here, and the request as PEM, to be sent to the CA.

    Raises:
        TrustError: if one of the arguments is not valid.
    """
    check_name(name)
    _check_role(role)
    _check_hosts(role, hosts)
    key = ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateSigningRequestBuilder().subject_name(_subject(name, role))
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName([_general_name(h) for h in hosts]), critical=False)
    return key, builder.sign(key, _SHA256).public_bytes(serialization.Encoding.PEM)


def read_request(csr_pem: bytes) -> Request:
    """Read a request and check all that can be checked without the CA.

    Raises:
        TrustError: if it is malformed, or its signature, key, name, role or hosts are not acceptable.
    """
    try:
        request = x509.load_pem_x509_csr(csr_pem)
        public_key, signed = request.public_key(), request.is_signature_valid
        wishes = [extension.value for extension in request.extensions]
    except _MALFORMED:
        raise TrustError("the request is no PEM certificate request; expected the .csr file that was made.") from None
    if not isinstance(public_key, ec.EllipticCurvePublicKey) or not _is_p256(public_key):
        raise TrustError("the request holds a key that is not ECDSA P-256; make it with: silotune pki request")
    if not signed:
        raise TrustError("the request is not signed by the key in it, or was changed on its way; ask for it again.")
    name, role = _read_subject(request.subject, "the request")
    alternatives = [other for wish in wishes if isinstance(wish, x509.SubjectAlternativeName) for other in wish]
    hosts = []
    for other in alternatives:
        if not isinstance(other, x509.DNSName | x509.IPAddress):
            raise TrustError("the request names something that is neither a DNS name nor an IP address; make it anew.")
        hosts.append(str(other.value))
    _check_hosts(role, hosts)
    return Request(name=name, role=role, hosts=tuple(hosts), public_key=public_key)


def approve(
    folder: Path,
    csr_pem: bytes,
    *,
    days: int = 365,
    passphrase: str | None,
    now: datetime | None = None,
    rotate: bool = False,
) -> x509.Certificate:
    """Issue the certificate that a request asks for, and file it under `issued/`.

    The caller must know that the request comes from its holder: compare the key's `fingerprint` by another way.
    A request for the key that the name has already is a renewal and needs no `rotate`.

    Args:
        folder: the CA folder.
        csr_pem: the request.
        days: life of the certificate.
        passphrase: of `ca.key`.
        now: the time; the clock's if None.
        rotate: allow a second key under a name; both are valid until one is revoked or expires.

    Raises:
        TrustError: if the request is malformed, its signature, key, name, role or hosts are not acceptable, its key
            is revoked or belongs to another name, its name has another key (without `rotate`), or the CA expires
            before the certificate would.
    """
    now = _whole_seconds(now)
    _check_days(days)
    authority = _Authority(folder)

    # 1. The request: its holder has the key, and everything in it is of a known kind.
    request = read_request(csr_pem)
    public_key, name, role = request.public_key, request.name, request.role

    # 2. Against what was issued before.
    for other in authority.record(now):
        same_key, same_name = other.public_key == public_key, other.name == name
        if same_key and other.state == "revoked":
            raise TrustError(f"the key of this request cannot be certified again: {other.reason} Make a new request.")
        if other.state not in ("valid", "not yet valid"):
            continue
        if same_key and not same_name:
            raise TrustError(
                f"the key of this request belongs to {other.name}, and {name} asks for it; every holder needs a key "
                "of its own. Make a new request."
            )
        if same_name and not same_key and not rotate:
            raise TrustError(
                f"{name} has a certificate with another key (serial {_hex(other.serial)}, valid until "
                f"{_date(other.not_after)}). If {name} changes its key, approve with --rotate and revoke the old one "
                "afterwards; if this is somebody else, ask for another name."
            )

    # 3. The certificate. Only what is written here is granted.
    end = now + timedelta(days=days)
    if end > authority.certificate.not_valid_after_utc:
        raise TrustError(
            f"the certificate would be valid until {_date(end)}, but the CA expires on "
            f"{_date(authority.certificate.not_valid_after_utc)}; choose fewer --days, or make a new CA."
        )
    key = authority.private_key(passphrase)
    usage = ExtendedKeyUsageOID.SERVER_AUTH if role == "server" else ExtendedKeyUsageOID.CLIENT_AUTH
    names: list[x509.GeneralName] = [_general_name(host) for host in request.hosts]
    if role == "site":
        names = [x509.UniformResourceIdentifier(f"silotune:site:{name}")]
    certificate = (
        _builder(_subject(name, role), authority.certificate.subject, public_key, now, timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, _SHA256)
    )
    write_public(folder / "issued" / _file_name(certificate), _pem(certificate))
    return certificate


def revoke(folder: Path, target: str, *, passphrase: str | None, now: datetime | None = None) -> int:
    """Revoke all certificates of a name, or the one with a serial number (hexadecimal), for good.

    Returns:
        How many were not revoked before; with 0 the list stays as it was.

    Raises:
        TrustError: if nothing was issued under that name or number, or a file of the CA folder is damaged.
    """
    now = _whole_seconds(now)
    authority = _Authority(folder)
    serial = target.replace(":", "").lower().lstrip("0")
    identities = authority.record(now)
    matching = [i for i in identities if i.serial is not None and (i.name == target or _hex(i.serial) == serial)]
    if not matching:
        names = ", ".join(sorted({i.name for i in identities})) or "nobody"
        raise TrustError(f"no certificate was issued for {target!r}; there are certificates for: {names}.")
    new = [i.serial for i in matching if i.serial is not None and i.state != "revoked"]
    if new:
        builder = x509.RevokedCertificateBuilder().revocation_date(now)
        revoked = [*authority.crl, *(builder.serial_number(serial).build() for serial in new)]
        key = authority.private_key(passphrase)
        _write_crl(folder, authority.certificate, key, revoked=revoked, number=_crl_number(authority.crl) + 1, now=now)
    return len(new)


def issued(folder: Path, now: datetime) -> list[SiteIdentity]:
    """List everything that a CA folder issued, by name and expiry; servers too. No passphrase is needed.

    Raises:
        TrustError: if `ca.crt` or `crl.pem` is missing or damaged.
    """
    return _Authority(folder).identities(now)


def publish(folder: Path, trust_folder: Path) -> int:
    """Copy `ca.crt` and `crl.pem` of a CA folder into a trust store, and return the list's number.

    Raises:
        TrustError: if the trust store is of another CA, or has seen a newer list.
    """
    authority = _Authority(folder)
    if (trust_folder / "ca.crt").exists():
        present = load_certificate(trust_folder / "ca.crt")
        if present.public_key() != authority.certificate.public_key():
            raise TrustError(
                f"{trust_folder} belongs to another CA ({_common_name(present)}); use a folder of its own."
            )
    _check_rollback(trust_folder, authority.crl, _seen_crl(trust_folder))
    write_public(trust_folder / "crl.pem", authority.crl.public_bytes(serialization.Encoding.PEM))
    write_public(trust_folder / "ca.crt", _pem(authority.certificate))
    return _crl_number(authority.crl)


class TrustStore:
    """The coordinator's folder of who may connect; every call reads the files anew."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def sites(self, now: datetime) -> list[SiteIdentity]:
        """List the certificates in `sites/`, by name and expiry, with their states at `now`.

        A file that is only half copied has the state `unreadable` and may be valid in the next call.

        Raises:
            TrustError: if `ca.crt` is missing or damaged; if `crl.pem` is damaged, not signed by this CA, older than
                one seen before, or gone. Nobody may be let in then.
        """
        ca, crl = self._authority()
        return _judge_files((self.folder / "sites").glob("*.crt"), _judge_site, ca, now, crl)

    def install(self, cert_pem: bytes, now: datetime | None = None) -> SiteIdentity:
        """Verify a site's certificate and store it as `sites/NAME-SERIAL.crt`.

        Raises:
            TrustError: if it is anything but a valid certificate of a site, signed by this CA.
        """
        ca, crl = self._authority()
        certificate = _parse_certificate(cert_pem, "the certificate")
        state, reason = _judge_site(certificate, ca, _whole_seconds(now), crl)
        if state != "valid":
            raise TrustError(f"the certificate is not installed: {reason}")
        path = self.folder / "sites" / _file_name(certificate)
        write_public(path, _pem(certificate))
        return _identity(path, certificate, state, reason)

    def _authority(self) -> tuple[x509.Certificate, x509.CertificateRevocationList | None]:
        ca = load_certificate(self.folder / "ca.crt")
        seen = _seen_crl(self.folder)  # before the list, so that one published in between is never taken for older
        path = self.folder / "crl.pem"
        crl = _load_crl(path, ca) if path.exists() else None
        if _check_rollback(self.folder, crl, seen) and crl is not None:
            try:
                write_public(self.folder / "crl.number", f"{_crl_number(crl)} {_crl_digest(crl)}\n".encode())
            except RunError as error:
                raise TrustError(f"the newest revocation list cannot be remembered: {error}") from None
        return ca, crl


def verify_certificate(
    cert: x509.Certificate,
    ca_cert: x509.Certificate,
    now: datetime,
    crl: x509.CertificateRevocationList | None = None,
) -> None:
    """Check that a certificate was issued by a CA, is valid at `now` and is not on the CA's revocation list.

    Raises:
        TrustError: if it is not, saying which, or if the list was not signed by the CA.
    """
    if crl is not None:
        _check_crl(crl, ca_cert, "the revocation list")
    state, reason = _judge(cert, ca_cert, now, crl)
    if state != "valid":
        raise TrustError(reason)


def identity(cert: x509.Certificate) -> tuple[str, Role]:
    """Return the name and the role that a certificate gives its holder; says nothing about its being genuine.

    Raises:
        TrustError: if it is not a certificate as `approve` issues them.
    """
    name, role = _read_subject(cert.subject, "the certificate")
    if not _is_p256(cert.public_key()):
        raise TrustError(f"the certificate of {name} holds a key that is not ECDSA P-256; expected that kind.")
    return name, role


def check_name(name: str) -> None:
    """Check that `name` is a `shared.config.Name`.

    Raises:
        TrustError: if not.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise TrustError(
            f"the name is {name!r}; expected 1 to 64 letters, digits, dots, dashes and underscores, the first a letter "
            "or digit."
        )


def fingerprint(public_key: ec.EllipticCurvePublicKey) -> str:
    """Return the SHA-256 of a public key (its SubjectPublicKeyInfo) in groups of four digits, for reading aloud."""
    spki = public_key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    digest = hashlib.sha256(spki).hexdigest()
    return " ".join(digest[i : i + 4] for i in range(0, len(digest), 4))


def expiry_warning(cert: x509.Certificate, now: datetime, days: int = 30) -> str | None:
    """Return a sentence if the certificate expires within `days` days or has expired, else None."""
    end, name = cert.not_valid_after_utc, _common_name(cert)
    if now > end:
        return f"the certificate of {name} expired on {_date(end)}; request a new one."
    if end - now > timedelta(days=days):
        return None
    return f"the certificate of {name} expires in {_count((end - now).days, 'day')}, on {_date(end)}; renew it."


def openssh_public_key(public_key: ec.EllipticCurvePublicKey) -> bytes:
    """Return a public key in the form that `flwr supernode register` takes (one OpenSSH line without a comment)."""
    return public_key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)


def load_certificate(path: Path) -> x509.Certificate:
    """Read a PEM file of one certificate.

    Raises:
        TrustError: if the file is missing or holds anything else.
    """
    return _parse_certificate(_read(path, "certificate"), str(path))


def save_private_key(
    path: Path, key: ec.EllipticCurvePrivateKey, passphrase: str | None, *, replace: bool = False
) -> None:
    """Write a private key (PKCS #8) to a key file; see `shared.keystore.save_secret` for the errors."""
    der = key.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    keystore.save_secret(path, der, passphrase=passphrase, replace=replace)


def load_private_key(path: Path, passphrase: str | None) -> ec.EllipticCurvePrivateKey:
    """Read a private key from a key file.

    Raises:
        TrustError: if the file does not open (see `shared.keystore.load_secret`) or holds a key of another kind.
    """
    der = keystore.load_secret(path, passphrase=passphrase)
    try:
        key = serialization.load_der_private_key(der, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not _is_p256(key.public_key()):
        raise TrustError(
            f"{path} holds a key of another kind; expected an ECDSA P-256 key, as `silotune pki` makes it."
        )
    return key


def write_plain_pem_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    """Write an unencrypted PEM key of mode 0600, for `flower-superlink --ssl-keyfile`, which reads no other.

    This undoes the passphrase of the key file. Write it to a file system in memory (`/run`, `/dev/shm`), start the
    process, and remove it: the key is read once, at the start. The key file stays the lasting copy.

    Raises:
        RunError: if the file cannot be written.
    """
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    atomic.write_bytes(path, pem)


def write_public(path: Path, data: bytes) -> None:
    """Replace a file that holds no secret (mode 0644) atomically; there is no moment in which others cannot read it.

    Raises:
        RunError: if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    atomic.write_bytes(temporary, data)
    try:
        temporary.chmod(0o644)
        temporary.replace(path)
        atomic.sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"could not write {path}: {error.strerror}; mend the permissions, then try again.") from error


class _Authority:
    """The files of a CA folder."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "ca.crt").exists():
            raise TrustError(f"{folder} holds no CA (no ca.crt); check the path, or make one: silotune pki init")
        self.folder = folder
        self.certificate = load_certificate(folder / "ca.crt")
        # A list made afresh would un-revoke everybody, so a missing one is an error.
        self.crl = _load_crl(folder / "crl.pem", self.certificate)

    def private_key(self, passphrase: str | None) -> ec.EllipticCurvePrivateKey:
        key = load_private_key(self.folder / "ca.key", passphrase)
        if key.public_key() != self.certificate.public_key():
            raise TrustError(
                f"ca.key and ca.crt in {self.folder} do not belong together; restore both from one backup."
            )
        return key

    def record(self, now: datetime) -> list[SiteIdentity]:
        """All that was issued; TrustError if a part of it cannot be read, because a decision needs all of it."""
        identities = self.identities(now)
        for found in identities:
            if found.public_key is None:
                raise TrustError(
                    f"the record of what this CA issued is damaged. {found.path}: {found.reason} Restore the folder "
                    "from its backup, or move that file away."
                )
        return identities

    def identities(self, now: datetime) -> list[SiteIdentity]:
        return _judge_files((self.folder / "issued").glob("*.crt"), _judge, self.certificate, now, self.crl)


_Judge = Callable[
    [x509.Certificate, x509.Certificate, datetime, x509.CertificateRevocationList | None], tuple[State, str]
]


def _judge(
    cert: x509.Certificate, ca: x509.Certificate, now: datetime, crl: x509.CertificateRevocationList | None
) -> tuple[State, str]:
    """Return the state and the reason; `crl` was checked before."""
    try:
        cert.verify_directly_issued_by(ca)
    except (InvalidSignature, *_MALFORMED):
        return "not signed by this CA", (
            f"the certificate of {_common_name(cert)} was not signed by this CA ({_common_name(ca)}); ask the "
            "consortium's CA for one."
        )
    try:
        name, _ = identity(cert)
    except (TrustError, *_MALFORMED) as error:
        return "unreadable", f"the certificate is not of the kind that this CA issues: {error}"
    entry = crl.get_revoked_certificate_by_serial_number(cert.serial_number) if crl is not None else None
    if entry is not None:
        return "revoked", f"the certificate of {name} was revoked on {_date(entry.revocation_date_utc)}."
    for holder, checked in ((name, cert), ("the CA", ca)):
        if now > checked.not_valid_after_utc:
            end = _date(checked.not_valid_after_utc)
            return "expired", f"the certificate of {holder} expired on {end}; request a new one."
        if now < checked.not_valid_before_utc:
            start = _date(checked.not_valid_before_utc)
            return "not yet valid", (
                f"the certificate of {holder} is not valid before {start}, and now is {_date(now)}; check the clock."
            )
    return "valid", ""


def _judge_site(
    cert: x509.Certificate, ca: x509.Certificate, now: datetime, crl: x509.CertificateRevocationList | None
) -> tuple[State, str]:
    state, reason = _judge(cert, ca, now, crl)
    if state == "valid" and identity(cert)[1] != "site":
        return "not a site's certificate", f"the certificate of {identity(cert)[0]} is one for a server, not a site."
    return state, reason


def _judge_files(
    paths: Iterable[Path],
    judge: _Judge,
    ca: x509.Certificate,
    now: datetime,
    crl: x509.CertificateRevocationList | None,
) -> list[SiteIdentity]:
    """Return one identity per file; never fails because of one file."""
    found = []
    for path in paths:
        if path.name.startswith("."):
            continue
        try:
            certificate = load_certificate(path)
        except TrustError as error:
            found.append(SiteIdentity(path=path, name=_printable(path.stem), state="unreadable", reason=str(error)))
            continue
        found.append(_identity(path, certificate, *judge(certificate, ca, now, crl)))
    return sorted(found, key=lambda i: (i.name, i.not_after or datetime.max.replace(tzinfo=UTC), i.path))


def _identity(path: Path, cert: x509.Certificate, state: State, reason: str) -> SiteIdentity:
    found = SiteIdentity(path=path, name=_printable(path.stem), state=state, reason=reason)
    try:
        name, role = identity(cert)
        public_key, end = cert.public_key(), cert.not_valid_after_utc
    except (TrustError, *_MALFORMED):
        return found
    if not isinstance(public_key, ec.EllipticCurvePublicKey):
        return found
    return replace(found, name=name, role=role, serial=cert.serial_number, not_after=end, public_key=public_key)


def _read_subject(subject: x509.Name, what: str) -> tuple[str, Role]:
    fields = {attribute.oid: str(attribute.value) for attribute in subject}
    if fields.keys() != {NameOID.COMMON_NAME, NameOID.ORGANIZATIONAL_UNIT_NAME} or len(list(subject)) != 2:
        raise TrustError(f"{what} must name its holder (CN) and its role (OU), and nothing else.")
    name, role = fields[NameOID.COMMON_NAME], fields[NameOID.ORGANIZATIONAL_UNIT_NAME]
    check_name(name)
    return name, _check_role(role)


def _subject(name: str, role: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role), x509.NameAttribute(NameOID.COMMON_NAME, name)]
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, life: timedelta
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATING)
        .not_valid_after(now + life)
    )


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def _check_role(role: str) -> Role:
    if role == "server":
        return "server"
    if role == "site":
        return "site"
    raise TrustError(f"the role is {role!r}; expected server or site.")


def _check_hosts(role: str, hosts: Sequence[str]) -> None:
    if role == "site" and hosts:
        raise TrustError("a site's request names hosts; only a server has them. Leave out --host.")
    if role == "server" and not hosts:
        raise TrustError("a server's request names no host; give each name and address that sites dial with --host.")
    for host in hosts:
        _general_name(host)


def _general_name(host: str) -> x509.DNSName | x509.IPAddress:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    label = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
    if len(host) > 253 or not re.fullmatch(rf"{label}(\.{label})*", host):
        raise TrustError(f"the host is {host!r}; expected a DNS name or an IP address, without a port or a wildcard.")
    return x509.DNSName(host)


def _check_days(days: int) -> None:
    if not 1 <= days <= MAX_DAYS:
        raise TrustError(f"days is {days}; expected 1 to {MAX_DAYS}.")


def _is_p256(key: object) -> bool:
    return isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)


def _write_crl(
    folder: Path,
    ca: x509.Certificate,
    key: ec.EllipticCurvePrivateKey,
    *,
    revoked: Iterable[x509.RevokedCertificate],
    number: int,
    now: datetime,
) -> None:
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
    write_public(folder / "crl.pem", builder.sign(key, _SHA256).public_bytes(serialization.Encoding.PEM))


def _load_crl(path: Path, ca: x509.Certificate) -> x509.CertificateRevocationList:
    content = _read(path, "revocation list")
    try:
        crl = x509.load_pem_x509_crl(content)
        _check_crl(crl, ca, str(path))
    except _MALFORMED:
        raise TrustError(f"{path} is no PEM revocation list; publish it again: silotune pki publish") from None
    return crl


def _check_crl(crl: x509.CertificateRevocationList, ca: x509.Certificate, what: str) -> None:
    key = ca.public_key()
    if not (isinstance(key, ec.EllipticCurvePublicKey) and crl.issuer == ca.subject and crl.is_signature_valid(key)):
        raise TrustError(
            f"{what} was not signed by this CA ({_common_name(ca)}); find out who put it there and publish the right "
            "one: silotune pki publish"
        )
    try:
        _crl_number(crl)
    except _MALFORMED:
        raise TrustError(f"{what} has no number; expected a list that `silotune pki` made.") from None


def _crl_number(crl: x509.CertificateRevocationList) -> int:
    return crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number


def _seen_crl(folder: Path) -> tuple[int, str]:
    """Return number and digest of the newest list seen in this trust store; 0 if there was none."""
    path = folder / "crl.number"
    if not path.exists():
        return 0, ""
    match = re.fullmatch(r"([0-9]{1,18}) ([0-9a-f]{64})\n", _read(path, "CRL number").decode(errors="replace"))
    if match is None:
        raise TrustError(f"{path} is damaged; restore it from its backup, or remove it if crl.pem is the newest list.")
    return int(match[1]), match[2]


def _check_rollback(folder: Path, crl: x509.CertificateRevocationList | None, seen: tuple[int, str]) -> bool:
    """Refuse a list older than the newest one seen; return whether this one is newer."""
    seen_number, seen_digest = seen
    if crl is None:
        if seen_number:
            raise TrustError(
                f"{folder} has no crl.pem, but revocation list {seen_number} was there before; without it, revoked "
                "sites could connect. Publish it again: silotune pki publish"
            )
        return False
    number = _crl_number(crl)
    if number < seen_number:
        raise TrustError(
            f"{folder}: the revocation list is number {number}, but number {seen_number} was seen before; an older "
            "list could un-revoke a site. Publish the newest one: silotune pki publish"
        )
    if number == seen_number and _crl_digest(crl) != seen_digest:
        raise TrustError(
            f"{folder}: there are two revocation lists of number {number}; the CA folder may have been restored from "
            "an old backup. Find the newest CA folder and publish from there."
        )
    return number > seen_number


def _crl_digest(crl: x509.CertificateRevocationList) -> str:
    # Without the signature, of which there is more than one for the same list.
    return hashlib.sha256(crl.tbs_certlist_bytes).hexdigest()


def _parse_certificate(pem: bytes, source: str) -> x509.Certificate:
    try:
        certificates = x509.load_pem_x509_certificates(pem)
    except _MALFORMED:
        certificates = []
    if len(certificates) != 1:
        raise TrustError(f"{source} is not a PEM file of one certificate; it may be half copied. Copy it again.")
    return certificates[0]


def _read(path: Path, what: str) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise TrustError(f"the {what} {path} does not exist; check the path, or restore it from its backup.") from None
    except OSError as error:
        raise TrustError(f"the {what} {path} cannot be read ({error.strerror}); mend its permissions.") from None
    if len(content) > _MAX_FILE_BYTES:
        raise TrustError(f"the {what} {path} is longer than {_MAX_FILE_BYTES} bytes; check the path.")
    return content


def _file_name(cert: x509.Certificate) -> str:
    return f"{identity(cert)[0]}-{_hex(cert.serial_number)}.crt"


def _pem(cert: x509.Certificate) -> bytes:
    return cert.public_bytes(serialization.Encoding.PEM)


def _common_name(cert: x509.Certificate) -> str:
    try:
        found = cert.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except ValueError:
        found = []
    return _printable(str(found[0].value)) if found else "without a name"


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)


def _hex(serial: int | None) -> str:
    return "" if serial is None else format(serial, "x")


def _date(time: datetime | None) -> str:
    return "" if time is None else f"{time.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _whole_seconds(now: datetime | None) -> datetime:
    return (now or datetime.now(UTC)).astimezone(UTC).replace(microsecond=0)
