"""How large a job may be: refused at once, with nothing built, whatever a job asks for."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, RecordDict

from client.policy.limits import Limits, broken_limits, check_adapter_size
from client.policy.template import policy_template
from client.site import guard
from client.training import proof
from shared.errors import ConfigError, PolicyError, RunError, SilotuneError, TrustError
from shared.job.job import Job
from shared.trust.signed_job import SignedJob, _JobDocument
from shared.trust.signing import SigningKey
from shared.wire.messages import Refusal, TrainRequest, unpack_request
from simulations.federation.processes import change_toml
from simulations.scenario import load_scenario
from tests.client.site.test_guard import World, asked, job, world

__all__ = ["asked", "job", "world"]  # fixtures

LARGE: list[tuple[dict[str, Any], str]] = [
    ({"task": {"labels": [f"{n}" for n in range(10_000)]}}, "task.labels asks for 10,000"),
    ({"lora": {"rank": 256, "last_layers": None}}, "lora.rank asks for 256"),
    ({"model": {"max_length": 8192}}, "model.max_length asks for 8,192"),
]


@contextmanager
def at_once(*, seconds: float = 10.0, megabytes: float = 100.0) -> Iterator[None]:
    """Fail if the block computes for longer, or Python allocates more at a time."""
    tracemalloc.start()
    started = time.process_time()
    try:
        yield
        assert time.process_time() - started < seconds
        assert tracemalloc.get_traced_memory()[1] < megabytes * 1e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("sections", "text"), LARGE, ids=["labels", "rank", "length"])
def test_the_largest_job_that_can_be_written_is_refused_before_anything_is_built(
    world: World,
    asked: TrainRequest,
    private_job: Callable[..., Job],
    monkeypatch: pytest.MonkeyPatch,
    sections: dict[str, Any],
    text: str,
) -> None:
    for module, name in ((proof, "load_runtime"), (guard, "backbone_sha256")):
        monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail("something was loaded"))
    large = private_job(**{"federation": {"min_sites": 2}} | sections)
    request = world.order(replace(asked, job=large))
    world.site.ledger()  # opens the site
    with at_once():
        assert text in world.refusal(request)
        prepared = world.site.accept(world.signed(large))
    assert isinstance(prepared, Refusal)
    assert text in prepared.reason


def test_an_adapter_beyond_the_policy_is_refused_unread(
    world: World, asked: TrainRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_toml(world.home.policy, limits={"max_adapter_megabytes": 0.001})
    monkeypatch.setattr(proof, "load_runtime", lambda *a, **k: pytest.fail("something was loaded"))
    assert "this site accepts at most 0.001 MB" in world.refusal(asked)


def test_a_limit_is_met_exactly() -> None:
    limits = Limits(max_adapter_megabytes=0.5)
    check_adapter_size(limits, 500_000)
    with pytest.raises(PolicyError, match=r"has 0\.5 MB; this site accepts at most 0\.5 MB"):
        check_adapter_size(limits, 500_001)


ABSURD = [
    {"task": {"kind": "sequence_classification", "labels": [str(n) for n in range(100_000)]}},
    {"task": {"kind": "sequence_classification", "labels": list(range(100_000))}},
    {"lora": {"rank": 1_000_000}},
    {"model": {"max_length": 1_000_000_000}},
    {"lora": {"rank": 10**4000}},
    {f"k{n}": 0 for n in range(80_000)},
]


@pytest.mark.parametrize("sections", ABSURD, ids=["labels", "no labels", "rank", "length", "long number", "keys"])
def test_an_absurd_job_is_refused_where_it_is_read(private_job: Callable[..., Job], sections: dict[str, Any]) -> None:
    """Whoever can sign anything at all can write such a job; no `Job` like it can be made here."""
    raw = json.loads(private_job().canonical_json()) | sections
    key = SigningKey.generate()
    times = {"issued": "2026-06-01T00:00:00Z", "not_after": "2026-06-02T00:00:00Z"}
    document = _JobDocument.sign(key, job=json.dumps(raw), coordinator=key.verify_key.text, **times)
    text = json.dumps(document.model_dump())
    with at_once(), pytest.raises((ConfigError, TrustError)) as caught:
        SignedJob.from_json(text, source="the job")
    assert len(str(caught.value)) < 20_000
    unsigned = RecordDict(
        {"silotune": ConfigRecord({"kind": "train", "round_number": 1, "adapter": b"", "job": json.dumps(raw)})}
    )
    with at_once(), pytest.raises(SilotuneError) as caught_too:
        unpack_request(unsigned)
    assert len(str(caught_too.value)) < 20_000


def test_ten_million_labels_are_not_even_parsed(private_job: Callable[..., Job]) -> None:
    text = '{"task": {"labels": [' + '"a",' * 10_000_000 + '"b"]}}'
    with at_once(megabytes=150), pytest.raises(TrustError, match="longer than"):
        SignedJob.from_json(text, source="the job")
    record = ConfigRecord({"kind": "train", "round_number": 1, "adapter": b"", "job": text})
    with at_once(), pytest.raises(RunError, match="no readable job"):
        unpack_request(RecordDict({"silotune": record}))


def test_every_scenario_of_ours_is_within_the_defaults() -> None:
    root = Path(__file__).resolve().parents[3]
    files = [*root.glob("simulations/**/*.toml"), *root.glob("benchmarks/**/*.toml")]
    jobs = []
    for file in files:
        try:
            jobs.append(load_scenario(file).job)
        except SilotuneError:  # no scenario, or its data is not here
            continue
    assert len(jobs) > 3
    assert [list(broken_limits(Limits(), job)) for job in jobs] == [[]] * len(jobs)


def test_the_template_writes_the_defaults() -> None:
    for name, value in Limits().model_dump().items():
        assert f"\n{name} = {value}\n" in policy_template()
