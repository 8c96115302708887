"""Collecting the sites' metrics: every lie is refused, every release is counted, and a crash asks no site to pay twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from server.rounds.earlier_requests import Asked, EarlierRequests
from server.rounds.local import LocalPrivacy
from server.rounds.loop import Coordinator, run_rounds
from server.rounds.observer import Observer
from server.rounds.site_metrics import site_metrics_record
from server.store.checkpoint import Checkpoint
from shared.job.job import Job
from shared.job.parsing import parse
from shared.privacy.accounting import GaussianSteps, compose_epsilon
from shared.tensors.adapters import encode
from shared.wire.messages import (
    MetricsReply,
    Refusal,
    SiteDescription,
    TrainReply,
    TrainRequest,
    pack_description,
    pack_metrics,
    pack_refusal,
    pack_reply,
    unpack_request,
)
from simulations.running.grid import InProcessGrid

Behaviour = Callable[[MetricsReply], RecordDict]
INITIAL = {"head.b": torch.zeros(2)}
COUNTS = {"accuracy": [70.0, 30.0]}


@pytest.fixture
def job() -> Job:
    raw: dict[str, Any] = {
        "name": "metrics",
        "task": {"kind": "sequence_classification", "labels": ["x", "y"]},
        "training": {"rounds": 2, "local_steps": 2, "learning_rate": 1.0},
        "privacy": {"noise_multiplier": 1.0},
        "site_metrics": {"names": ["accuracy"], "noise_multiplier": 5.0},
    }
    return parse(Job, raw, source="test")


def lying(**changes: Any) -> Behaviour:
    return lambda reply: pack_metrics(replace(reply, **changes))


def grid_of(behaviours: dict[str, Behaviour], asked: list[TrainRequest] | None = None) -> InProcessGrid:
    names, app = ["a", "b", "c"], ClientApp()

    @app.query("describe")
    def describe(message: Message, context: Context) -> Message:
        described = SiteDescription(site=names[context.node_id - 1], declared_records=8, version="1")
        return Message(pack_description(described), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        request = unpack_request(message.content)
        job = request.job
        reply = TrainReply(
            site=names[context.node_id - 1],
            round_number=request.round_number,
            job_sha256=job.sha256,
            update=encode({"head.b": torch.ones(2)}),
            declared_records=8,
            noise_multiplier=job.privacy.noise_multiplier or 0.0,
            sample_rate=job.privacy.sample_rate,
            max_grad_norm=job.privacy.max_grad_norm,
            delta=job.privacy.delta,
            steps=job.training.local_steps,
            randomness="os",
            epsilon_budget=8.0,
        )
        return Message(pack_reply(reply), reply_to=message)

    @app.query("metrics")
    def metrics(message: Message, context: Context) -> Message:
        request, name = unpack_request(message.content, "metrics"), names[context.node_id - 1]
        if asked is not None:
            asked.append(request)
        reply = MetricsReply(
            site=name,
            job_sha256=request.job.sha256,
            adapter_sha256=hashlib.sha256(request.adapter).hexdigest(),
            counts=COUNTS,
            noise_multiplier=5.0,
            randomness="os",
        )
        return Message(behaviours.get(name, pack_metrics)(reply), reply_to=message)

    return InProcessGrid(app, len(names))


def coordinator(job: Job, saved: list[Checkpoint]) -> Coordinator:
    return Coordinator(
        job=job,
        initial_adapter=INITIAL,
        update_shapes={name: tensor.shape for name, tensor in INITIAL.items()},
        privacy=LocalPrivacy(job),
        evaluate=lambda adapter: {"loss": 0.0},
        evaluate_every=1,
        save=saved.append,
        observer=Observer(),
    )


def run(job: Job, **behaviours: Behaviour) -> Checkpoint:
    return run_rounds(grid_of(behaviours), coordinator(job, []), None)


def test_the_sites_are_asked_once_after_the_last_round_and_added_up(job: Job) -> None:
    asked: list[TrainRequest] = []
    saved: list[Checkpoint] = []
    grid = grid_of({}, asked)
    finished = run_rounds(grid, coordinator(job, saved), None)
    assert [request.round_number for request in asked] == [3, 3, 3]
    assert {request.adapter for request in asked} == {encode(finished.adapter)}
    assert saved[-1] is finished
    assert finished.history[-1].epsilon_max == finished.releases["a"].epsilon
    assert finished.site_metrics == {"a": COUNTS, "b": COUNTS, "c": COUNTS}
    record = site_metrics_record(finished, job)
    (found,) = record.estimates
    assert (found.value, found.sites, found.votes) == (0.7, 3, 300.0)
    assert found.standard_error is not None
    assert 0.02 < found.standard_error < 0.05
    json.dumps(asdict(record), allow_nan=False)
    # Asked and answered: a resumed run does not ask again.
    assert run_rounds(grid, coordinator(job, []), finished) is finished
    assert len(asked) == 3


def test_the_statement_counts_them(job: Job) -> None:
    release = run(job).releases["a"]
    training = GaussianSteps(noise_multiplier=1.0, sample_rate=job.privacy.sample_rate, steps=4)
    metrics = GaussianSteps(noise_multiplier=5.0, sample_rate=1.0, steps=1)
    assert release.epsilon == release.epsilon_bound == compose_epsilon([training, metrics], 1e-5)
    assert release.epsilon > compose_epsilon([training], 1e-5)
    assert release.steps == 4


@pytest.mark.parametrize(
    ("behaviour", "unknown"),
    [
        (lambda reply: pack_refusal(Refusal(site="b", code="PolicyError", reason="no")), False),
        (lambda reply: RecordDict(), True),
        (lying(site="a"), True),
        (lying(job_sha256="0" * 64), True),
        (lying(adapter_sha256="0" * 64), True),
        (lying(noise_multiplier=1.0), True),
        (lying(counts={}), True),
        (lying(counts={"accuracy": [1.0]}), True),
        (lying(counts={"accuracy": [1.0, 2.0], "loss": [1.0, 2.0]}), True),
        (lambda reply: broken(reply, '"accuracy":[70.0,30.0]', '"accuracy":[NaN,30.0]'), True),
        (lambda reply: broken(reply, '"accuracy":[70.0,30.0]', '"accuracy":[1e999,30.0]'), True),
        # Finite, but sums of it are not.
        (lambda reply: broken(reply, '"accuracy":[70.0,30.0]', '"accuracy":[1e308,30.0]'), True),
        (lambda reply: broken(reply, '"noise_multiplier":5.0', '"noise_multiplier":1e999'), True),
    ],
)
def test_what_does_not_count_is_left_out_and_accounted_for(job: Job, behaviour: Behaviour, unknown: bool) -> None:
    finished = run(job, b=behaviour)
    assert finished.site_metrics is not None
    assert sorted(finished.site_metrics) == ["a", "c"]
    honest, other = finished.releases["a"], finished.releases["b"]
    assert other.metrics_sha256 is None
    assert other.epsilon < honest.epsilon
    # A refusal released nothing; of anything else nobody here knows what the site charged.
    assert other.epsilon_bound == (honest.epsilon if unknown else other.epsilon)


def broken(reply: MetricsReply, found: str, instead: str) -> RecordDict:
    text = reply.canonical().decode()
    assert found in text
    content = pack_metrics(reply)
    content.config_records["silotune"]["release"] = text.replace(found, instead)
    return content


def test_a_refusal_does_not_hide_what_an_earlier_process_was_sent(job: Job) -> None:
    """It asked, died, and never saw the answer; the site, outside its hours by now, refuses to repeat it."""
    privacy = LocalPrivacy(job)
    checkpoint = replace(run(job), site_metrics=None)
    checkpoint = replace(checkpoint, releases={n: replace(r, metrics=()) for n, r in checkpoint.releases.items()})
    adapter = hashlib.sha256(encode(checkpoint.result)).hexdigest()
    described = SiteDescription(site="a", declared_records=8, version="1")
    privacy.earlier = EarlierRequests([Asked(site=described, round_number=3, adapter_sha256=adapter)])
    refusal = Refusal(site="x", code="PolicyError", reason="not now")
    refusing = {name: lambda reply: pack_refusal(refusal) for name in ("a", "b")}
    after = run_rounds(grid_of(refusing), replace(coordinator(job, []), privacy=privacy), checkpoint)
    assert {name for name, release in after.releases.items() if release.metrics} == {"a", "c"}


def test_injected_randomness_voids_the_statement(job: Job) -> None:
    release = run(job, c=lying(randomness="injected")).releases["c"]
    assert not release.protected


def test_nobody_answers(job: Job) -> None:
    def no(reply: MetricsReply) -> RecordDict:
        return pack_refusal(Refusal(site=reply.site, code="PolicyError", reason="no"))

    finished = run(job, a=no, b=no, c=no)
    assert finished.site_metrics == {}
    assert site_metrics_record(finished, job).estimates == ()
