"""The consortium's certificate authority (CA): who may be the coordinator, and which sites may connect.

Three folders, on three kinds of machine:
    CA folder     `ca.key`, `ca.crt`, `issued/NAME-SERIAL.crt`, `crl.pem`; may stay offline. It is the only record of
                  what was issued, so it needs a backup.
    trust store   `ca.crt`, `crl.pem`, `sites/NAME-SERIAL.crt`; beside the coordinator, which reads it again and again.
                  `crl.number` remembers the newest revocation list that was seen there.
    anywhere      a private key is made where it is used and never leaves; a request (CSR) travels to the CA and a
                  certificate comes back.

What a certificate says is told in `shared/trust/certificates.py`, what a revocation list guarantees in
`shared/trust/revocation.py`.

Guarantees (tests in tests/shared/trust/test_pki.py)
    * A key that was revoked is never certified again (test_a_revoked_key_never_comes_back).
    * What a request asks for beyond its name, role and hosts is not granted (test_wishes_of_a_request_are_ignored). Role and
      hosts are named by whoever approves; a request for others is refused (test_who_approves_names_role_and_hosts).

Not guaranteed: sites do not see the revocation of a server certificate, for gRPC reads no revocation list. Give server
certificates a short life.
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shared.errors import TrustError
from shared.trust.certificates import (
    MALFORMED,
    SHA256,
    Judge,
    Role,
    SiteIdentity,
    check_name,
    check_role,
    common_name,
    date_text,
    file_name,
    hex_serial,
    is_p256,
    load_certificate,
    pem_bytes,
    read_subject,
    whole_seconds,
    write_public,
)
from shared.trust.node_keys import load_private_key, save_private_key
from shared.trust.revocation import check_newer, crl_number, load_crl, write_crl

MAX_DAYS = 36_500
BACKDATING = timedelta(minutes=5)  # so that a machine whose clock is a little late accepts a new certificate


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a request (CSR) asks for: a certificate for `public_key` under this name, role and hosts."""

    name: str
    role: Role
    hosts: tuple[str, ...]
    public_key: ec.EllipticCurvePublicKey

    def concerned(self, certificate: x509.Certificate) -> bool:
        """Return whether a certificate may be of this name or key; most are not, which shows without checking signatures."""
        content = certificate.public_bytes(serialization.Encoding.DER)
        return self.name.encode() in content or self._key in content

    @cached_property
    def _key(self) -> bytes:
        return self.public_key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)


def create_ca(
    folder: Path, *, name: str, days: int = 3650, passphrase: str | None, now: datetime | None = None
) -> x509.Certificate:
    """Make a CA with a new key and an empty revocation list; `name` is 1 to 64 printable characters.

    Raises:
        TrustError: if the folder holds a CA already, others may write into it, or the name or the number of days is out of
            bounds.
        RunError: if the folder cannot be written.
    """
    if not (0 < len(name) <= 64 and name.isprintable() and name.strip() == name):
        raise TrustError(f"the CA's name is {name!r}; expected 1 to 64 printable characters.")
    _check_days(days)
    for file in ("ca.key", "ca.crt", "crl.pem"):
        if os.path.lexists(folder / file):
            raise TrustError(f"{folder} holds a CA already ({file}); choose another folder.")
    if folder.exists():
        _check_private(folder)
    else:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)
    now = whole_seconds(now)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = (
        _builder(subject, subject, key.public_key(), now, timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, SHA256)
    )
    save_private_key(folder / "ca.key", key, passphrase)
    write_crl(folder, certificate, key, revoked=(), number=1, now=now)
    write_public(folder / "ca.crt", pem_bytes(certificate))
    return certificate


def make_request(*, name: str, role: str, hosts: Sequence[str] = ()) -> tuple[ec.EllipticCurvePrivateKey, bytes]:
    """Make a new private key and a request for its certificate.

    Args:
        name: of the holder, a `shared.job.values.Name`.
        role: `server` or `site`.
        hosts: DNS names and IP addresses under which sites reach a server; none for a site.

    Returns:
        The key, to be saved here, and the request as PEM, to be sent to the CA.

    Raises:
        TrustError: if one of the arguments is not valid.
    """
    check_name(name)
    check_role(role)
    _check_hosts(role, hosts)
    key = ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateSigningRequestBuilder().subject_name(_subject(name, role))
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName([_general_name(h) for h in hosts]), critical=False)
    return key, builder.sign(key, SHA256).public_bytes(serialization.Encoding.PEM)


def read_request(csr_pem: bytes) -> Request:
    """Read a request and check all that can be checked without the CA.

    Raises:
        TrustError: if it is malformed, or its signature, key, name, role or hosts are not acceptable.
    """
    try:
        request = x509.load_pem_x509_csr(csr_pem)
        public_key, signed = request.public_key(), request.is_signature_valid
        wishes, subject = [extension.value for extension in request.extensions], request.subject
    except MALFORMED:
        raise TrustError("the request is no PEM certificate request; expected the .csr file that was made.") from None
    if not isinstance(public_key, ec.EllipticCurvePublicKey) or not is_p256(public_key):
        raise TrustError("the request holds a key that is not ECDSA P-256; make it with: silotune pki request")
    if not signed:
        raise TrustError("the request is not signed by the key in it, or was changed on its way; ask for it again.")
    name, role = read_subject(subject, "the request")
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
    role: str,
    hosts: Sequence[str] = (),
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
        role: what the caller wants to certify, `server` or `site`; a request for the other is refused, for whoever writes
            the request could else become the coordinator.
        hosts: all names and addresses of a server; a request for others, or for fewer, is refused.
        days: life of the certificate.
        passphrase: of `ca.key`.
        now: the time; the clock's if None.
        rotate: allow a second key under a name; both are valid until one is revoked or expires.

    Raises:
        TrustError: if the request is malformed, its signature, key, name, role or hosts are not acceptable or not those
            that the caller named, its key is revoked or belongs to another name, its name has another key (without
            `rotate`), or the CA expires before the certificate would.
    """
    now = whole_seconds(now)
    _check_days(days)
    check_role(role)
    _check_hosts(role, hosts, whose="the approval")
    authority = _Authority(folder)

    # 1. The request: its holder has the key, everything in it is of a known kind, and it asks for nothing else than is meant.
    request = read_request(csr_pem)
    _check_meant(request, role, hosts)

    # 2. Against what was issued before.
    _check_record(authority, request, now, rotate=rotate)

    # 3. The certificate, which must not outlive the CA.
    end = now + timedelta(days=days)
    if end > authority.certificate.not_valid_after_utc:
        raise TrustError(
            f"the certificate would be valid until {date_text(end)}, but the CA expires on "
            f"{date_text(authority.certificate.not_valid_after_utc)}; choose fewer --days, or make a new CA."
        )
    key = authority.private_key(passphrase)
    certificate = _issued(authority, request, key, now, days)
    write_public(folder / "issued" / file_name(certificate), pem_bytes(certificate))
    return certificate


def revoke(folder: Path, target: str, *, passphrase: str | None, now: datetime | None = None) -> int:
    """Revoke all certificates of a name, or the one with a serial number (hexadecimal), for good.

    Returns:
        How many were not revoked before; with 0 the list stays as it was.

    Raises:
        TrustError: if nothing was issued under that name or number, or a file of the CA folder is damaged.
    """
    now = whole_seconds(now)
    authority = _Authority(folder)
    serial = target.replace(":", "").lower().lstrip("0")
    identities = authority.record(now)
    matching = [i for i in identities if i.serial is not None and (i.name == target or hex_serial(i.serial) == serial)]
    if not matching:
        names = ", ".join(sorted({i.name for i in identities})) or "nobody"
        raise TrustError(f"no certificate was issued for {target!r}; there are certificates for: {names}.")
    new = [i.serial for i in matching if i.serial is not None and i.state != "revoked"]
    if new:
        builder = x509.RevokedCertificateBuilder().revocation_date(now)
        revoked = [*authority.crl, *(builder.serial_number(serial).build() for serial in new)]
        key = authority.private_key(passphrase)
        write_crl(folder, authority.certificate, key, revoked=revoked, number=crl_number(authority.crl) + 1, now=now)
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
            raise TrustError(f"{trust_folder} belongs to another CA ({common_name(present)}); use a folder of its own.")
    check_newer(trust_folder, authority.crl, authority.certificate)
    write_public(trust_folder / "crl.pem", authority.crl.public_bytes(serialization.Encoding.PEM))
    write_public(trust_folder / "ca.crt", pem_bytes(authority.certificate))
    return crl_number(authority.crl)


class _Authority:
    """The files of a CA folder."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "ca.crt").exists():
            raise TrustError(f"{folder} holds no CA (no ca.crt); check the path, or make one: silotune pki init")
        for part in (folder, folder / "issued"):
            if part.exists():
                _check_private(part)
        self.folder = folder
        self.certificate = load_certificate(folder / "ca.crt")
        # A list made afresh would un-revoke everybody, so a missing one is an error.
        self.crl = load_crl(folder / "crl.pem", self.certificate)

    def private_key(self, passphrase: str | None) -> ec.EllipticCurvePrivateKey:
        key = load_private_key(self.folder / "ca.key", passphrase)
        if key.public_key() != self.certificate.public_key():
            raise TrustError(
                f"ca.key and ca.crt in {self.folder} do not belong together; restore both from one backup."
            )
        return key

    def record(self, now: datetime, *, about: Request | None = None) -> list[SiteIdentity]:
        """All that was issued, or all of it that may concern a request; TrustError if any of it, because a decision needs
        all, cannot be read.
        """
        identities = self.identities(now, about=about)
        for found in identities:
            if found.public_key is None:
                raise TrustError(
                    f"the record of what this CA issued is damaged. {found.path}: {found.reason} Restore the folder "
                    "from its backup, or move that file away."
                )
        return identities

    def identities(self, now: datetime, *, about: Request | None = None) -> list[SiteIdentity]:
        judge = Judge(ca=self.certificate, crl=self.crl, now=now)
        return judge.files((self.folder / "issued").glob("*.crt"), concerns=None if about is None else about.concerned)


def _check_meant(request: Request, role: str, hosts: Sequence[str]) -> None:
    """Refuse a request for another role or other hosts than the caller means to certify."""
    if request.role != role:
        raise TrustError(
            f"the request of {request.name} asks for a certificate of a {request.role}, not of a {role}. Only the coordinator "
            f"gets one of a server. If {request.name} is meant to be a {request.role}, approve with --role {request.role}; "
            "else have the request made again."
        )
    asked, named = _host_set(request.hosts), _host_set(hosts)
    if more := [host for host in request.hosts if not _host_set([host]) <= named]:
        raise TrustError(
            f"the request of {request.name} asks for {', '.join(more)} too. If sites are meant to dial that, name it with "
            "--host; else have the request made again."
        )
    if fewer := [host for host in hosts if not _host_set([host]) <= asked]:
        raise TrustError(
            f"the request of {request.name} does not ask for {', '.join(fewer)}; leave out that --host, or have the request "
            "made again with it."
        )


def _host_set(hosts: Sequence[str]) -> set[str]:
    return {str(_general_name(host).value).lower() for host in hosts}


def _check_record(authority: _Authority, request: Request, now: datetime, *, rotate: bool) -> None:
    """Refuse a key that was revoked or is another's, and without `rotate` a second key under a name."""
    name = request.name
    for other in authority.record(now, about=request):
        same_key, same_name = other.public_key == request.public_key, other.name == name
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
                f"{name} has a certificate with another key (serial {hex_serial(other.serial)}, valid until "
                f"{date_text(other.not_after)}). If {name} changes its key, approve with --rotate and revoke the old one "
                "afterwards; if this is somebody else, ask for another name."
            )


def _issued(
    authority: _Authority, request: Request, key: ec.EllipticCurvePrivateKey, now: datetime, days: int
) -> x509.Certificate:
    """Return the certificate of a request; only what is written here is granted."""
    name, role, public_key = request.name, request.role, request.public_key
    usage = ExtendedKeyUsageOID.SERVER_AUTH if role == "server" else ExtendedKeyUsageOID.CLIENT_AUTH
    names: list[x509.GeneralName] = [_general_name(host) for host in request.hosts]
    if role == "site":
        names = [x509.UniformResourceIdentifier(f"silotune:site:{name}")]
    return (
        _builder(_subject(name, role), authority.certificate.subject, public_key, now, timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, SHA256)
    )


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


def _check_hosts(role: str, hosts: Sequence[str], *, whose: str = "the request") -> None:
    if role == "site" and hosts:
        raise TrustError(f"{whose} of a site names hosts; only a server has them. Leave out --host.")
    if role == "server" and not hosts:
        raise TrustError(f"{whose} of a server names no host; give each name and address that sites dial with --host.")
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


def _check_private(folder: Path) -> None:
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & 0o022:
        raise TrustError(
            f"others may write into {folder} (mode {mode:04o}), so they could exchange what this CA issued or revoked; check "
            f"that nobody did, then: chmod 700 {folder}"
        )


def _check_days(days: int) -> None:
    if not 1 <= days <= MAX_DAYS:
        raise TrustError(f"days is {days}; expected 1 to {MAX_DAYS}.")
