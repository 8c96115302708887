"""Sessions, kept at the server: a browser holds a random number, the database its hash.

Formal guarantees (tests: tests/shared/web/test_sessions.py)
    * A session ends after 30 minutes without a request and 12 hours after sign-in, whatever is asked
      (test_a_session_ends_idle_and_ends_old).
    * Whoever reads the database can open none (test_the_database_opens_no_session).
    * What needs a proof of the last five minutes has one of this very session (test_a_proof_is_of_one_session_and_ends).
    * Of an account that was disabled, or whose password or role changed, none goes on (tests/shared/web/test_accounts.py).
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, delete, insert, select, update

from shared.web.state.database import Database
from shared.web.state.tables import SESSIONS

IDLE_SECONDS, LONGEST_SECONDS = 30 * 60, 12 * 3600
PROVEN_SECONDS = 5 * 60
_NOTED_EVERY = 60  # seconds; not every request is a write


@dataclass(frozen=True, kw_only=True)
class Session:
    """A session that goes on.

    Attributes:
        label: names it on pages; opens nothing.
        account: id of whose it is.
        created, seen: seconds since 1970.
        address, browser: where it was begun.
        proven: when its person last proved to be the account's, by signing in or again since; 0: never.
    """

    label: str
    account: str
    created: int
    seen: int
    address: str
    browser: str
    proven: int


@dataclass(frozen=True, kw_only=True)
class Sessions:
    """The sessions of a console.

    Attributes:
        database: where they are kept.
        now: whole seconds since 1970.
    """

    database: Database
    now: Callable[[], int]

    def begin(self, account: str, *, address: str, browser: str, proven: int | None = None) -> str:
        """Begin a session and return what the browser shall hold, 256 random bits.

        Args:
            proven: when the person proved to be the account's, seconds since 1970; 0: never; None: now.
        """
        secret, now = secrets.token_urlsafe(32), self.now()
        with self.database.writing() as connection:
            connection.execute(delete(SESSIONS).where(self._over()))
            connection.execute(
                insert(SESSIONS).values(
                    id=_hash(secret),
                    account=account,
                    created=now,
                    seen=now,
                    address=address[:64],
                    browser=browser[:200],
                    proven=now if proven is None else proven,
                )
            )
        return secret

    def find(self, secret: str, *, noted: bool = True) -> Session | None:
        """Return the session of a browser, if it goes on.

        Args:
            noted: a person asked, so that the session is not idle.
        """
        where = (SESSIONS.c.id == _hash(secret)) & ~self._over()
        with self.database.reading() as connection:
            row = connection.execute(select(SESSIONS).where(where)).one_or_none()
        if row is None:
            return None
        if noted and self.now() - row.seen >= _NOTED_EVERY:
            with self.database.writing() as connection:
                connection.execute(update(SESSIONS).where(where).values(seen=self.now()))
        return _session(row)

    def prove(self, secret: str) -> None:
        """Note that the person of a session has just proved to be its account's."""
        where = (SESSIONS.c.id == _hash(secret)) & ~self._over()
        with self.database.writing() as connection:
            connection.execute(update(SESSIONS).where(where).values(proven=self.now()))

    def is_proven(self, session: Session) -> bool:
        """Return whether that was within the last five minutes."""
        return 0 <= self.now() - session.proven < PROVEN_SECONDS

    def of(self, account: str) -> list[Session]:
        """Return an account's sessions, the newest first."""
        where = (SESSIONS.c.account == account) & ~self._over()
        with self.database.reading() as connection:
            rows = connection.execute(select(SESSIONS).where(where).order_by(SESSIONS.c.created.desc())).all()
        return [_session(row) for row in rows]

    def end(self, secret: str) -> None:
        """End one."""
        with self.database.writing() as connection:
            connection.execute(delete(SESSIONS).where(SESSIONS.c.id == _hash(secret)))

    def _over(self) -> ColumnElement[bool]:
        now = self.now()
        return (SESSIONS.c.seen <= now - IDLE_SECONDS) | (SESSIONS.c.created <= now - LONGEST_SECONDS)


def end_all(connection: Connection, account: str) -> None:
    """End every session of an account, in the transaction at hand."""
    connection.execute(delete(SESSIONS).where(SESSIONS.c.account == account))


def _session(row: object) -> Session:
    found = row._mapping  # type: ignore[attr-defined]
    rest = {name: found[name] for name in ("account", "created", "seen", "address", "browser", "proven")}
    return Session(label=found["id"][:8], **rest)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="replace")).hexdigest()
