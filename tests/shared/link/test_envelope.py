"""Flower messages as payloads: whole and equal on the other side, and garbage is an error of ours."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, Metadata, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from shared.link import frames
from shared.link.envelope import content_of, message, open_envelope, request_of, seal_envelope
from shared.link.frames import Envelope, LinkError, Record

NODE, COORDINATOR = 77, 1
CONTENT = RecordDict(
    {
        "config": ConfigRecord(
            {"text": "ü", "bytes": b"\x00\xff", "whole": -3, "real": 0.5, "yes": True, "many": [1, 2]}
        ),
        "metric": MetricRecord({"loss": 0.25, "counts": [1, 2, 3]}),
        "array": ArrayRecord({"w": Array(np.arange(6.0, dtype=np.float32).reshape(2, 3))}),
        "empty": ConfigRecord({}),
    }
)


def sent(content: RecordDict | Error) -> Message:
    facts = {"run_id": 9, "src_node_id": 5, "dst_node_id": 6, "reply_to_message_id": ""}
    metadata = Metadata(**facts, message_id="x", group_id="3", created_at=1.5, ttl=60.0, message_type="train")
    return message(content, metadata)


def received(payload: bytes) -> Message:
    return request_of(payload, message_id=b"\x01" * 16, node=NODE)


def test_a_message_arrives_as_it_was_sent_but_for_its_addresses() -> None:
    came = received(seal_envelope(sent(CONTENT)))
    assert came.content == CONTENT
    assert np.array_equal(came.content.array_records["array"]["w"].numpy(), np.arange(6.0).reshape(2, 3))
    facts = came.metadata
    assert (facts.run_id, facts.group_id, facts.created_at, facts.ttl, facts.message_type) == (
        9,
        "3",
        1.5,
        60.0,
        "train",
    )
    # Who sent it and to whom follows from the stream, never from its bytes.
    assert (facts.src_node_id, facts.dst_node_id, facts.message_id) == (COORDINATOR, NODE, "01" * 16)


def test_an_error_arrives_as_an_error() -> None:
    came = content_of(open_envelope(seal_envelope(sent(Error(code=100, reason="withheld")))))
    assert isinstance(came, Error)
    assert (came.code, came.reason) == (100, "withheld")


def test_a_reply_can_be_made_to_what_arrived() -> None:
    came = received(seal_envelope(sent(CONTENT)))
    reply = Message(RecordDict(), reply_to=came)
    assert (reply.metadata.reply_to_message_id, reply.metadata.dst_node_id) == ("01" * 16, COORDINATOR)


ENVELOPE = open_envelope(seal_envelope(sent(CONTENT)))


@pytest.mark.parametrize(
    "changes",
    [
        {"records": [Record("a", "config", b"\xff\xff", [])]},
        {"records": [Record("a", "config", b"", [])]},
        {"records": [Record("a", "pickle", b"cos\nsystem\n", [])]},
        {"records": [Record("a", "metric", frames.bytes_of(ENVELOPE), [])]},
        {"message_type": "rm -rf"},
        {"ttl": float("nan")},
        {"created_at": float("inf")},
    ],
    ids=lambda changes: "-".join(f"{key}" for key in changes),
)
def test_what_cannot_be_read_is_an_error_of_the_link(changes: dict[str, object]) -> None:
    with pytest.raises(LinkError):
        received(frames.bytes_of(replace(ENVELOPE, **changes)))  # type: ignore[arg-type]


@given(st.data())
def test_damaged_payloads_are_a_message_or_an_error_of_the_link(data: st.DataObject) -> None:
    damaged = bytearray(frames.bytes_of(ENVELOPE))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(LinkError):
        received(bytes(damaged))


def test_a_long_reason_is_cut() -> None:
    envelope = Envelope(1, "train", "", 0.0, 1.0, [], [frames.Failure(2**40, "x" * 10_000)])
    error = content_of(envelope)
    assert isinstance(error, Error)
    assert (error.code, len(error.reason or "")) == (2**31 - 1, 1000)
