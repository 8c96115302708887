"""Updates are added as they come and forgotten: the coordinator's memory does not grow with the number of sites."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from flwr.app import Message

from server.rounds.exchange import exchange
from server.rounds.local import LocalPrivacy
from server.rounds.loop import Coordinator, run_rounds
from server.rounds.observer import Observer
from shared.tensors.adapters import encode
from shared.wire.messages import TRAIN, TrainReply, TrainRequest, pack_request
from tests.server.rounds import test_loop
from tests.server.rounds.test_loop import grid_of, make_job

ADAPTER = {"w": torch.zeros(512, 512)}  # one megabyte
MEGABYTE = 2**20


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


class Watching(Observer):
    """Remembers the most memory that was in use when an update had been judged."""

    most = 0

    def update_judged(self, round_number: int, site: str, reply: TrainReply | None, problem: str | None) -> None:
        assert problem is None
        self.most = max(self.most, resident())


def growth(num_sites: int, monkeypatch: pytest.MonkeyPatch) -> float:
    """Return the megabytes by which the process grew over a round of so many sites, each with a megabyte of its own."""
    generator = torch.Generator().manual_seed(0)
    names = [f"s{i}" for i in range(num_sites)]
    job, watching = make_job(training={"rounds": 1, "local_steps": 2}), Watching()
    grid = grid_of({}, names=names)
    # Made when asked for, so that the sites themselves hold nothing.
    monkeypatch.setattr(test_loop, "encode", lambda _: encode({"w": torch.randn(512, 512, generator=generator)}))
    setup = Coordinator(
        job=job,
        initial_adapter=ADAPTER,
        update_shapes={name: tensor.shape for name, tensor in ADAPTER.items()},
        privacy=LocalPrivacy(job),
        evaluate=lambda adapter: {},
        evaluate_every=1,
        save=lambda checkpoint: None,
        observer=watching,
    )
    before = resident()
    last = run_rounds(grid, setup, None)
    assert last.history[-1].sites == sorted(names)
    assert last.history[-1].bytes_up is not None
    assert last.history[-1].bytes_up > num_sites * MEGABYTE
    return (watching.most - before) / MEGABYTE


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux' account of the process")
def test_three_hundred_sites_take_no_more_memory_than_thirty(monkeypatch: pytest.MonkeyPatch) -> None:
    growth(3, monkeypatch)  # what is loaded at first use
    few, many = growth(30, monkeypatch), growth(300, monkeypatch)
    assert many < 50
    # Of 270 MB more that came; the allocator keeps 5 to 35 MB, whether 30 sites answered or 900.
    assert many - few < 40


def test_an_exchange_pulls_few_answers_at_once() -> None:
    """Also where everyone answered before the coordinator looked."""
    inner = grid_of(names=[f"s{i}" for i in range(100)])
    asked_for: list[int] = []

    class Ready:
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            return inner.push_messages(messages)

        def pull_messages(self, identifiers: Iterable[str]) -> Iterable[Message]:
            some = list(identifiers)
            asked_for.append(len(some))
            return [reply for one in some for reply in inner.pull_messages([one])]

    job = make_job()
    request = TrainRequest(job=job, round_number=1, adapter=encode(test_loop.INITIAL))
    answers = exchange(
        Ready(),  # type: ignore[arg-type]
        lambda nodes: [inner.create_message(pack_request(request), TRAIN, node, "1") for node in nodes],
        range(1, 101),
        timeout=60.0,
        expected=0.0,
    )
    assert sorted(node for node, _ in answers) == list(range(1, 101))
    assert max(asked_for) <= 16
