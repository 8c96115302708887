"""Messages: an honest one survives the trip; a malicious one becomes a refusal and costs nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from shared.errors import ConfigError, RunError
from shared.job.job import Job
from shared.link.envelope import request as made_request
from shared.wire import messages
from shared.wire.messages import Refusal, SiteDescription, TrainReply, TrainRequest
from simulations.running.grid import InProcessGrid

REPLY = TrainReply(
    site="st-mary",
    round_number=3,
    job_sha256="a" * 64,
    update=b"\x00\x01bytes",
    declared_records=64,
    noise_multiplier=1.1,
    sample_rate=0.05,
    max_grad_norm=1.0,
    delta=1e-5,
    steps=4,
    randomness="os",
    epsilon_budget=8.0,
)


@pytest.fixture(autouse=True)
def _identity() -> None:
    InProcessGrid(ClientApp(), 1)  # Flower stamps messages with the identity of the process


def answered(content: RecordDict) -> Message:
    request = made_request(
        messages.describe_request(), run_id=1, message_id="request", message_type=messages.TRAIN, node=2, group_id=""
    )
    return Message(content, reply_to=request)


def changed(**header: Any) -> RecordDict:
    """The packed reply with header values that the dataclass would not hold."""
    content = messages.pack_reply(REPLY)
    content.config_records["silotune"].update(header)
    return content


def without(key: str) -> RecordDict:
    content = messages.pack_reply(REPLY)
    del content.config_records["silotune"][key]
    return content


def test_a_reply_survives_the_trip() -> None:
    assert messages.unpack_reply(answered(messages.pack_reply(REPLY))) == REPLY
    injected = replace(REPLY, randomness="injected", update=b"")
    assert messages.unpack_reply(answered(messages.pack_reply(injected))) == injected


@pytest.mark.parametrize(
    "edges",
    [
        {"epsilon_budget": 0.0, "noise_multiplier": 0.0, "steps": 0, "round_number": 0, "declared_records": 1},
        {"epsilon_budget": 1.7e308, "noise_multiplier": 1e4, "steps": 1 << 24, "declared_records": 1_000_000_000},
        {"sample_rate": 1.0, "round_number": 1 << 24, "max_grad_norm": 1e12, "delta": 0.999},
        {"sample_rate": 1e-9, "max_grad_norm": 1e-12, "delta": 1e-30},
    ],
)
def test_numbers_at_their_edges_survive_the_trip(edges: dict[str, Any]) -> None:
    reply = replace(REPLY, **edges)
    assert messages.unpack_reply(answered(messages.pack_reply(reply))) == reply


def test_a_request_survives_the_trip(classification_job: Callable[..., Job]) -> None:
    request = TrainRequest(job=classification_job(seed=2**62), round_number=2, adapter=bytes(range(256)))
    back = messages.unpack_request(messages.pack_request(request))
    assert back == request
    assert back.job.sha256 == request.job.sha256


def test_a_description_and_a_refusal_survive_the_trip() -> None:
    description = SiteDescription(site="a", declared_records=8, version="1")
    assert messages.unpack_description(answered(messages.pack_description(description))) == description
    wordy = messages.unpack_description(answered(messages.pack_description(replace(description, version="1\x1b" * 99))))
    assert wordy == replace(description, version="1\N{REPLACEMENT CHARACTER}" * 32)
    refusal = Refusal(site="a", code="PolicyError", reason="no")
    assert messages.unpack_description(answered(messages.pack_refusal(refusal))) == refusal
    assert messages.unpack_reply(answered(messages.pack_refusal(refusal))) == refusal


def test_an_error_of_the_transport_becomes_a_refusal() -> None:
    request = answered(messages.describe_request())
    failed = Message(Error(code=7, reason="gone"), reply_to=request)
    assert messages.unpack_reply(failed) == Refusal(site="", code="Error7", reason="gone")


def test_a_refusal_forges_no_line_of_a_log() -> None:
    forged = "no\n2026-11-30 12:00:00 INFO silotune.coordinator: round 3: all is well\r\n  b refused: it is broken"
    content = messages.pack_refusal(Refusal(site="a\nb", code="Policy\nError", reason=forged))
    found = messages.unpack_reply(answered(content))
    assert isinstance(found, Refusal)
    assert (found.site, found.code) == ("a     b", "Policy     Error")
    first, *others = found.reason.split("\n")
    assert first == "no"
    assert len(others) == 2
    assert all(line.startswith("    ") and "\r" not in line for line in others)


NUMBERS = ("noise_multiplier", "sample_rate", "max_grad_norm", "delta", "epsilon_budget", "steps", "declared_records")


@pytest.mark.parametrize(
    "content",
    [
        lambda: RecordDict(),
        lambda: RecordDict({"silotune": ConfigRecord({"kind": "update"})}),
        lambda: RecordDict({"silotune": ArrayRecord()}),
        lambda: messages.describe_request(),
        lambda: changed(steps="many"),
        lambda: changed(steps=float("inf")),
        lambda: changed(round_number=float("nan")),
        lambda: changed(noise_multiplier=[1.0]),
        *(
            lambda key=key, text=text: changed(**{key: text})
            for key in NUMBERS
            for text in ("nan", "inf", "-inf", "1e400")
        ),
        *(lambda key=key: changed(**{key: "9" * 400}) for key in ("steps", "round_number", "declared_records")),
        *(lambda key=key: changed(**{key: "-1"}) for key in (*NUMBERS, "round_number")),
        lambda: changed(epsilon_budget=-5.0),
        lambda: changed(epsilon_budget=-5e-324),
        lambda: changed(sample_rate=1.0000001),
        lambda: changed(delta=1.0000001),
        lambda: changed(steps=2**24 + 1),
        lambda: changed(round_number=2**24 + 1),
        lambda: changed(declared_records=0),
        lambda: changed(declared_records=4 * 10**18),
        lambda: changed(declared_records=10**9 + 1),
        lambda: changed(site="../../etc/cron.d/x"),
        lambda: changed(site=".."),
        lambda: changed(site=""),
        lambda: changed(site="a\n"),
        lambda: changed(site="a" * 100),
        lambda: changed(kind=b"update"),
        lambda: changed(update="text"),
        lambda: changed(update=10 * 2**30),
        lambda: without("update"),
        lambda: without("steps"),
    ],
)
def test_a_malformed_reply_becomes_a_refusal(content: Callable[[], RecordDict]) -> None:
    answer = messages.unpack_reply(answered(content()))
    assert isinstance(answer, Refusal)
    assert answer.code == "Malformed"


@pytest.mark.parametrize(
    "header",
    [
        {"site": "../x"},
        {"declared_records": float("inf")},
        {"declared_records": "x"},
        {"declared_records": "9" * 400},
        {"declared_records": 0},
        {"declared_records": 4 * 10**18},
        {"kind": "update"},
    ],
)
def test_a_malformed_description_becomes_a_refusal(header: dict[str, Any]) -> None:
    content = messages.pack_description(SiteDescription(site="a", declared_records=8, version="1"))
    content.config_records["silotune"].update(header)
    answer = messages.unpack_description(answered(content))
    assert isinstance(answer, Refusal)
    assert answer.code == "Malformed"


def test_a_refusal_cannot_flood_the_coordinator() -> None:
    flood = Refusal(site="a" * 10_000, code="c" * 10_000, reason="r" * 1_000_000)
    answer = messages.unpack_reply(answered(messages.pack_refusal(flood)))
    assert isinstance(answer, Refusal)
    assert max(len(text) for text in asdict(answer).values()) < 1000


def test_a_malformed_request_is_refused_at_the_site(classification_job: Callable[..., Job]) -> None:
    request = TrainRequest(job=classification_job(), round_number=1, adapter=b"x")
    for key, value in (("job", "{"), ("round_number", "one"), ("round_number", float("inf"))):
        content = messages.pack_request(request)
        content.config_records["silotune"][key] = value
        with pytest.raises(RunError, match="no readable job or round number"):
            messages.unpack_request(content)
    content = messages.pack_request(request)
    content.config_records["silotune"]["job"] = '{"name": "x", "code": "import os"}'
    with pytest.raises(ConfigError, match="unknown key 'code'"):
        messages.unpack_request(content)
    content.config_records["silotune"]["kind"] = "update"
    with pytest.raises(RunError, match="expected a message of kind 'train', found 'update'"):
        messages.unpack_request(content)
    bare = messages.pack_request(request)
    del bare.config_records["silotune"]["adapter"]
    with pytest.raises(RunError, match="carries no adapter"):
        messages.unpack_request(bare)


def test_a_refusal_cannot_act_on_a_terminal() -> None:
    said = Refusal(site="a", code="PolicyError", reason="no\x1b[2J\x07 way\nsecond line")
    answer = messages.unpack_reply(answered(messages.pack_refusal(said)))
    assert isinstance(answer, Refusal)
    assert answer.reason == "no?[2J? way\n    second line"


METRICS = messages.MetricsReply(
    site="st-mary",
    job_sha256="a" * 64,
    adapter_sha256="b" * 64,
    counts={"accuracy": [40.5, -1.25], "loss": [3.0, 36.0]},
    noise_multiplier=4.0,
    randomness="os",
)


def test_metrics_survive_the_trip() -> None:
    assert messages.unpack_metrics(answered(messages.pack_metrics(METRICS))) == METRICS
    assert messages.carries_release(answered(messages.pack_metrics(METRICS)))
    refusal = Refusal(site="st-mary", code="PolicyError", reason="no")
    assert messages.unpack_metrics(answered(messages.pack_refusal(refusal))) == refusal
    assert not messages.carries_release(answered(messages.pack_refusal(refusal)))


@pytest.mark.parametrize(
    "release",
    [
        "",
        "[]",
        "null",
        "[" * 100_000,
        '{"site": "../../etc"}',
        METRICS.canonical().decode().replace("[40.5,-1.25]", "7"),
        METRICS.canonical().decode().replace("40.5", '"many"'),
        METRICS.canonical().decode().replace('{"accuracy"', '[{"accuracy"').replace("36.0]}", "36.0]}]"),
        METRICS.canonical().decode().replace("40.5", "0" * (1 << 22)),
        METRICS.canonical().decode().replace("st-mary", "st mary"),
        METRICS.canonical().decode().replace("4.0", "-4.0"),
        METRICS.canonical().decode().replace("40.5", "1e16"),
        METRICS.canonical().decode().replace("-1.25", "-1e16"),
    ],
)
def test_metrics_that_cannot_be_read_are_a_refusal(release: str) -> None:
    content = messages.pack_metrics(METRICS)
    content.config_records["silotune"]["release"] = release
    answer = messages.unpack_metrics(answered(content))
    assert isinstance(answer, Refusal)
    assert answer.code == messages.MALFORMED


@pytest.mark.parametrize("name", ["job_sha256", "adapter_sha256", "counts"])
def test_metrics_that_have_no_bytes_are_a_refusal(name: str) -> None:
    """Half a character can be read from JSON and cannot be written: it must not end the round where it is hashed."""
    fields = asdict(METRICS) | {name: {"\ud800": [1.0]} if name == "counts" else "\ud800"}
    content = RecordDict({"silotune": ConfigRecord({"kind": "metrics", "release": json.dumps(fields)})})
    answer = messages.unpack_metrics(answered(content))
    assert isinstance(answer, Refusal)
    assert answer.code == messages.MALFORMED


@pytest.mark.parametrize("sha256", ["", "\x1b[2J" + "0" * 60, "A" * 64, "0" * 64 + "\n"])
def test_a_hash_is_64_hex_digits_or_the_reply_is_none(sha256: str) -> None:
    answer = messages.unpack_reply(answered(messages.pack_reply(replace(REPLY, job_sha256=sha256))))
    assert isinstance(answer, Refusal)
    assert answer.code == messages.MALFORMED
