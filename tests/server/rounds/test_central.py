"""The round loop under central DP: secret coins, charge before release, nothing about participants in what is published."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from flwr.app import Message

import server.rounds.central as central_module
import server.rounds.roster as roster_module
from server.aggregation import apply_update
from server.rounds.central import LEDGER_FILE, CentralPrivacy
from server.rounds.loop import run_rounds
from server.rounds.observer import Observer
from server.store.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from shared.errors import PrivacyError, RunError
from shared.privacy.accounting import GaussianSteps, compose_epsilon
from shared.privacy.central import CentralPlan
from shared.privacy.randomness import SiteRandomness
from shared.wire.messages import SiteDescription, TrainReply
from simulations.running.grid import DropoutGrid, InProcessGrid
from tests.server.rounds.central_sites import (
    INITIAL,
    NUM_SITES,
    PRIVACY,
    SHAPES,
    clipped_sum,
    coordinator,
    grid_of,
    make_job,
    released,
    update_of,
)


def charged(folder: Path) -> list[int]:
    content = json.loads((folder / LEDGER_FILE).read_text())
    assert content["unit"] == "site"
    return [charge["round"] for charge in content["charges"]]


def descriptions(number: int = NUM_SITES) -> dict[int, SiteDescription]:
    return {node: SiteDescription(site=f"s{node:03}", declared_records=8, version="1") for node in range(1, number + 1)}


# --- a round ---


def test_a_round_is_the_noisy_mean_over_the_drawn_sites(tmp_path: Path) -> None:
    job, asked = make_job(training={"rounds": 1, "local_steps": 2}), list[tuple[int, int]]()
    last = run_rounds(grid_of(asked=asked), coordinator(job, tmp_path, seed="round"), None)
    plan, randomness = CentralPlan.from_job(job), SiteRandomness.injected("round")
    coins = randomness.stream("sampling", round_number=1, step=0)
    drawn = (plan.plan.sample(NUM_SITES, coins) + 1).tolist()
    assert sorted(node for _, node in asked) == drawn
    assert 30 < len(drawn) < 70
    total = clipped_sum(plan, [update_of(node) for node in drawn], SHAPES, 0.5)
    expected = plan.finish(plan.add_noise(total, 0.5, randomness, 1), SHAPES, 0.5)
    assert all(torch.equal(last.adapter[name], expected.mean[name]) for name in INITIAL)
    assert float(last.server_state["|clip_norm"]) == expected.clip_norm != 0.5


def test_the_server_optimiser_reads_the_noisy_mean_only(tmp_path: Path) -> None:
    config = {"server_optimizer": "adam", "server_learning_rate": 0.01, "server_momentum": 0.9}
    job = make_job(training={"rounds": 1, "local_steps": 2}, aggregation=config)
    last = run_rounds(grid_of(), coordinator(job, tmp_path, seed="adam"), None)
    plain = run_rounds(grid_of(), coordinator(make_job(training=job.training), tmp_path / "plain", seed="adam"), None)
    expected, state = apply_update(INITIAL, plain.adapter, {}, job.aggregation)
    assert all(torch.equal(last.adapter[name], expected[name]) for name in INITIAL)
    assert last.server_state.keys() == {*state, "|clip_norm"}


def test_what_a_round_leaves_behind_does_not_tell_who_was_drawn(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.safetensors"
    last = run_rounds(
        grid_of(), coordinator(make_job(), tmp_path, save=lambda state: save_checkpoint(file, state)), None
    )
    assert last.releases == {}
    for record in last.history:
        assert (record.sites, record.failed) == ([], {})
        assert (record.bytes_up, record.bytes_down, record.seconds) == (None, None, None)
    for path in tmp_path.iterdir():
        assert not re.search(rb"s0\d\d|s100", path.read_bytes()), path
    assert load_checkpoint(file, job_sha256=last.job_sha256) is not None


def test_epsilon_is_of_sites_and_follows_the_executed_rounds(tmp_path: Path) -> None:
    setup = coordinator(make_job(), tmp_path)
    last = run_rounds(grid_of(), setup, None)
    steps = [GaussianSteps(noise_multiplier=1.5, sample_rate=0.5, steps=number) for number in range(1, 5)]
    assert [record.epsilon_max for record in last.history] == [None, *(compose_epsilon([s], 1e-5) for s in steps)]
    release = setup.privacy.release()
    assert release is not None
    assert (release.events, release.rounds, release.protected) == ((steps[-1],), (1, 2, 3, 4), True)
    assert release.update_noise_multiplier == pytest.approx((1.5**-2 - 5.0**-2) ** -0.5)


def test_injected_randomness_is_remembered_over_a_resume(tmp_path: Path) -> None:
    job = make_job()
    first = run_rounds(grid_of(), coordinator(job, tmp_path, seed="x"), None, stop_after=2)
    assert first.history[-1].epsilon_max is None
    setup = coordinator(job, tmp_path)
    run_rounds(grid_of(), setup, first)
    release = setup.privacy.release()
    assert release is not None
    assert not release.protected


# --- sites that fail ---


class Judged(Observer):
    """Remembers what became of the updates."""

    def __init__(self) -> None:
        self.problems: dict[str, str | None] = {}

    def update_judged(self, round_number: int, site: str, reply: TrainReply | None, problem: str | None) -> None:
        self.problems[site] = problem


def test_a_refused_update_counts_as_zero(tmp_path: Path) -> None:
    """Malformed, NaN or another mechanism: the sum is that of the others, and the divisor stays."""
    job = make_job(training={"rounds": 1, "local_steps": 2}, privacy=PRIVACY | {"central": all_sites(clip_norm=0.5)})
    nan = {name: torch.full(shape, float("nan")) for name, shape in SHAPES.items()}
    bad = {7: nan, 8: {"w": INITIAL["w"]}}
    judged = Judged()
    grid = grid_of(update=lambda node: bad.get(node, update_of(node)))
    last = run_rounds(grid, coordinator(job, tmp_path, seed="nan", observer=judged), None)
    assert "NaN or infinity" in str(judged.problems["s007"])
    assert "lacks 1 tensors" in str(judged.problems["s008"])
    plan, randomness = CentralPlan.from_job(job), SiteRandomness.injected("nan")
    others = [update_of(node) for node in range(1, NUM_SITES + 1) if node not in bad]
    noisy = plan.add_noise(clipped_sum(plan, others, SHAPES, 0.5), 0.5, randomness, 1)
    expected = plan.finish(noisy, SHAPES, 0.5)
    assert all(torch.equal(last.adapter[name], expected.mean[name]) for name in INITIAL)
    assert float(last.server_state["|clip_norm"]) == expected.clip_norm


def all_sites(**changes: object) -> dict[str, object]:
    return {"num_sites": NUM_SITES, "site_sample_rate": 1.0, **changes}


@pytest.mark.parametrize("dropout", [0.5, 0.999999])
def test_silent_sites_change_neither_noise_nor_divisor(tmp_path: Path, dropout: float) -> None:
    """A round in which nobody answers is a noisy round like any other, and is not repeated until somebody does."""
    job = make_job()
    silent = DropoutGrid(grid_of(update=lambda node: INITIAL), dropout, seed=0)
    last = run_rounds(silent, coordinator(job, tmp_path, seed="silent"), None, stop_after=1)
    present = coordinator(job, tmp_path / "present", seed="silent")
    expected = run_rounds(grid_of(update=lambda node: INITIAL), present, None, stop_after=1)
    assert charged(tmp_path) == [1]
    # Updates of zero: what is left is noise.
    assert float(last.adapter["w"].abs().max()) > 0
    assert all(torch.equal(last.adapter[name], expected.adapter[name]) for name in INITIAL)


def test_more_sites_than_declared_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"101 sites take part, but privacy\.central\.num_sites declares 100"):
        run_rounds(grid_of(101), coordinator(make_job(), tmp_path), None)
    assert not (tmp_path / LEDGER_FILE).exists()


def test_fewer_sites_than_a_hundred_are_not_begun_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster_module, "DESCRIBE_TIMEOUT_SECONDS", 0.2)
    with pytest.raises(RunError, match=r"99 nodes are connected, federation\.min_sites is 100"):
        run_rounds(grid_of(99), coordinator(make_job(), tmp_path), None)


def test_nobody_drawn_is_a_round(tmp_path: Path) -> None:
    job = make_job(privacy=PRIVACY | {"central": {"num_sites": NUM_SITES, "site_sample_rate": 1e-9}})

    class NoMessages(InProcessGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            listed = list(messages)
            assert listed, "an empty request was pushed"
            return super().push_messages(listed)

    last = run_rounds(NoMessages(grid_of()._client_app, NUM_SITES), coordinator(job, tmp_path), None)
    assert (last.round_number, charged(tmp_path)) == (4, [1, 2, 3, 4])


# --- coins ---


def test_coins_do_not_come_from_the_job() -> None:
    central = CentralPrivacy(make_job(), Path("unused"))
    draws = [tuple(central.begin(1).draw(descriptions())) for _ in range(20)]
    assert len(set(draws)) == 20
    assert len({len(draw) for draw in draws}) > 3, "sizes of Poisson samples vary"


def test_one_attempt_releases_once(tmp_path: Path) -> None:
    attempt = CentralPrivacy(make_job(), tmp_path).begin(1)
    released(attempt)
    with pytest.raises(RuntimeError, match="share its noise"):
        released(attempt)
    assert charged(tmp_path) == [1]


# --- the account ---


class Killed(BaseException):
    """The process died."""


def test_the_charge_is_durable_before_the_noise_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync, replace_file, add_noise = os.fsync, os.replace, CentralPlan.add_noise

    def noted_fsync(handle: int) -> None:
        fsync(handle)
        synced.append("fsync")

    def noted_replace(source: str, target: object) -> None:
        replace_file(source, str(target))
        synced.append(f"replace {Path(str(target)).name}")

    def noted_noise(*arguments: object) -> object:
        synced.append("noise")
        return add_noise(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    monkeypatch.setattr(CentralPlan, "add_noise", noted_noise)
    released(CentralPrivacy(make_job(), tmp_path).begin(1))
    assert synced == ["fsync", f"replace {LEDGER_FILE}", "fsync", "noise"]


def test_a_charge_that_cannot_be_written_draws_no_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, value: object) -> None:
        raise RunError("disk full")

    monkeypatch.setattr(central_module, "write_json", full)
    monkeypatch.setattr(CentralPlan, "add_noise", lambda *arguments: pytest.fail("noise was drawn"))
    with pytest.raises(RunError, match="disk full"):
        released(CentralPrivacy(make_job(), tmp_path).begin(1))


@pytest.mark.parametrize("moment", ["after the charge", "after the noise", "before the checkpoint"])
def test_a_recomputed_round_is_a_second_charge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Killed in round 2 between charge and checkpoint; the round is computed again and counts twice."""
    job, saved = make_job(), list[Checkpoint]()
    plain_noise = CentralPlan.add_noise

    def dying(state: Checkpoint) -> None:
        if state.round_number == 2:
            raise Killed
        saved.append(state)

    def noise(plan: CentralPlan, total: object, clip: float, randomness: SiteRandomness, number: int) -> object:
        if number == 2 and moment == "after the charge":
            raise Killed
        noisy = plain_noise(plan, total, clip, randomness, number)  # type: ignore[arg-type]
        if number == 2 and moment == "after the noise":
            raise Killed
        return noisy

    with monkeypatch.context() as patch:
        patch.setattr(CentralPlan, "add_noise", noise)
        save = dying if moment == "before the checkpoint" else saved.append
        with pytest.raises(Killed):
            run_rounds(grid_of(update=lambda node: INITIAL), coordinator(job, tmp_path, save=save), None)
    assert charged(tmp_path) == [1, 2]
    # A new process goes on from the last checkpoint.
    setup = coordinator(job, tmp_path)
    last = run_rounds(grid_of(), setup, saved[-1], stop_after=3)
    assert (last.round_number, charged(tmp_path)) == (3, [1, 2, 2, 3])
    release = setup.privacy.release()
    assert release is not None
    assert release.steps == 4
    assert last.history[-1].epsilon_max == release.epsilon == release.epsilon_budget
    # Four noisy rounds were declared to the sites and four were executed.
    with pytest.raises(PrivacyError, match=r"round 4 cannot be executed: .* 4 noisy rounds .* \(1 of them again"):
        run_rounds(grid_of(), coordinator(job, tmp_path), last)
    assert charged(tmp_path) == [1, 2, 2, 3]


def test_a_recomputed_round_has_other_coins_and_noise(tmp_path: Path) -> None:
    job = make_job()
    start = run_rounds(grid_of(), coordinator(job, tmp_path), None, stop_after=1)
    ends = [run_rounds(grid_of(), coordinator(job, tmp_path), start, stop_after=2) for _ in range(2)]
    assert charged(tmp_path) == [1, 2, 2]
    assert not torch.equal(ends[0].adapter["w"], ends[1].adapter["w"])


DYING = """
import os, sys
from pathlib import Path
from server.store.checkpoint import save_checkpoint
from server.rounds.loop import run_rounds
from tests.server.rounds.central_sites import coordinator, grid_of, make_job

folder = Path(sys.argv[1])

def save(checkpoint):
    if checkpoint.round_number == 2:
        os._exit(9)
    save_checkpoint(folder / "checkpoint.safetensors", checkpoint)

run_rounds(grid_of(), coordinator(make_job(), folder, save=save), None)
"""


def test_a_killed_process_leaves_the_charge_behind(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[3]
    environment = os.environ | {"PYTHONPATH": str(root)}
    died = subprocess.run([sys.executable, "-c", DYING, tmp_path], env=environment, timeout=300, check=False)
    assert died.returncode == 9
    assert charged(tmp_path) == [1, 2]
    job = make_job()
    start = load_checkpoint(tmp_path / "checkpoint.safetensors", job_sha256=job.sha256)
    assert start is not None
    assert start.round_number == 1
    run_rounds(grid_of(), coordinator(job, tmp_path), start, stop_after=2)
    assert charged(tmp_path) == [1, 2, 2]


def test_a_resumed_run_gives_the_same_adapter(tmp_path: Path) -> None:
    """The clipping bound comes from the checkpoint, exactly."""
    job = make_job(aggregation={"server_optimizer": "momentum", "server_momentum": 0.5})
    through = run_rounds(grid_of(), coordinator(job, tmp_path / "through", seed="same"), None)
    file = tmp_path / "checkpoint.safetensors"
    save_checkpoint(
        file, run_rounds(grid_of(), coordinator(job, tmp_path / "stopped", seed="same"), None, stop_after=2)
    )
    start = load_checkpoint(file, job_sha256=job.sha256)
    resumed = run_rounds(grid_of(), coordinator(job, tmp_path / "stopped", seed="same"), start)
    assert all(torch.equal(through.adapter[name], resumed.adapter[name]) for name in INITIAL)
    assert through.server_state["|clip_norm"] == resumed.server_state["|clip_norm"]
    assert [record.metrics for record in through.history] == [record.metrics for record in resumed.history]


def test_an_account_that_was_changed_lost_or_exchanged_is_refused(tmp_path: Path) -> None:
    job = make_job()
    last = run_rounds(grid_of(), coordinator(job, tmp_path), None, stop_after=3)
    path = tmp_path / LEDGER_FILE
    text = path.read_text()
    content = json.loads(text)
    for change in (
        lambda c: c["charges"].pop(0),
        lambda c: c["charges"].pop(1),
        lambda c: c["charges"][1].update(noise_multiplier=9.0),
        lambda c: c["charges"][2].update(round=1),
        lambda c: c["charges"][0].pop("previous"),
        lambda c: c.pop("charges"),
    ):
        changed = json.loads(text)
        change(changed)
        path.write_text(json.dumps(changed))
        with pytest.raises(RunError, match="cannot be trusted"):
            coordinator(job, tmp_path)
    path.write_text(text[:-20])
    with pytest.raises(RunError, match="cannot be trusted"):
        coordinator(job, tmp_path)
    # Cut at the end, the chain holds, but the checkpoint knows better.
    path.write_text(json.dumps(content | {"charges": content["charges"][:-1]}))
    with pytest.raises(RunError, match="does not hold the charge of round 3"):
        run_rounds(grid_of(), coordinator(job, tmp_path), last)
    path.unlink()
    with pytest.raises(RunError, match="does not hold the charge of round 1"):
        run_rounds(grid_of(), coordinator(job, tmp_path), last)
    path.write_text(text)
    with pytest.raises(RunError, match="belongs to another job"):
        coordinator(make_job(seed=1), tmp_path)
    assert run_rounds(grid_of(), coordinator(job, tmp_path), last).round_number == 4
