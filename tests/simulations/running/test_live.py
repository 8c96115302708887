"""What the live view tells while a simulation runs."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from shared.job.job import Job
from shared.wire.messages import SiteDescription
from simulations.running.engine import Arm
from simulations.running.live import LiveView

MakeJob = Callable[..., Job]


def told(job: Job, *sizes: int) -> str:
    """Return what is printed once the sites are known, twice as after a site came back."""
    output = io.StringIO()
    view = LiveView(Console(file=output, width=100))
    observer = view.observer(Arm("federated", job, Path("run")))
    sites = [
        SiteDescription(site=f"site-{number}", declared_records=size, version="") for number, size in enumerate(sizes)
    ]
    observer.roster(sites)
    observer.roster(sites)
    return output.getvalue()


def test_a_site_that_brings_too_much_noise_is_named_before_the_first_round(classification_job: MakeJob) -> None:
    output = told(classification_job(aggregation={"weights": "equal"}), 64, 512, 1024)
    assert output.count("warning: site-0 declares 64 records, 4.0% of all, but brings 98.1% of the noise") == 1
    assert 'Set aggregation.weights = "declared"' in output


@pytest.mark.parametrize("sections", [{}, {"aggregation": {"weights": "equal"}, "privacy": {"mechanism": "none"}}])
def test_nothing_is_said_where_there_is_nothing_to_mind(classification_job: MakeJob, sections: dict[str, Any]) -> None:
    assert told(classification_job(**sections), 64, 512, 1024) == ""


def test_texts_that_pass_through_the_frozen_layers_are_told_of_now_and_then(
    classification_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    output = io.StringIO()
    observer = LiveView(Console(file=output, width=100)).observer(Arm("federated", classification_job(), Path("run")))
    for done in range(0, 4000, 100):
        observer.preparing(done, 4000)
        now[0] += 1.0
    lines = output.getvalue().splitlines()
    assert lines == ["federated: frozen layers: 40 % of the texts", "federated: frozen layers: 80 % of the texts"]
