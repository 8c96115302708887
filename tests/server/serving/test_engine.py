"""Batches of similar length, the bounded queue, and requests that nobody waits for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from server.serving import engine as engine_module
from server.serving.engine import Batching, Failed, QueueFull, _around
from server.serving.limits import Limits
from shared.errors import ConfigError
from shared.models.batches import Example


class Stub:
    """A model whose output is each example's first token; it waits while `held`."""

    version = "stub:1"

    def __init__(self, at_once: int = 1) -> None:
        self.at_once = at_once
        self.batches: list[list[int]] = []
        self.go = threading.Event()
        self.go.set()
        self.began = threading.Event()

    def outputs(self, examples: Sequence[Example]) -> list[torch.Tensor]:
        self.began.set()
        self.go.wait(10)
        self.batches.append([one.length for one in examples])
        return [one.input_ids[:1] for one in examples]


class _Counting(Stub):
    """A model that notes how many compute at the same time."""

    def __init__(self, at_once: int) -> None:
        super().__init__(at_once)
        self.now = self.most = 0
        self.lock = threading.Lock()

    def outputs(self, examples: Sequence[Example]) -> list[torch.Tensor]:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            return super().outputs(examples)
        finally:
            with self.lock:
                self.now -= 1


def example(length: int, first: int = 1) -> Example:
    return Example(torch.full((length,), first))


@pytest.fixture
def stub() -> Any:
    return Stub()


@pytest.fixture
def batching() -> Iterator[Batching]:
    found = Batching(Limits(batch_tokens=100, batch_wait_ms=1.0, queue=50, texts=50))
    yield found
    found.close()


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30).map(sorted), st.data())
def test_a_batch_holds_its_oldest_text_and_keeps_to_the_tokens(lengths: list[int], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(lengths) - 1))
    begin, end = _around(lengths, place, 100)
    assert begin <= place < end
    padded = lengths[end - 1] * (end - begin)
    assert padded <= max(100, lengths[place])
    # Nothing that would still fit is left out on either side.
    assert begin == 0 or lengths[end - 1] * (end - begin + 1) > 100
    assert end == len(lengths) or lengths[end] * (end - begin + 1) > 100


def test_texts_of_all_requests_are_answered_in_their_order(stub: Any, batching: Batching) -> None:
    futures = [
        batching.submit(stub, [example(1 + (7 * i + j) % 20, first=10 * i + j) for j in range(1 + i % 5)])
        for i in range(9)
    ]
    for i, future in enumerate(futures):
        assert [int(one) for one in future.result(10)] == [10 * i + j for j in range(1 + i % 5)]
    assert batching.waiting == 0
    assert batching.told.texts == sum(map(len, stub.batches))


def test_what_waits_is_batched_by_length(stub: Any, batching: Batching) -> None:
    stub.go.clear()
    first = batching.submit(stub, [example(2)])
    stub.began.wait(10)
    rest = [batching.submit(stub, [example(length)]) for length in (3, 40, 4, 41, 5)]
    stub.go.set()
    for future in (first, *rest):
        future.result(10)
    assert stub.batches == [[2], [3, 4, 5], [40, 41]]


def test_a_full_queue_refuses_at_once_and_takes_on_again(stub: Any, batching: Batching) -> None:
    stub.go.clear()
    held = batching.submit(stub, [example(3)])
    stub.began.wait(10)
    full = batching.submit(stub, [example(3) for _ in range(50)])
    with pytest.raises(QueueFull) as refused:
        batching.submit(stub, [example(3)])
    assert refused.value.seconds >= 1
    assert batching.waiting == 50
    stub.go.set()
    held.result(10), full.result(10)
    assert len(batching.submit(stub, [example(3)]).result(10)) == 1


def test_what_nobody_waits_for_is_not_computed(stub: Any, batching: Batching) -> None:
    stub.go.clear()
    held = batching.submit(stub, [example(3)])
    stub.began.wait(10)
    gone, kept = batching.submit(stub, [example(7), example(8)]), batching.submit(stub, [example(9)])
    assert gone.cancel()
    stub.go.set()
    held.result(10), kept.result(10)
    assert stub.batches == [[3], [9]]
    assert batching.waiting == 0


def test_a_request_keeps_its_model(stub: Any, batching: Batching) -> None:
    other = Stub()
    stub.go.clear()
    held = batching.submit(stub, [example(3)])
    stub.began.wait(10)
    old, new = batching.submit(stub, [example(4)]), batching.submit(other, [example(4)])  # type: ignore[arg-type]
    stub.go.set()
    held.result(10), old.result(10), new.result(10)
    assert (stub.batches, other.batches) == ([[3], [4]], [[4]])


def test_an_idle_engine_waits_for_company_and_no_longer(stub: Any) -> None:
    batching = Batching(Limits(batch_tokens=1000, batch_wait_ms=200.0))
    began = time.monotonic()
    futures = [batching.submit(stub, [example(3)]), batching.submit(stub, [example(4)])]
    for future in futures:
        future.result(10)
    assert stub.batches == [[3, 4]]
    assert 0.15 < time.monotonic() - began < 5
    batching.close()


def test_a_model_that_fails_fails_its_batch_alone(
    batching: Batching, stub: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(examples: Sequence[Example]) -> list[torch.Tensor]:
        raise ValueError("MARKER in a text")

    broken: Any = SimpleNamespace(version="broken:1", at_once=1, outputs=fail)
    with pytest.raises(Failed):
        batching.submit(broken, [example(3)]).result(10)
    assert len(batching.submit(stub, [example(3)]).result(10)) == 1
    assert "broken:1" in caplog.text
    assert "MARKER" not in caplog.text


def test_a_defect_of_the_engine_ends_nothing(batching: Batching, stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "_around", lambda *_: 1 / 0)
    with pytest.raises(Failed):
        batching.submit(stub, [example(3)]).result(10)
    monkeypatch.undo()
    assert len(batching.submit(stub, [example(3)]).result(10)) == 1
    assert batching.alive


@pytest.fixture
def several() -> Iterator[Batching]:
    found = Batching(Limits(batch_tokens=100, batch_wait_ms=1.0, queue=5000, texts=50), threads=3)
    yield found
    found.close()


def test_idle_threads_share_what_waits(several: Batching) -> None:
    """Each computes its part at the same time: none returns before all have begun."""
    stub, together = Stub(at_once=3), threading.Barrier(3)

    def outputs(examples: Sequence[Example]) -> list[torch.Tensor]:
        together.wait(10)
        return Stub.outputs(stub, examples)

    stub.outputs = outputs  # type: ignore[method-assign]
    found = several.submit(stub, [example(10, first=i) for i in range(6)])  # type: ignore[arg-type]
    assert [int(one) for one in found.result(10)] == list(range(6))
    assert stub.batches == [[10, 10]] * 3


def test_a_model_that_computes_one_batch_at_a_time_gets_whole_ones(several: Batching, stub: Any) -> None:
    stub.go.clear()
    first = several.submit(stub, [example(10) for _ in range(9)])
    assert stub.began.wait(10)
    others = [several.submit(stub, [example(10)] * 2) for _ in range(3)]
    time.sleep(0.1)
    assert several.waiting == 6  # no thread takes what it could not begin
    stub.go.set()
    for future in (first, *others):
        future.result(10)
    assert stub.batches == [[10] * 9, [10] * 6]


@pytest.mark.parametrize("at_once", [[1], [3], [1, 3], [2, 1, 3]])
def test_of_several_threads_every_text_gets_its_own_answer_once(several: Batching, at_once: list[int]) -> None:
    stubs: Any = [_Counting(number) for number in at_once]
    futures = [
        several.submit(
            stubs[i % len(stubs)], [example(1 + (7 * i + j) % 20, first=50 * i + j) for j in range(1 + i % 40)]
        )
        for i in range(150)
    ]
    for i, future in enumerate(futures):
        assert [int(one) for one in future.result(20)] == [50 * i + j for j in range(1 + i % 40)]
    texts = sum(1 + i % 40 for i in range(150))
    batches = sum(len(stub.batches) for stub in stubs)
    assert (several.waiting, several.told.texts, several.told.batches) == (0, texts, batches)
    assert several._tokens == several._computing == 0
    assert all(stub.most <= stub.at_once for stub in stubs)


def test_a_part_that_fails_fails_its_request_alone_and_once(several: Batching) -> None:
    stub: Any = Stub(at_once=3)

    def outputs(examples: Sequence[Example]) -> list[torch.Tensor]:
        if any(int(one.input_ids[0]) == 7 for one in examples):
            raise ValueError("MARKER")
        return Stub.outputs(stub, examples)

    stub.outputs = outputs
    with pytest.raises(Failed):
        several.submit(stub, [example(10, first=i) for i in range(30)]).result(10)
    assert len(several.submit(stub, [example(3)]).result(10)) == 1
    assert several.alive


def test_at_the_end_whatever_waits_fails(stub: Any) -> None:
    batching = Batching(Limits(batch_wait_ms=60_000.0))
    future = batching.submit(stub, [example(3)])
    batching.close()
    with pytest.raises(Failed):
        future.result(1)
    with pytest.raises(QueueFull):
        batching.submit(stub, [example(3)])


@pytest.mark.parametrize("wrong", [{"queue": 0}, {"batch_wait_ms": -1}, {"texts": 10, "queue": 5}, {"body_bytes": 0}])
def test_bounds_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--"):
        Limits(**wrong)
