"""The database of a console, a file or PostgreSQL: private, whole, brought forwards from every version."""

from __future__ import annotations

import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import Connection, MetaData, insert, inspect, select, text

from shared.errors import ConfigError, RunError
from shared.web.state import database as module
from shared.web.state.database import NEWEST, Database, upgrade, versions
from shared.web.state.tables import ACCOUNTS, METADATA, SESSIONS

ON_BOTH = (
    "test_every_version_is_brought_forwards",
    "test_a_new_database_is_what_migrations_make",
    "test_the_newest_version_has_the_tables_that_the_code_reads",
    "test_a_transaction_is_all_or_nothing",
    "test_two_starts_at_once",
    "test_a_newer_database_is_refused",
)


def empty(folder: Path, url: str | None, monkeypatch: pytest.MonkeyPatch) -> Database:
    """Return a database in which nothing was made yet."""
    with monkeypatch.context() as patched:
        patched.setattr(Database, "_bring_forwards", lambda _: None)
        return Database(folder, url)


def test_every_version_is_brought_forwards(
    tmp_path: Path, database_url: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = versions()
    assert known[0] == "0001"
    found = empty(tmp_path / "console", database_url, monkeypatch)
    with found.writing() as connection:
        upgrade(connection, known[0])
        then = MetaData()
        then.reflect(connection)
        account = {"id": "a" * 32, "name": "Amal", "name_key": "amal", "role": "officer", "created": 1}
        connection.execute(insert(then.tables["accounts"]).values(**account, totp_step=7, disabled=False))
        session = {"id": "s", "account": "a" * 32, "created": 1, "seen": 2, "address": "x", "browser": "y"}
        connection.execute(insert(then.tables["sessions"]).values(**session))
    for version in known[1:]:
        with found.writing() as connection:
            upgrade(connection, version)
            row = connection.execute(select(text("*")).select_from(text("accounts"))).one()
            assert (row.name, row.totp_step) == ("Amal", 7)
            assert connection.execute(text("SELECT seen FROM sessions")).scalar_one() == 2
    found.close()
    again = Database(tmp_path / "console", database_url)
    with again.reading() as connection:
        assert connection.execute(select(ACCOUNTS.c.name)).scalar_one() == "Amal"
        assert connection.execute(select(SESSIONS.c.seen)).scalar_one() == 2
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one() == known[-1]
    again.close()


def shape(connection: Connection) -> dict[str, object]:
    """Return all that a database says of its tables."""
    found = inspect(connection)
    return {
        name: (
            {one["name"]: (str(one["type"]), one["nullable"], one["default"]) for one in found.get_columns(name)},
            found.get_pk_constraint(name)["constrained_columns"],
            sorted((one["constrained_columns"], one["options"]) for one in found.get_foreign_keys(name)),
            sorted((str(one["name"]), one["column_names"], bool(one["unique"])) for one in found.get_indexes(name)),
            sorted(one["column_names"] for one in found.get_unique_constraints(name)),
        )
        for name in found.get_table_names()
    }


def test_a_new_database_is_what_migrations_make(
    tmp_path: Path, database_url: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new one is made without Alembic, which takes ten megabytes of a console's memory."""
    assert versions()[-1] == NEWEST
    new = Database(tmp_path / "new", database_url)
    with new.reading() as connection:
        made = shape(connection)
        assert connection.execute(text("SELECT version_num FROM alembic_version")).all() == [(NEWEST,)]
    with new.writing() as connection:
        for table in reversed(METADATA.sorted_tables):
            table.drop(connection)
        connection.execute(text("DROP TABLE alembic_version"))
    new.close()
    migrated = empty(tmp_path / "migrated", database_url, monkeypatch)
    with migrated.writing() as connection:
        upgrade(connection, NEWEST)
    with migrated.reading() as connection:
        assert shape(connection) == made
    migrated.close()


def test_the_newest_version_has_the_tables_that_the_code_reads(database: Database) -> None:
    with database.reading() as connection:
        found = inspect(connection)
        assert set(found.get_table_names()) - {"alembic_version"} == set(METADATA.tables)
        for name, table in METADATA.tables.items():
            columns = {column["name"]: column["nullable"] for column in found.get_columns(name)}
            assert columns == {column.name: column.nullable for column in table.columns}
            indexes = {index["name"] for index in found.get_indexes(name) if not index.get("duplicates_constraint")}
            assert indexes == {index.name for index in table.indexes}


def test_the_file_is_private(tmp_path: Path) -> None:
    found = Database(tmp_path / "console")
    with found.writing() as connection:
        connection.execute(text("DELETE FROM attempts"))
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "console").iterdir()}
    assert set(modes.values()) == {0o600}
    assert stat.S_IMODE((tmp_path / "console").stat().st_mode) == 0o700
    found.close()


def test_a_transaction_is_all_or_nothing(database: Database) -> None:
    account = {"id": "a", "name": "Amal", "name_key": "amal", "role": "viewer", "created": 1, "totp_step": 0}

    def break_off() -> None:
        with database.writing() as connection:
            connection.execute(insert(ACCOUNTS).values(**account, disabled=False))
            raise OSError("later")

    with pytest.raises(OSError, match="later"):
        break_off()
    with database.reading() as connection:
        assert connection.execute(select(ACCOUNTS)).all() == []


def test_two_starts_at_once(tmp_path: Path, database_url: str | None) -> None:
    code = (
        "import sys; from pathlib import Path; from shared.web.state.database import Database; "
        "Database(Path(sys.argv[1]), sys.argv[2] or None).close()"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "console"), database_url or ""]
    started = [subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [(process.communicate()[1], process.returncode) for process in started] == [("", 0)] * 2


def test_a_newer_database_is_refused(tmp_path: Path, database_url: str | None) -> None:
    found = Database(tmp_path / "console", database_url)
    with found.writing() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    found.close()
    with pytest.raises(RunError, match="version 9999, which this program does not know"):
        Database(tmp_path / "console", database_url)


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / module.FILE).write_bytes(b"this is a text, and no database at all" * 40)
    with pytest.raises(RunError, match=r"console\.db cannot be used \(file is not a database\)"):
        Database(tmp_path)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("no url at all", "the URL of the console's database is none"),
        ("mysql://root:secret@host/name", "of the kind 'mysql'"),
    ],
)
def test_urls_that_cannot_be_used(tmp_path: Path, url: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as found:
        Database(tmp_path, url)
    assert "secret" not in str(found.value)


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be used") as found:
        Database(tmp_path, "postgresql://me:secret@127.0.0.1:1/name")
    assert "secret" not in str(found.value)


def test_in_memory_all_threads_see_one_database() -> None:
    database, other = Database(None), Database(None)

    def add(number: int) -> None:
        values = {"id": str(number), "name": "x", "name_key": str(number), "role": "viewer", "created": 1}
        with database.writing() as connection:
            connection.execute(insert(ACCOUNTS).values(**values, totp_step=0, disabled=False))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(40)))
    for each, number in ((database, 40), (other, 0)):
        with each.reading() as connection:
            assert len(connection.execute(select(ACCOUNTS.c.id)).all()) == number
