"""The round loop against sites that lie, fail, repeat themselves or say nothing."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import Context, Error, Message, Metadata, RecordDict
from flwr.clientapp import ClientApp

import server.rounds.roster as roster_module
from server.rounds.local import LocalPrivacy, select_sites
from server.rounds.loop import Coordinator, run_rounds
from server.rounds.observer import Observer
from server.rounds.roster import Roster
from server.store.checkpoint import Checkpoint
from shared.errors import RunError
from shared.job.job import Job
from shared.job.parsing import parse
from shared.link.envelope import message as made_message
from shared.tensors.adapters import encode
from shared.wire.messages import (
    Refusal,
    SiteDescription,
    TrainReply,
    TrainRequest,
    pack_description,
    pack_refusal,
    pack_reply,
    unpack_request,
)
from shared.wire.updates import encode_update
from simulations.running.grid import InProcessGrid

Behaviour = Callable[[TrainReply, TrainRequest], RecordDict]

INITIAL = {"w": torch.zeros(2, 3), "head.b": torch.zeros(2)}
UPDATES = {
    name: {"w": torch.full((2, 3), value), "head.b": torch.tensor([value, -value])}
    for name, value in (("a", 1.0), ("b", 2.0), ("c", 6.0))
}


def make_job(**sections: Any) -> Job:
    raw: dict[str, Any] = {
        "name": "rounds",
        "task": {"kind": "sequence_classification", "labels": ["x", "y"]},
        "training": {"rounds": 2, "local_steps": 2},
        "privacy": {"noise_multiplier": 1.0},
    }
    raw |= sections
    raw["training"] = {
        "learning_rate": 10.0,
        **raw["training"],
    }  # so that the updates below are within the plan's bounds
    return parse(Job, raw, source="test")


def honest(reply: TrainReply, request: TrainRequest) -> RecordDict:
    return pack_reply(reply)


def lying(**changes: Any) -> Behaviour:
    return lambda reply, request: pack_reply(replace(reply, **changes))


def header(**changes: Any) -> Behaviour:
    def act(reply: TrainReply, request: TrainRequest) -> RecordDict:
        content = pack_reply(reply)
        content.config_records["silotune"].update(changes)
        return content

    return act


class Claims(bytes):
    """Bytes that claim ten gigabytes without having them."""

    def __len__(self) -> int:
        return 10 * 2**30


def grid_of(
    behaviours: dict[str, Behaviour] | None = None,
    *,
    names: Iterable[str] = ("a", "b", "c"),
    sizes: dict[str, int] | None = None,
    randomness: str = "os",
) -> InProcessGrid:
    """Nodes 1, 2, ... that answer as the sites `names`."""
    order, app = list(names), ClientApp()

    @app.query("describe")
    def describe(message: Message, context: Context) -> Message:
        name = order[context.node_id - 1]
        described = SiteDescription(site=name, declared_records=(sizes or {}).get(name, 8), version="1")
        return Message(pack_description(described), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        request, name = unpack_request(message.content), order[context.node_id - 1]
        job = request.job
        reply = TrainReply(
            site=name,
            round_number=request.round_number,
            job_sha256=job.sha256,
            update=encode(UPDATES.get(name, UPDATES["a"])),
            declared_records=(sizes or {}).get(name, 8),
            noise_multiplier=job.privacy.noise_multiplier or 0.0,
            sample_rate=job.privacy.sample_rate,
            max_grad_norm=job.privacy.max_grad_norm,
            delta=job.privacy.delta,
            steps=job.training.local_steps,
            randomness="os" if randomness == "os" else "injected",
            epsilon_budget=8.0,
        )
        return Message((behaviours or {}).get(name, honest)(reply, request), reply_to=message)

    return InProcessGrid(app, len(order))


def coordinator(job: Job, saved: list[Checkpoint] | None = None) -> Coordinator:
    return Coordinator(
        job=job,
        initial_adapter=INITIAL,
        update_shapes={name: tensor.shape for name, tensor in INITIAL.items()},
        privacy=LocalPrivacy(job),
        evaluate=lambda adapter: {"loss": float(adapter["w"].sum())},
        evaluate_every=1,
        save=(saved if saved is not None else []).append,
        observer=Observer(),
    )


# --- one bad site among good ones ---


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (lambda reply, request: RecordDict(), "Malformed"),
        (header(steps="many"), "Malformed"),
        (header(noise_multiplier=[1.0]), "Malformed"),
        (header(declared_records=float("inf")), "Malformed"),
        (header(site="../../x"), "Malformed"),
        (lying(update=b"\x80\x04pickle"), "do not start like an adapter"),
        (lying(update=encode(UPDATES["b"])[:-3]), "SHA-256"),
        (lying(update=encode({**UPDATES["b"], "w": torch.full((2, 3), float("nan"))})), "NaN or infinity"),
        (lying(update=encode({**UPDATES["b"], "w": torch.full((2, 3), float("inf"))})), "NaN or infinity"),
        (lying(update=encode({**UPDATES["b"], "w": torch.zeros(3, 2)})), "shape (3, 2), expected (2, 3)"),
        (lying(update=encode({**UPDATES["b"], "w": torch.zeros(500, 500)})), "more than the"),
        (lying(update=Claims(b"SILOTUN1")), "10,737,418,240 bytes, more than the"),
        (lying(update=encode({"w": UPDATES["b"]["w"]})), "lacks 1 tensors"),
        (lying(update=encode({**UPDATES["b"], "x": torch.zeros(1)})), "unknown tensors"),
        (lying(round_number=7), "stale update of round 7"),
        (lying(job_sha256="f" * 64), "answered for job ffff"),
        (lying(site="c"), "the node of site 'b' answered as 'c'"),
        (lying(noise_multiplier=0.0), "executed the mechanism"),
        (lying(noise_multiplier=float("nan")), "Malformed"),
        (lying(noise_multiplier=1e-9), "executed the mechanism"),
        (lying(sample_rate=0.9), "executed the mechanism"),
        (lying(sample_rate=2.0), "Malformed"),
        (lying(delta=0.5), "executed the mechanism"),
        (lying(steps=-1), "Malformed"),
        (lying(steps=3), "executed the mechanism"),
        (lying(steps=10**12), "Malformed"),
        (lying(epsilon_budget=-5.0), "Malformed"),
        (lying(declared_records=0), "Malformed"),
        (lambda *_: pack_refusal(Refusal(site="b", code="PolicyError", reason="no")), "PolicyError: no"),
    ],
)
def test_a_bad_update_is_recorded_and_the_round_goes_on(behaviour: Behaviour, reason: str) -> None:
    job = make_job(training={"rounds": 1, "local_steps": 2}, aggregation={"weights": "declared"})
    last = run_rounds(grid_of({"b": behaviour}), coordinator(job), None)
    record = last.history[-1]
    assert record.sites == ["a", "c"]
    assert list(record.failed) == ["b"]
    assert reason in record.failed["b"]
    assert torch.equal(last.adapter["w"], torch.full((2, 3), 3.5))  # the mean of 1 and 6: nothing of b
    assert all(tensor.isfinite().all() for tensor in last.adapter.values())


def test_a_wrong_dtype_is_refused() -> None:
    import hashlib

    from safetensors.torch import save

    payload = save({name: tensor.double() for name, tensor in UPDATES["b"].items()})
    update = b"SILOTUN1" + hashlib.sha256(payload).digest() + payload
    last = run_rounds(grid_of({"b": lying(update=update)}), coordinator(make_job()), None)
    assert "dtype torch.float64, expected torch.float32" in last.history[-1].failed["b"]


def test_a_release_that_was_not_aggregated_is_accounted_all_the_same() -> None:
    """A site that executed the plan but whose bytes were damaged on the way has spent its epsilon."""
    last = run_rounds(grid_of({"b": lying(update=b"damaged")}), coordinator(make_job()), None)
    assert last.releases["b"].steps == last.releases["a"].steps == 4
    assert last.releases["b"].rounds == (1, 2)


def test_injected_randomness_is_remembered() -> None:
    last = run_rounds(grid_of(randomness="injected"), coordinator(make_job()), None)
    assert all(not release.protected for release in last.releases.values())
    assert last.history[-1].epsilon_max is None


# --- too few ---


def test_too_few_valid_updates_stop_the_run_and_keep_the_checkpoint() -> None:
    def fails_in_round_2(reply: TrainReply, request: TrainRequest) -> RecordDict:
        return pack_reply(reply) if request.round_number < 2 else RecordDict()

    saved: list[Checkpoint] = []
    job = make_job(federation={"min_sites": 3})
    with pytest.raises(RunError) as stop:
        run_rounds(grid_of({"b": fails_in_round_2}), coordinator(job, saved), None)
    assert "round 2: 2 valid updates, federation.min_sites is 3 (b: Malformed" in str(stop.value)
    assert "resume" in str(stop.value)
    assert [checkpoint.round_number for checkpoint in saved] == [0, 1, 1]  # the last one notes what was released
    # Mended, it goes on from there to the result of an undisturbed run.
    resumed = run_rounds(grid_of(), coordinator(job), saved[-1])
    through = run_rounds(grid_of(), coordinator(job), None)
    assert torch.equal(resumed.adapter["w"], through.adapter["w"])
    assert [record.round for record in resumed.history] == [0, 1, 2]


def wait_for(grid: InProcessGrid, job: Job) -> dict[int, SiteDescription]:
    return Roster(grid, job, observer=Observer()).wait()


def test_too_few_nodes_are_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster_module, "DESCRIBE_TIMEOUT_SECONDS", 0.2)
    with pytest.raises(RunError, match=r"3 nodes are connected, federation\.min_sites is 5"):
        wait_for(grid_of(), make_job(federation={"min_sites": 5}))


def test_two_nodes_of_one_name_are_refused() -> None:
    with pytest.raises(RunError, match="two nodes call themselves 'a'"):
        wait_for(grid_of(names=["a", "b", "a"]), make_job())


def test_a_name_that_could_leave_the_folder_is_no_site() -> None:
    assert [s.site for s in wait_for(grid_of(names=["a", "../b", "c"]), make_job()).values()] == ["a", "c"]


# --- time ---


class SilentGrid(InProcessGrid):
    """Describes its sites; some of them never answer a training request."""

    mute: frozenset[int] = frozenset()

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for identifier, message in list(self._waiting.items()):
            if message.metadata.message_type == "train" and message.metadata.dst_node_id in self.mute:
                del self._waiting[identifier]
        return super().pull_messages(message_ids)


@pytest.mark.parametrize("mute", [frozenset({2}), frozenset({1, 2, 3})])
def test_sites_that_never_answer_cost_the_timeout_and_no_more(mute: frozenset[int]) -> None:
    grid = grid_of()
    silent = SilentGrid(grid._client_app, 3)
    silent.mute = mute
    job = make_job(training={"rounds": 1, "local_steps": 2}, federation={"round_timeout_seconds": 0.4})
    started = time.monotonic()
    if len(mute) == 3:
        with pytest.raises(RunError, match=r"a: no answer within 0\.4 s; b: no answer"):
            run_rounds(silent, coordinator(job), None)
    else:
        last = run_rounds(silent, coordinator(job), None)
        assert last.history[-1].failed == {"b": "no answer within 0.4 s"}
        assert last.history[-1].sites == ["a", "c"]
    assert 0.4 <= time.monotonic() - started < 10


def lost(request: str) -> Message:
    """Return what a Grid answers in its own name for a message that it lost."""
    metadata = Metadata(1, "ff", 1, 1, request, "", time.time(), 60.0, "train")
    return made_message(Error(code=5, reason="lost"), metadata)


class LosingGrid(InProcessGrid):
    """Answers for node 2 as one does that lost the message."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for reply in super().pull_messages(message_ids):
            if reply.metadata.src_node_id == 2 and reply.metadata.message_type == "train":
                replies.append(lost(reply.metadata.reply_to_message_id))
            else:
                replies.append(reply)
        # And an answer to nothing that was asked.
        return [*replies, lost("never sent")]


def test_a_lost_message_is_booked_to_the_site_that_was_asked() -> None:
    last = run_rounds(LosingGrid(grid_of()._client_app, 3), coordinator(make_job()), None)
    for record in last.history[1:]:
        assert list(record.failed) == ["b"]
        assert record.failed["b"] == "NotConnected: lost"
        assert record.sites == ["a", "c"]


# --- order and selection ---


class ShufflingGrid(InProcessGrid):
    """Answers in a random order."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        identifiers = list(super().push_messages(messages))
        items = list(self._waiting.items())
        random.Random(len(self.orders)).shuffle(items)
        self._waiting = dict(items)
        self.orders.append([message.metadata.dst_node_id for _, message in items])
        return identifiers

    orders: list[list[int]]


def test_arrival_order_does_not_change_the_result() -> None:
    names = [f"s{i}" for i in range(9)]
    generator = torch.Generator().manual_seed(0)
    noisy: dict[str, Behaviour] = {
        name: lying(update=encode({n: torch.randn(t.shape, generator=generator) * 1e2 for n, t in INITIAL.items()}))
        for name in names
    }
    job = make_job(training={"rounds": 2, "local_steps": 2, "learning_rate": 1000.0})
    straight = run_rounds(grid_of(noisy, names=names), coordinator(job), None)
    shuffled = ShufflingGrid(grid_of(noisy, names=names)._client_app, 9)
    shuffled.orders = []
    other = run_rounds(shuffled, coordinator(job), None)
    assert shuffled.orders[1] != sorted(shuffled.orders[1]), "the test must shuffle"
    assert all(torch.equal(straight.adapter[name], other.adapter[name]) for name in INITIAL)
    assert straight.history[-1].sites == other.history[-1].sites


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_updates_come_as_the_job_names_and_in_no_other_form(dtype: Any) -> None:
    job = make_job(federation={"update_dtype": dtype})
    compressed: dict[str, Behaviour] = {
        name: lying(update=encode_update(update, dtype, salt=name).data) for name, update in UPDATES.items()
    }
    last = run_rounds(grid_of(compressed), coordinator(job), None)
    assert last.history[-1].sites == ["a", "b", "c"]
    assert torch.allclose(last.adapter["w"], torch.full((2, 3), 6.0), rtol=1e-6)  # two rounds of the mean of 1, 2 and 6
    assert last.history[-1].bytes_up == sum(
        len(encode_update(update, dtype, salt="").data) for update in UPDATES.values()
    )
    # Site c sends float32, and counts as a release all the same.
    last = run_rounds(grid_of({name: compressed[name] for name in "ab"}), coordinator(job), None)
    assert last.history[-1].sites == ["a", "b"]
    assert (
        f"bytes, expected exactly {len(encode_update(UPDATES['c'], dtype).data)} in {dtype}"
        in (last.history[-1].failed["c"])
    )
    assert last.releases["c"].steps == 4


def test_a_diverged_update_is_refused_and_the_round_goes_on() -> None:
    update = encode({**UPDATES["b"], "w": torch.full((2, 3), 1e4)})
    job = make_job(privacy={"mechanism": "none"})  # of noised updates less is accepted, see below
    last = run_rounds(grid_of({"b": lying(update=update)}), coordinator(job), None)
    assert last.history[-1].sites == ["a", "c"]
    assert "holds values up to 10000, expected at most 4096" in last.history[-1].failed["b"]


def test_an_update_longer_than_the_plan_allows_is_left_out_and_still_a_release() -> None:
    update = encode({**UPDATES["b"], "w": torch.full((2, 3), 30.0)})
    job = make_job()
    last = run_rounds(grid_of({"b": lying(update=update)}), coordinator(job), None)
    assert last.history[-1].sites == ["a", "c"]
    assert "moves a value of 'w' 1.48 times as far as 2 steps of adamw can" in last.history[-1].failed["b"]
    assert last.releases["b"].steps == 4
    clean = run_rounds(
        grid_of({"b": lambda reply, request: pack_refusal(Refusal(site="b", code="PolicyError", reason="no"))}),
        coordinator(job),
        None,
    )
    assert all(torch.equal(last.adapter[name], clean.adapter[name]) for name in INITIAL)


class Doubts(Observer):
    def __init__(self) -> None:
        self.told: list[tuple[int, str]] = []

    def update_doubted(self, round_number: int, site: str, doubt: str) -> None:
        self.told.append((round_number, site))


def test_an_update_shorter_than_its_noise_counts_and_is_told() -> None:
    shapes = {"w": torch.Size([40, 50]), "head.b": torch.Size([2])}
    sgd = {"rounds": 2, "local_steps": 2, "optimizer": "sgd", "learning_rate": 1.0}
    job = make_job(training=sgd, federation={"min_sites": 3})
    std = 1.0 / (0.05 * 8)  # of one step's noise at a site that declares 8 records

    def noised(scale: float) -> Behaviour:
        def act(reply: TrainReply, request: TrainRequest) -> RecordDict:
            generator = torch.Generator().manual_seed(request.round_number)
            update = {name: torch.randn(shape, generator=generator) * scale * std for name, shape in shapes.items()}
            return pack_reply(replace(reply, update=encode(update)))

        return act

    observer = Doubts()
    there = replace(
        coordinator(job),
        initial_adapter={name: torch.zeros(shape) for name, shape in shapes.items()},
        update_shapes=shapes,
        observer=observer,
    )
    last = run_rounds(grid_of({"a": noised(2.0), "b": noised(0.2), "c": noised(2.0)}), there, None)
    assert observer.told == [(1, "b"), (2, "b")]
    for record in last.history[1:]:
        assert record.sites == ["a", "b", "c"]
        assert record.failed == {}
        assert list(record.doubted) == ["b"]
        assert "declares 8 records would alone make it" in record.doubted["b"]


@pytest.mark.parametrize(("described", "answered"), [(1024, 8), (8, 1024)])
def test_a_site_that_says_two_sizes_is_bounded_by_the_larger(described: int, answered: int) -> None:
    """Else it would weigh by the one and have the room of the other."""
    sgd = {"rounds": 1, "local_steps": 2, "optimizer": "sgd", "learning_rate": 0.5, "momentum": 0.0}
    job = make_job(training=sgd)
    long = lying(update=encode({**UPDATES["b"], "w": torch.full((2, 3), 6.0)}), declared_records=answered)
    last = run_rounds(grid_of({"b": long}, sizes={"a": 8, "b": described, "c": 8}), coordinator(job), None)
    assert "declares 1,024 records is longer than" in last.history[-1].failed["b"]


def test_the_draw_of_sites_is_public_and_repeatable() -> None:
    sites = {node: SiteDescription(site=f"s{node}", declared_records=1, version="1") for node in range(10)}
    job = make_job(federation={"sites_per_round": 4})
    draws = [select_sites(sites, job, number) for number in range(1, 40)]
    assert draws == [select_sites(sites, job, number) for number in range(1, 40)]
    assert all(len(set(draw)) == 4 for draw in draws)
    assert len({tuple(draw) for draw in draws}) > 20, "rounds must draw differently"
    assert {node for draw in draws for node in draw} == set(sites), "everyone must get a turn"
    assert draws != [select_sites(sites, make_job(seed=1, federation={"sites_per_round": 4}), n) for n in range(1, 40)]
    assert select_sites(sites, make_job(), 1) == list(sites)
    assert select_sites(sites, make_job(federation={"sites_per_round": 99}), 1) == list(sites)


def test_only_drawn_sites_are_asked() -> None:
    job = make_job(federation={"sites_per_round": 2})
    last = run_rounds(grid_of(), coordinator(job), None)
    for record in last.history[1:]:
        assert len(record.sites) == 2
        assert record.failed == {}
        assert record.bytes_down == 2 * len(encode(INITIAL))


# --- what is recorded ---


def test_weights_follow_the_declared_sizes() -> None:
    job = make_job(training={"rounds": 1, "local_steps": 2}, aggregation={"weights": "declared"})
    last = run_rounds(grid_of(sizes={"a": 1, "b": 1, "c": 2}), coordinator(job), None)
    assert torch.allclose(last.adapter["w"], torch.full((2, 3), (1 + 2 + 2 * 6) / 4))


def test_epsilon_grows_with_the_executed_steps_and_evaluation_follows_its_interval() -> None:
    job = make_job(training={"rounds": 4, "local_steps": 2})
    setup = replace(coordinator(job), evaluate_every=3)
    last = run_rounds(grid_of(), setup, None)
    spent = [record.epsilon_max for record in last.history]
    assert spent[0] is None
    known = [value for value in spent if value is not None]
    assert known == sorted(known)
    assert len(set(known)) == 4
    assert [bool(record.metrics) for record in last.history] == [True, False, False, True, True]
    assert last.releases["a"].steps == 8
    assert last.releases["a"].epsilon == known[-1]


def test_stop_after_stops_and_resume_goes_on() -> None:
    job = make_job(training={"rounds": 4, "local_steps": 2}, aggregation={"server_optimizer": "adam"})
    stopped = run_rounds(grid_of(), coordinator(job), None, stop_after=2)
    assert stopped.round_number == 2
    resumed = run_rounds(grid_of(), coordinator(job), stopped)
    through = run_rounds(grid_of(), coordinator(job), None)
    assert all(torch.equal(resumed.adapter[name], through.adapter[name]) for name in INITIAL)
    assert resumed.releases == through.releases
