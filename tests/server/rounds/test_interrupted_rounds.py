"""Requests whose outcome nobody knows: lost on the way, or sent by a coordinator that died."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

import server.rounds.roster as roster_module
from server.app import write_spent
from server.records.rounds import RoundRecord
from server.rounds.earlier_requests import Asked, EarlierRequests
from server.rounds.local import LocalPrivacy
from server.rounds.loop import Coordinator, run_rounds
from server.rounds.observer import Observer
from server.rounds.roster import Authority
from server.rounds.secure.round import SecurePrivacy
from server.runs.folder import RunFolder
from server.store.checkpoint import Checkpoint
from shared.errors import RunError
from shared.job.job import Job
from shared.job.parsing import parse
from shared.job.privacy import SiteMetricsConfig
from shared.privacy.plan import PrivacyPlan
from shared.tensors.adapters import encode
from shared.trust.certificates import spki
from shared.trust.receipts import Receipt, sign_release
from shared.trust.signed_job import sign_job
from shared.trust.signing import SigningKey
from shared.wire.messages import (
    KEPT_ROUNDS,
    TRAIN,
    Refusal,
    SiteDescription,
    TrainReply,
    pack_description,
    pack_refusal,
    pack_reply,
    released,
    unpack_reply,
    unpack_request,
    with_receipt,
)
from simulations.running.grid import InProcessGrid

INITIAL = {"w": torch.zeros(2)}
NAMES = {1: "a", 2: "b"}


def make_job(rounds: int = 2) -> Job:
    raw = {
        "name": "interrupted",
        "task": {"kind": "sequence_classification", "labels": ["x", "y"]},
        "training": {"rounds": rounds, "local_steps": 2, "learning_rate": 1.0},
        "privacy": {"noise_multiplier": 1.0},
        "federation": {"min_sites": 1, "round_timeout_seconds": 30.0},
    }
    return parse(Job, raw, source="test")


def make_shared_job() -> Job:
    raw = make_job().model_dump(mode="json") | {
        "training": {"rounds": 2, "local_steps": 1, "learning_rate": 1.0},
        "privacy": {"mechanism": "distributed", "max_colluding": 0, "noise_multiplier": 1.0, "sample_rate": 0.25},
        "federation": {"min_sites": 2},
    }
    return parse(Job, raw, source="test")


def make_app(*, b_refuses: bool = False) -> ClientApp:
    app = ClientApp()

    @app.query("describe")
    def describe(message: Message, context: Context) -> Message:
        name = NAMES[context.node_id]
        return Message(pack_description(SiteDescription(site=name, declared_records=8, version="1")), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        request = unpack_request(message.content)
        if b_refuses and NAMES[context.node_id] == "b":
            return Message(pack_refusal(Refusal(site="b", code="PolicyError", reason="too late")), reply_to=message)
        reply = TrainReply(
            site=NAMES[context.node_id],
            round_number=request.round_number,
            job_sha256=request.job.sha256,
            update=encode({"w": torch.ones(2)}),
            declared_records=8,
            noise_multiplier=1.0,
            sample_rate=request.job.privacy.sample_rate,
            max_grad_norm=request.job.privacy.max_grad_norm,
            delta=request.job.privacy.delta,
            steps=2,
            randomness="os",
            epsilon_budget=8.0,
        )
        return Message(pack_reply(reply), reply_to=message)

    return app


def coordinator(job: Job, authority: Authority | None) -> Coordinator:
    return Coordinator(
        job=job,
        initial_adapter=INITIAL,
        update_shapes={"w": torch.Size([2])},
        privacy=LocalPrivacy(job),
        evaluate=lambda adapter: {"loss": float(adapter["w"].sum())},
        evaluate_every=1,
        save=lambda checkpoint: None,
        observer=Observer(),
        authority=authority,
    )


def make_authority(job: Job) -> Authority:
    key, now = SigningKey.generate(), datetime.now(UTC)
    signed = sign_job(
        job, signer=SigningKey.generate(), coordinator=key.verify_key, issued=now, not_after=now + timedelta(days=1)
    )
    return Authority(signed_job=signed, key=key, registered=lambda: NAMES)


@pytest.mark.parametrize(("repeated", "unanswered"), [(False, ()), (True, (1,))])
def test_a_refusal_to_a_repeated_request_may_hide_a_release(repeated: bool, unanswered: tuple[int, ...]) -> None:
    """A site whose process died may have made and charged an update before its next process refuses."""
    job = make_job()
    authority = replace(make_authority(job), may_repeat=lambda message_id: bool(message_id) and repeated)
    last = run_rounds(InProcessGrid(make_app(b_refuses=True), 2), coordinator(job, authority), None, stop_after=1)
    assert last.history[-1].sites == ["a"]
    stated = last.releases.get("b")
    assert (() if stated is None else stated.unanswered) == unanswered
    assert stated is None or stated.epsilon_bound > stated.epsilon == 0.0


def test_a_day_of_refusals_is_some_hundreds_of_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A site notes every question in its audit log."""
    clock, asked = [0.0], []
    refusals = Refusal(site="b", code="PolicyError", reason="this site runs rounds only between 22:00 and 06:00")
    monkeypatch.setattr(roster_module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(roster_module.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    app, honest = ClientApp(), make_app()

    @app.query("describe")
    def describe(message: Message, context: Context) -> Message:
        return honest(message, context)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        asked.append(clock[0])
        return honest(message, context) if clock[0] > 16 * 3600 else Message(pack_refusal(refusals), reply_to=message)

    job = make_job()
    last = run_rounds(InProcessGrid(app, 2), coordinator(job, make_authority(job)), None)
    assert last.round_number == job.training.rounds
    assert 900 < len(asked) / 2 < 1000
    assert asked[-1] < 16 * 3600 + 75, "and a minute after the last of them the job is over"


def test_a_site_that_does_not_answer_costs_no_more_than_the_rounds_patience_and_is_not_asked_twice() -> None:
    asked: Counter[int] = Counter()

    class Silent(InProcessGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            messages = list(messages)
            asked.update(m.metadata.dst_node_id for m in messages if m.metadata.message_type == TRAIN)
            # The request says for how long its answer is waited for; a site begins nothing that nobody waits for.
            assert all(1.0 < m.metadata.ttl <= 10.0 for m in messages if m.metadata.message_type == TRAIN)
            return super().push_messages(messages)

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            waiting = [i for i in message_ids if self._waiting[i].metadata.message_type != TRAIN or self._of_a(i)]
            return super().pull_messages(waiting)

        def _of_a(self, identifier: str) -> bool:
            return self._waiting[identifier].metadata.dst_node_id == 1

    job = make_job()
    job = job.model_copy(update={"federation": job.federation.model_copy(update={"round_timeout_seconds": 1.0})})
    last = run_rounds(Silent(make_app(), 2), coordinator(job, make_authority(job)), None, stop_after=1)
    assert last.history[-1].failed == {"b": "no answer within 1 s"}
    assert asked == {1: 1, 2: 1}
    assert last.releases["b"].unanswered == (1,)


@pytest.mark.parametrize("sent", ["none", "by another", "for another round", "right"])
def test_a_release_counts_only_with_a_receipt_by_its_sites_key(sent: str) -> None:
    job = make_job()
    key, kept = ec.generate_private_key(ec.SECP256R1()), []
    app, honest = ClientApp(), make_app()

    @app.query("describe")
    def describe(message: Message, context: Context) -> Message:
        return honest(message, context)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        reply, request = honest(message, context), unpack_request(message.content)
        assert request.order is not None
        release = unpack_reply(reply)
        assert isinstance(release, TrainReply)
        if sent == "for another round":
            request = replace(request, round_number=9)
        assert request.order is not None
        signer = ec.generate_private_key(ec.SECP256R1()) if sent == "by another" else key
        receipt = b"" if sent == "none" else sign_release(signer, released(request, request.order.sent_at, release))
        return Message(with_receipt(reply.content, receipt), reply_to=message)

    class Keeper(Observer):
        def receipt(self, receipt: Receipt) -> None:
            kept.append(receipt)

    authority = replace(make_authority(job), keys=lambda name: [spki(key.public_key())])
    made = replace(coordinator(job, authority), observer=Keeper())
    grid = InProcessGrid(app, 2)
    if sent == "right":
        last = run_rounds(grid, made, None, stop_after=1)
        assert last.history[-1].sites == ["a", "b"]
        assert [(receipt.what.site, receipt.what.round) for receipt in kept] == [("a", 1), ("b", 1)]
        return

    class Enough(Exception):
        pass

    def stop(checkpoint: Checkpoint) -> None:
        if checkpoint.releases:
            # Nobody here knows what was released, so it counts.
            assert {name: release.unanswered for name, release in checkpoint.releases.items()} == {"a": (1,), "b": (1,)}
            raise Enough

    with pytest.raises(Enough):
        run_rounds(grid, replace(made, save=stop), None, stop_after=1)
    assert kept == []


def interrupted(job: Job, *, round_number: int = 0) -> Checkpoint:
    history = [RoundRecord(round=number, metrics={"loss": 0.0}) for number in range(round_number + 1)]
    return Checkpoint(job_sha256=job.sha256, round_number=round_number, adapter=INITIAL, history=history)


def asked(name: str, number: int, adapter: bytes, update: str | None = None, *, size: int = 8) -> Asked:
    return Asked(
        site=SiteDescription(site=name, declared_records=size, version=""),
        round_number=number,
        adapter_sha256=hashlib.sha256(adapter).hexdigest(),
        update_sha256=update,
    )


def test_what_an_earlier_process_asked_counts_until_it_is_answered() -> None:
    job, first = make_job(), encode(INITIAL)
    log = [asked("gone", 1, first, size=64), asked("a", 1, first)]
    authority = replace(make_authority(job), asked_since=lambda number: log)
    last = run_rounds(InProcessGrid(make_app(), 2), coordinator(job, authority), interrupted(job))
    assert last.releases["gone"].unanswered == (1,)
    assert last.releases["gone"].declared_records == 64
    assert last.releases["gone"].epsilon_bound > last.releases["gone"].epsilon == 0.0
    assert last.releases["a"].unanswered == ()
    assert last.releases["a"].rounds == (1, 2)


@pytest.mark.parametrize("shared", [False, True])
def test_whoever_was_asked_in_a_round_that_was_given_up_may_have_answered(shared: bool, tmp_path: Path) -> None:
    """A run that is stopped in a round states at once what its sites may have spent in it."""
    job = make_shared_job() if shared else make_job()
    privacy = SecurePrivacy(job, tmp_path) if shared else LocalPrivacy(job)
    first = encode(INITIAL)
    log = [asked("a", 2, first, "1" * 64), asked("b", 2, first)]
    before = interrupted(job, round_number=1)
    noted = privacy.with_open_requests(before, EarlierRequests(log)).releases
    assert (noted["a"].rounds, noted["a"].unanswered) == ((2,), ())
    assert (noted["b"].rounds, noted["b"].unanswered) == ((), (2,))
    assert 0.0 < noted["b"].epsilon_bound == pytest.approx(noted["a"].epsilon)
    # Nothing in it is final: what is noted twice counts once.
    assert privacy.with_open_requests(replace(before, releases=noted), EarlierRequests(log)).releases == noted
    assert privacy.with_open_requests(before, EarlierRequests()).releases == {}


def test_what_a_run_writes_when_it_is_stopped_counts_the_round_that_was_given_up(tmp_path: Path) -> None:
    job = make_job()
    log = [asked("a", 2, encode(INITIAL)), asked("b", 2, encode(INITIAL), "2" * 64)]
    with RunFolder(tmp_path / "run", job, resume=False) as folder:
        folder.save_checkpoint(interrupted(job, round_number=1))
        write_spent(folder, LocalPrivacy(job), lambda number: log)
    read = {name: json.loads((folder.path / "sites" / name / "privacy.json").read_text()) for name in "ab"}
    assert (read["a"]["rounds"], read["a"]["rounds_unanswered"]) == ([], [2])
    assert (read["b"]["rounds"], read["b"]["rounds_unanswered"]) == ([2], [])
    assert 0.0 < read["a"]["epsilon_bound"] == pytest.approx(read["b"]["epsilon_spent"])
    # Without the log what is complete is written all the same.
    (folder.path / "statement.json").unlink()
    with RunFolder(folder.path, job, resume=True) as folder, pytest.raises(RunError, match="unreadable"):
        write_spent(folder, LocalPrivacy(job), unreadable)
    assert (folder.path / "statement.json").exists()


def unreadable(round_number: int) -> list[Asked]:
    raise RunError("unreadable")


@pytest.mark.parametrize("shared", [False, True])
def test_what_a_round_that_was_given_up_was_made_of_is_no_guess(shared: bool, tmp_path: Path) -> None:
    """An update that came and was accepted said what its noise was drawn from; of a test's there is no epsilon to state."""
    job = make_shared_job() if shared else make_job()
    privacy = SecurePrivacy(job, tmp_path) if shared else LocalPrivacy(job)
    log = [asked(name, 2, encode(INITIAL), "1" * 64) for name in "ab"]
    before = interrupted(job, round_number=1)

    def made_by(log: list[Asked]) -> dict[str, str]:
        noted = privacy.with_open_requests(before, EarlierRequests(log)).releases
        return {name: release.randomness for name, release in noted.items()}

    assert made_by(log) == {"a": "os", "b": "os"}
    # Of one sum it is the noise of all.
    of_a = "injected" if shared else "os"
    assert made_by([log[0], replace(log[1], randomness="injected")]) == {"a": of_a, "b": "injected"}


def test_metrics_that_were_asked_for_may_have_been_released() -> None:
    job = make_job()
    job = job.model_copy(update={"site_metrics": SiteMetricsConfig(names=("accuracy",), noise_multiplier=4.0)})
    number = job.training.rounds + 1
    log = [asked("a", number, encode(INITIAL)), asked("a", number, encode(INITIAL))]
    noted = LocalPrivacy(job).with_open_requests(interrupted(job, round_number=2), EarlierRequests(log)).releases["a"]
    assert noted.metrics == ("accuracy",)
    assert noted.metrics_mechanism == PrivacyPlan.from_job(job).metrics
    assert noted.unanswered == ()
    assert noted.epsilon_bound > 0.0


# --- a run that was put back ---


class Ledgers:
    """Two sites that answer as real ones do: a request that differs in any byte is a new release, and all are counted.

    Args:
        absent: rounds in which site b's answer is lost on the way: released all the same.
    """

    def __init__(self, absent: tuple[int, ...]) -> None:
        self.absent = absent
        self.stored: dict[tuple[str, int], tuple[bytes, bytes]] = {}
        self.released: Counter[str] = Counter()
        self.log: list[Asked] = []

    def app(self) -> ClientApp:
        app = make_app()
        made = ClientApp()

        @made.query("describe")
        def describe(message: Message, context: Context) -> Message:
            return app(message, context)

        @made.train()
        def train(message: Message, context: Context) -> Message:
            name, request = NAMES[context.node_id], unpack_request(message.content)
            number = request.round_number
            kept = self.stored.get((name, number))
            if kept is None or kept[0] != request.adapter:
                self.released[name] += 1
                update = encode({"w": torch.full((2,), 0.1 if name == "a" else 0.4)}, salt=str(self.released))
                self.stored[name, number] = (request.adapter, update)
                for earlier in range(number - KEPT_ROUNDS + 1):
                    self.stored.pop((name, earlier), None)
            if name == "b" and number in self.absent:
                return Message(Error(code=1, reason="lost on the way"), reply_to=message)
            reply = TrainReply(
                site=name,
                round_number=number,
                job_sha256=request.job.sha256,
                update=self.stored[name, number][1],
                declared_records=8,
                noise_multiplier=1.0,
                sample_rate=request.job.privacy.sample_rate,
                max_grad_norm=request.job.privacy.max_grad_norm,
                delta=request.job.privacy.delta,
                steps=2,
                randomness="os",
                epsilon_budget=8.0,
            )
            return Message(pack_reply(reply), reply_to=message)

        return made

    def observer(self) -> Observer:
        ledgers = self

        class Log(Observer):
            def round_started(self, round_number: int, sites: Sequence[str], adapter: bytes) -> None:
                ledgers.log += [asked(name, round_number, adapter) for name in sites]

            def update_judged(
                self, round_number: int, site: str, reply: TrainReply | None, problem: str | None
            ) -> None:
                if reply is not None and problem is None:
                    place = max(
                        i
                        for i, one in enumerate(ledgers.log)
                        if (one.site.site, one.round_number) == (site, round_number)
                    )
                    sha256 = hashlib.sha256(reply.update).hexdigest()
                    ledgers.log[place] = replace(ledgers.log[place], update_sha256=sha256)

        return Log()


def run_on(
    ledgers: Ledgers, job: Job, authority: Authority, start: Checkpoint | None, *, stop_after: int | None = None
) -> dict[int, Checkpoint]:
    """Run from `start` and return the checkpoint after each round."""
    kept: dict[int, Checkpoint] = {}
    known = list(ledgers.log)
    since = replace(authority, asked_since=lambda number: [one for one in known if one.round_number > number])
    setup = replace(
        coordinator(job, since),
        observer=ledgers.observer(),
        save=lambda checkpoint: kept.__setitem__(checkpoint.round_number, checkpoint),
    )
    run_rounds(InProcessGrid(ledgers.app(), 2), setup, start, stop_after=stop_after)
    return kept


ALL = (1, 2, 3, 4, 5)


@pytest.mark.parametrize("back", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    ("first_lost", "then_lost"),
    [((), ()), ((4,), ()), ((5,), ()), ((2, 4), ()), (ALL, ()), ((4, 5), (5,)), ((4,), (5,)), ((), (5,)), (ALL, ALL)],
)
def test_a_run_put_back_counts_every_release_of_every_timeline(
    back: int, first_lost: tuple[int, ...], then_lost: tuple[int, ...]
) -> None:
    """What the sites released is known here, and no bound of the coordinator may be below it."""
    job = make_job(rounds=7)
    authority, ledgers = make_authority(job), Ledgers(first_lost)
    first = run_on(ledgers, job, authority, None, stop_after=5)
    ledgers.absent = then_lost
    again = run_on(ledgers, job, authority, first[5 - back], stop_after=6)
    require_all_counted(again[6], ledgers)
    ledgers.absent = first_lost  # the first adapters once more, after others took their place at the sites
    twice = run_on(ledgers, job, authority, first[5 - back], stop_after=6)
    require_all_counted(twice[6], ledgers)
    last = run_on(ledgers, job, authority, twice[max(5 - back + 1, 4)])
    require_all_counted(last[7], ledgers)
    if not (first_lost or then_lost):  # the same adapters: nothing is released twice unless a site forgot it
        assert ledgers.released["a"] <= 7 + 3 * max(0, back + 1 - KEPT_ROUNDS)


def require_all_counted(last: Checkpoint, ledgers: Ledgers) -> None:
    for name in "ab":
        release = last.releases[name]
        assert 2 * ledgers.released[name] <= sum(event.steps for event in release.possible_events)
        assert release.epsilon_bound >= release.epsilon


def test_two_rounds_back_with_another_site_is_counted_exactly() -> None:
    """Round 4 of the first timeline had no b; with b the adapter of round 5 differs, and a releases round 5 twice."""
    job = make_job(rounds=6)
    authority, ledgers = make_authority(job), Ledgers(absent=(4,))
    first = run_on(ledgers, job, authority, None, stop_after=5)
    ledgers.absent = ()
    last = run_on(ledgers, job, authority, first[3])[6]
    assert ledgers.released == {"a": 7, "b": 7}
    assert last.releases["a"].rounds == (1, 2, 3, 4, 5, 5, 6)
    assert (last.releases["a"].steps, last.releases["a"].unanswered) == (14, ())
    assert last.releases["b"].steps + 2 * len(last.releases["b"].unanswered) == 14


def test_a_resumed_run_is_told() -> None:
    told: list[int] = []

    class Notes(Observer):
        def resumed(self, checkpoint: Checkpoint) -> None:
            told.append(checkpoint.round_number)

    job = make_job()
    setup = replace(coordinator(job, make_authority(job)), observer=Notes())
    run_rounds(InProcessGrid(make_app(), 2), setup, None)
    assert told == []
    run_rounds(InProcessGrid(make_app(), 2), setup, interrupted(job))
    assert told == [0]
