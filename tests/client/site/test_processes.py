"""A site of several processes answers as one of a single process, to the last byte (`compute.processes`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from client.site.config import SiteCompute
from client.site.site import Site
from client.training.processes import Processes
from shared.errors import ConfigError
from shared.job.job import Job
from shared.privacy.randomness import SiteRandomness
from shared.wire.messages import Refusal, TrainReply, TrainRequest
from simulations.scenario import load_scenario


def injected() -> SiteRandomness:
    return SiteRandomness.injected("site")


def test_a_site_of_several_processes_sends_the_same_bytes(
    site_home: Callable[..., Path],
    private_job: Callable[..., Job],
    request_for: Callable[..., TrainRequest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compute = {"device": "cpu", "precision": "float32"}
    several = Site(site_home("several", compute=compute | {"processes": 2}), new_randomness=injected)
    alone = Site(site_home("alone", compute=compute), new_randomness=injected)
    try:
        request = request_for(private_job())
        expected, found = alone.answer(request), several.answer(request)
        assert isinstance(expected, TrainReply)
        assert isinstance(found, TrainReply)
        assert found.update == expected.update
        pids = several.processes.pids if several.processes else []
        assert len(pids) == 1
        # What fails is told to nobody, costs what was charged, and releases nothing; the next round works again.
        monkeypatch.setattr(Processes, "sums", ends(several))
        refused = several.answer(request_for(private_job(), 2))
        monkeypatch.undo()
        assert refused == Refusal.withheld("several")
        assert [event.steps for event in several.ledger().events()] == [2, 2]
        third = several.answer(request_for(private_job(), 3))
        assert isinstance(third, TrainReply)
        assert third.update == alone.answer(request_for(private_job(), 3)).update  # type: ignore[union-attr]
        assert several.processes is not None
        assert len(several.processes.pids) == 1
        assert several.processes.pids != pids
    finally:
        several.end_processes()


def ends(site: Site) -> Callable[..., Any]:
    """A step before which a worker was killed."""
    sums = Processes.sums

    def step(self: Processes, *arguments: Any) -> Any:
        for worker in self._workers:
            worker._process.kill()
            worker._process.wait()
        return sums(self, *arguments)

    return step


def test_processors_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr("client.training.processes.num_processors", lambda: 12)
    for threads, count in ((12, 2), (12, 5), (1, 2), (4, 2), (12, 64)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        Processes(count, SiteCompute().of_each)
    assert chosen == [6, 2, 1, 4, 1]


def test_only_a_real_site_has_several(scenario_file: Callable[..., Path]) -> None:
    """A simulation shares one backbone among all its sites, in one process."""
    with pytest.raises(ConfigError, match=r"compute\.processes is for the site.toml of a real site"):
        load_scenario(scenario_file(compute={"processes": 2}))
