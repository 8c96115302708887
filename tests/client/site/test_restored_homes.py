"""A home that was put back from a backup, in parts: no release is ever without its charge."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client.check import check_site
from client.site.site import Site
from shared.job.job import Job
from shared.privacy.ledger_export import LedgerExport
from shared.wire.messages import WITHHELD, Refusal, TrainReply, TrainRequest
from tests.client.site.test_guard import World
from tests.client.site.test_oracles import ROWS, make_world  # noqa: F401 (a fixture)

MakeRequest = Callable[..., TrainRequest]


@pytest.fixture
def job(private_job: Callable[..., Job]) -> Job:
    return private_job(federation={"min_sites": 2})


def put_back(home: Path, backup: Path, *parts: str) -> None:
    for part in parts:
        if (home / part).is_dir():
            shutil.rmtree(home / part)
            shutil.copytree(backup / part, home / part)
        else:
            shutil.copy(backup / part, home / part)


def findings(world: World) -> dict[str, tuple[str, str]]:
    return {f.name: (f.outcome, f.text) for f in check_site(world.home, passphrase=None, connect=False)}


@pytest.mark.parametrize("number", [2, 3])
def test_a_ledger_and_a_log_that_are_older_than_a_release_stop_the_site(
    make_world: Callable[..., World],  # noqa: F811
    job: Job,
    request_for: MakeRequest,
    tmp_path: Path,
    number: int,
) -> None:
    """Ledger and log agree with each other, so the mirror finds nothing; the stored release of round 2 tells."""
    world = make_world(ROWS)
    assert isinstance(world.site.answer(world.order(request_for(job, 1))), TrainReply)
    backup = tmp_path / "backup"
    shutil.copytree(world.home.path, backup)
    assert isinstance(world.site.answer(world.order(request_for(job, 2))), TrainReply)
    world.opened.clear()
    put_back(world.home.path, backup, "ledger.db", "audit")
    answer = world.site.answer(world.order(request_for(job, number)))
    assert isinstance(answer, Refusal)
    assert answer.code == WITHHELD
    outcome, text = findings(world)["ledger"]
    assert outcome == "failed"
    assert "round-00002.safetensors holds a release that ledger.db never charged" in text


def test_releases_that_are_older_than_the_ledger_are_made_and_charged_again(
    make_world: Callable[..., World],  # noqa: F811
    job: Job,
    request_for: MakeRequest,
    tmp_path: Path,
) -> None:
    world = make_world(ROWS)
    assert isinstance(world.site.answer(world.order(request_for(job, 1))), TrainReply)
    backup = tmp_path / "backup"
    shutil.copytree(world.home.path, backup)
    first = world.site.answer(world.order(request_for(job, 2)))
    spent = world.site.ledger().spent_epsilon()
    world.opened.clear()
    put_back(world.home.path, backup, "rounds")
    second = world.site.answer(world.order(request_for(job, 2)))
    assert isinstance(first, TrainReply)
    assert isinstance(second, TrainReply)
    assert first.update != second.update
    assert world.site.ledger().spent_epsilon() > spent


def test_a_ledger_that_was_removed_is_noticed(
    site_home: Callable[..., Path], private_job: Callable[..., Job], request_for: MakeRequest
) -> None:
    """Also where no audit log is: at a simulated site."""
    home, job = site_home(), private_job()
    assert isinstance(Site(home).answer(request_for(job, 1)), TrainReply)
    (home / "ledger.db").unlink()
    for number in (1, 2):
        assert isinstance(Site(home).answer(request_for(job, number)), Refusal)


def test_an_account_and_the_releases_that_move_together_go_on(
    site_home: Callable[..., Path], private_job: Callable[..., Job], request_for: MakeRequest
) -> None:
    home, job = site_home(), private_job()
    old = Site(home)
    reply = old.answer(request_for(job, 1))
    export: LedgerExport = old.ledger().export(site="north", declared_records=8)
    (home / "ledger.db").unlink()
    moved = Site(home)
    moved.ledger().import_account(export)
    assert moved.answer(request_for(job, 1)) == reply
    assert isinstance(moved.answer(request_for(job, 2)), TrainReply)


def test_releases_without_noise_need_no_charge(
    site_home: Callable[..., Path], private_job: Callable[..., Job], request_for: MakeRequest
) -> None:
    home = site_home(allow_non_private=True)
    open_job: Any = private_job(privacy={"mechanism": "none", "noise_multiplier": None})
    assert isinstance(Site(home).answer(request_for(open_job, 1)), TrainReply)
    assert isinstance(Site(home).answer(request_for(private_job(), 1)), TrainReply)
