"""A home that was put back from a backup, in parts: no release is ever without its charge."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from client.check import check_site
from client.site.guard import Guard
from client.site.outbox import Outbox
from client.site.site import Site
from shared.errors import LedgerError
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


def test_a_round_that_was_made_again_is_told_from_the_one_that_was_charged(
    make_world: Callable[..., World],  # noqa: F811
    job: Job,
    request_for: MakeRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The older ledger has a charge of the same round, of another adapter; the release that lies there was charged after it."""
    monkeypatch.setattr(Guard, "admit_progress", lambda *_: None)  # as versions before 0.2 did
    world = make_world(ROWS)
    assert isinstance(world.site.answer(world.order(request_for(job, 1))), TrainReply)
    assert isinstance(world.site.answer(world.order(request_for(job, 2))), TrainReply)
    backup = tmp_path / "backup"
    shutil.copytree(world.home.path, backup)
    assert isinstance(world.site.answer(world.order(request_for(job, 2, shift=1e-3))), TrainReply)
    assert findings(world)["ledger"][0] == "ok"
    world.opened.clear()
    put_back(world.home.path, backup, "ledger.db", "audit")
    assert isinstance(world.site.answer(world.order(request_for(job, 2))), Refusal)
    assert findings(world)["ledger"][0] == "failed"


def test_a_ledger_that_was_removed_with_its_log_is_no_ledger_that_was_never_begun(
    make_world: Callable[..., World],  # noqa: F811
    job: Job,
    request_for: MakeRequest,
) -> None:
    world = make_world(ROWS)
    assert "not begun" in findings(world)["ledger"][1]
    assert isinstance(world.site.answer(world.order(request_for(job, 1))), TrainReply)
    world.opened.clear()
    (world.home.path / "ledger.db").unlink()
    outcome, text = findings(world)["ledger"]
    assert outcome == "failed"
    assert "that ledger.db never charged" in text


def test_copies_that_somebody_made_beside_releases_are_not_read_and_not_removed(
    make_world: Callable[..., World],  # noqa: F811
    job: Job,
    request_for: MakeRequest,
) -> None:
    world = make_world(ROWS)
    assert isinstance(world.site.answer(world.order(request_for(job, 1))), TrainReply)
    (stored,) = (world.home.path / "rounds").glob("*/round-00001.safetensors")
    copies = [
        stored.with_name("round-00001 copy.safetensors"),
        stored.with_name("round-old.safetensors"),
        stored.parent.with_name("before") / stored.name,
        stored.parent.with_name("before") / "metrics.json",
    ]
    for copy in copies:
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(stored, copy)
    world.opened.clear()
    assert findings(world)["ledger"][0] == "ok"
    for number in range(2, 1 + job.training.rounds):
        assert isinstance(world.site.answer(world.order(request_for(job, number))), TrainReply)
    assert all(copy.exists() for copy in copies)


def test_a_stored_release_that_says_nothing_of_its_noise_ends_with_a_message(tmp_path: Path) -> None:
    file = tmp_path / ("a" * 16) / "round-00001.safetensors"
    file.parent.mkdir()
    file.write_bytes(save({"update": torch.zeros(1, dtype=torch.uint8)}, {"reply": "{}"}))
    with pytest.raises(LedgerError, match="cannot be read"):
        Outbox(tmp_path, seal=None).check_charged([])


def test_the_hundred_thousandth_round_starts_from_the_one_before(tmp_path: Path) -> None:
    """Its number has a digit more than the names of files have been made for."""
    outbox, job = Outbox(tmp_path, seal=None), "c" * 64
    for number in (99_998, 99_999, 100_000):
        fields = {f.name: "" for f in dataclasses.fields(TrainReply)}
        reply = TrainReply(**{**fields, "update": b"u", "job_sha256": job, "round_number": number})
        outbox.store_round(reply, request_sha256="", optimizer_state={"m": torch.tensor([float(number)])})
    assert outbox.kept("optimizer", job, 100_000)["m"].item() == 99_999
    assert outbox.kept("optimizer", job, 99_999)["m"].item() == 99_998


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
