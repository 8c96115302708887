"""`console.toml` in a console's folder: which OpenID provider signs people in, and which of its groups has which role."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from shared.job.parsing import Section, load_toml, parse
from shared.trust.keystore import read_passphrase
from shared.web.roles import Role

SETTINGS_FILE = "console.toml"


class OidcConfig(Section):
    """Sign-in elsewhere."""

    issuer: str
    """Address of the provider, as its tokens name it, such as `https://login.hospital.example/realms/staff`."""
    client_id: str = Field(min_length=1, max_length=300)
    """Under which it knows this console."""
    client_secret_file: str | None = None
    """File with the client's secret, readable by its owner alone; none for a public client, which PKCE protects."""
    title: str = Field(default="OpenID Connect", min_length=1, max_length=60)
    """What the page of sign-in calls it."""
    scopes: tuple[str, ...] = ("openid", "profile")
    """What is asked for; some providers tell groups only with a scope of their own."""
    groups_claim: str = Field(default="groups", min_length=1)
    """Where a token names the groups."""
    roles: dict[str, Role] = Field(min_length=1)
    """Group and role; of somebody in several groups the first line counts. Whoever is in none may not come in."""

    @field_validator("issuer")
    @classmethod
    def _check_issuer(cls, issuer: str) -> str:
        if not is_protected(issuer):
            raise ValueError("the issuer must be an https:// address")
        return issuer

    def role_of(self, claims: Mapping[str, Any]) -> Role | None:
        """Return the role of somebody by the groups in their token; None if they have none here."""
        told = claims.get(self.groups_claim)
        groups = (
            {str(group) for group in told} if isinstance(told, list) else {told} if isinstance(told, str) else set()
        )
        return next((role for group, role in self.roles.items() if group in groups), None)

    def secret(self, folder: Path) -> str | None:
        """Return the client's secret.

        Raises:
            TrustError: its file cannot be read, or others may read it.
        """
        return None if self.client_secret_file is None else read_passphrase(folder / self.client_secret_file)


class ConsoleConfig(Section):
    """`console.toml`."""

    oidc: OidcConfig | None = None


def load_settings(folder: Path) -> ConsoleConfig:
    """Return the settings of a console's folder; without a file, those that nobody changed.

    Raises:
        ConfigError: the file is not valid.
    """
    path = folder / SETTINGS_FILE
    return parse(ConsoleConfig, load_toml(path), source=str(path)) if path.exists() else ConsoleConfig()


def is_protected(address: str) -> bool:
    """Return whether nobody on the way can read or change what is sent there: by TLS, or within this machine."""
    try:
        parts = urlsplit(address)
        host = parts.hostname or ""
        return bool(host) and (
            parts.scheme == "https" or (parts.scheme == "http" and ipaddress.ip_address(host).is_loopback)
        )
    except ValueError:
        return False
