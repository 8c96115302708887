"""Opening what a console keeps: its folder, its key, its database.

console.key   seals the secrets of authenticators; under the passphrase of the folder's other keys, if they have one
console.db    accounts, sessions, invitations, attempts; not there if they are in PostgreSQL
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.trust.audit_log import AuditLog, Event
from shared.trust.keystore import Seal, load_secret, new_key, save_secret
from shared.web.accounts.accounts import Accounts, Record
from shared.web.accounts.sessions import Sessions
from shared.web.oidc.provider import Provider
from shared.web.oidc.settings import load_settings
from shared.web.state.database import Database

KEY_FILE = "console.key"
_PATIENCE = 10.0
"""Seconds for which whoever does something waits for who keeps the audit log locked, and holds one of the threads that answer."""


@dataclass(frozen=True, kw_only=True)
class People:
    """Who may use a console: their accounts and sessions, and their own provider of sign-in, or None."""

    accounts: Accounts
    sessions: Sessions
    provider: Provider | None = None


def seconds_now() -> int:
    """Return whole seconds since 1970."""
    return int(time.time())


def note(log: AuditLog, account: str, action: str, details: Mapping[str, Any]) -> None:
    """Note in a signed audit log what an account does; what cannot be noted is not done.

    Raises:
        TrustError: the log cannot be written.
        Held: others keep it locked for very long.
    """
    with log.locked(patience=_PATIENCE):
        log.append(Event.CONSOLE_ACTION, account=account, action=action, **details)


def open_accounts(
    folder: Path,
    *,
    url: str | None,
    passphrase: str | None,
    record: Record,
    now: Callable[[], int] = seconds_now,
) -> tuple[Accounts, Sessions]:
    """Return the accounts and sessions that a folder keeps; both are begun at the first time.

    Args:
        folder: of the console, private to its owner.
        url: of PostgreSQL; None: a file in the folder.
        passphrase: of the console's key.

    Raises:
        ConfigError, RunError, TrustError: as their texts say.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = folder / KEY_FILE
    if not key.exists():
        save_secret(key, new_key(), passphrase=passphrase)
    seal = Seal(load_secret(key, passphrase=passphrase))
    database = Database(folder, url)
    return Accounts(database=database, seal=seal, now=now, record=record), Sessions(database=database, now=now)


def open_people(
    folder: Path, *, url: str | None, passphrase: str | None, record: Record, now: Callable[[], int]
) -> People:
    """Return whom a folder lets in; see `open_accounts`."""
    accounts, sessions = open_accounts(folder, url=url, passphrase=passphrase, record=record, now=now)
    oidc = load_settings(folder).oidc
    provider = None if oidc is None else Provider(oidc, secret=oidc.secret(folder), now=now)
    return People(accounts=accounts, sessions=sessions, provider=provider)
