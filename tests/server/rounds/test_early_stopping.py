"""A run ends where its public metric says, resumed or not, and never accounts for what it did not execute."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from server.app import Run, execute
from server.records.rounds import RoundRecord
from server.rounds.earlier_requests import Asked
from server.rounds.early_stopping import best_round, evaluations_without_improvement, is_over, stopped_early
from server.rounds.local import LocalPrivacy
from server.rounds.loop import Coordinator, run_rounds
from server.rounds.observer import Observer
from server.rounds.roster import Authority
from server.store.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from shared.errors import ConfigError
from shared.job.job import Job
from shared.job.parsing import parse
from shared.job.training import TrainingConfig
from shared.privacy.accounting import GaussianSteps, compose_epsilon
from shared.privacy.statement import STOPPED_EARLY, run_statement
from shared.tensors.adapters import decode, encode
from shared.trust.signed_job import sign_job
from shared.trust.signing import SigningKey
from shared.wire.messages import (
    MetricsReply,
    SiteDescription,
    TrainReply,
    pack_description,
    pack_metrics,
    pack_reply,
    unpack_request,
)
from simulations.running.grid import InProcessGrid

# Accuracy after round 0, 1, ...; each round adds 1 to the one weight of the adapter.
SERIES = [0.50, 0.60, 0.70, 0.69, 0.71, 0.65, 0.71, 0.64, 0.63, 0.90]


def make_job(rule: dict[str, Any] | None, *, rounds: int = 9, **sections: Any) -> Job:
    training: dict[str, Any] = {"rounds": rounds, "local_steps": 2, "learning_rate": 1.0}
    if rule is not None:
        training["early_stopping"] = rule
    raw = {
        "name": "early",
        "task": {"kind": "sequence_classification", "labels": ["x", "y"]},
        "training": training,
        "privacy": {"noise_multiplier": 1.0},
    }
    return parse(Job, raw | sections, source="test")


def grid_of(asked: list[bytes] | None = None) -> InProcessGrid:
    """Two sites whose every update adds 1; `asked` collects the adapters that site metrics are asked of."""
    app, names = ClientApp(), ["a", "b"]

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
            update=encode({"head.b": torch.ones(1)}),
            declared_records=8,
            noise_multiplier=1.0,
            sample_rate=job.privacy.sample_rate,
            max_grad_norm=job.privacy.max_grad_norm,
            delta=job.privacy.delta,
            steps=job.training.local_steps,
            randomness="os",
            epsilon_budget=50.0,
        )
        return Message(pack_reply(reply), reply_to=message)

    @app.query("metrics")
    def metrics(message: Message, context: Context) -> Message:
        request = unpack_request(message.content, "metrics")
        if asked is not None:
            asked.append(request.adapter)
        reply = MetricsReply(
            site=names[context.node_id - 1],
            job_sha256=request.job.sha256,
            adapter_sha256=hashlib.sha256(request.adapter).hexdigest(),
            counts={"accuracy": [5.0, 3.0]},
            noise_multiplier=10.0,
            randomness="os",
        )
        return Message(pack_metrics(reply), reply_to=message)

    return InProcessGrid(app, len(names))


class Told(Observer):
    def __init__(self) -> None:
        self.stops: list[int] = []

    def stopped_early(self, checkpoint: Checkpoint) -> None:
        self.stops.append(checkpoint.round_number)


def coordinator(
    job: Job, *, series: Sequence[float] = SERIES, every: int = 1, saved: list[Checkpoint] | None = None
) -> Coordinator:
    return Coordinator(
        job=job,
        initial_adapter={"head.b": torch.zeros(1)},
        update_shapes={"head.b": torch.Size([1])},
        privacy=LocalPrivacy(job),
        evaluate=lambda adapter: {"accuracy": series[round(float(adapter["head.b"]))], "loss": 1.0},
        evaluate_every=every,
        save=(saved if saved is not None else []).append,
        observer=Told(),
    )


@pytest.mark.parametrize(
    ("rule", "every", "stops"),
    [
        (None, 1, 9),
        ({"patience": 1}, 1, 3),  # 0.69 is no improvement on 0.70
        ({"patience": 2}, 1, 6),  # 0.71 is one; 0.65 and 0.71 are none on it
        ({"patience": 3}, 1, 7),
        ({"patience": 3, "min_delta": 0.05}, 1, 5),  # 0.71 is no improvement by more than 0.05 on 0.70
        ({"patience": 2, "min_delta": 0.5}, 1, 2),
        ({"patience": 4}, 1, 8),
        ({"patience": 5}, 1, 9),  # never: 0.90 in the last round
        ({"patience": 100, "keep": "best"}, 1, 9),
        ({"patience": 1}, 2, 6),  # evaluated after 2, 4, 6: 0.70, 0.71, 0.71
        ({"patience": 1}, 3, 9),  # after 3, 6, 9: 0.69, 0.71, 0.90
    ],
)
def test_a_planted_series_stops_at_a_known_round(rule: dict[str, Any] | None, every: int, stops: int) -> None:
    asked = coordinator(make_job(rule), every=every)
    finished = run_rounds(grid_of(), asked, None)
    assert finished.round_number == stops
    assert float(finished.adapter["head.b"]) == stops
    assert is_over(finished, asked.job)
    assert stopped_early(finished, asked.job) == (stops < 9)
    assert asked.observer.stops == ([stops] if stops < 9 else [])  # type: ignore[attr-defined]
    # What was executed is accounted for, what was planned is not.
    release = finished.releases["a"]
    assert (release.steps, release.steps_planned) == (2 * stops, 18)
    executed = GaussianSteps(noise_multiplier=1.0, sample_rate=0.05, steps=2 * stops)
    assert release.epsilon_bound == finished.history[-1].epsilon_max == compose_epsilon([executed], 1e-5)
    # Resumed after its end it does nothing more.
    assert run_rounds(grid_of(), asked, finished) is finished


@pytest.mark.parametrize("kill_after", range(7))
@pytest.mark.parametrize("keep", ["last", "best"])
def test_a_run_resumed_from_any_round_stops_at_the_same_one(kill_after: int, keep: str, tmp_path: Path) -> None:
    job = make_job({"patience": 2, "keep": keep})
    whole = run_rounds(grid_of(), coordinator(job), None)
    saved: list[Checkpoint] = []
    run_rounds(grid_of(), coordinator(job, saved=saved), None, stop_after=max(kill_after, 1))
    save_checkpoint(tmp_path / "checkpoint", saved[kill_after])
    durable = load_checkpoint(tmp_path / "checkpoint", job_sha256=job.sha256)
    assert durable is not None
    resumed = run_rounds(grid_of(), coordinator(job), durable)
    assert resumed.round_number == whole.round_number == 6
    assert resumed.releases == whole.releases
    assert [record.metrics for record in resumed.history] == [record.metrics for record in whole.history]
    assert torch.equal(resumed.adapter["head.b"], whole.adapter["head.b"])
    # 0.71 in round 4 and again in round 6: the first of equals.
    assert float(resumed.result["head.b"]) == float(whole.result["head.b"]) == (4.0 if keep == "best" else 6.0)


def test_the_best_may_be_what_was_there_before_training() -> None:
    job = make_job({"patience": 2, "keep": "best"})
    finished = run_rounds(grid_of(), coordinator(job, series=[0.9, 0.5, 0.6, 0.7]), None)
    assert finished.round_number == 2
    assert float(finished.result["head.b"]) == 0.0
    assert best_round(finished.history, job) == 0


def test_lower_is_better_where_the_task_says_so() -> None:
    job = make_job({"patience": 1, "keep": "best"}, task={"kind": "regression", "target_range": [1, 5]})
    history = [RoundRecord(round=n, metrics={"mae": value, "rmse": value}) for n, value in enumerate([2.0, 1.0, 1.5])]
    assert best_round(history, job) == 1
    assert evaluations_without_improvement(history, job) == 1
    assert evaluations_without_improvement(history[:2], job) == 0


def test_a_metric_that_is_no_number_is_no_improvement() -> None:
    job = make_job({"patience": 3})
    values = [float("nan"), float("nan"), 0.5, float("nan"), 0.4]
    history = [RoundRecord(round=n, metrics={"accuracy": value}) for n, value in enumerate(values)]
    assert [evaluations_without_improvement(history[: n + 1], job) for n in range(5)] == [1, 2, 0, 1, 2]
    assert best_round(history, job) == 2


def test_rounds_that_were_not_evaluated_decide_nothing() -> None:
    job = make_job({"patience": 1})
    history = [RoundRecord(round=0, metrics={"accuracy": 0.5}), *(RoundRecord(round=n) for n in range(1, 6))]
    assert evaluations_without_improvement(history, job) == 0


@pytest.mark.parametrize("keep", ["last", "best"])
def test_site_metrics_are_released_once_on_the_adapter_that_is_kept(keep: str) -> None:
    job = make_job({"patience": 2, "keep": keep}, site_metrics={"names": ["accuracy"]})
    asked: list[bytes] = []
    saved: list[Checkpoint] = []
    finished = run_rounds(grid_of(asked), coordinator(job, saved=saved), None)
    assert finished.round_number == 6
    shapes = {"head.b": torch.Size([1])}
    assert [float(decode(adapter, shapes)["head.b"]) for adapter in asked] == [4.0 if keep == "best" else 6.0] * 2
    events = [
        GaussianSteps(noise_multiplier=1.0, sample_rate=0.05, steps=12),
        GaussianSteps(noise_multiplier=10.0, sample_rate=1.0, steps=1),
    ]
    assert finished.releases["a"].epsilon == finished.history[-1].epsilon_max == compose_epsilon(events, 1e-5)
    assert run_rounds(grid_of(asked), coordinator(job), finished) is finished
    assert len(asked) == 2
    # Killed after the last round and before the metrics: they are asked for, and no further round is run.
    before = saved[-2]
    assert (before.round_number, before.site_metrics) == (6, None)
    again = run_rounds(grid_of(asked), coordinator(job), before)
    assert (again.round_number, len(asked)) == (6, 4)
    assert again.releases == finished.releases


def test_a_coordinator_that_died_before_the_metrics_asks_for_them_and_for_no_round(tmp_path: Path) -> None:
    """What an earlier process asked for after the last round was metrics: no site is charged here with a round 7."""
    job = make_job({"patience": 2}, site_metrics={"names": ["accuracy"]})
    saved: list[Checkpoint] = []
    run_rounds(grid_of(), coordinator(job, saved=saved), None)
    key, now, looked_up = SigningKey.generate(), datetime.now(UTC), []

    def asked_since(number: int) -> list[Asked]:
        looked_up.append(number)
        adapter = hashlib.sha256(encode(saved[-2].result)).hexdigest()
        site = SiteDescription(site="a", declared_records=8, version="1")
        return [Asked(site=site, round_number=10, adapter_sha256=adapter)]

    signed = sign_job(
        job, signer=SigningKey.generate(), coordinator=key.verify_key, issued=now, not_after=now + timedelta(days=1)
    )
    authority = Authority(signed_job=signed, key=key, registered=lambda: {1: "a", 2: "b"}, asked_since=asked_since)
    asked: list[bytes] = []
    resumed = run_rounds(grid_of(asked), replace(coordinator(job), authority=authority), saved[-2])
    assert looked_up == [6]
    assert (resumed.round_number, len(asked)) == (6, 2)
    assert all(release.rounds == (1, 2, 3, 4, 5, 6) for release in resumed.releases.values())
    assert all(release.unanswered == () for release in resumed.releases.values())
    assert resumed.site_metrics is not None
    assert resumed.site_metrics.keys() == {"a", "b"}


def test_the_statement_says_that_it_was_stopped_by_what_was_released() -> None:
    job = make_job({"patience": 1})
    releases = list(run_rounds(grid_of(), coordinator(job), None).releases.values())
    assert STOPPED_EARLY in run_statement(releases, "early", stopped_early=True).not_covered
    assert STOPPED_EARLY not in run_statement(releases, "early").not_covered
    unprotected = [replace(release, private=False) for release in releases]
    assert STOPPED_EARLY not in run_statement(unprotected, "early", stopped_early=True).not_covered


def test_without_public_records_it_is_refused_before_anything_is_written(
    tmp_path: Path, classification_job: Any
) -> None:
    job = classification_job(training={"early_stopping": {"patience": 1}})
    with pytest.raises(ConfigError, match="public evaluation records, and there are none"):
        execute(grid_of(), Run(job=job, folder=tmp_path / "run", public_records=[]))
    assert not (tmp_path / "run").exists()


def test_a_job_without_the_rule_keeps_its_hash() -> None:
    job = make_job(None)
    assert "early_stopping" not in json.loads(job.canonical_json())["training"]
    assert make_job({"patience": 1}).sha256 != job.sha256


@pytest.mark.parametrize(
    "rule", [{}, {"patience": 0}, {"patience": 1, "min_delta": -0.1}, {"patience": 1, "keep": "first"}]
)
def test_a_rule_that_makes_no_sense_is_refused(rule: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="early_stopping"):
        parse(TrainingConfig, {"rounds": 3, "early_stopping": rule}, source="test")
