"""API tokens: who may ask for what, how much a day, and what was used, in one SQLite file.

Several services may share the file. A token is 256 random bits and is shown once; the file holds its SHA-256, which for a value
that nobody can guess is as good as a slow hash.

Formal guarantees (tests: tests/server/serving/test_tokens.py)
    * A token reaches what its scopes and models name, and nothing else (test_routes.py: test_every_scope_on_every_route).
    * A revoked or expired token is refused from the next request on: the file is asked each time
      (test_a_revoked_token_is_refused_at_once).
    * Use is on the disk before a request is computed, and quotas hold for all services of the file together, whatever is killed
      (test_quotas_hold_between_processes, test_a_kill_keeps_what_was_used).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from shared.errors import ConfigError, RunError, excerpt
from shared.files.atomic import require_file_or_nothing
from shared.job.parsing import nearest
from shared.job.values import NAME_PATTERN
from shared.trust.keystore import check_private, check_unwritable

Scope = Literal["predict", "completions", "explain", "metrics"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
_MARK = "slt_"
_VERSION = 1
_BUSY_SECONDS = 10.0
_TABLES = """
CREATE TABLE IF NOT EXISTS tokens (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    hash BLOB NOT NULL UNIQUE,
    scopes TEXT NOT NULL,
    models TEXT,
    requests_per_minute INTEGER,
    requests_per_day INTEGER,
    tokens_per_day INTEGER,
    made TEXT NOT NULL,
    expires TEXT,
    revoked TEXT
) STRICT;
CREATE TABLE IF NOT EXISTS usage (
    token INTEGER NOT NULL REFERENCES tokens(id),
    day TEXT NOT NULL,
    model TEXT NOT NULL,
    requests INTEGER NOT NULL DEFAULT 0,
    read_tokens INTEGER NOT NULL DEFAULT 0,
    written_tokens INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (token, day, model)
) STRICT, WITHOUT ROWID;
"""


@dataclass(frozen=True, kw_only=True)
class Token:
    """One token, without its secret.

    Attributes:
        scopes: what may be asked for.
        models: names that may be asked; None: all.
        requests_per_minute, requests_per_day, tokens_per_day: at most; None: no bound. Days are those of UTC.
        made, expires, revoked: ISO 8601, UTC.
    """

    id: int
    name: str
    scopes: tuple[Scope, ...]
    models: tuple[str, ...] | None
    requests_per_minute: int | None
    requests_per_day: int | None
    tokens_per_day: int | None
    made: str
    expires: str | None
    revoked: str | None

    def may(self, scope: Scope) -> bool:
        """Return whether it may ask for this."""
        return scope in self.scopes

    def may_ask(self, model: str) -> bool:
        """Return whether it may ask a model of this name."""
        return self.models is None or model in self.models


@dataclass(frozen=True)
class Use:
    """What a token used.

    Attributes:
        read_tokens, written_tokens: of the model's own tokens, of texts and of continuations.
    """

    requests: int = 0
    read_tokens: int = 0
    written_tokens: int = 0

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.read_tokens + self.written_tokens


class QuotaExceeded(Exception):
    """A request would go beyond what a token may use on a day; `what` names it, and `seconds` is when the next day begins."""

    def __init__(self, what: str, most: int, seconds: int) -> None:
        super().__init__(f"this token may use {most:,} {what} a day (UTC), which is used up or would be")
        self.seconds = seconds


class TokenFile:
    """The file; a thread may use one object at a time, several processes the file.

    Args:
        path: of the file, which `create` makes.
        now: seconds since 1970.
        busy_seconds: for which another process that holds the file alone is waited for.
    """

    def __init__(
        self,
        path: Path,
        *,
        create: bool = False,
        now: Callable[[], float] = time.time,
        busy_seconds: float = _BUSY_SECONDS,
    ) -> None:
        self.path, self._now, self._busy_seconds = path, now, busy_seconds
        if not create and not path.exists():
            raise ConfigError(f"there is no token file {path}; make it with: silotune tokens add NAME --tokens {path}")
        require_file_or_nothing(path)
        try:
            if create and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            self._connect()
        except (sqlite3.Error, OSError) as error:
            raise self._unusable(error) from None

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def add(
        self,
        name: str,
        *,
        scopes: Sequence[Scope],
        models: Sequence[str] | None = None,
        requests_per_minute: int | None = None,
        requests_per_day: int | None = None,
        tokens_per_day: int | None = None,
        days: int | None = None,
    ) -> str:
        """Make a token and return it; it cannot be shown again.

        Raises:
            ConfigError: if the name cannot be, or is taken, also by one that was revoked.
        """
        if not re.fullmatch(NAME_PATTERN, name):
            raise ConfigError(f"{excerpt(name)} is no name of a token; expected 1 to 64 letters, digits, ., _ and -.")
        if not scopes:
            raise ConfigError(f"a token without a scope may do nothing; give --scope of {', '.join(SCOPES)}.")
        secret = _MARK + secrets.token_urlsafe(32)
        expires = None if days is None else self._moment(days * 86_400)
        values = (
            name,
            _hashed(secret),
            json.dumps([scope for scope in SCOPES if scope in scopes]),
            None if models is None else json.dumps(sorted({*models})),
            requests_per_minute,
            requests_per_day,
            tokens_per_day,
            self._moment(),
            expires,
        )
        try:
            with self._writing():
                self._database.execute(
                    "INSERT INTO tokens (name, hash, scopes, models, requests_per_minute, requests_per_day, tokens_per_day,"
                    " made, expires) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    values,
                )
        except sqlite3.IntegrityError:
            raise ConfigError(
                f"there is a token {name!r} already, or was one whose use is still billed; choose another name."
            ) from None
        return secret

    def tokens(self) -> list[Token]:
        """Return all tokens by their names, revoked ones too."""
        return [_token(row) for row in self._rows("SELECT * FROM tokens ORDER BY name")]

    def find(self, secret: str) -> Token | None:
        """Return the token that a request shows, unless it was revoked or has expired; None if there is no such."""
        rows = self._rows("SELECT * FROM tokens WHERE hash = ? AND revoked IS NULL", (_hashed(secret),))
        if not rows or (rows[0]["expires"] is not None and rows[0]["expires"] <= self._moment()):
            return None
        return _token(rows[0])

    def revoke(self, name: str) -> None:
        """Let a token be refused from now on, for good; what it used stays.

        Raises:
            ConfigError: if there is no such token, or it was revoked before.
        """
        known = {token.name: token for token in self.tokens()}
        if name not in known:
            hint = nearest(name, list(known)) if known else "there is none yet"
            raise ConfigError(f"no token {excerpt(name)} in {self.path}; {hint}.")
        if known[name].revoked is not None:
            raise ConfigError(f"{name!r} was revoked on {str(known[name].revoked)[:10]} already.")
        with self._writing():
            self._database.execute("UPDATE tokens SET revoked = ? WHERE name = ?", (self._moment(), name))

    def charge(self, charges: Sequence[tuple[Token, str, Use]]) -> list[QuotaExceeded | str]:
        """Book requests before they are computed, all in one transaction; return the day of each, or why it is refused.

        Args:
            charges: token, name of the model, and what the request may use at most.
        """
        day, found = self._moment()[:10], list[QuotaExceeded | str]()
        with self._writing():
            for token, model, use in charges:
                refused = self._over(token, day, use)
                if refused is None:
                    self._book(token, model, day, use, sign=1)
                found.append(refused or day)
        return found

    def refund(self, refunds: Sequence[tuple[Token, str, str, Use]]) -> None:
        """Take back what booked requests did not use: token, name of the model, day of the booking, and the rest."""
        with self._writing():
            for token, model, day, rest in refunds:
                self._book(token, model, day, rest, sign=-1)

    def usage(self, name: str | None = None, since: str = "") -> list[dict[str, Any]]:
        """Return what was used by token, day and model, oldest first.

        Args:
            since: the first day, such as 2026-03-01.
        """
        rows = self._rows(
            "SELECT name AS token, day, model, requests, read_tokens, written_tokens FROM usage JOIN tokens ON id = token"
            " WHERE day >= ? AND (? IS NULL OR name = ?) AND requests + read_tokens + written_tokens > 0"
            " ORDER BY day, name, model",
            (since, name, name),
        )
        return [dict(row) for row in rows]

    def _over(self, token: Token, day: str, use: Use) -> QuotaExceeded | None:
        if token.requests_per_day is None and token.tokens_per_day is None:
            return None
        (row,) = self._database.execute(
            "SELECT coalesce(sum(requests), 0) AS requests, coalesce(sum(read_tokens + written_tokens), 0) AS tokens"
            " FROM usage WHERE token = ? AND day = ?",
            (token.id, day),
        ).fetchall()
        if token.requests_per_day is not None and row["requests"] + use.requests > token.requests_per_day:
            return QuotaExceeded("requests", token.requests_per_day, self._to_midnight())
        if token.tokens_per_day is not None and row["tokens"] + use.tokens > token.tokens_per_day:
            return QuotaExceeded("tokens", token.tokens_per_day, self._to_midnight())
        return None

    def _book(self, token: Token, model: str, day: str, use: Use, *, sign: int) -> None:
        self._database.execute(
            # Of the same person: another file may have been put in the place of the one in which the token was found.
            "INSERT INTO usage SELECT ?, ?, ?, ?, ?, ? WHERE EXISTS (SELECT 1 FROM tokens WHERE id = ? AND name = ?)"
            " ON CONFLICT (token, day, model) DO UPDATE SET"
            " requests = requests + excluded.requests, read_tokens = read_tokens + excluded.read_tokens,"
            " written_tokens = written_tokens + excluded.written_tokens",
            (
                token.id,
                day,
                model,
                sign * use.requests,
                sign * use.read_tokens,
                sign * use.written_tokens,
                token.id,
                token.name,
            ),
        )

    def _connect(self) -> None:
        self._file = _identity(self.path)
        self._database = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode=rw",  # one that was removed meanwhile is not made anew
            uri=True,
            timeout=self._busy_seconds,
            isolation_level=None,
            check_same_thread=False,
        )
        self._open()
        check_private(self.path, stat.S_IMODE(self.path.stat().st_mode), "holds API tokens' hashes and use", group=True)
        check_unwritable(self.path, "holds API tokens,")
        self._log = _identity(self._log_path)

    @property
    def _log_path(self) -> Path:
        """Where SQLite keeps what was written last, until it is put into the file (https://sqlite.org/wal.html)."""
        return self.path.with_name(f"{self.path.name}-wal")

    def _at_hand(self) -> sqlite3.Connection:
        """Return the file that is there now: one that was put in its place, such as a backup, is opened anew.

        SQLite would go on with the one that it opened, and a token that is revoked in the new one would count. So it would by the
        log of the one before, which SQLite knows by its path alone: it would be read over the new file.
        """
        try:
            found = self.path.stat()
            if (found.st_dev, found.st_ino) != self._file:
                # Ours stays open until then, so that no other file can get the number of the log.
                if self._log is not None and self._log == _identity(self._log_path):
                    raise RunError(
                        f"the token file {self.path} was replaced, and {self._log_path.name} beside it is that of the file "
                        f"before, which would be read over it; delete {self._log_path.name} and {self.path.name}-shm."
                    )
                self._file, self._log = (-1, -1), None  # whatever fails now, the next time it is opened anew
                self._database.close()
                try:
                    self._connect()
                except BaseException:
                    self._file, self._log = (-1, -1), None
                    raise
        except (sqlite3.Error, OSError) as error:
            raise self._unusable(error) from None
        return self._database

    def _open(self) -> None:
        self._database.row_factory = sqlite3.Row
        # Readers are not held up by a writer; every commit is on the disk before it counts.
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")
        (version,) = self._database.execute("PRAGMA user_version").fetchone()
        if version == 0:
            with self._writing():
                for statement in filter(str.strip, _TABLES.split(";")):
                    self._database.execute(statement)
                self._database.execute(f"PRAGMA user_version = {_VERSION}")
        elif version != _VERSION:
            raise ConfigError(f"{self.path} was written by a newer Silotune (format {version}); use that one.")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        self._at_hand()
        try:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            raise self._unusable(error) from None

    def _rows(self, query: str, values: Sequence[object] = ()) -> list[sqlite3.Row]:
        database = self._at_hand()
        try:
            return database.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise self._unusable(error) from None

    def _unusable(self, error: Exception) -> RunError:
        return RunError(
            f"the token file {self.path} cannot be used ({error}); free space, or restore it from a backup."
        )

    def _to_midnight(self) -> int:
        """Return the seconds until the next day of UTC, at least one."""
        return max(1, 86_400 - int(self._now()) % 86_400)

    def _moment(self, seconds_from_now: float = 0) -> str:
        return datetime.fromtimestamp(self._now() + seconds_from_now, UTC).isoformat(timespec="seconds")


def _identity(path: Path) -> tuple[int, int] | None:
    """Return which file is there; None if there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _hashed(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def _token(row: sqlite3.Row) -> Token:
    fields = {key: row[key] for key in row.keys() if key not in ("hash", "scopes", "models")}  # noqa: SIM118 (of a Row)
    models = None if row["models"] is None else tuple(json.loads(row["models"]))
    return Token(scopes=tuple(json.loads(row["scopes"])), models=models, **fields)
