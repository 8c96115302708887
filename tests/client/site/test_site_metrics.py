"""A site's metrics: charged before they leave, once for one request, on records that it never trains on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import client.site.outbox as outbox_module
import client.site.release as release_module
from client.site.held_out import held_out
from client.site.site import Site
from shared.errors import PrivacyError
from shared.job.job import Job
from shared.privacy.accounting import GaussianSteps
from shared.privacy.randomness import SiteRandomness
from shared.wire.messages import MetricsReply, Refusal, TrainReply, TrainRequest

MakeHome = Callable[..., Path]
MakeRequest = Callable[..., TrainRequest]


@pytest.fixture
def job(private_job: Callable[..., Job]) -> Job:
    return private_job(site_metrics={"names": ["accuracy", "loss"], "noise_multiplier": 4.0})


@pytest.fixture
def distinct(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records that differ, for equal ones are on one side."""
    return [record | {"text": f"{record['text']} {'and so on ' * (i % 5)}{i}"} for i, record in enumerate(records)]


@pytest.fixture
def site(site_home: MakeHome, distinct: list[dict[str, Any]]) -> Site:
    return Site(site_home(rows=distinct, evaluation_share=0.3))


@pytest.fixture
def asked(job: Job, request_for: MakeRequest) -> TrainRequest:
    """A request for the metrics, after the last of three rounds."""
    return request_for(job, 4, shift=0.01)


def kinds(site: Site) -> list[str]:
    return [entry.kind for entry in site.ledger().entries()]


def test_metrics_are_charged_before_they_are_measured(
    site: Site, asked: TrainRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def traced(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            order.append(f"{name} after {kinds(site)[-1]}")
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(release_module, "cast_votes", traced("measure", release_module.cast_votes))
    monkeypatch.setattr(outbox_module, "write_bytes", traced("store", outbox_module.write_bytes))
    reply = site.metrics.make(asked)
    assert order == ["measure after reserve", "store after reserve"]
    assert kinds(site) == ["open", "budget", "reserve", "commit"]
    assert site.ledger().events() == [GaussianSteps(noise_multiplier=4.0, sample_rate=1.0, steps=2)]
    assert site.ledger().entries()[-1].payload["release_sha256"] == hashlib.sha256(reply.canonical()).hexdigest()
    assert {name: len(counts) for name, counts in reply.counts.items()} == {"accuracy": 2, "loss": 2}
    assert reply.counts["accuracy"] != reply.counts["loss"]
    assert reply.randomness == "os"
    # About three tenths of 60 records, with noise of standard deviation 4 in each of two counts.
    assert 0 < sum(reply.counts["accuracy"]) + 3 * 4 * 2**0.5 < 70


def test_the_same_request_gets_the_same_counts_and_one_charge(site: Site, asked: TrainRequest) -> None:
    first = site.metrics.make(asked)
    assert Site(site.home).metrics.make(asked) == first
    assert kinds(site).count("reserve") == 1


def test_another_adapter_is_another_release(
    site: Site, job: Job, asked: TrainRequest, request_for: MakeRequest
) -> None:
    first = site.metrics.make(asked)
    second = site.metrics.make(request_for(job, 4, shift=0.02))
    assert second.counts != first.counts
    assert kinds(site).count("reserve") == 2


def test_a_crash_keeps_the_charge(site: Site, asked: TrainRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    class Crash(BaseException):
        pass

    def crash(*_: Any, **__: Any) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(outbox_module, "write_bytes", crash)
        with pytest.raises(Crash):
            site.answer_metrics(asked)
    again = Site(site.home)
    assert kinds(again)[-1] == "reserve"
    assert isinstance(again.answer_metrics(asked), MetricsReply)
    assert kinds(again).count("reserve") == 2, "the lost noise may have been seen, so the second attempt costs again"


def test_what_the_budget_does_not_hold_does_not_leave(
    site_home: MakeHome, distinct: list[dict[str, Any]], asked: TrainRequest
) -> None:
    site = Site(site_home(rows=distinct, evaluation_share=0.3, budget={"epsilon": 0.5, "delta": 1e-5}))
    refusal = site.answer_metrics(asked)
    assert isinstance(refusal, Refusal)
    assert refusal.code == "BudgetExceeded"
    assert "reserve" not in kinds(site)


@pytest.mark.parametrize("round_number", [1, 3, 5])
def test_an_order_for_a_round_is_none_for_metrics_and_the_other_way_round(
    site: Site, job: Job, request_for: MakeRequest, round_number: int
) -> None:
    refusal = site.answer_metrics(request_for(job, round_number))
    assert isinstance(refusal, Refusal)
    assert "asked for before its last round ended" in refusal.reason
    refusal = site.answer(request_for(job, 4))
    assert isinstance(refusal, Refusal)
    assert "round 4 is outside the job's 3 rounds" in refusal.reason


def test_a_job_without_metrics_gets_none(site: Site, private_job: Callable[..., Job], request_for: MakeRequest) -> None:
    refusal = site.answer_metrics(request_for(private_job(), 4))
    assert isinstance(refusal, Refusal)
    assert "plans no site metrics" in refusal.reason


def test_a_site_that_holds_nothing_out_says_so(site_home: MakeHome, asked: TrainRequest) -> None:
    refusal = Site(site_home()).answer_metrics(asked)
    assert isinstance(refusal, Refusal)
    assert "site north holds no records out of training" in refusal.reason


def test_no_round_trains_on_a_held_out_record(
    site: Site, asked: TrainRequest, request_for: MakeRequest, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, measured = [], []
    train, cast = release_module.train_local_rounds, release_module.cast_votes

    def texts(examples: Any) -> list[Any]:
        return [tuple(example.input_ids.tolist()) for example in examples]

    def training(runtime: Any, works: Any, *args: Any, **kwargs: Any) -> Any:
        trained.extend(text for work in works for text in texts(work.examples))
        return train(runtime, works, *args, **kwargs)

    def casting(runtime: Any, examples: Any, *args: Any) -> Any:
        measured.extend(texts(examples))
        return cast(runtime, examples, *args)

    monkeypatch.setattr(release_module, "train_local_rounds", training)
    monkeypatch.setattr(release_module, "cast_votes", casting)
    assert isinstance(site.answer(request_for(job, 1)), TrainReply)
    assert isinstance(site.answer_metrics(asked), MetricsReply)
    assert len(trained) + len(measured) == 60
    assert 8 <= len(measured) <= 30
    assert site.declared_records == 2 ** (len(trained).bit_length() - 1)


def test_the_side_of_a_record_depends_on_itself_alone(distinct: list[dict[str, Any]]) -> None:
    out = held_out(distinct, 0.3, dataset="notes")
    for index in (0, 31, 59):
        fewer = held_out(distinct[:index] + distinct[index + 1 :], 0.3, dataset="notes")
        assert fewer == out[:index] + out[index + 1 :]
    assert held_out(distinct, 0.3, dataset="other") != out
    assert not any(held_out(distinct, 0.0, dataset="notes"))
    many = [{"text": str(i)} for i in range(4000)]
    assert 1100 < sum(held_out(many, 0.3, dataset="notes")) < 1300


def test_all_records_of_a_person_are_on_one_side_and_cast_one_vote(
    site_home: MakeHome, distinct: list[dict[str, Any]], private_job: Callable[..., Job], request_for: MakeRequest
) -> None:
    rows = [row | {"patient": f" {i % 20}" if i % 3 else i % 20} for i, row in enumerate(distinct)]
    columns = {"text": "text", "label": "label", "person": "patient"}
    site = Site(
        site_home(
            rows=rows,
            evaluation_share=0.4,
            data={"path": "data.jsonl", "columns": columns},
            budget={"epsilon": 50.0, "delta": 1e-5, "unit": "patient"},
        )
    )
    assert site.trained.persons is not None
    assert site.held_out.persons is not None
    # Three records each, whatever the spelling of the id.
    assert site.trained.persons.count + site.held_out.persons.count == 20
    assert {len(of) for of in (*site.trained.persons.rows, *site.held_out.persons.rows)} == {3}
    persons = {"unit": "patient", "records_per_person": 2}
    job = private_job(
        site_metrics={"names": ["loss"], "noise_multiplier": 0.2}, privacy=persons, training={"rounds": 3}
    )
    counts = site.metrics.make(request_for(job, 4)).counts["loss"]
    assert sum(counts) == pytest.approx(site.held_out.persons.count, abs=6 * 0.2 * 2**0.5)
    assert site.ledger().events() == [GaussianSteps(noise_multiplier=0.2, sample_rate=1.0, steps=1)]


def test_the_stored_counts_are_bound_to_their_job(site: Site, asked: TrainRequest) -> None:
    site.metrics.make(asked)
    (stored,) = site.home.glob("rounds/*/metrics.json")
    stored.write_text("{}")
    refusal = Site(site.home).answer_metrics(asked)
    assert isinstance(refusal, Refusal)
    assert refusal == Refusal.withheld("north")


# --- planted faults ---


def residuals(site: Site, job: Job, request_for: MakeRequest, monkeypatch: pytest.MonkeyPatch) -> np.ndarray[Any, Any]:
    """Return what a site adds to known counts, in standard deviations, [releases, bins] of both metrics."""
    known = {"accuracy": torch.tensor([[1.0, 0.0], [0.0, 1.0]]), "loss": torch.tensor([[0.5, 0.5]])}
    exact = [1.0, 1.0, 0.5, 0.5]
    monkeypatch.setattr(release_module, "cast_votes", lambda *_: known)
    found = []
    for number in range(60):
        counts = site.metrics.make(request_for(job, 4, shift=0.001 * number)).counts
        found.append([*counts["accuracy"], *counts["loss"]])
    return (np.array(found) - exact) / job.site_metrics.noise_multiplier


def is_noise_as_planned(scores: np.ndarray[Any, Any]) -> bool:
    independent = abs(np.corrcoef(scores.T) - np.eye(scores.shape[1])).max() < 0.5
    return bool(independent) and stats.kstest(scores.ravel(), "norm").pvalue > 1e-3


@pytest.fixture
def cheap(job: Job) -> Job:
    return job.model_copy(update={"site_metrics": job.site_metrics.model_copy(update={"noise_multiplier": 400.0})})


def test_the_site_adds_the_noise_that_it_charges(
    site: Site, cheap: Job, request_for: MakeRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_noise_as_planned(residuals(site, cheap, request_for, monkeypatch))


@pytest.mark.parametrize("fault", ["none", "half", "shared", "fixed"])
def test_a_planted_fault_in_the_noise_is_caught(
    site: Site, cheap: Job, request_for: MakeRequest, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    real = release_module.noisy_counts

    def broken(counts: torch.Tensor, *, noise_multiplier: float, stream: Any) -> list[float]:
        if fault == "none":
            return [float(value) for value in counts]
        if fault == "half":
            return real(counts, noise_multiplier=noise_multiplier / 2, stream=stream)
        return real(counts, noise_multiplier=noise_multiplier, stream=stream)

    monkeypatch.setattr(release_module, "noisy_counts", broken)
    if fault == "shared":  # one stream for both metrics
        stream = SiteRandomness.stream
        monkeypatch.setattr(
            SiteRandomness, "stream", lambda self, purpose, **_: stream(self, purpose, round_number=1, step=0)
        )
    if fault == "fixed":
        site.new_randomness = lambda: SiteRandomness.injected("the same")
    if fault == "shared":  # the source itself gives no stream twice
        with pytest.raises(PrivacyError, match="was used before"):
            residuals(site, cheap, request_for, monkeypatch)
        return
    with np.errstate(invalid="ignore"):
        assert not is_noise_as_planned(residuals(site, cheap, request_for, monkeypatch))
