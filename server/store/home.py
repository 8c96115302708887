"""The coordinator's folder: which file lies where, and what its settings are.

coordinator.toml   name, hosts and ports
keys/              server.key (TLS; plain PEM, for Flower reads it) and round.key (signs rounds and adapters); made here
trust/             ca.crt, crl.pem, server.crt and sites/*.crt: who may connect
jobs/NUMBER-NAME/  the signed job, its public evaluation data, its state and its run folder
audit/             the audit log
logs/, flower/     Flower's output and own files
coordinator.json   what the running coordinator says of itself
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import AwareDatetime, BaseModel, Field, ValidationError

from shared.errors import RunError
from shared.files.atomic import exclusive_lock
from shared.files.json_files import read_object
from shared.files.places import Below
from shared.job.parsing import Section, load_toml, parse
from shared.job.values import Name
from shared.trust.audit_log import AuditLog
from shared.trust.signed_file import Signer
from shared.trust.signing import SigningKey, load_signing_key


class CoordinatorConfig(Section):
    """`coordinator.toml`."""

    name: Name = "coordinator"
    """Name in the server certificate."""
    hosts: tuple[str, ...] = Field(default=("localhost", "127.0.0.1"), min_length=1)
    """Host names and addresses under which sites reach the Fleet API; they stand in the server certificate."""
    fleet_host: str = "0.0.0.0"  # noqa: S104 (sites must reach it; TLS and authentication are always on)
    """Address that the Fleet API (gRPC over TLS, for sites) listens on."""
    fleet_port: int = Field(default=9092, ge=1, le=65535)
    """Its port: the only one that a firewall has to open."""
    control_port: int = Field(default=8000, ge=1, le=65535)
    """Port of Flower's Control API, which has no authentication: always on 127.0.0.1."""


class _SiteStatus(BaseModel):
    online: bool
    until: str


class _Status(BaseModel):
    """What commands read of `coordinator.json`; they send signals to `pid`."""

    pid: int = Field(gt=1, lt=2**31, strict=True)
    updated: AwareDatetime
    state: str
    sites: dict[str, _SiteStatus]


@dataclass(frozen=True)
class CoordinatorHome:
    """The paths of a coordinator's folder; what lies there stands above."""

    path: Path

    config = Below("coordinator.toml")
    trust = Below("trust")
    ca_certificate = Below("trust/ca.crt")
    server_certificate = Below("trust/server.crt")
    server_key = Below("keys/server.key")
    round_key = Below("keys/round.key")
    jobs = Below("jobs")
    audit = Below("audit")
    status = Below("coordinator.json")
    superlink_log = Below("logs/superlink.log")  # of all Flower's processes, those of the ServerApp included
    flower = Below("flower")

    def load_config(self) -> CoordinatorConfig:
        """Return the parsed `coordinator.toml`.

        Raises:
            ConfigError: if it is missing or not valid.
        """
        return parse(CoordinatorConfig, load_toml(self.config), source=str(self.config))

    def load_round_key(self, passphrase: str | None) -> SigningKey:
        """Return the key that signs rounds and adapters."""
        return load_signing_key(self.round_key, passphrase)

    def signer(self, passphrase: str | None) -> Signer:
        """Return who signs files for this coordinator: its name, with the round key."""
        return Signer(role="coordinator", name=self.load_config().name, key=self.load_round_key(passphrase))

    def open_log(self, key: SigningKey) -> AuditLog:
        """Return the audit log, its head signed with the round key; several processes may write to it."""
        return AuditLog(self.audit, seal_head=key)

    def read_status(self) -> dict[str, Any]:
        """Return what the coordinator last said of itself; {} if it never did, or the file is not as it wrote it."""
        try:
            said = read_object(self.status)
            _Status.model_validate(said)
        except (RunError, ValidationError):
            return {}
        return said

    def works_there(self, pid: int) -> bool:
        """Return whether this process has the lock file open that `locked` holds, as far as the system tells."""
        lock = self.path / ".coordinator.lock"
        try:
            wanted = lock.stat()
            for handle in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):  # closed since
                    found = handle.stat()
                    if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                        return True
        except OSError:
            return False
        return False

    def locked(self) -> AbstractContextManager[None]:
        """Let one coordinator at a time work in this folder.

        Raises:
            RunError: if another one does.
        """
        busy = f"another coordinator works in {self.path}; stop it first."
        return exclusive_lock(self.path / ".coordinator.lock", busy)
