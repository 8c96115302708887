"""Sites that could not be computed side by side are computed alone, with coins of their own, on both paths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import client.training.gradient as gradient_module
import client.training.trainer as trainer_module
from client.site.site import Site
from shared.job.job import Job
from shared.privacy.randomness import SiteRandomness
from shared.secure_sum.messages import Ready, pack_roster
from shared.wire.messages import Refusal, TrainReply, TrainRequest
from simulations.running.together import ready_together, train_together

MakeHome = Callable[..., Path]
MakeRequest = Callable[..., TrainRequest]
NAMES = ("north", "south", "west")


class OutOfMemory(RuntimeError):
    """What happens in company only."""


def fails_in_company(real: Callable[..., Any]) -> Callable[..., Any]:
    """Break off after the coins were drawn, where more than one site is computed."""

    def clipped_sums(runtime: Any, pool: Any, works: Sequence[Any], *others: Any) -> Any:
        if len(works) > 1:
            raise OutOfMemory
        return real(runtime, pool, works, *others)

    return clipped_sums


@pytest.fixture(params=["os", "injected"])
def open_sites(site_home: MakeHome, request: pytest.FixtureRequest) -> Callable[[], list[Site]]:
    folders = iter(range(10))

    def build() -> list[Site]:
        number = next(folders)
        homes = [site_home(f"{name}-{number}") for name in NAMES]
        if request.param == "os":
            return [Site(home) for home in homes]
        return [
            Site(home, new_randomness=lambda name=name: SiteRandomness.injected(name))
            for home, name in zip(homes, NAMES, strict=True)
        ]

    return build


def test_updates_are_trained_alone(
    open_sites: Callable[[], list[Site]],
    private_job: Callable[..., Job],
    request_for: MakeRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = request_for(private_job())
    expected = [site.answer(asked) for site in open_sites()]
    sites = open_sites()
    monkeypatch.setattr(trainer_module, "clipped_sums", fails_in_company(trainer_module.clipped_sums))
    answers = train_together([(site, asked) for site in sites])
    assert all(isinstance(answer, TrainReply) for answer in answers), answers
    for site, answer, alone in zip(sites, answers, expected, strict=True):
        assert len([entry for entry in site.ledger().entries() if entry.kind == "reserve"]) == 1
        assert isinstance(answer, TrainReply)
        assert isinstance(alone, TrainReply)
        # An injected source gives what the site gets alone; that of the system nothing twice.
        assert (answer.update == alone.update) == (answer.randomness == "injected")


def test_shares_are_computed_alone(
    open_sites: Callable[[], list[Site]],
    classification_job: Callable[..., Job],
    request_for: MakeRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = classification_job(
        training={"rounds": 3, "local_steps": 1},
        privacy={"mechanism": "distributed", "max_colluding": 0, "noise_multiplier": 1.0, "sample_rate": 0.25},
        federation={"min_sites": 2},
    )
    asked = replace(request_for(job), attempt=1)
    alone = open_sites()
    for site in alone:
        assert isinstance(site.answer_ready(asked), Ready)
    sites = open_sites()
    monkeypatch.setattr(gradient_module, "clipped_sums", fails_in_company(gradient_module.clipped_sums))
    answers = ready_together([(site, asked) for site in sites])
    assert all(isinstance(answer, Ready) for answer in answers), answers
    injected = False
    for site, other in zip(sites, alone, strict=True):
        (own,), (expected,) = site.shares._drawn.values(), other.shares._drawn.values()
        injected = own.origin == "injected"
        assert np.array_equal(own.words, expected.words) == injected
    roster = tuple(sorted((a for a in answers if isinstance(a, Ready)), key=lambda entry: entry.site))
    masked = [site.answer_masked(replace(asked, adapter=pack_roster(roster))) for site in sites]
    assert not any(isinstance(answer, Refusal) for answer in masked), masked
