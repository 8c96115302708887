"""API tokens: what is kept of them, quotas of several processes, revocation, and what is billed whatever is killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.serving.access.accounts import Accounts, Booked, TooFast
from server.serving.access.tokens import QuotaExceeded, Token, TokenFile, Use
from shared.errors import ConfigError, RunError, TrustError

NOW = 1_800_000_000.0
DAY = "2027-01-15"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens.db"


@pytest.fixture
def file(path: Path) -> TokenFile:
    return TokenFile(path, create=True, now=lambda: NOW)


def backed_up(path: Path) -> Path:
    """Return a copy of a token file, made as SQLite makes one."""
    backup = path.with_name("backup.db")
    with contextlib.closing(sqlite3.connect(path)) as source, contextlib.closing(sqlite3.connect(backup)) as target:
        source.backup(target)
    backup.chmod(0o600)
    return backup


def forget_log(path: Path) -> None:
    """Delete what SQLite keeps beside a file."""
    for leftover in path.parent.glob(path.name + "-*"):
        leftover.unlink()


def made(file: TokenFile, name: str = "ward", **options: Any) -> tuple[str, Token]:
    secret = file.add(name, scopes=options.pop("scopes", ("predict",)), **options)
    token = file.find(secret)
    assert token is not None
    return secret, token


def test_a_token_is_found_by_its_secret_and_the_file_holds_none(file: TokenFile, path: Path) -> None:
    secret, token = made(file, scopes=("predict", "metrics"), models=["films"], tokens_per_day=10)
    assert (token.name, token.scopes, token.models, token.tokens_per_day) == (
        "ward", ("predict", "metrics"), ("films",), 10,
    )  # fmt: skip
    assert len(secret) >= 4 + 43
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for one in path.parent.iterdir():
        assert secret.encode() not in one.read_bytes()
        assert secret.removeprefix("slt_").encode() not in one.read_bytes()
    assert file.find(secret + "x") is None
    assert file.find("") is None


def test_a_revoked_token_is_refused_at_once(file: TokenFile, path: Path) -> None:
    secret, _ = made(file)
    other = TokenFile(path)
    other.revoke("ward")
    assert file.find(secret) is None
    with pytest.raises(ConfigError, match="already"):
        other.revoke("ward")
    with pytest.raises(ConfigError, match="ward"):
        other.revoke("wrad")
    with pytest.raises(ConfigError, match="billed"):
        file.add("ward", scopes=("predict",))


def test_a_token_expires(path: Path) -> None:
    now = [NOW]
    file = TokenFile(path, create=True, now=lambda: now[0])
    secret = file.add("ward", scopes=("predict",), days=1)
    now[0] += 86_399
    assert file.find(secret) is not None
    now[0] += 1
    assert file.find(secret) is None


@pytest.mark.parametrize(("quota", "what"), [({"requests_per_day": 3}, "requests"), ({"tokens_per_day": 30}, "tokens")])
def test_quotas_are_of_a_day(path: Path, quota: dict[str, int], what: str) -> None:
    now = [NOW]
    file = TokenFile(path, create=True, now=lambda: now[0])
    _, token = made(file, **quota)
    asked = [(token, "films", Use(1, 10))] * 4
    found = file.charge(asked)
    assert found[:3] == [DAY] * 3
    assert isinstance(found[3], QuotaExceeded)
    assert what in str(found[3])
    file.refund([(token, "films", DAY, Use(1, 10))])
    assert file.charge(asked[:1]) == [DAY]
    now[0] += 86_400
    assert file.charge(asked[:1]) == ["2027-01-16"]
    assert [(row["day"], row["requests"], row["read_tokens"]) for row in file.usage("ward")] == [
        (DAY, 3, 30), ("2027-01-16", 1, 10),
    ]  # fmt: skip
    assert [row["day"] for row in file.usage(since="2027-01-16")] == ["2027-01-16"]


_CHARGES = """
import sys
from pathlib import Path
from server.serving.access.tokens import TokenFile, Use
file = TokenFile(Path(sys.argv[1]))
token = file.find(sys.argv[2])
while True:
    found = file.charge([(token, "films", Use(1, 5, 2))])
    print("refused" if not isinstance(found[0], str) else "booked", flush=True)
"""


def child(path: Path, secret: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _CHARGES, str(path), secret]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_quotas_hold_between_processes(path: Path) -> None:
    file = TokenFile(path, create=True)
    secret, _ = made(file, requests_per_day=60)
    children = [child(path, secret) for _ in range(2)]
    booked = 0
    for one in children:
        assert one.stdout is not None
        while one.stdout.readline() == "booked\n":
            booked += 1
        one.kill()
        one.wait()
    assert booked == 60
    assert file.usage()[0]["requests"] == 60


def test_a_kill_keeps_what_was_used(path: Path) -> None:
    secret, _ = made(TokenFile(path, create=True))
    one = child(path, secret)
    assert one.stdout is not None
    told = [one.stdout.readline() for _ in range(20)]
    one.send_signal(signal.SIGKILL)
    told += one.stdout.readlines()
    one.wait()
    (row,) = TokenFile(path).usage()
    assert len(told) <= row["requests"] <= len(told) + 1, "what was told is on the disk"
    assert (row["read_tokens"], row["written_tokens"]) == (5 * row["requests"], 2 * row["requests"])


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="silotune tokens add"):
        TokenFile(tmp_path / "none.db")
    (tmp_path / "text.db").write_text("this is no database, but long enough to be taken for one " * 20)
    with pytest.raises(RunError, match="cannot be used"):
        TokenFile(tmp_path / "text.db")
    (tmp_path / "link.db").symlink_to(tmp_path / "text.db")
    with pytest.raises(RunError, match="no plain file"):
        TokenFile(tmp_path / "link.db", create=True)


def test_use_is_booked_together_and_what_was_not_used_is_taken_back(path: Path) -> None:
    _, token = made(TokenFile(path, create=True), requests_per_day=20)
    accounts = Accounts(path)

    async def ask() -> list[Booked | BaseException]:
        asked = (accounts.charge(token, "films", Use(1, 3, 100)) for _ in range(25))
        return await asyncio.gather(*asked, return_exceptions=True)

    found = asyncio.run(ask())
    booked = [one for one in found if isinstance(one, Booked)]
    assert len(booked) == 20
    assert all(isinstance(one, QuotaExceeded) for one in found if not isinstance(one, Booked))
    for one in booked[:-1]:
        accounts.settle(one, Use(1, 3, 4))
    accounts.settle(booked[-1], Use())
    accounts.close()
    (row,) = TokenFile(path).usage()
    assert (row["requests"], row["read_tokens"], row["written_tokens"]) == (19, 57, 76)


def test_a_token_has_a_rate(path: Path) -> None:
    _, token = made(TokenFile(path, create=True), requests_per_minute=60)
    now = [0.0]
    accounts = Accounts(path, clock=lambda: now[0])
    for _ in range(60):
        accounts.check_rate(token)
    with pytest.raises(TooFast) as refused:
        accounts.check_rate(token)
    assert refused.value.seconds == 1
    now[0] += 1.01
    accounts.check_rate(token)
    with pytest.raises(TooFast):
        accounts.check_rate(token)
    accounts.close()


def test_the_commands(path: Path, silotune: Callable[..., Any]) -> None:
    done = silotune("tokens", "add", "ward", "--tokens", path, "--scope", "predict", "--model", "films", "--json")
    secret = json.loads(done.out)["token"]
    token = TokenFile(path).find(secret)
    assert token is not None
    assert (token.scopes, token.models) == (("predict",), ("films",))
    listed = silotune("tokens", "list", "--tokens", path)
    assert "ward" in listed.out
    assert secret not in listed.out
    TokenFile(path).charge([(token, "films", Use(1, 7))])
    rows = json.loads(silotune("tokens", "usage", "--tokens", path, "--json").out)
    assert [(row["token"], row["read_tokens"]) for row in rows] == [("ward", 7)]
    assert silotune("tokens", "revoke", "ward", "--tokens", path).status == 0
    assert TokenFile(path).find(secret) is None
    wrong = silotune("tokens", "revoke", "nobody", "--tokens", path)
    assert (wrong.status, "Traceback" in wrong.err) == (2, False)
    assert silotune("tokens", "list", "--tokens", path.parent / "no.db").status == 2


def test_a_lock_that_is_held_delays_and_loses_nothing(path: Path) -> None:
    file = TokenFile(path, create=True)
    secret, token = made(file)
    child_id = os.fork()
    if child_id == 0:
        other = TokenFile(path)
        with other._writing():
            time.sleep(0.5)
        os._exit(0)
    time.sleep(0.2)
    assert file.find(secret) is not None, "readers are not held up"
    assert isinstance(file.charge([(token, "films", Use(1))])[0], str)
    os.waitpid(child_id, 0)


def test_a_file_that_was_put_in_its_place_counts(path: Path) -> None:
    file = TokenFile(path, create=True)
    secret, token = made(file)
    backup = backed_up(path)
    forget_log(path)
    backup.replace(path)
    TokenFile(path).revoke(token.name)
    assert file.find(secret) is None, "revoked in the file that is there"
    path.unlink()
    forget_log(path)
    with pytest.raises(RunError, match="cannot be used"):
        file.find(secret)
    with pytest.raises(RunError, match="cannot be used"):
        file.charge([(token, "films", Use(1))])
    assert not path.exists(), "no empty one is made in its place"
    TokenFile(path, create=True)
    again, _ = made(TokenFile(path))
    assert file.find(again) is not None


def test_fault_the_log_of_the_file_before_is_not_read_over_the_new_one(path: Path) -> None:
    file = TokenFile(path, create=True)
    secret, token = made(file)
    backup = backed_up(path)
    with contextlib.closing(TokenFile(backup)) as other:
        other.revoke(token.name)
    file.charge([(token, "films", Use(1))])  # is in the log alone
    backup.replace(path)
    for _ in range(2):
        with pytest.raises(RunError, match=r"delete tokens.db-wal and tokens.db-shm"):
            file.find(secret)
    forget_log(path)
    assert file.find(secret) is None, "revoked in the file that is there"


def test_fault_a_file_that_others_may_write_does_not_take_its_place(path: Path) -> None:
    file = TokenFile(path, create=True)
    secret, _ = made(file)
    other = TokenFile(path.with_name("other.db"), create=True)
    other.close()
    forget_log(path)
    other.path.chmod(0o666)
    other.path.replace(path)
    for _ in range(2):
        with pytest.raises(TrustError):
            file.find(secret)
    path.chmod(0o600)
    assert file.find(secret) is None


def test_fault_who_holds_the_file_alone_holds_up_no_answer(path: Path) -> None:
    file = TokenFile(path, create=True)
    secret, _ = made(file)
    file.close()
    accounts = Accounts(path)
    for one in (accounts._reading, accounts._writing):
        one.close()
    try:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as alone:
            for one in (accounts._reading, accounts._writing):  # as if it had come now
                one._file, one._log = (-1, -1), None
            alone.execute("PRAGMA locking_mode = EXCLUSIVE")
            alone.execute("BEGIN EXCLUSIVE")
            began = time.monotonic()
            assert "cannot be used" in str(accounts.trouble())
            assert time.monotonic() - began < 2
        assert accounts.find(secret) is not None
    finally:
        accounts.close()


def test_fault_what_could_not_be_taken_back_is_taken_back_later(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = TokenFile(path, create=True)
    _, token = made(file)
    accounts = Accounts(path)
    full = [True]
    real = TokenFile.refund

    def refund(self: TokenFile, refunds: Any) -> None:
        if full[0]:
            raise RunError("no space is left")
        real(self, refunds)

    monkeypatch.setattr(TokenFile, "refund", refund)
    booked = asyncio.run(accounts.charge(token, "films", Use(1, 5, 7)))
    accounts.settle(booked, Use(1, 5, 2))
    with pytest.raises(RunError):
        asyncio.run(accounts.charge(token, "films", Use(1)))
    full[0] = False
    accounts.close()
    assert [(row["read_tokens"], row["written_tokens"]) for row in file.usage()] == [(5, 2)]
