"""A real site's folder: which file lies where, how it is made, and how it is opened.

site.toml      name, data, budget, address of the coordinator
policy.toml    what the site accepts
ca.crt         certificate of the consortium, from whoever runs its CA
site.crt       this site's certificate, signed by that CA
keys/          site.key (proves who the site is), storage.key (reads what it keeps) and log.key (signs the audit log);
               made here, never leave
log.pub        lets others check the audit log
ledger.db      the privacy budget, sealed
records.sealed which records were charged under which data set's name, as keyed digests, sealed
declared.json  the public size that the site declares
approvals.sealed which jobs wait for people of the site, and what they said, sealed
policies/      texts of policies that were proposed or in force; the audit log says which was when
rounds/        stored releases and optimiser states, sealed
audit/         the audit log
node.json      what the running node says of itself
console/       accounts of the console, if there is one; settings of its sign-in
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from client.approval.store import STORE_FILE
from client.site.config import SiteConfig
from shared.errors import ConfigError, TrustError
from shared.files.atomic import exclusive_lock
from shared.files.backup import refuse_unpacked
from shared.files.places import Below
from shared.job.parsing import load_toml, parse
from shared.trust.audit_log import AuditLog
from shared.trust.certificates import identity, load_certificate
from shared.trust.keystore import Seal, load_secret
from shared.trust.node_keys import load_private_key
from shared.trust.signed_file import Signer
from shared.trust.signing import load_signing_key
from shared.trust.trust_store import verify_certificate

if TYPE_CHECKING:
    from client.site.site import Site


LOCK_FILE = ".node.lock"


@dataclass(frozen=True)
class SiteHome:
    """The paths of a site's folder; what lies there stands above."""

    path: Path

    config = Below("site.toml")
    policy = Below("policy.toml")
    ca_certificate = Below("ca.crt")
    certificate = Below("site.crt")
    key = Below("keys/site.key")
    next_key = Below("keys/site.key.next")  # of a rotation that was requested but not installed
    storage_key = Below("keys/storage.key")
    log_key = Below("keys/log.key")
    audit = Below("audit")
    status = Below("node.json")
    approvals = Below(STORE_FILE)

    @property
    def key_files(self) -> list[Path]:
        """The key files that are there, all under one passphrase."""
        return [self.key, self.storage_key, self.log_key, *([self.next_key] if self.next_key.exists() else [])]

    def load_config(self) -> SiteConfig:
        """Return the parsed `site.toml`.

        Raises:
            ConfigError: if it is missing or not valid.
        """
        return parse(SiteConfig, load_toml(self.config), source=str(self.config))

    def coordinator(self) -> str:
        """Return the coordinator's address, host:port.

        Raises:
            ConfigError: `site.toml` names none, or is not valid.
        """
        address = self.load_config().coordinator
        if address is None:
            raise ConfigError(f'{self.config} names no coordinator; add the line: coordinator = "host:9092"')
        return address

    def signer(self, passphrase: str | None) -> Signer:
        """Return who signs files for this site: its name, with the key of its audit log."""
        key = load_signing_key(self.log_key, passphrase)
        return Signer(role="site", name=self.load_config().name, key=key)

    def locked(self) -> AbstractContextManager[None]:
        """Let one node at a time work in this folder.

        Raises:
            RunError: if another one does, or the folder is not there.
        """
        return exclusive_lock(self.path / LOCK_FILE, f"another node works in {self.path}; stop it first.")


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Who the site is towards the coordinator.

    Attributes:
        address: of the coordinator, host:port.
        ca_certificate: PEM.
        certificate: the site's own.
        private_key: belongs to it.
    """

    address: str
    ca_certificate: bytes
    certificate: x509.Certificate
    private_key: ec.EllipticCurvePrivateKey


def load_identity(home: SiteHome, *, passphrase: str | None, now: datetime | None = None) -> Identity:
    """Return the site's identity, checked.

    Raises:
        ConfigError: `site.toml` names no coordinator.
        TrustError: key, certificate or CA are missing, do not belong together, or have expired.
    """
    config, address = home.load_config(), home.coordinator()
    for path, what in ((home.ca_certificate, "the consortium's CA certificate"), (home.certificate, "its certificate")):
        if not path.exists():
            raise TrustError(
                f"the site has no {path.name}, {what}. Send {home.path}/{config.name}.csr to whoever runs the CA, then: "
                f"silotune site install {home.path} --certificate FILE --ca FILE"
            )
    certificate = load_certificate(home.certificate)
    verify_certificate(certificate, load_certificate(home.ca_certificate), now or datetime.now(UTC))
    check_holder(certificate, config.name)
    private_key = load_private_key(home.key, passphrase)
    if certificate.public_key() != private_key.public_key():
        raise TrustError(f"{home.certificate} was made for another key than {home.key}; install the one for this key.")
    return Identity(
        address=address,
        ca_certificate=home.ca_certificate.read_bytes(),
        certificate=certificate,
        private_key=private_key,
    )


def check_holder(certificate: x509.Certificate, name: str) -> None:
    """Check that a certificate was made for the site of this name; the coordinator refuses any other name.

    Raises:
        TrustError: it is another site's, or a server's.
    """
    holder, role = identity(certificate)
    if (holder, role) != (name, "site"):
        raise TrustError(
            f"the certificate was made for the {role} {holder!r}, but this is the site {name!r} (name in site.toml). Install "
            "the right one, or mend the name."
        )


def open_log(home: SiteHome, *, passphrase: str | None) -> AuditLog:
    """Return the site's audit log; its head is signed with `keys/log.key`."""
    return AuditLog(home.audit, seal_head=load_signing_key(home.log_key, passphrase))


def open_site(
    home: SiteHome, *, passphrase: str | None, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
) -> Site:
    """Open a real site: with its policy, its audit log and its storage key.

    Raises:
        ConfigError, TrustError, DataError: as their texts say.
        RunError: the folder is a backup that was unpacked by hand.
    """
    # Imported here: everything else in this file must not wait for PyTorch.
    from client.site.guard import Guard
    from client.site.site import Site

    refuse_unpacked(home.path, "silotune site restore BACKUP HOME")
    config = home.load_config()
    seal = Seal(load_secret(home.storage_key, passphrase=passphrase))
    guard = Guard(
        site=config.name,
        policy_file=home.policy,
        seal=seal,
        log=open_log(home, passphrase=passphrase),
        key=lambda: _key(home.key, home.key.stat().st_mtime_ns, passphrase),
        clock=clock,
    )
    return Site(home.path, guard=guard)


@functools.lru_cache(maxsize=1)
def _key(path: Path, stamp: int, passphrase: str | None) -> ec.EllipticCurvePrivateKey:
    # Read again when it was exchanged; a passphrase takes a while.
    return load_private_key(path, passphrase)
