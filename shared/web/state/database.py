"""A console's database: opened, brought to the newest version, read and written in transactions.

Formal guarantees (tests: tests/shared/web/test_database.py)
    * A file of SQLite is private to its owner from the start (test_the_file_is_private).
    * A transaction that raises leaves nothing behind (test_a_transaction_is_all_or_nothing).
    * Every version from the first one on is brought forwards with what it holds, also if two consoles start at once
      (test_every_version_is_brought_forwards, test_two_starts_at_once).
    * A database of a newer version is not touched (test_a_newer_database_is_refused).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    URL,
    Column,
    Connection,
    Engine,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    inspect,
    make_url,
    text,
)
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.pool import QueuePool

from shared.errors import ConfigError, RunError
from shared.web.state.tables import METADATA

if TYPE_CHECKING:  # alembic is imported only where there is something to bring forwards: it takes ten megabytes
    from alembic.config import Config

FILE = "console.db"
NEWEST = "0004"
_MIGRATIONS = Path(__file__).parent / "migrations"
_LOCK = 0x53494C4F  # of PostgreSQL, while a database is brought forwards


class Database:
    """The database of one console, at the newest version; safe to use from several threads.

    Args:
        folder: where `console.db` lies if no `url` is given; made, private to its owner.
            None: in memory, and gone with the process.
        url: of PostgreSQL, `postgresql://user:password@host/name`.

    Raises:
        ConfigError: the URL cannot be used.
        RunError: the database cannot be reached, or is of a newer version.
    """

    def __init__(self, folder: Path | None, url: str | None = None) -> None:
        if url is not None:
            self._engine = _postgresql(url)
            self.told = self._engine.url.render_as_string(hide_password=True)
        else:
            self._engine = _in_memory() if folder is None else _sqlite(folder / FILE)
            self.told = "in memory" if folder is None else str(folder / FILE)
        with _explained(self.told):
            self._bring_forwards()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """One consistent view."""
        with _explained(self.told), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """All or nothing; of SQLite one writer at a time."""
        with _explained(self.told), self._engine.connect() as connection:
            connection = connection.execution_options(writes=True)
            with connection.begin():
                yield connection

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    def _bring_forwards(self) -> None:
        with self.writing() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
            found = _version(connection)
            if found is None:
                _make_new(connection)
            elif found != NEWEST:
                upgrade(connection, NEWEST)


def _make_new(connection: Connection) -> None:
    """Make a new database as all migrations would leave it (tests/shared/web/test_database.py,
    test_a_new_database_is_what_migrations_make).
    """
    METADATA.create_all(connection)
    version = Table("alembic_version", MetaData(), Column("version_num", String(32), primary_key=True))
    version.create(connection)
    connection.execute(version.insert().values(version_num=NEWEST))


def upgrade(connection: Connection, version: str) -> None:
    """Bring a database to a version, within the transaction at hand.

    Raises:
        RunError: it is of a version that this program does not know.
    """
    from alembic import command
    from alembic.script import ScriptDirectory
    from alembic.util.exc import CommandError

    config, found = _config(), _version(connection)
    if found is not None:
        try:
            ScriptDirectory.from_config(config).get_revision(found)
        except CommandError:
            raise RunError(
                f"the console's database has version {found}, which this program does not know. Install the release of "
                "Silotune that wrote it, or a newer one; nothing was changed."
            ) from None
    config.attributes["connection"] = connection
    command.upgrade(config, version)


def versions() -> list[str]:
    """Return all versions of the database, the first one first."""
    from alembic.script import ScriptDirectory

    return [script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()][::-1]


def _version(connection: Connection) -> str | None:
    """Return the version of a database; None of a new one."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def _config() -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _sqlite(path: Path) -> Engine:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # SQLite itself would make it public
    except OSError as error:
        raise RunError(f"{path} cannot be used: {error.strerror}. Check the folder and its permissions.") from None
    engine = create_engine(
        URL.create("sqlite", database=str(path)), connect_args={"timeout": 10, "check_same_thread": False}
    )
    return _prepared(engine)


def _in_memory() -> Engine:
    # One connection that all threads take in turn: a second one would have a memory of its own.
    arguments = {"check_same_thread": False}
    return _prepared(
        create_engine("sqlite://", poolclass=QueuePool, pool_size=1, max_overflow=0, connect_args=arguments)
    )


def _prepared(engine: Engine) -> Engine:
    @event.listens_for(engine, "connect")
    def _prepare(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # transactions are begun below
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # Who will write takes the lock at once: a transaction that reads first could not get it later.
        writes = connection.get_execution_options().get("writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN DEFERRED")

    return engine


def _postgresql(text_of_url: str) -> Engine:
    wanted = "expected postgresql://USER:PASSWORD@HOST/NAME"
    try:
        url = make_url(text_of_url)
    except ArgumentError:  # its text may hold the password
        raise ConfigError(f"the URL of the console's database is none; {wanted}.") from None
    if url.get_backend_name() != "postgresql":
        raise ConfigError(f"the console's database is of the kind {url.drivername!r}; {wanted}, or none for a file.")
    return create_engine(
        url.set(drivername="postgresql+psycopg"),
        pool_pre_ping=True,
        pool_size=4,
        isolation_level="READ COMMITTED",
        connect_args={"connect_timeout": 10},
    )


@contextmanager
def _explained(told: str) -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        reason = str(error.orig).strip().splitlines()[0] if str(error.orig).strip() else type(error.orig).__name__
        raise RunError(
            f"the console's database {told} cannot be used ({reason}). Check that it is there, that this account may use it, and "
            "the space on its disk."
        ) from error
