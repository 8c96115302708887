"""How often somebody may try."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from sqlalchemy import select

from shared.trust.keystore import Seal, new_key
from shared.web.accounts.accounts import Accounts, Gone, Refused
from shared.web.accounts.attempts import Attempts, Purpose, TooManyAttempts
from shared.web.accounts.devices import SECONDS, cookie_of, device_of
from shared.web.state.database import Database
from shared.web.state.tables import ATTEMPTS
from tests.shared.web.conftest import PASSWORD, Clock, Person

ON_BOTH = (
    "test_attempts_at_once_all_count",
    "test_a_restart_forgives_nothing",
    "test_success_forgets_the_accounts_failures_and_not_the_addresses",
)


@pytest.fixture
def attempts(database: Database, clock: Clock) -> Attempts:
    return Attempts(database=database, now=clock)


def fail(attempts: Attempts, times: int, account: str = "amal") -> None:
    for number in range(times):
        attempts.begin(account=account, address=f"address {number}")


def test_an_account_is_held_back_longer_and_longer(attempts: Attempts, clock: Clock) -> None:
    fail(attempts, 5)
    waits = []
    for _ in range(7):
        with pytest.raises(TooManyAttempts) as found:
            attempts.begin(account="amal", address="z")
        waits.append(found.value.seconds)
        clock.wait(found.value.seconds)
        attempts.begin(account="amal", address="z")
    assert waits == [30, 60, 120, 240, 480, 900, 900]
    attempts.begin(account="ben", address="z")


def test_an_address_is_held_back(attempts: Attempts) -> None:
    for number in range(30):
        attempts.begin(account=f"name {number}", address="10.0.0.9")
    with pytest.raises(TooManyAttempts):
        attempts.begin(account="name 31", address="10.0.0.9")
    with pytest.raises(TooManyAttempts):
        attempts.begin(account=None, address="10.0.0.9")
    attempts.begin(account="name 31", address="10.0.0.10")


@pytest.mark.parametrize("tried", ["sign-in", "invitation", "elsewhere"])
def test_purposes_are_counted_apart(attempts: Attempts, clock: Clock, tried: Purpose) -> None:
    for number in range(30):
        attempts.begin(account=f"name {number}", address="x", purpose=tried)
    with pytest.raises(TooManyAttempts):
        attempts.begin(account=None, address="x", purpose=tried)
    others: set[Purpose] = {"sign-in", "invitation", "elsewhere"} - {tried}
    for purpose in others:
        attempts.begin(account="mine", address="x", purpose=purpose)
        attempts.succeeded(account="mine", address="x", purpose=purpose)
    with pytest.raises(TooManyAttempts):
        attempts.begin(account=None, address="x", purpose=tried)
    clock.wait(901)
    attempts.begin(account=None, address="x", purpose=tried)


def test_wrong_invitations_keep_nobody_from_signing_in(accounts: Accounts, person: Callable[..., Person]) -> None:
    amal = person()
    for _ in range(31):
        with suppress(Gone, TooManyAttempts):
            accounts.invitation("AAAA-AAAA", address="10.0.0.9")
    with pytest.raises(TooManyAttempts):
        accounts.invitation("AAAA-AAAA", address="10.0.0.9")
    assert accounts.sign_in("Amal", PASSWORD, amal.code(), address="10.0.0.9").name == "Amal"
    for number in range(31):
        with suppress(Refused, TooManyAttempts):
            accounts.sign_in(f"nobody {number}", "a guess", "000000", address="10.0.0.8")
    with pytest.raises(Gone):
        accounts.invitation("AAAA-AAAA", address="10.0.0.8")


def test_success_forgets_the_accounts_failures_and_not_the_addresses(attempts: Attempts) -> None:
    for number in range(29):
        attempts.begin(account=f"name {number}", address="x")
    attempts.begin(account="mine", address="x")
    attempts.succeeded(account="mine", address="x")
    attempts.begin(account="name 30", address="x")
    with pytest.raises(TooManyAttempts):
        attempts.begin(account="mine", address="x")


def test_attempts_at_once_all_count(attempts: Attempts) -> None:
    def attempt(number: int) -> bool:
        try:
            attempts.begin(account="amal", address=f"address {number}")
        except TooManyAttempts:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        let_in = sum(pool.map(attempt, range(24)))
    assert let_in <= 5 + 7, "no more than the free ones, and those that were counted at the same moment"
    with attempts.database.reading() as connection:
        counted = connection.execute(select(ATTEMPTS.c.failures).where(ATTEMPTS.c.who.like("account:%"))).scalar_one()
    assert counted == let_in


def test_a_restart_forgives_nothing(attempts: Attempts, clock: Clock, tmp_path: Path, database_url: str | None) -> None:
    fail(attempts, 5)
    again = Database(tmp_path / "console", database_url)
    with pytest.raises(TooManyAttempts):
        Attempts(database=again, now=clock).begin(account="amal", address="z")
    again.close()


def test_old_attempts_are_forgotten(attempts: Attempts, clock: Clock) -> None:
    fail(attempts, 5)
    clock.wait(86_401)
    attempts.begin(account="amal", address="z")
    with attempts.database.reading() as connection:
        assert len(connection.execute(select(ATTEMPTS)).all()) == 2


def test_unknown_names_are_held_back_alike(accounts: Accounts, person: Callable[..., Person], clock: Clock) -> None:
    amal = person()
    told: dict[str, list[str]] = {"Amal": [], "Nobody": []}
    for name, texts in told.items():
        for number in range(6):
            with pytest.raises((Refused, TooManyAttempts)) as found:
                accounts.sign_in(name, "not the right one", "123456", address=f"{name} {number}")
            texts.append(str(found.value))
    assert told["Amal"] == told["Nobody"]
    with pytest.raises(TooManyAttempts):  # the right ones do not help for now
        accounts.sign_in("Amal", PASSWORD, amal.code(), address="z")
    clock.wait(30)
    accounts.sign_in("Amal", PASSWORD, amal.code(), address="z")


def test_a_known_browser_has_its_own_count(accounts: Accounts, person: Callable[..., Person], clock: Clock) -> None:
    """Whoever reaches the page and knows a name keeps its person from signing in nowhere they signed in before."""
    amal = person()
    cookie = accounts.known(amal.account, "")
    for _ in range(6):
        with suppress(Refused, TooManyAttempts):
            accounts.sign_in("Amal", "a guess", "000000", address="10.0.0.66")
    with pytest.raises(TooManyAttempts):
        accounts.sign_in("Amal", PASSWORD, amal.code(), address="10.0.0.9")
    clock.wait(30)
    for number in range(40):  # through a tunnel all addresses are one
        with suppress(Refused, TooManyAttempts):
            accounts.sign_in(f"nobody {number}", "a guess", "000000", address="10.0.0.9")
    assert accounts.sign_in("Amal", PASSWORD, amal.code(), address="10.0.0.9", cookie=cookie).name == "Amal"
    clock.wait(60)
    accounts.prove(amal.account, PASSWORD, amal.code(), address="10.0.0.9", cookie=cookie)
    for _ in range(5):
        with pytest.raises(Refused):
            accounts.sign_in("Amal", "a guess", "000000", address="10.0.0.9", cookie=cookie)
    with pytest.raises(TooManyAttempts):
        accounts.sign_in("Amal", PASSWORD, amal.code(), address="10.0.0.9", cookie=cookie)


def test_a_cookie_of_another_knows_nobody(accounts: Accounts, person: Callable[..., Person]) -> None:
    amal = person()
    seal, mine, now = accounts.seal, amal.account.id, accounts.now()
    cookie = accounts.known(amal.account, "")
    device = device_of(seal, cookie, mine, now=now)
    assert device is not None
    assert device_of(seal, cookie, "another", now=now) is None
    for forged in ("", "00", "zz", cookie[:-2], Seal(new_key()).seal(b'["x", {}]', context="known device").hex()):
        assert device_of(seal, forged, mine, now=now) is None
    assert device_of(seal, seal.seal(b"[]", context="elsewhere").hex(), mine, now=now) is None
    assert device_of(seal, cookie, mine, now=now + SECONDS) is None
    both = cookie_of(seal, cookie, "another", now=now + 1)
    assert device_of(seal, both, mine, now=now) == device, "one browser of several people is one"
    for number in range(9):
        both = cookie_of(seal, both, f"{number:032}", now=now + 2)
    assert device_of(seal, both, mine, now=now) is None, "the last five are kept"
    assert len(both) < 1500
