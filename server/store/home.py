"""The coordinator's folder: which file lies where, and what its settings are.

coordinator.toml   name, hosts and ports
keys/              server.key (TLS) and round.key (signs rounds and adapters); made here
trust/             ca.crt, crl.pem, server.crt and sites/*.crt: who may connect
jobs/NUMBER-NAME/  the signed job, its public evaluation data, its state and its run folder
audit/             the audit log
logs/              what the coordinator wrote about itself
coordinator.json   what the running coordinator says of itself
console/           accounts of the console, if there ever was one; in no backup
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from shared.errors import RunError
from shared.files.atomic import exclusive_lock
from shared.files.json_files import read_object
from shared.files.places import Below
from shared.job.parsing import Section, load_toml, parse
from shared.job.values import Name
from shared.service.logs import LogFormat
from shared.service.page import Listen
from shared.trust.audit_log import AuditLog
from shared.trust.signed_file import Signer
from shared.trust.signing import SigningKey, load_signing_key


class CoordinatorConfig(Section):
    """`coordinator.toml`."""

    name: Name = "coordinator"
    """Name in the server certificate."""
    hosts: tuple[str, ...] = Field(default=("localhost", "127.0.0.1"), min_length=1)
    """Host names and addresses under which sites reach it; they stand in the server certificate."""
    listen_host: str = "0.0.0.0"  # noqa: S104 (sites must reach it; mutual TLS is always on)
    """Address to listen on for sites (gRPC over mutual TLS 1.3)."""
    listen_port: int = Field(default=9092, ge=1, le=65535)
    """Its port: the only one that other machines reach, and that a firewall has to open."""

    metrics_listen: Listen = "127.0.0.1:9492"
    """Where `/metrics` and `/healthz` are served on this machine, by plain HTTP: an address and a port, or `off`. With an address
    that is no loopback address, everybody who reaches it can read them."""
    log_format: LogFormat = "text"
    """`text`: its logs are lines for people. `json`: one JSON object a line, with `time` (UTC), `level`, `logger`, `message`, and
    `job`, `round` and `site` where it is about one."""

    @property
    def address(self) -> str:
        """Where to listen, host:port."""
        host = f"[{self.listen_host}]" if ":" in self.listen_host else self.listen_host
        return f"{host}:{self.listen_port}"

    @model_validator(mode="before")
    @classmethod
    def _of_versions_before_0_2(cls, raw: Any) -> Any:
        """Read the names that the keys had, and leave out the port of Flower's Control API, which is gone."""
        if not isinstance(raw, dict):
            return raw
        names = {"fleet_host": "listen_host", "fleet_port": "listen_port"}
        return {names.get(key, key): value for key, value in raw.items() if key != "control_port"}


def _aware(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("a time without a time zone")
    return text


_Time = Annotated[str, Field(strict=True), AfterValidator(_aware)]


class _SiteStatus(BaseModel):
    online: bool
    until: str
    last_seen: str | None = None


class _Descriptors(BaseModel):
    used: int
    limit: int


class _Clock(BaseModel):
    set_by: float
    set_at: _Time | None
    synchronized: bool | None


class _Status(BaseModel):
    """What commands read of `coordinator.json`; they send signals to `pid`."""

    pid: int = Field(gt=1, lt=2**31, strict=True)
    updated: _Time
    state: str
    certificate_until: _Time | None = None
    descriptors: _Descriptors | None = None
    clock: _Clock | None = None
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
    log = Below("logs/coordinator.log")

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
