"""Accounts: how they are made, proven, changed, and what nobody can do to them."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select

from shared.web.accounts import codes, passwords
from shared.web.accounts.accounts import FIRST_SECONDS, INVITED_SECONDS, Account, Accounts, Gone, Refused, name_key
from shared.web.accounts.attempts import TooManyAttempts
from shared.web.accounts.passwords import Unsuitable
from shared.web.accounts.sessions import Sessions
from shared.web.roles import Role
from shared.web.state.tables import ACCOUNTS, INVITATIONS
from tests.shared.test_names import LOOK_ALIKE, UNSEEN
from tests.shared.web.conftest import PASSWORD, Clock, Person, Recorded, code_at

Make = Callable[..., Person]

ON_BOTH = (
    "test_the_first_administrator_signs_in",
    "test_a_refusal_does_not_tell_what_was_wrong",
    "test_a_code_counts_once_at_one_moment",
    "test_an_account_that_is_not_there",
    "test_the_last_administrator_stays",
    "test_what_cannot_be_recorded_does_not_happen",
    "test_somebody_from_elsewhere",
    "test_names_are_one_however_they_are_spelled",
)


def test_the_first_administrator_signs_in(accounts: Accounts, person: Make, recorded: Recorded) -> None:
    amal = person("Amal  Haddad")
    assert (amal.account.name, amal.account.role) == ("Amal Haddad", Role.ADMINISTRATOR)
    found = accounts.sign_in("amal haddad", PASSWORD, amal.code(), address="a")
    assert found.id == amal.account.id
    assert accounts.invite_first() is None
    assert [(who, what) for who, what, _ in recorded.lines] == [
        ("Amal Haddad", "account.taken"),
        ("Amal Haddad", "sign-in"),
    ]


def test_a_password_is_kept_as_argon2id(accounts: Accounts, person: Make) -> None:
    amal = person()
    with accounts.database.reading() as connection:
        row = connection.execute(select(ACCOUNTS)).one()
    assert row.password.startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    assert amal.secret.encode() not in row.totp, "the secret of the authenticator is sealed"


def test_a_refusal_does_not_tell_what_was_wrong(accounts: Accounts, person: Make) -> None:
    amal, ben = person(), person("Ben", Role.VIEWER)
    accounts.change(ben.account.id, by=amal.account, disabled=True)
    tries = [
        ("Amal", "another long sentence", amal.code()),
        ("Amal", PASSWORD, "000000" if amal.code() != "000000" else "111111"),
        ("Amal", PASSWORD, ""),
        ("Nobody", PASSWORD, amal.code()),
        ("Ben", PASSWORD, ben.code()),
        ("' OR 1=1 --", PASSWORD, amal.code()),
        ("\ud800", "\ud800" * 20, "\ud800"),
    ]
    texts = set()
    for number, (name, password, code) in enumerate(tries):
        with pytest.raises(Refused) as found:
            accounts.sign_in(name, password, code, address=f"address {number}")
        texts.add(str(found.value))
    assert len(texts) == 1


def test_unknown_names_take_as_long(accounts: Accounts, person: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways compute one argon2id hash, which is nearly all of the time."""
    person()
    computed: list[str] = []
    real = passwords._HASHER.verify
    monkeypatch.setattr(
        passwords, "_HASHER", type("Counted", (), {"verify": lambda _, k, p: (computed.append(k), real(k, p))[1]})()
    )
    for name in ("Amal", "Nobody"):
        with pytest.raises(Refused):
            accounts.sign_in(name, "not the right one", "123456", address=name)
    assert len(computed) == 2
    assert {kept.rpartition("$")[0].rpartition("$")[0] for kept in computed} == {"$argon2id$v=19$m=19456,t=2,p=1"}


def test_a_code_counts_once(accounts: Accounts, person: Make, clock: Clock) -> None:
    amal = person()
    code = amal.code()
    accounts.sign_in("Amal", PASSWORD, code, address="a")
    with pytest.raises(Refused):
        accounts.sign_in("Amal", PASSWORD, code, address="a")
    with pytest.raises(Refused):  # an older one was not used, and does not count either
        accounts.sign_in("Amal", PASSWORD, code_at(amal.secret, clock() - 30), address="a")
    clock.wait(30)
    accounts.sign_in("Amal", PASSWORD, f" {amal.code()[:3]} {amal.code()[3:]}", address="a")


def test_a_code_counts_once_at_one_moment(accounts: Accounts, person: Make) -> None:
    amal = person()

    def attempt(number: int) -> bool:
        try:
            accounts.sign_in("Amal", PASSWORD, amal.code(), address=f"address {number}")
        except Refused:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(attempt, range(4))) == 1


def test_a_code_of_another_moment_is_none(clock: Clock) -> None:
    secret = codes.new_secret()
    found = [codes.step_of(secret, code_at(secret, clock() + 30 * away), clock()) for away in (-2, -1, 0, 1, 2)]
    now = clock() // 30
    assert found == [None, now - 1, now, now + 1, None]


def test_an_invitation_counts_once(accounts: Accounts, person: Make, clock: Clock) -> None:
    amal = person()
    code = accounts.invite("Ben", Role.OFFICER, by=amal.account)
    invited = accounts.invitation(code.lower().replace("-", " "), address="a")
    assert invited.name == "Ben"
    taken = accounts.take(code, name="Someone", password=PASSWORD, totp=code_at(invited.secret, clock()), address="a")
    assert (taken.name, taken.role, taken.invited) == ("Ben", Role.OFFICER, False)
    with pytest.raises(Gone):
        accounts.invitation(code, address="a")
    with accounts.database.reading() as connection:
        assert connection.execute(select(INVITATIONS)).all() == []


def test_an_invitation_ends(accounts: Accounts, person: Make, clock: Clock) -> None:
    first = accounts.invite_first()
    assert first is not None
    clock.wait(FIRST_SECONDS)
    with pytest.raises(Gone):
        accounts.invitation(first, address="a")
    amal = person()
    code = accounts.invite("Ben", Role.VIEWER, by=amal.account)
    clock.wait(INVITED_SECONDS - 1)
    assert accounts.invitation(code, address="a").name == "Ben"
    clock.wait(1)
    with pytest.raises(Gone):
        accounts.invitation(code, address="a")


def test_of_two_codes_for_a_first_administrator_the_newer_counts(accounts: Accounts) -> None:
    older, newer = accounts.invite_first(), accounts.invite_first()
    assert older is not None
    assert newer is not None
    with pytest.raises(Gone):
        accounts.invitation(older, address="a")
    assert accounts.invitation(newer, address="a").name is None


@pytest.mark.parametrize(
    ("password", "key"),
    [
        ("short", "password_short"),
        ("x" * 257, "password_long"),
        ("abcabcabcabcabc", "password_plain"),
        ("i am amal of the ward", "password_plain"),
    ],
)
def test_unsuitable_passwords(password: str, key: str) -> None:
    with pytest.raises(Unsuitable) as found:
        passwords.hashed(password, name="Amal")
    assert found.value.key == key


def test_names_are_one_however_they_are_spelled(accounts: Accounts, person: Make) -> None:
    amal = person("José")
    for name in ("JOSÉ", "jose\u0301", "  José "):
        with pytest.raises(Unsuitable) as found:
            accounts.invite(name, Role.VIEWER, by=amal.account)
        assert found.value.key == "name_taken"
    for name in ("", "a", "x" * 65, "a\u202eb", "a\nb\x00", *LOOK_ALIKE):
        with pytest.raises(Unsuitable) as found:
            accounts.invite(name, Role.VIEWER, by=amal.account)
        assert found.value.key == "name_wrong"
    assert name_key("Ａmal") == "amal"
    assert {name_key(name) for name in UNSEEN} == {"officer"}, "of an account from before"


def test_the_last_administrator_stays(accounts: Accounts, person: Make) -> None:
    amal = person()
    accounts.invite("Ben", Role.ADMINISTRATOR, by=amal.account)  # was invited, and cannot sign in yet
    for attempt in (
        lambda: accounts.change(amal.account.id, by=amal.account, disabled=True),
        lambda: accounts.change(amal.account.id, by=amal.account, role=Role.OFFICER),
        lambda: accounts.invite_again(amal.account.id, by=amal.account),
    ):
        with pytest.raises(Unsuitable) as found:
            attempt()
        assert found.value.key == "last_administrator"
    carol = person("Carol", Role.ADMINISTRATOR)
    assert accounts.change(amal.account.id, by=carol.account, role=Role.OFFICER).role == Role.OFFICER


def test_whatever_changes_an_account_ends_its_sessions(accounts: Accounts, sessions: Sessions, person: Make) -> None:
    amal, ben = person(), person("Ben", Role.VIEWER)
    changes: list[Callable[[], object]] = [
        lambda: accounts.change(ben.account.id, by=amal.account, role=Role.OFFICER),
        lambda: accounts.change(ben.account.id, by=amal.account, disabled=True),
        lambda: accounts.change(ben.account.id, by=amal.account, disabled=False),
        lambda: accounts.change_password(ben.account, "another long sentence"),
        lambda: accounts.end_sessions(ben.account),
        lambda: accounts.invite_again(ben.account.id, by=amal.account),
    ]
    for change in changes:
        held = sessions.begin(ben.account.id, address="a", browser="b")
        assert sessions.find(held) is not None
        change()
        assert sessions.find(held) is None
    with pytest.raises(Refused):
        accounts.sign_in("Ben", "another long sentence", ben.code(), address="a")


def test_known_browsers_end(accounts: Accounts, sessions: Sessions, person: Make, recorded: Recorded) -> None:
    """Of an account that somebody else may have used, whatever browser it is; of all others nothing."""
    first, ben = person(), person("Ben", Role.OFFICER)
    kept = accounts.known(first.account, "")
    ends: list[Callable[[], object]] = [
        lambda: accounts.sign_out(ben.account.id, by=first.account),
        lambda: accounts.end_sessions(ben.account),
        lambda: accounts.change_password(ben.account, "another long one"),
        lambda: accounts.change(ben.account.id, by=first.account, disabled=True),
        lambda: accounts.change(ben.account.id, by=first.account, disabled=False),
        lambda: accounts.invite_again(ben.account.id, by=first.account),
    ]
    for number, end in enumerate(ends):
        cookie = accounts.known(ben.account, kept)
        secret = sessions.begin(ben.account.id, address="x", browser="y")
        assert accounts._device("ben", cookie) is not None
        end()
        assert sessions.find(secret) is None
        assert (accounts._device("ben", cookie) is None) == (number != 4), "enabling forgets nothing"
        assert accounts._device("amal", cookie) == accounts._device("amal", kept), "the same browser, another account"
        assert accounts._device("ben", accounts.known(ben.account, cookie)) is not None, (
            "until somebody signs in there again"
        )
    assert ("Amal", "account.signed-out", {"name": "Ben"}) in recorded.lines


def test_an_account_that_is_not_there(accounts: Accounts, person: Make) -> None:
    amal = person()
    for attempt in (
        lambda: accounts.change("0" * 32, by=amal.account, disabled=True),
        lambda: accounts.invite_again("' OR 1=1", by=amal.account),
        lambda: accounts.sign_out("' OR 1=1", by=amal.account),
    ):
        with pytest.raises(Gone):
            attempt()


def test_what_cannot_be_recorded_does_not_happen(accounts: Accounts, person: Make, recorded: Recorded) -> None:
    amal, ben = person(), person("Ben", Role.VIEWER)
    before = accounts.all()
    recorded.broken = True
    attempts: list[Callable[[], object]] = [
        lambda: accounts.invite("Carol", Role.VIEWER, by=amal.account),
        lambda: accounts.invite_again(ben.account.id, by=amal.account),
        lambda: accounts.sign_out(ben.account.id, by=amal.account),
        lambda: accounts.change(ben.account.id, by=amal.account, role=Role.OFFICER),
        lambda: accounts.change_password(ben.account, "another long sentence"),
        lambda: accounts.from_issuer(issuer="i", subject="s", name="Dan", role=Role.VIEWER, address="a"),
    ]
    for attempt in attempts:
        with pytest.raises(OSError, match="full"):
            attempt()
    assert accounts.all() == before


def test_nothing_secret_is_recorded(accounts: Accounts, person: Make, recorded: Recorded) -> None:
    amal = person()
    code = accounts.invite("Ben", Role.VIEWER, by=amal.account)
    accounts.change_password(amal.account, "another long sentence")
    for number in range(6):  # a password in the wrong field
        with pytest.raises((Refused, TooManyAttempts)):
            accounts.sign_in("my secret password", "x", "y", address=f"address {number}")
    told = str(recorded.lines)
    for secret in (PASSWORD, "another long sentence", code, amal.secret, "my secret password"):
        assert secret not in told
    assert ("-", "sign-in.blocked", {"name": None, "address": "address 4"}) in recorded.lines


def test_somebody_from_elsewhere(accounts: Accounts, person: Make, sessions: Sessions) -> None:
    person()

    def arrive(role: Role, name: str = "Dan") -> Account:
        return accounts.from_issuer(issuer="https://id", subject="7", name=name, role=role, address="a")

    dan = arrive(Role.VIEWER)
    held = sessions.begin(dan.id, address="a", browser="b")
    assert arrive(Role.VIEWER, name="Daniel").id == dan.id
    assert sessions.find(held) is not None
    assert arrive(Role.OFFICER).role == Role.OFFICER
    assert sessions.find(held) is None, "another role is another session"
    with pytest.raises(Unsuitable):  # a name does not make it the same person
        accounts.from_issuer(issuer="https://id", subject="8", name="amal", role=Role.OFFICER, address="a")
    with pytest.raises(Refused):
        accounts.sign_in("Dan", "", "", address="a")


def test_a_hash_takes_long_enough_to_be_worth_it() -> None:
    begin = time.process_time()
    passwords.hashed(PASSWORD, name="Amal")
    assert time.process_time() - begin > 0.005
