"""Accounts of a console over each kind of database, with a clock that the tests set."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest
from argon2 import PasswordHasher

from shared.trust.keystore import Seal, new_key
from shared.web.accounts import codes, passwords
from shared.web.accounts.accounts import Account, Accounts
from shared.web.accounts.sessions import Sessions
from shared.web.roles import Role
from shared.web.state.database import Database
from tests.shared.web.postgresql import programs, running

PASSWORD = "a long sentence of mine"  # noqa: S105
_NUMBERS = itertools.count()


@dataclass
class Clock:
    """Whole seconds that go on when a test says so."""

    seconds: int = 1_800_000_000

    def __call__(self) -> int:
        return self.seconds

    def wait(self, seconds: int) -> None:
        self.seconds += seconds


@dataclass
class Recorded:
    """What was recorded, and whether it can be."""

    lines: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    broken: bool = False

    def __call__(self, account: str, action: str, details: Mapping[str, Any]) -> None:
        if self.broken:
            raise OSError("the disk is full")
        self.lines.append((account, action, dict(details)))


@dataclass
class Person:
    """Somebody with an account, and with an authenticator."""

    account: Account
    secret: str
    clock: Clock

    def code(self) -> str:
        """The code of now."""
        return code_at(self.secret, self.clock())


def code_at(secret: str, now: int) -> str:
    """Return the code that an authenticator shows at a moment."""
    import pyotp

    return str(pyotp.TOTP(secret).at(now))


@pytest.fixture(scope="session")
def _server() -> Iterator[str]:
    place = programs()
    if place is None:
        pytest.skip("PostgreSQL is not installed here (Debian: postgresql)")
    with running(place) as url:
        yield url


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run over both databases what a module names in `ON_BOTH`: whatever depends on locks, types or transactions."""
    if "database_url" in metafunc.fixturenames:
        both = metafunc.function.__name__ in getattr(metafunc.module, "ON_BOTH", ())
        metafunc.parametrize("database_url", ["sqlite", "postgresql"] if both else ["sqlite"], indirect=True)


@pytest.fixture
def database_url(request: pytest.FixtureRequest) -> str | None:
    """The URL of an empty database; None is a file."""
    if request.param == "sqlite":
        return None
    server = request.getfixturevalue("_server")
    name = f"console_{next(_NUMBERS)}"
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"{server}/{name}"


@pytest.fixture
def database(tmp_path: Path, database_url: str | None) -> Iterator[Database]:
    found = Database(tmp_path / "console", database_url)
    yield found
    found.close()


@pytest.fixture(autouse=True)
def _cheap_hashes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a hash costs is tested by those that name it; elsewhere it would only take time."""
    if not any(word in request.node.name for word in ("argon2id", "as_long", "worth_it")):
        monkeypatch.setattr(passwords, "_HASHER", PasswordHasher(time_cost=1, memory_cost=64, parallelism=1))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def recorded() -> Recorded:
    return Recorded()


@pytest.fixture
def accounts(database: Database, clock: Clock, recorded: Recorded) -> Accounts:
    return Accounts(database=database, seal=Seal(new_key()), now=clock, record=recorded)


@pytest.fixture
def sessions(database: Database, clock: Clock) -> Sessions:
    return Sessions(database=database, now=clock)


@pytest.fixture
def person(accounts: Accounts, clock: Clock) -> Callable[..., Person]:
    """Return a maker of accounts; the first one is an administrator."""
    made: list[Account] = []

    def make(name: str = "Amal", role: Role = Role.ADMINISTRATOR, password: str = PASSWORD) -> Person:
        if not made:
            code = accounts.invite_first()
            assert code is not None
        else:
            code = accounts.invite(name, role, by=made[0])
        secret = accounts.invitation(code, address="a").secret
        taken = accounts.take(code, name=name, password=password, totp=code_at(secret, clock()), address="a")
        made.append(taken)
        clock.wait(codes.STEP_SECONDS * 3)  # the code that was used is over
        return Person(account=taken, secret=secret, clock=clock)

    return make
