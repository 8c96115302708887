"""How often somebody may try to sign in: by account and by address, in the database, so that a restart forgives nothing.

Through one address may come everybody, so what is tried there for one purpose holds back nobody who comes for another.

A browser that an account signed in with before has a count of its own (`shared/web/accounts/devices.py`): what others try
under the name, or from the same address, keeps its person waiting nowhere else.

Formal guarantees (tests: tests/shared/web/test_attempts.py)
    * An attempt counts before it is judged, so that many at once are no more than one after the other
      (test_attempts_at_once_all_count).
    * A name that no account has is held back like one that an account has (test_unknown_names_are_held_back_alike).
    * Whoever guesses elsewhere does not keep a known browser from signing in, and one that is known may guess no more often
      (test_a_known_browser_has_its_own_count).
    * Wrong invitations keep nobody from signing in, nor does the reverse (test_purposes_are_counted_apart).
    * What is kept does not grow without end (test_old_attempts_are_forgotten).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import Connection, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from shared.errors import SilotuneError
from shared.web.state.database import Database
from shared.web.state.tables import ATTEMPTS

Purpose = Literal["sign-in", "invitation", "elsewhere"]
"""With a password, with an invitation's code, or back from an OpenID provider."""
_BY_ADDRESS: dict[Purpose, str] = {"sign-in": "address", "invitation": "invitation", "elsewhere": "elsewhere"}
_FREE = {"account": 5, "device": 5} | dict.fromkeys(_BY_ADDRESS.values(), 30)
"""Failures before the first wait; behind one address there may be a ward."""
_FIRST_WAIT, _LONGEST_WAIT = 30, 900
_FORGOTTEN_AFTER = {"account": 86_400, "device": 86_400} | dict.fromkeys(_BY_ADDRESS.values(), 900)
"""Seconds without an attempt; through one address, such as that of a tunnel, may come everybody."""


class TooManyAttempts(SilotuneError):
    """Somebody has to wait.

    Attributes:
        seconds: so long.
    """

    def __init__(self, seconds: int) -> None:
        super().__init__(f"too many attempts; wait {seconds} seconds.")
        self.seconds = seconds


@dataclass(frozen=True, kw_only=True)
class Attempts:
    """Counts attempts.

    Attributes:
        database: where.
        now: whole seconds since 1970.
    """

    database: Database
    now: Callable[[], int]

    def begin(
        self, *, account: str | None, address: str, device: str | None = None, purpose: Purpose = "sign-in"
    ) -> bool:
        """Count an attempt as failed, before it is judged; return whether whoever fails now has to wait for the first time.

        Args:
            account: the name's key, whether there is such an account or not; None where none is named.
            device: names the account's browser, which then counts alone; None if it is not known.
            purpose: what is tried; an address has a count for each.

        Raises:
            TooManyAttempts: nothing was counted.
        """
        kinds = _kinds(account, address, device, purpose)
        now, blocked = self.now(), False
        with self.database.writing() as connection:
            for kind, seconds in _FORGOTTEN_AFTER.items():
                over = (ATTEMPTS.c.latest < now - seconds) & ATTEMPTS.c.who.startswith(f"{kind}:")
                connection.execute(delete(ATTEMPTS).where(over))
            for kind, what in kinds:
                wait = _waiting_since(connection, _key(kind, what)) - now
                if wait > 0:
                    raise TooManyAttempts(wait)
            for kind, what in kinds:
                failures = _counted(connection, _key(kind, what), now)
                if failures >= _FREE[kind]:
                    wait = min(_FIRST_WAIT << min(failures - _FREE[kind], 10), _LONGEST_WAIT)
                    where = ATTEMPTS.c.who == _key(kind, what)
                    connection.execute(update(ATTEMPTS).where(where).values(blocked_until=now + wait))
                    blocked |= failures == _FREE[kind]
        return blocked

    def succeeded(
        self, *, account: str | None, address: str, device: str | None = None, purpose: Purpose = "sign-in"
    ) -> None:
        """Take back the attempt that was counted: the account's failures are forgotten, of the address's this one only."""
        with self.database.writing() as connection:
            for kind, what in _kinds(account, address, device, purpose):
                where = ATTEMPTS.c.who == _key(kind, what)
                if kind in _BY_ADDRESS.values():
                    less = {"failures": ATTEMPTS.c.failures - 1, "blocked_until": 0}
                    connection.execute(update(ATTEMPTS).where(where).values(**less))
                else:
                    connection.execute(delete(ATTEMPTS).where(where))


def _kinds(account: str | None, address: str, device: str | None, purpose: Purpose) -> list[tuple[str, str]]:
    if device is not None:
        return [("device", device)]
    return [(_BY_ADDRESS[purpose], address), *([("account", account)] if account is not None else [])]


def _waiting_since(connection: Connection, who: str) -> int:
    found = connection.execute(select(ATTEMPTS.c.blocked_until).where(ATTEMPTS.c.who == who)).scalar()
    return int(found or 0)


def _counted(connection: Connection, who: str, now: int) -> int:
    """Count one more, and return how many there are."""
    more = update(ATTEMPTS).where(ATTEMPTS.c.who == who).values(failures=ATTEMPTS.c.failures + 1, latest=now)
    if not connection.execute(more).rowcount:
        try:
            with connection.begin_nested():
                connection.execute(insert(ATTEMPTS).values(who=who, failures=1, latest=now, blocked_until=0))
        except IntegrityError:  # somebody else began to count at the same moment
            connection.execute(more)
    return int(connection.execute(select(ATTEMPTS.c.failures).where(ATTEMPTS.c.who == who)).scalar_one())


def _key(kind: str, what: str) -> str:
    return f"{kind}:{hashlib.sha256(what.encode(errors='replace')).hexdigest()}"
