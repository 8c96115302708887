"""Accounts: made by invitation, signed in to with a password and an authenticator, changed by administrators.

Formal guarantees (tests: tests/shared/web/test_accounts.py)
    * Signing in fails with one text and in one time, whatever was wrong (test_a_refusal_does_not_tell_what_was_wrong,
      test_unknown_names_take_as_long).
    * A code of an authenticator counts once (test_a_code_counts_once), also if it is sent twice at one moment.
    * An invitation counts once and for a limited time (test_an_invitation_counts_once, test_an_invitation_ends).
    * There is always an administrator who can sign in (test_the_last_administrator_stays).
    * Where somebody else may have been signed in, no session and no known browser is left: after another password, an
      invitation anew, disabling, and when an administrator says so (test_known_browsers_end).
    * Everything that changes an account is recorded before it holds; what cannot be recorded does not happen
      (test_what_cannot_be_recorded_does_not_happen).
"""

from __future__ import annotations

import secrets
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from shared import names
from shared.errors import SilotuneError
from shared.trust.keystore import Seal
from shared.web.accounts import codes, devices, passwords
from shared.web.accounts.attempts import Attempts
from shared.web.accounts.passwords import Unsuitable
from shared.web.accounts.sessions import end_all
from shared.web.roles import Role
from shared.web.state.database import Database
from shared.web.state.tables import ACCOUNTS, INVITATIONS

Record = Callable[[str, str, Mapping[str, Any]], None]
"""Notes what an account did: its name, the action, details without any secret. What it raises stops the action."""

FIRST_SECONDS, INVITED_SECONDS = 15 * 60, 72 * 3600
_MOST_NAME = 64


class Refused(SilotuneError):
    """Somebody is not who they say; the text is the same whatever was wrong."""


class Gone(SilotuneError):
    """There is no such account or invitation, or not any more."""


@dataclass(frozen=True, kw_only=True)
class Account:
    """One account.

    Attributes:
        id: random, of 128 bits.
        name: as people see it.
        role: what it may do, see `shared.web.roles`.
        invited: the invitation was not taken yet.
        elsewhere: it signs in by OpenID Connect.
        disabled: it cannot sign in.
        created, signed_in: seconds since 1970; None: never.
    """

    id: str
    name: str
    role: Role
    invited: bool
    elsewhere: bool
    disabled: bool
    created: int
    signed_in: int | None


@dataclass(frozen=True, kw_only=True)
class Invitation:
    """An invitation that can be taken.

    Attributes:
        name: of the account; None of the first administrator, who chooses one.
        secret: for the authenticator.
        expires: seconds since 1970.
    """

    name: str | None
    secret: str
    expires: int


@dataclass(frozen=True, kw_only=True)
class Accounts:
    """The accounts of a console.

    Attributes:
        database: where they are kept.
        seal: seals the secrets of authenticators.
        now: whole seconds since 1970.
        record: see `Record`.
    """

    database: Database
    seal: Seal
    now: Callable[[], int]
    record: Record

    @property
    def attempts(self) -> Attempts:
        """Who has tried how often."""
        return Attempts(database=self.database, now=self.now)

    def all(self) -> list[Account]:
        """Return all accounts by name."""
        with self.database.reading() as connection:
            return [_account(row) for row in connection.execute(select(ACCOUNTS).order_by(ACCOUNTS.c.name_key))]

    def find(self, account: str) -> Account | None:
        """Return the account of an id, if it may be used."""
        with self.database.reading() as connection:
            row = connection.execute(select(ACCOUNTS).where(ACCOUNTS.c.id == account)).one_or_none()
        return None if row is None or row.disabled else _account(row)

    def invite_first(self) -> str | None:
        """Return a code by which the first administrator makes an account; None if there is one who can sign in."""
        with self.database.writing() as connection:
            if _administrators(connection):
                return None
            connection.execute(delete(INVITATIONS).where(INVITATIONS.c.account.is_(None)))
            return self._invite(connection, None, FIRST_SECONDS)

    def invite(self, name: str, role: Role, *, by: Account) -> str:
        """Make an account and return the code with which its person takes it.

        Raises:
            Unsuitable: the name is taken, empty, too long, or not plain, see `shared.names`.
        """
        shown = checked_name(name)
        with self.database.writing() as connection:
            account = _new(connection, shown, role, self.now())
            self.record(by.name, "account.invited", {"name": shown, "role": role.value})
            return self._invite(connection, account, INVITED_SECONDS)

    def invite_again(self, account: str, *, by: Account) -> str:
        """Return a new code for an account whose person lost password or authenticator; both, and its sessions, end at once.

        Raises:
            Gone: there is no such account, or it signs in elsewhere.
            Unsuitable: it is the last administrator's.
        """
        with self.database.writing() as connection:
            found = _locked(connection, account)
            if found.elsewhere:
                raise Gone("it signs in elsewhere")
            _keep_one(connection, found)
            self.record(by.name, "account.reset", {"name": found.name})
            connection.execute(_of(account).values(password=None, totp=None))
            connection.execute(delete(INVITATIONS).where(INVITATIONS.c.account == account))
            _end_everywhere(connection, account)
            return self._invite(connection, account, INVITED_SECONDS)

    def invitation(self, code: str, *, address: str) -> Invitation:
        """Return what a code invites to.

        Raises:
            Gone: it is none, or not any more.
            TooManyAttempts: of this address.
        """
        self.attempts.begin(account=None, address=address, purpose="invitation")
        with self.database.reading() as connection:
            found = self._invitation(connection, code)
        self.attempts.succeeded(account=None, address=address, purpose="invitation")
        return found

    def take(self, code: str, *, name: str | None, password: str, totp: str, address: str) -> Account:
        """Take an invitation: set the password and the authenticator of an account, and sign it in.

        Args:
            name: of the first administrator; of others it is fixed.

        Raises:
            Gone, TooManyAttempts: see `invitation`.
            Refused: the authenticator's code is not right.
            Unsuitable: of name or password.
        """
        self.invitation(code, address=address)
        with self.database.writing() as connection:
            invited = self._invitation(connection, code)
            shown = invited.name or checked_name(name or "")
            kept = passwords.hashed(password, name=shown)
            step = codes.step_of(invited.secret, totp, self.now())
            if step is None:
                raise Refused("the code is not right")
            where = INVITATIONS.c.code == codes.invitation_hash(code)
            account = connection.execute(select(INVITATIONS.c.account).where(where)).scalar_one()
            if not connection.execute(delete(INVITATIONS).where(where)).rowcount:
                raise Gone("it was taken at the same moment")
            account = account or _new(connection, shown, Role.ADMINISTRATOR, self.now())
            self.record(shown, "account.taken", {"address": address})
            sealed = self.seal.seal(invited.secret.encode(), context=f"totp/{account}")
            taken = {"password": kept, "totp": sealed, "totp_step": step, "signed_in": self.now()}
            connection.execute(_of(account).values(**taken))
            return _locked(connection, account)

    def sign_in(self, name: str, password: str, totp: str, *, address: str, cookie: str = "") -> Account:
        """Return the account of whoever proves to be its person.

        Args:
            cookie: by which a browser may be known, see `shared.web.accounts.devices`.

        Raises:
            Refused: they do not.
            TooManyAttempts: by this name or address.
        """
        key = name_key(name)
        device = self._device(key, cookie)
        blocked = self.attempts.begin(account=key, address=address, device=device)
        with self.database.reading() as connection:
            row = connection.execute(select(ACCOUNTS).where(ACCOUNTS.c.name_key == key)).one_or_none()
        fits = passwords.fits(password, None if row is None else row.password)
        if row is None or not fits or row.disabled or not self._use(row, totp):
            if blocked:  # what was typed may be a password, so only a name that is an account's is noted
                self.record("-", "sign-in.blocked", {"name": None if row is None else row.name, "address": address})
            raise Refused("name, password or code are not right")
        self.attempts.succeeded(account=key, address=address, device=device)
        account = _account(row)
        self.record(account.name, "sign-in", {"address": address})
        return account

    def prove(self, account: Account, password: str, totp: str, *, address: str, cookie: str = "") -> None:
        """Check password and code of somebody who is signed in; raises as `sign_in`."""
        key = name_key(account.name)
        device = self._device(key, cookie)
        self.attempts.begin(account=key, address=address, device=device)
        with self.database.reading() as connection:
            row = connection.execute(select(ACCOUNTS).where(ACCOUNTS.c.id == account.id)).one()
        if not passwords.fits(password, row.password) or not self._use(row, totp):
            raise Refused("password or code are not right")
        self.attempts.succeeded(account=key, address=address, device=device)

    def change_password(self, account: Account, password: str) -> None:
        """Set another password; every session of the account ends.

        Raises:
            Unsuitable: see `passwords.hashed`.
        """
        kept = passwords.hashed(password, name=account.name)
        with self.database.writing() as connection:
            self.record(account.name, "account.password", {})
            connection.execute(_of(account.id).values(password=kept))
            _end_everywhere(connection, account.id)

    def end_sessions(self, account: Account) -> None:
        """Sign out everywhere."""
        with self.database.writing() as connection:
            self.record(account.name, "sign-out.everywhere", {})
            _end_everywhere(connection, account.id)

    def sign_out(self, account: str, *, by: Account) -> None:
        """End every session and known browser of an account.

        Raises:
            Gone: there is no such account.
        """
        with self.database.writing() as connection:
            found = _locked(connection, account)
            self.record(by.name, "account.signed-out", {"name": found.name})
            _end_everywhere(connection, account)

    def change(self, account: str, *, by: Account, role: Role | None = None, disabled: bool | None = None) -> Account:
        """Give another role, disable or enable; sessions end, of an account that is disabled known browsers, too.

        Raises:
            Gone: there is no such account.
            Unsuitable: it is the last administrator's.
        """
        with self.database.writing() as connection:
            found = _locked(connection, account)
            changes: dict[str, Any] = {}
            if role is not None and role != found.role:
                changes["role"] = role.value
            if disabled is not None and disabled != found.disabled:
                changes["disabled"] = disabled
            if not changes:
                return found
            if disabled or (role is not None and role != Role.ADMINISTRATOR):
                _keep_one(connection, found)
            self.record(by.name, "account.changed", {"name": found.name, **changes})
            connection.execute(_of(account).values(**changes))
            (_end_everywhere if disabled else end_all)(connection, account)
            return _locked(connection, account)

    def from_issuer(self, *, issuer: str, subject: str, name: str, role: Role, address: str) -> Account:
        """Return the account of somebody whom an OpenID provider vouches for, made at the first time, with the role of now.

        Raises:
            Refused: the account is disabled.
            Unsuitable: another account has the name.
        """
        with self.database.writing() as connection:
            where = (ACCOUNTS.c.issuer == issuer) & (ACCOUNTS.c.subject == subject)
            row = connection.execute(select(ACCOUNTS).where(where)).one_or_none()
            if row is not None and row.disabled:
                raise Refused("the account is disabled")
            account = row.id if row else _new(connection, checked_name(name), role, self.now())
            found = _locked(connection, account)
            self.record(found.name, "sign-in", {"address": address, "issuer": issuer, "role": role.value})
            if found.role != role:
                end_all(connection, account)
            now = {"issuer": issuer, "subject": subject, "role": role.value, "signed_in": self.now()}
            connection.execute(_of(account).values(**now))
            return _locked(connection, account)

    def known(self, account: Account, cookie: str) -> str:
        """Return the cookie by which the browser of an account that has just signed in is known."""
        where = ACCOUNTS.c.id == account.id
        with self.database.reading() as connection:
            ended = connection.execute(select(ACCOUNTS.c.browsers_ended).where(where)).scalar_one()
        return devices.cookie_of(self.seal, cookie, devices.known_as(account.id, ended), now=self.now())

    def _device(self, key: str, cookie: str) -> str | None:
        if not cookie:
            return None
        with self.database.reading() as connection:
            row = connection.execute(select(ACCOUNTS).where(ACCOUNTS.c.name_key == key)).one_or_none()
        if row is None:
            return None
        return devices.device_of(self.seal, cookie, devices.known_as(row.id, row.browsers_ended), now=self.now())

    def _use(self, row: Any, totp: str) -> bool:
        """Use up an authenticator's code; return whether it is right and was not used before."""
        if row.totp is None:
            return False
        secret = self.seal.open(row.totp, context=f"totp/{row.id}").decode()
        step = codes.step_of(secret, totp, self.now())
        if step is None:
            return False
        newer = update(ACCOUNTS).where((ACCOUNTS.c.id == row.id) & (ACCOUNTS.c.totp_step < step))
        with self.database.writing() as connection:
            return bool(connection.execute(newer.values(totp_step=step, signed_in=self.now())).rowcount)

    def _invite(self, connection: Connection, account: str | None, seconds: int) -> str:
        code = codes.new_invitation()
        kept = codes.invitation_hash(code)
        secret = self.seal.seal(codes.new_secret().encode(), context=f"invitation/{kept}")
        connection.execute(
            insert(INVITATIONS).values(code=kept, account=account, totp=secret, expires=self.now() + seconds)
        )
        return code

    def _invitation(self, connection: Connection, code: str) -> Invitation:
        kept = codes.invitation_hash(code)
        joined = INVITATIONS.outerjoin(ACCOUNTS)
        wanted = select(INVITATIONS, ACCOUNTS.c.name, ACCOUNTS.c.disabled).select_from(joined)
        row = connection.execute(wanted.where(INVITATIONS.c.code == kept)).one_or_none()
        if row is None or row.expires <= self.now() or row.disabled:
            raise Gone("there is no such invitation, or it is over")
        if row.account is None and _administrators(connection):
            raise Gone("there is a first administrator by now")
        secret = self.seal.open(row.totp, context=f"invitation/{kept}").decode()
        return Invitation(name=row.name, secret=secret, expires=row.expires)


def name_key(name: str) -> str:
    """Return what two spellings of one name have in common, as it is kept."""
    return names.name_key(name)[:128]


def checked_name(name: str) -> str:
    """Return a name as it is kept; raise `Unsuitable` if it cannot be one."""
    shown = unicodedata.normalize("NFC", " ".join(name.split()))
    if not 2 <= len(shown) <= _MOST_NAME or not names.is_plain(shown):
        raise Unsuitable("name_wrong")
    return shown


def _new(connection: Connection, name: str, role: Role, now: int) -> str:
    account = secrets.token_hex(16)
    values = {"id": account, "name": name, "name_key": name_key(name), "role": role.value, "created": now}
    try:
        with connection.begin_nested():
            connection.execute(insert(ACCOUNTS).values(**values, totp_step=0, disabled=False))
    except IntegrityError:
        raise Unsuitable("name_taken") from None
    return account


def _of(account: str) -> Any:
    return update(ACCOUNTS).where(ACCOUNTS.c.id == account)


def _end_everywhere(connection: Connection, account: str) -> None:
    """End every session and known browser of an account, in the transaction at hand."""
    end_all(connection, account)
    connection.execute(_of(account).values(browsers_ended=ACCOUNTS.c.browsers_ended + 1))


def _locked(connection: Connection, account: str) -> Account:
    # What comes from an address may be anything; PostgreSQL takes no zeros.
    if account.isalnum():
        row = connection.execute(select(ACCOUNTS).where(ACCOUNTS.c.id == account).with_for_update()).one_or_none()
        if row is not None:
            return _account(row)
    raise Gone("there is no such account")


def _administrators(connection: Connection) -> list[str]:
    """Return the ids of administrators who can sign in."""
    can = ACCOUNTS.c.password.is_not(None) | ACCOUNTS.c.issuer.is_not(None)
    where = (ACCOUNTS.c.role == Role.ADMINISTRATOR.value) & ~ACCOUNTS.c.disabled & can
    return list(connection.execute(select(ACCOUNTS.c.id).where(where).with_for_update()).scalars())


def _keep_one(connection: Connection, account: Account) -> None:
    """Raise `Unsuitable` if nobody but this account could manage accounts."""
    if _administrators(connection) == [account.id]:
        raise Unsuitable("last_administrator")


def _account(row: Any) -> Account:
    return Account(
        id=row.id,
        name=row.name,
        role=Role(row.role),
        invited=row.password is None and row.issuer is None,
        elsewhere=row.issuer is not None,
        disabled=row.disabled,
        created=row.created,
        signed_in=row.signed_in,
    )
