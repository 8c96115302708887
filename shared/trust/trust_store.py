"""Who may connect, as the coordinator sees it: a folder of certificates beside the CA's certificate and revocation list."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from shared.errors import RunError, TrustError
from shared.trust.certificates import (
    Judge,
    SiteIdentity,
    file_name,
    identity_of,
    load_certificate,
    parse_certificate,
    pem_bytes,
    whole_seconds,
    write_public,
)
from shared.trust.revocation import (
    check_newer,
    check_rollback,
    crl_digest,
    crl_number,
    load_crl,
    parse_crl,
    seen_crl,
)


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
        return self.judge(now).files((self.folder / "sites").glob("*.crt"))

    def install(self, cert_pem: bytes, now: datetime | None = None) -> SiteIdentity:
        """Verify a site's certificate and store it as `sites/NAME-SERIAL.crt`.

        Raises:
            TrustError: if it is anything but a valid certificate of a site, signed by this CA.
        """
        certificate = self.check(cert_pem, whole_seconds(now))
        path = self.folder / "sites" / file_name(certificate)
        write_public(path, pem_bytes(certificate))
        return identity_of(path, certificate, "valid", "")

    def check(self, cert_pem: bytes, now: datetime) -> x509.Certificate:
        """Return a site's certificate that could be installed.

        Raises:
            TrustError: as for `install`.
        """
        certificate = parse_certificate(cert_pem, "the certificate")
        state, reason = self.judge(whole_seconds(now)).judged(certificate)
        if state != "valid":
            raise TrustError(f"the certificate is not installed: {reason}")
        return certificate

    def check_list(self, pem: bytes) -> x509.CertificateRevocationList:
        """Return a revocation list that could be installed.

        Raises:
            TrustError: if it is none of this CA's, or older than the newest that was seen here.
        """
        ca = load_certificate(self.folder / "ca.crt")
        crl = parse_crl(pem, ca, "the revocation list")
        check_newer(self.folder, crl, ca)
        return crl

    def install_list(self, crl: x509.CertificateRevocationList) -> None:
        """Put a list into force, unless a newer one came in meanwhile, from another process or thread.

        Raises:
            TrustError: as for `check_list`.
        """
        with self._alone():
            check_newer(self.folder, crl, load_certificate(self.folder / "ca.crt"))
            write_public(self.folder / "crl.pem", crl.public_bytes(Encoding.PEM))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Wait until nobody else installs a list here."""
        folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def judge(self, now: datetime) -> Judge:
        """Return what certificates of sites are judged by at `now`.

        Raises:
            TrustError: as for `sites`.
        """
        ca = load_certificate(self.folder / "ca.crt")
        seen = seen_crl(self.folder)  # before the list, so that one published in between is never taken for older
        path = self.folder / "crl.pem"
        crl = load_crl(path, ca) if path.exists() else None
        if check_rollback(self.folder, crl, seen) and crl is not None:
            try:
                write_public(self.folder / "crl.number", f"{crl_number(crl)} {crl_digest(crl)}\n".encode())
            except RunError as error:
                raise TrustError(f"the newest revocation list cannot be remembered: {error}") from None
        return Judge(ca=ca, crl=crl, now=now, sites_only=True)


def verify_certificate(cert: x509.Certificate, ca_cert: x509.Certificate, now: datetime) -> None:
    """Check that a certificate was issued by a CA and is valid at `now`; who is no trust store has no revocation list.

    Raises:
        TrustError: if it is not, saying which.
    """
    state, reason = Judge(ca=ca_cert, crl=None, now=now).judged(cert)
    if state != "valid":
        raise TrustError(reason)
